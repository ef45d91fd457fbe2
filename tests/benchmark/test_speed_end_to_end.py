"""benchmark.speed.end_to_end and .cost: the commands run on the trainer's own step. Nothing is timed."""
import re

import pytest
import torch

from benchmark.speed import cost, end_to_end, roofline
from models.gpt import GPT_SIZES
from models.vq import VQ_SIZES


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    for name, dim in (("tiny", 64), ("small", 96)):
        monkeypatch.setitem(GPT_SIZES, name, dict(n_layer=2, n_head=4, dim=dim, num_classes=9))
    monkeypatch.setitem(VQ_SIZES, "tiny", dict(codebook_size=64, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), ch=32,
                                               z_channels=32, num_res_blocks=1))
    monkeypatch.setattr(roofline, "MATMUL_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2 ** 16})


@pytest.mark.parametrize("flags", (["--baseline"], ["--gpt_type", "t2i", "--micro_batch_size", "2",
                                                    "--dtype", "bfloat16"]))
def test_the_command_runs(capsys, flags):
    costs, ratio = end_to_end.main(["--gpt_model", "tiny", "--vq_model", "tiny", "--image_size", "16", "--batch_size",
                                    "4", "--device", "cpu", *flags])
    printed = capsys.readouterr().out
    for name in ("ours", "seconds", "memory", "parity", "roofline"):
        assert re.search(rf"^{name} ", printed, re.MULTILINE), name
    for phase in ("sample", "decode", "reference", "update"):
        assert costs.seconds[phase] > 0 and costs.peaks[phase] > 0
    assert costs.logp_gap < (1e-4 if "--baseline" in flags else 0.5)
    assert (ratio is not None) == ("--baseline" in flags) == bool(re.search(r"^ratio +\d", printed, re.MULTILINE))
    assert ratio is None or ratio > 0


def test_the_plain_step_does_every_phase():
    config = end_to_end.EndToEndConfig(gpt_model="tiny", vq_model="tiny", image_size=16, batch_size=2, device="cpu")
    metrics = end_to_end.Metrics(torch.device("cpu"))
    end_to_end.plain_whole_step(config)(metrics)
    assert {name for name, value in metrics.seconds.items() if value > 0} == {
        f"seconds/{name}" for name in ("sample", "decode", "score", "reference", "update")}


def test_a_fitted_exponent_is_the_slope():
    panel = cost.Panel("tokens", "", [16, 64, 256], {"rollout": [3 * x ** 1.5 for x in (16, 64, 256)]})
    assert panel.exponent("rollout") == pytest.approx(1.5)


def test_cost_measures_each_point_once_and_draws(capsys, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "seconds_per_image", lambda config: asked.append(config) or {
        "rollout": 2.0 * config.image_size, "training": 1.0 / config.batch_size})
    file = tmp_path / "cost.png"
    found = cost.main(["--models", "tiny", "small", "--image_sizes", "32", "64", "--batches", "2", "4", "--device",
                       "cpu", "--output", str(file)])
    assert len(asked) == len(set(asked)) == 4  # the common point of the three panels once
    assert found[0].exponent("training") == pytest.approx(-1) and found[1].exponent("rollout") == pytest.approx(0.5)
    assert found[2].x[0] < found[2].x[1] and file.read_bytes().startswith(b"\x89PNG")
    assert "exponent" in capsys.readouterr().out


def test_a_point_of_cost_is_measured():
    config = end_to_end.EndToEndConfig(gpt_model="tiny", vq_model="tiny", image_size=16, batch_size=2, device="cpu")
    assert all(value > 0 for value in cost.seconds_per_image(config).values())


@pytest.mark.parametrize("main,flags,message", (
    (cost.main, ["--batches", "4"], "batches needs at least two different values"),
    (cost.main, ["--models", "tiny", "GPT-Z"], "gpt_model must be one of"),
    (end_to_end.main, ["--vq_model", "VQ-Z", "--gpt_model", "tiny"], "vq_model must be one of")))
def test_mistakes_are_one_line(capsys, main, flags, message):
    with pytest.raises(SystemExit):
        main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
