"""test.sh from samples to numbers on the shipped shapes weights: one guidance scale, and several."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fid_evaluation
import sample_c2i
from benchmark.cfg_sweep import best, format_sweep, plot_sweep
from dataset.images import ShapesImages
from utils.config import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "pretrained" / "shapes" / "gpt_c2i"


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    path = tmp_path_factory.mktemp("ref") / "ref.npz"
    np.savez(path, arr_0=ShapesImages("c2i", 1, split="test").batch(range(12))[0])
    return path


def c2i(folder, ref, *words):
    with one_line_errors():
        sample_c2i.main(["--model", str(MODEL), "--step", "base", "--num_images", "6", "--results_dir", str(folder),
                         "--ref", str(ref), "--features", "shapes", *map(str, words)])


def test_test_sh_sweeps_the_guidance_scale_with_two_processes_as_with_one(tmp_path, ref):
    environment = {**os.environ, "SKIP_SETUP": "1", "PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1",
                   "CFG": "1.5 2.0", "REF": str(ref)}
    command = ["bash", str(ROOT / "test.sh"), str(MODEL), "0", "base", "--features", "shapes", "--num_images", "6",
               "--results_dir", str(tmp_path), "--labels", "balanced", "--bootstrap", "10", "--batch_size", "2"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "sampling: 100%" in done.stderr and "gpt_c2i_base_1.5.npz: 100%" in done.stderr  # progress
    assert done.stdout.count("on 2 x cpu") == 2
    sweep = json.loads((tmp_path / "gpt_c2i_base_cfg_sweep.json").read_text())
    assert list(sweep) == ["1.5", "2.0"]
    for scale, row in sweep.items():
        assert row == json.loads((tmp_path / f"gpt_c2i_base_{scale}.json").read_text())
        assert row["num_sample_images"] == 6 and row["num_ref_images"] == 12 and row["features"] == "shapes"
        assert f"FID              {row['fid']:.4f}   [" in done.stdout and f"{row['fid']:.4f}" in table(done.stdout)
        npz = np.load(tmp_path / f"gpt_c2i_base_{scale}.npz")["arr_0"]
        assert npz.shape == (6, 64, 64, 3)
        settings = json.loads((tmp_path / f"gpt_c2i_base_{scale}" / "sampling.json").read_text())
        assert settings["cfg_scale"] == float(scale)
    assert sweep["1.5"]["fid"] != sweep["2.0"]["fid"]
    with Image.open(tmp_path / "gpt_c2i_base_cfg_sweep.png") as picture:
        assert picture.width > 400
    c2i(tmp_path / "alone", ref, "--cfg_scale", "2.0", "--labels", "balanced", "--batch_size", "2")
    alone = np.load(tmp_path / "alone" / "gpt_c2i_base_2.npz")["arr_0"]
    assert np.array_equal(alone, npz) and len(np.unique(alone, axis=0)) == 6
    numbers = json.loads((tmp_path / "alone" / "gpt_c2i_base_2.json").read_text())
    assert numbers["fid"] == pytest.approx(sweep["2.0"]["fid"], rel=1e-4)


def table(printed):
    return printed[printed.index("CFG  "):]


def test_the_reference_is_measured_once_and_before_sampling(tmp_path, ref, monkeypatch, capsys):
    calls = []
    for name in ("measure_path", "measure_reference"):
        function = getattr(fid_evaluation, name)
        monkeypatch.setattr(fid_evaluation, name,
                            lambda path, *more, f=function: calls.append(path.name) or f(path, *more))
    c2i(tmp_path, ref, "--cfg_sweep", 1, 2, 1)
    assert calls == ["ref.npz", "ref.npz", "gpt_c2i_base_1.npz", "gpt_c2i_base_2.npz"]
    with pytest.raises(SystemExit):
        c2i(tmp_path / "none", tmp_path / "none.npz", "--cfg_scale", 1)
    assert "none.npz" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_one_scale_makes_no_sweep(tmp_path, ref, capsys):
    c2i(tmp_path, ref, "--cfg_sweep", "1.50")
    assert (tmp_path / "gpt_c2i_base_1.50.json").is_file() and not list(tmp_path.glob("*sweep*"))
    assert "best of the column" not in capsys.readouterr().out
    c2i(tmp_path, ref, "--cfg_scale", "1.5")
    one, other = (json.loads((tmp_path / f"gpt_c2i_base_{label}.json").read_text()) for label in ("1.50", "1.5"))
    assert one["fid"] == other["fid"]


@pytest.mark.parametrize("words,message", [
    (["--cfg_sweep", "1.5", "high"], "--cfg_sweep 1.5 high: could not convert"),
    (["--bootstrap", "-1"], "bootstrap must be at least 0"),
])
def test_mistakes_are_one_line(tmp_path, ref, capsys, words, message):
    with pytest.raises(SystemExit):
        c2i(tmp_path, ref, *words)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["try", "0"], ["try", "0", "latest"], ["try", "0", "latest", "--labels", "random"]])
def test_test_sh_asks_for_a_guidance_scale(words):
    environment = {key: value for key, value in os.environ.items() if key != "CFG"}
    done = subprocess.run(["bash", str(ROOT / "test.sh"), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "MODEL_NAME GPU_RANK STEP CFG" in done.stderr


def row(fid, recall, **more):
    return {**dict.fromkeys(fid_evaluation.METRICS), "fid": fid, "inception_score": 5.0 + fid, "recall": recall, **more}


def test_sweep_table_and_plot():
    rows = {"2.0": row(3.0, 0.4), "1.50": row(4.0, 0.6), "10": row(5.0, 0.5, bootstrap={"fid": [4.5, 5.5]})}
    assert [best(rows, name) for name in ("fid", "recall", "inception_score", "kid")] == ["2.0", "1.50", "10", None]
    lines = format_sweep(rows).splitlines()
    assert lines[0].split()[:3] == ["CFG", "FID", "sFID"] and lines[1].split()[:3] == ["2.0", "3.0000*", "-"]
    assert lines[2].split()[-2] == "0.6000*"
    assert plot_sweep(rows, "a model").startswith(b"\x89PNG")
