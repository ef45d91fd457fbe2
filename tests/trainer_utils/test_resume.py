"""Kill -9, damage and restarts: the same command again ends with the weights of an uninterrupted run, bit for bit."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grpo_trainer
import train_c2i
from tests.tiny_world import command_line
from utils.config import one_line_errors

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
# Cosine and warm-up, several updates a step and a reference: all that has to continue where it stood.
FLAGS = ["--exit_step", STEPS, "--save_steps", 3, "--eval_steps", 4, "--lr_scheduler", "cosine", "--warmup_steps", 2,
         "--num_minibatches", 2, "--beta", 0.05, "--cfg_scale", 2, "--save_total_limit", 3]


@pytest.fixture(scope="module", autouse=True)
def no_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_trainer, "write_report", lambda folder: None)
        yield


def train(world, output, *more):
    """train_c2i.py's main in this process, as its command line would run it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_c2i.py", *command_line(world, output, *FLAGS, *more)])
        with one_line_errors():
            train_c2i.main()
    return output / "run"


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run that nothing interrupted."""
    return train(world, tmp_path_factory.mktemp("whole"))


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # clocks differ
        for name in [name for name in line if name.startswith("seconds/") or name == "images_per_sec"]:
            del line[name]
    return lines


def assert_same_run(run, whole):
    name = f"checkpoint-{STEPS}/model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(run) == metrics(whole)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6", "checkpoint-9"]
    for grid in (whole / "samples").iterdir():
        assert (run / "samples" / grid.name).read_bytes() == grid.read_bytes()


def test_the_uninterrupted_run_trains(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines if "reward" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/entropy" in line] == [0, 4, 8, 12]
    assert lines[-2]["kl"] > 1e-4 and lines[1]["grad_norm"] > 0
    first, last = (whole / f"checkpoint-{step}" / "model.safetensors" for step in (6, 12))
    assert first.read_bytes() != last.read_bytes()


def test_kill_9_and_the_same_command_again(world, whole, tmp_path):
    command = [sys.executable, str(ROOT / "train_c2i.py"), *command_line(world, tmp_path, *FLAGS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, cwd=tmp_path, env=environment)
        deadline = time.monotonic() + 120
        while num_logged(run) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert (run / "checkpoint-3").is_dir() and not (run / f"checkpoint-{STEPS}").exists()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "rew')  # what a kill in the middle of a write leaves
    assert_same_run(train(world, tmp_path), whole)


def num_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"reward":') if path.exists() else 0


@pytest.mark.parametrize("damage", ("truncated", "flipped", "missing"))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(world, whole, tmp_path, caplog, damage):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "output_dir": str(tmp_path)}))
    shutil.rmtree(run / "checkpoint-12")
    file = run / "checkpoint-9" / ("trainer.pt" if damage == "truncated" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[: -100] if damage == "truncated" else content)
    train(world, tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(f"checkpoint {run / 'checkpoint-9'} is damaged ({file.name}" in text for text in warnings)
    assert_same_run(run, whole)


def test_a_finished_run_says_so_and_stays_as_it_is(world, whole, caplog, monkeypatch):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "rollout", lambda *_: pytest.fail("a finished run trains"))
    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "evaluate", lambda *_: pytest.fail("a finished run evaluates"))
    with caplog.at_level("INFO"):
        train(world, whole.parent)
    assert any("the run is finished" in record.getMessage() for record in caplog.records)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_dry_run_steps_plans_and_writes_nothing(world, whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    train(world, whole.parent, "--dry_run", "--exit_step", STEPS + 5)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    told = capsys.readouterr().out
    assert "32 images a step = 8 prompts x 4 generations x 1 processes" in told and "nothing was written" in told
    assert re.search(r"^peak +\d", told, re.MULTILINE) and re.search(r"^seconds +\d", told, re.MULTILINE)


def test_more_steps_continue_a_finished_run(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    run = train(world, tmp_path, "--exit_step", STEPS + 1)
    assert [line["step"] for line in metrics(run) if "reward" in line] == list(range(1, STEPS + 2))


def test_a_changed_configuration_is_refused_by_name(world, whole, capsys):
    before = (whole / "config.json").read_bytes()
    with pytest.raises(SystemExit):
        train(world, whole.parent, "--learning_rate", "2e-3")
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "learning_rate: 0.001 -> 0.002" in error and "Traceback" not in error
    assert (whole / "config.json").read_bytes() == before
