"""The rollout benchmark: its plain decoder is right, its counts are right, and its command runs. Nothing is timed."""
import re

import pytest
import torch

from benchmark.speed import reference, rollout, roofline
from models.generate import SamplingConfig, generate
from models.gpt import GPT, GPT_SIZES, GPTConfig
from tests.tiny_gpt import L, tiny_condition, tiny_gpt


@pytest.fixture
def tiny_size(monkeypatch):
    monkeypatch.setitem(GPT_SIZES, "tiny", dict(n_layer=2, n_head=4, dim=64, n_kv_head=2, vocab_size=512))
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2 ** 16})
    monkeypatch.setattr(roofline, "MATMUL_SIDE", {"cpu": 64})


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
@torch.no_grad()
def test_the_plain_decoder_decodes(model_type):
    """With top_k 1 nothing is random: greedy decoding."""
    gpt, (condition, _) = tiny_gpt(model_type).eval(), tiny_condition(model_type)
    tokens = reference.decode(gpt, condition, 2.0, top_k=1)
    assert torch.equal(tokens, generate(gpt, condition, SamplingConfig(cfg_scale=2.0, greedy=True)).tokens)
    assert tokens.shape == (3, L) and tokens.unique().numel() > 3


def test_the_plain_decoder_samples_the_filtered_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(8000, -1)
    counts = torch.bincount(reference.pick(torch.cat([logits, logits * 0]), 1.5, 1.0, 3), minlength=4) / 8000
    expected = torch.tensor([3.0, 1.5, 0.0, -torch.inf]).softmax(-1)
    assert (counts - expected).abs().max() < 0.02 and counts[3] == 0


def test_work_is_what_the_weights_and_the_cache_are():
    config = GPTConfig(dim=64, n_layer=3, n_head=4, n_kv_head=2, vocab_size=500, num_classes=9)
    gpt = GPT(config)
    matrices = sum(p.numel() for name, p in gpt.named_parameters() if p.dim() == 2 and "embed" not in name)
    steps, body = 255, matrices - gpt.output.weight.numel()
    read = sum(3 * 16 * (1 + token) * 2 * 32 for token in range(1, 256))  # of keys and values
    work = roofline.decode_work(config, 8, 256, torch.float32)
    assert work.bytes == 4 * (steps * matrices + read)
    # of attention twice as many as keys and values are read: a key head serves two query heads
    assert work.flops == steps * (2 * 16 * body + 2 * 8 * gpt.output.weight.numel()) + 4 * read
    half = roofline.decode_work(config, 8, 0, torch.bfloat16)
    assert half.bytes == 2 * (steps * matrices + read / 2)
    assert work.seconds(roofline.Ceilings(work.bytes, work.flops / 3)) == 3


@pytest.mark.parametrize("flags", (["--baseline"], ["--gpt_type", "t2i", "--rollout_dtype", "bfloat16",
                                                    "--num_generations", "2", "--cfg_scale", "1"]))
def test_the_command_runs(tiny_size, capsys, flags):
    speed = rollout.main(["--gpt_model", "tiny", "--image_size", "48", "--batch_size", "4", "--rounds", "1",
                          "--device", "cpu", *flags])
    printed = capsys.readouterr().out
    for name in ("rollout", "seconds", "memory", "bytes", "arithmetic", "roofline", "parity"):
        assert re.search(rf"^{name} ", printed, re.MULTILINE), name
    assert 0 < speed.sampling_seconds and 0 < speed.roofline_share and speed.tokens == 9
    assert speed.parity_max < (1e-4 if "--baseline" in flags else 0.1)
    assert (speed.ratio is not None) == ("--baseline" in flags) == bool(re.search(r"^ratio +\d", printed, re.MULTILINE))


@pytest.mark.parametrize("flags,message", ((["--gpt_model", "GPT-Z"], "gpt_model must be one of GPT-B"),
                                           (["--image_size", "100"], "multiple of 16"),
                                           (["--batch_size", "6", "--num_generations", "4"], "multiple of"),
                                           (["--rounds", "0"], "rounds must be at least 1")))
def test_mistakes_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit):
        rollout.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
