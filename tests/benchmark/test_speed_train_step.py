"""benchmark.speed.train_step and .vq: the plain step does what ours does, counts are right, commands run. Not timed."""
import re
from dataclasses import replace

import pytest
import torch

from benchmark.speed import roofline, train_step, vq
from models.gpt import GPT_SIZES
from models.vq import VQ_SIZES
from utils.distributed import Metrics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(GPT_SIZES, "tiny", dict(n_layer=4, n_head=4, dim=64, vocab_size=4096, num_classes=9))
    monkeypatch.setitem(VQ_SIZES, "tiny", dict(codebook_size=64, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), ch=32,
                                               z_channels=32, num_res_blocks=1))
    monkeypatch.setattr(roofline, "MATMUL_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2 ** 16})


@pytest.mark.parametrize("options", (dict(), dict(gpt_type="t2i", guidance_logprob="guided_detach_uncond"),
                                     dict(cfg_scale=1.0, gradient_checkpointing=True, micro_batch_size=1)),
                         ids=("guided", "t2i", "lean"))
def test_both_steps_are_the_same_update(options, monkeypatch):
    config = train_step.TrainStepConfig(gpt_model="tiny", image_size=64, batch_size=3, device="cpu", **options)
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def record(parameters, limit):
        parameters = list(parameters)
        found.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    for make_step in (train_step.lean_step, train_step.plain_step):
        make_step(config)(train_step.random_minibatch(config), Metrics(CPU))
    assert len(found) == 2 and len(found[0]) == len(found[1])
    for lean, plain in zip(*found):
        torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-6)


def test_lean_flags_halve_the_memory():
    """Activations and logits outweigh the tiny weights here, as they do in a large batch."""
    config = train_step.TrainStepConfig(gpt_model="tiny", image_size=256, batch_size=4, device="cpu", rounds=1,
                                        gradient_checkpointing=True, micro_batch_size=2, head_chunk_tokens=128,
                                        optimizer="adamw_8bit", reference="bf16")
    lean, plain = (train_step.measure(make, config) for make in (train_step.lean_step, train_step.plain_step))
    assert lean.peak_bytes < plain.peak_bytes / 4
    assert plain.largest_bytes >= 4 * 4 * 256 * 4096 > 4 * lean.largest_bytes


def test_flops_grow_with_rows_and_tokens():
    config = train_step.TrainStepConfig(gpt_model="tiny", image_size=64, batch_size=2, device="cpu")
    unguided = replace(config, cfg_scale=1.0)
    tokens, block = 16, 4 * 64 * 64 + 3 * 64 * 256  # attention, and SwiGLU of width 256
    layers = 4 * 2 * (2 * block * tokens + 2 * 64 * tokens ** 2)
    assert train_step.step_flops(unguided) == 4 * (layers + 2 * 64 * 4096 * 2 * tokens)
    assert train_step.step_flops(config) == 4 * (2 * layers + 2 * 64 * 4096 * 2 * tokens)


def test_the_commands_run(capsys):
    speeds = train_step.main(["--gpt_model", "tiny", "--image_size", "32", "--batch_size", "2", "--device", "cpu",
                              "--rounds", "1", "--baseline", "--lora_rank", "2", "--micro_batch_size", "auto"])
    printed = capsys.readouterr().out
    assert re.search(r"^ours +\d", printed, re.M) and re.search(r"^baseline +\d", printed, re.M)
    assert "baseline / ours: time" in printed and speeds["ours"].total > 0
    speeds = vq.main(["--vq_model", "tiny", "--image_size", "16", "--batch_size", "3", "--rounds", "1",
                      "--device", "cpu", "--vq_dtype", "float32", "bfloat16"])
    one, float32, bfloat16 = speeds
    assert one.largest_gap == 0 and float32.largest_gap <= 1 and 0 < bfloat16.largest_gap < 30
    assert re.search(r"^bfloat16 +\d", capsys.readouterr().out, re.M)
    with pytest.raises(SystemExit):
        vq.main(["--vq_dtype", "float16"])
    assert "vq_dtype must be float32 or bfloat16, got float16" in capsys.readouterr().err
