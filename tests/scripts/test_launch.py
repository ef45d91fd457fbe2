"""scripts/launch.sh and scripts/slurm_train.sbatch with a Python, srun and scontrol that say what they are given."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = {"SLURM_JOB_ID": "100", "SLURM_STEP_ID": "1", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_GPUS_ON_NODE": "4"}
FAKE_PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then echo ${VISIBLE:-0}; exit; fi
echo "$@"
echo "${RANK-}/${WORLD_SIZE-} ${LOCAL_RANK-} ${MASTER_ADDR-}:${MASTER_PORT-} ${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-}"
"""


def clean(**env):
    dropped = ("SLURM_", "SRUN_", "NODE_RANK", "NNODES", "MASTER_", "MAX_RESTARTS", "GPUS", "NPROC", "RANK", "WORLD_")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | env


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def launch(tmp_path):
    python = script(tmp_path / "python", FAKE_PYTHON)

    def run(*words, target="train.py", **env):
        command = 'set -euo pipefail; source scripts/launch.sh; launch "$@"'
        done = subprocess.run(["bash", "-c", command, "bash", target, "preset", *words], cwd=ROOT, text=True,
                              capture_output=True, env=clean(PYTHON=python, **env))
        return done.returncode, done.stdout.splitlines(), done.stderr
    return run


def started(result):
    code, (arguments, ranks), err = result
    assert (code, err) == (0, "")
    return arguments.removeprefix("scripts/run_workers.py "), ranks


@pytest.mark.parametrize("env, expected", [
    ({}, "train.py"),
    ({"GPUS": "1"}, "train.py"),  # on a CPU, if there is no GPU
    ({"VISIBLE": "4"}, "--standalone --nproc_per_node 4 --max_restarts 0 train.py"),
    ({"VISIBLE": "4", "GPUS": "2"}, "--standalone --nproc_per_node 2 --max_restarts 0 train.py"),
    ({"NPROC": "2"}, "--standalone --nproc_per_node 2 --max_restarts 0 train.py"),
    ({"MAX_RESTARTS": "3"}, "--standalone --nproc_per_node 1 --max_restarts 3 train.py"),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "GPUS": "1"},
     "--nnodes 2 --node_rank 1 --master_addr a --master_port 29500 --nproc_per_node 1 --max_restarts 0 train.py"),
    ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "7", "NPROC": "2", "MAX_RESTARTS": "1"},
     "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint a:7 --rdzv_id argrpo --rdzv_conf is_host=true "
     "--nproc_per_node 2 --max_restarts 1 train.py"),
])
def test_one_process_runs_plainly_and_several_under_torchrun(launch, env, expected):
    assert started(launch("--beta", "0", **env))[0] == f"{expected} --config preset --beta 0"


def test_a_restart_gets_a_store_of_its_own(launch):
    assert started(launch(NPROC="2", MAX_RESTARTS="1"))[1].endswith(" 1")
    assert not started(launch(NPROC="2"))[1].endswith(" 1")


def test_modules_and_the_users_own_preset(launch):
    assert started(launch("--config=mine", target="benchmark.x", NPROC="1"))[0] == "-m benchmark.x --config=mine"
    assert " -m benchmark.x " in started(launch(target="benchmark.x", NPROC="2"))[0]


@pytest.mark.parametrize("env, complaint", [
    ({"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
    ({"NNODES": "2", "MASTER_ADDR": "a"}, "needs NODE_RANK"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK=2 must be below NNODES=2"),
    ({"NNODES": "two"}, "NNODES=two: expected a whole number"),
    ({"NNODES": "0"}, "NNODES=0: expected a whole number"),
    ({"NPROC": "-1"}, "NPROC=-1"),
    ({"GPUS": "1.5"}, "GPUS=1.5"),
    ({"NODE_RANK": "08"}, "NODE_RANK=08"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a whole number from 1 to 65535"),
    ({"MAX_RESTARTS": "yes"}, "MAX_RESTARTS=yes"),
    ({"GPUS": "4", "VISIBLE": "2"}, "GPUS=4, but 2 are visible"),
    ({"GPUS": "2"}, "NPROC=2 starts processes on the CPU"),
    ({"SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}, "start with srun"),
    (SLURM | {"SLURM_NTASKS": "3"}, "3 tasks on 2 nodes"),
    (SLURM | {"SLURM_NTASKS": "4", "GPUS": "4"}, "srun starts 2 tasks"),
    (SLURM | {"SLURM_NTASKS": "4", "MAX_RESTARTS": "1"}, "one task per node"),
])
def test_a_bad_combination_is_one_line_and_starts_nothing(launch, env, complaint):
    code, out, err = launch(**env)
    assert (code, out) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err


def test_one_slurm_task_per_node_meets_at_the_first_node(launch):
    words = started(launch(**SLURM))[0]
    assert words == ("--nnodes 2 --rdzv_backend c10d --rdzv_endpoint gpu007:15101 --rdzv_id 100 --rdzv_conf "
                     "is_host=false --nproc_per_node 4 --max_restarts 0 train.py --config preset")
    assert "is_host=true" in started(launch(**SLURM | {"SLURM_NODEID": "0"}))[0]
    del (typed := SLURM | {"SLURM_GPUS_PER_NODE": "h100:8"})["SLURM_GPUS_ON_NODE"]
    assert "--nproc_per_node 8" in started(launch(**typed))[0]
    assert "--nproc_per_node 2" in started(launch(**SLURM, NPROC="2"))[0]


def test_one_slurm_task_per_process_needs_no_torchrun(launch):
    tasks = SLURM | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert started(launch(**tasks)) == ("train.py --config preset", "3/4 1 gpu007:15101 ")
    bound = started(launch(**tasks, CUDA_VISIBLE_DEVICES="5"))[1]  # srun --gpus-per-task=1
    assert bound.startswith("3/4 0 ")


def test_variables_go_before_the_allocation(launch):
    words = started(launch(**SLURM, NNODES="1", NPROC="2"))[0]
    assert words.startswith("--standalone --nproc_per_node 2")


@pytest.mark.parametrize("nodes, first", [
    ("node1", "node1"), ("b2,a1", "b2"), ("gpu[003-006,9],x1", "gpu003"), ("a[7,9]", "a7"), ("r[1-2]n[04-08]", "r1n04"),
    ("r[1-2]-gpu,z", "r1-gpu"), ("one,gpu[1-2]", "one"),
])
def test_first_host_of_a_node_list(nodes, first):
    done = subprocess.run(["bash", "-c", 'source scripts/launch.sh; _launch_first_host "$1"', "bash", nodes], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == first


@pytest.fixture
def submit(tmp_path):
    """Run the batch script as Slurm does: a copy elsewhere, in the folder where sbatch was called."""
    folder, tools = tmp_path / "repository", tmp_path / "bin"
    (folder / "scripts").mkdir(parents=True)
    tools.mkdir()
    (folder / "run_c2i_train.sh").write_text('echo "run $*"; exit "$STEP_CODE"\n')
    (folder / "scripts" / "setup_env.sh").write_text("export PYTHON=chosen\n")
    job = shutil.copy(ROOT / "scripts" / "slurm_train.sbatch", tmp_path / "slurm_script")
    script(tools / "srun", '#!/bin/bash\necho "srun $* ($PYTHON $SKIP_SETUP ${SRUN_CPUS_PER_TASK-})"\n'
                           'while [[ $1 == -* ]]; do shift; done\n"$@"\n')
    script(tools / "scontrol", '#!/bin/bash\necho "scontrol $*"\nexit ${REFUSED:-0}\n')

    def run(code, *words, cwd=folder, **env):
        env = clean(PATH=f"{tools}:{os.environ['PATH']}", STEP_CODE=str(code), SLURM_JOB_ID="5",
                    SLURM_SUBMIT_DIR=str(cwd), **env)
        done = subprocess.run(["bash", job, *words], cwd="/", env=env, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr
    return run


@pytest.mark.parametrize("code, env, requeued, ends_with", [
    (0, {}, False, 0), (1, {}, False, 1), (137, {}, False, 137),
    (143, {}, True, 0), (138, {}, True, 0), (143, {"REFUSED": "1"}, True, 143),
    (1, {"SLURM_JOB_END_TIME": "1"}, True, 0), (0, {"SLURM_JOB_END_TIME": "1"}, False, 0),
    (1, {"SLURM_JOB_END_TIME": "99999999999"}, False, 1),
])
def test_the_batch_job_requeues_itself_when_it_was_preempted(submit, code, env, requeued, ends_with):
    returned, out, _ = submit(code, "--config", "a b", SLURM_CPUS_PER_TASK="6", **env)
    assert returned == ends_with
    assert out[:2] == ["srun --kill-on-bad-exit=1 bash run_c2i_train.sh --config a b (chosen 1 6)", "run --config a b"]
    assert out[2:] == (["scontrol requeue 5"] if requeued else [])


def test_the_batch_job_says_where_it_must_be_called(submit, tmp_path):
    code, out, err = submit(0, cwd=tmp_path)
    assert (code, out) == (2, []) and "error: no run_c2i_train.sh" in err


def test_the_batch_job_outlives_the_signal_that_its_tasks_get(submit, tmp_path):
    waits = 'kill -USR1 $PPID; kill -TERM $PPID; sleep 0.2; exit 138\n'  # its parent is srun, whose parent is the job
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\n{waits}")
    assert submit(0)[:2] == (0, ["scontrol requeue 5"])
