"""The shell scripts on the shipped shapes weights, at tiny size: what a newcomer runs first."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--exit_step", "2", "--eval_steps", "1", "--save_steps", "1", "--num_generations", "4",
        "--per_device_train_batch_size", "4", "--num_minibatches", "2", "--eval_num_prompts", "4",
        "--eval_generations", "2", "--num_threads", "1"]


@pytest.mark.parametrize("kind", ("c2i", "t2i"))
def test_run_script_trains_and_leaves_everything_behind(kind, tmp_path):
    command = ["bash", str(ROOT / f"run_{kind}_train.sh"), "--output_dir", str(tmp_path), "--run_name", "tiny", *TINY]
    environment = {**os.environ, "PYTHON": sys.executable, "SKIP_SETUP": "1", "GPUS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "tiny"
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "report.html", "reward_curve.png",
                                                     "samples", "tensorboard", "checkpoint-1", "checkpoint-2"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = [line for line in lines if "eval/fid" in line][:: 2]
    assert first["step"] == 0 and last["step"] == 2
    for name in ("eval/rewards/shapes_strict", "eval/rewards/shapes_strict_stderr", "eval/token_hamming",
                 "eval/entropy", "eval/position_spread", "eval/precision", "eval/recall"):
        assert name in last
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert steps[0]["logp_gap_max"] < 1e-4 and steps[0]["kl"] is not None
    assert "GRPO: 100%" in done.stderr


@pytest.mark.parametrize("kind", ("c2i", "t2i"))
def test_sweep_evaluates_the_shipped_weights(kind, monkeypatch):
    from benchmark.shapes import statistics, sweep
    monkeypatch.setattr(sweep, "NUM_IMAGES", 16)
    monkeypatch.setattr(sweep, "NUM_PROMPTS", {"c2i": 8, "t2i": 8})
    monkeypatch.setattr(statistics, "NUM_REFERENCE", 512)
    numbers = sweep.evaluate(ROOT / "models" / "pretrained" / "shapes" / f"gpt_{kind}", kind)
    assert 0 <= numbers["strict @1"] <= 1 and numbers["FID @2"] > 0 and 0 < numbers["Hamming @1"] <= 1
    assert sweep.table_row("base", [{"steps": 1, **numbers}]).startswith("| base | 1 | ")
