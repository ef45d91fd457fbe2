"""scripts/run_workers.py: which of several errors is shown, with which exit code; real torchrun, gloo and signals."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import DistBackendError

from scripts.run_workers import HUNG, Failure, outcome
from tests.tiny_world import command_line, make_world
from trainer_utils.composition import RunConfig
from utils import distributed

ROOT = Path(__file__).resolve().parents[2]


def failure(rank, time_sec, code=1, message="", consequence=False):
    return Failure(rank, time_sec, code, message, consequence)


LOST = failure(0, 1.0, 1, "the connection broke", consequence=True)


@pytest.mark.parametrize("failures, signum, code, line", [
    ([LOST, failure(1, 2.0, 1, "no such file")], None, 1, "error: rank 1 (host H): no such file"),
    ([failure(0, 3.0, 1, "b"), failure(1, 2.0, 2, "a")], None, 2, "error: rank 1 (host H): a"),
    ([LOST, failure(1, 2.0, 137)], None, 137,
     "error: rank 1 (host H) was killed (signal 9: out of memory, or by hand)"),
    ([LOST, failure(1, 2.0, 143, consequence=True)], None, 1, "error: rank 0 (host H): the connection broke"),
    ([LOST, failure(1, 31.0, 137, HUNG, True)], None, 1, "error: rank 0 (host H): the connection broke; rank 1 hung"),
    ([failure(0, 1.0, 139)], None, 139, "error: rank 0 (host H) was ended by SIGSEGV (signal 11)"),
    ([failure(0, 1.0, 3)], None, 3, "error: rank 0 (host H) ended with exit code 3; its output above says why"),
    ([failure(0, 2.0, 143), LOST], None, 143, "stopped by SIGTERM; the same command continues"),
    ([LOST], signal.SIGUSR1, 138, "stopped by SIGUSR1; the same command continues"),
    ([], signal.SIGTERM, 143, "stopped by SIGTERM; the same command continues"),
    ([failure(0, 2.0, 143), failure(1, 3.0, 1, "disk full")], signal.SIGTERM, 1,
     "error: rank 1 (host H): disk full"),
])
def test_the_cause_is_shown_and_not_its_consequences(monkeypatch, failures, signum, code, line):
    monkeypatch.setattr("socket.gethostname", lambda: "H")
    assert outcome(failures, signum) == (code, line)


PRELUDE = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(__file__).parent
sys.path.insert(0, os.getcwd())
from utils.config import one_line_errors
"""
WAITS = PRELUDE + """
def stop(signum, frame):
    time.sleep(0.5)  # saves
    (folder / f"saved{rank}").touch()
    raise SystemExit(128 + signum)

with one_line_errors():
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, stop)
    with open(folder / f"ready{rank}", "a") as ready:
        ready.write("attempt ")
    time.sleep(60)
"""
FINISHES = PRELUDE + """
signal.signal(signal.SIGTERM, lambda *_: None)
(folder / f"ready{rank}").touch()
time.sleep(1)
(folder / f"done{rank}").touch()
"""
FAILS = PRELUDE + """
with one_line_errors():
    if rank == 1:
        if sys.argv[-1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("name")
    time.sleep(60)
"""
HANGS = PRELUDE + """
from utils import distributed
with one_line_errors(), distributed.translated_errors():
    distributed.setup(60 if rank else 1)
    distributed.barrier()
    if rank == 1:
        time.sleep(60)
    distributed.barrier()
"""
DIES_ONCE = PRELUDE + """
import train_c2i
from trainer_utils.checkpoints import Checkpoints
from utils import distributed
save = Checkpoints.save

def save_and_die(checkpoints, step, **options):
    save(checkpoints, step, **options)
    if step == 1 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
with one_line_errors(), distributed.translated_errors():
    train_c2i.main()
"""


@pytest.fixture
def start(tmp_path):
    """start(text of a script, *its arguments, **env): two processes of it, through launch.sh."""
    running = []

    def begin(text, *words, **env):
        (tmp_path / "script.py").write_text(text)
        command = 'source scripts/launch.sh; launch "$@"'
        env = {**os.environ, "PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1", **env}
        running.append(subprocess.Popen(
            ["bash", "-c", command, "bash", str(tmp_path / "script.py"), "", *map(str, words)], cwd=ROOT, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]
    yield begin
    for process in running:
        process.kill()


def ended(process):
    _, err = process.communicate(timeout=100)
    return process.returncode, (err.strip().splitlines() or [""])[-1], err


def wait_for(*paths):
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("error, shown", [
    (RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"),
     "another process has not answered for 5 s (--comm_timeout)"),
    (RuntimeError("[/x/gloo/transport/tcp/pair.cc:5] Connection closed by peer [1.2.3.4]:56. This is typically caused"),
     "the connection to another process broke, whose error is the cause (Connection closed by peer [1.2.3.4]:56)"),
    (DistBackendError("NCCL error in: x.cpp:9\nncclRemoteError: socket closed"),
     "the connection to another process broke, whose error is the cause (NCCL error in: x.cpp:9)"),
])
def test_a_failed_collective_is_one_line(error, shown):
    with pytest.raises(distributed.PeerLost) as raised, distributed.translated_errors():
        raise error
    assert str(raised.value) == shown


def test_other_runtime_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^shapes differ$"), distributed.translated_errors():
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("seconds", [0, -1, float("inf")])
def test_comm_timeout_is_a_time(seconds):
    with pytest.raises(ValueError, match="comm_timeout must be a number above 0"):
        RunConfig("run", ["clip"], comm_timeout=seconds)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_all_processes_save_and_starts_none_again(start, tmp_path, signum):
    process = start(WAITS, MAX_RESTARTS="3")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(signum)
    code, last, _ = ended(process)
    assert (code, last) == (128 + signum, f"stopped by {signum.name}; the same command continues")
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert (tmp_path / "ready0").read_text() == "attempt "


def test_a_signal_in_the_last_moment_of_a_run_is_no_failure(start, tmp_path):
    process = start(FINISHES)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.terminate()
    code, _, err = ended(process)
    # 143 where the processes' end was seen before torchrun told of it: then the same command says "finished"
    assert code in (0, 143) and (tmp_path / "done0").exists() and (tmp_path / "done1").exists(), err


def test_the_failing_processs_own_error_is_the_last_line_after_its_traceback(start):
    code, last, err = ended(start(FAILS, "bug"))
    assert code == 1 and last.startswith("error: rank 1 (host ") and last.endswith("): KeyError: 'name'")
    assert err.count("Traceback") == 1 and "ChildFailedError" not in err


def test_a_killed_process_is_told_last(start):
    code, last, _ = ended(start(FAILS, "killed"))
    assert code == 137 and last.startswith("error: rank 1 ")
    assert last.endswith(" was killed (signal 9: out of memory, or by hand)")


def test_a_process_that_does_not_answer_ends_the_run(start):
    code, last, _ = ended(start(HANGS))
    assert code == 1
    assert last.startswith("error: rank 0 ")
    assert last.endswith("another process has not answered for 1 s (--comm_timeout)")


def test_after_a_restart_training_resumes_from_its_checkpoint(start, tmp_path):
    make_world(tmp_path)
    words = command_line(tmp_path, tmp_path, "--exit_step", 2, "--save_steps", 1, "--eval_steps", 0)
    code, _, err = ended(start(DIES_ONCE, "--config", "", *words, MAX_RESTARTS="1"))
    assert code == 0 and "resuming after step 1" in err
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_whose_launcher_is_gone_ends():
    text = "from utils import config, distributed\nwith config.one_line_errors(): distributed.setup()"
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "ARGRPO_LAUNCHER_PID": str(os.getppid())}
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: the launcher that started this process is gone\n")
