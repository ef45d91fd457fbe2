"""Adapters: they start as the base, train alone, sample what they score, and leave as plain weights."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import grpo_trainer
import train_c2i
from models.checkpoint import load_gpt, save_model
from models.generate import SamplingConfig, generate
from models.lora import LoRAConfig, adapted, add_adapters, base_alone, merged_state
from models.policy import Scorer
from tests.tiny_gpt import tiny_condition, tiny_gpt
from tests.tiny_world import command_line
from trainer_utils.reference import Reference
from utils.config import one_line_errors

CONFIG = LoRAConfig(lora_rank=3, lora_alpha=6.0)


def adapted_gpt(model_type="c2i", moved=True):
    gpt = tiny_gpt(model_type).eval()
    add_adapters(gpt, CONFIG)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for _, module in adapted(gpt):
            module.lora_b.data = 0.1 * torch.randn(module.lora_b.shape, generator=generator)
    return gpt


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
def test_the_start_and_adapters_off_are_the_base_exactly(model_type):
    base, (condition, mask) = tiny_gpt(model_type).eval(), tiny_condition(model_type)
    tokens = torch.arange(33).view(3, 11)
    expected = base(condition, tokens, mask)
    assert torch.equal(adapted_gpt(model_type, moved=False)(condition, tokens, mask), expected)
    moved = adapted_gpt(model_type)
    assert not torch.allclose(moved(condition, tokens, mask), expected, atol=1e-3)
    with base_alone(moved):
        assert torch.equal(moved(condition, tokens, mask), expected)
    assert not torch.allclose(moved(condition, tokens, mask), expected, atol=1e-3)  # on again


def test_gradients_are_those_of_the_sum():
    """Against autograd through x W^T + s (x A^T) B^T."""
    gpt = adapted_gpt()
    module = gpt.layers[0].feed_forward.w1
    x = torch.randn(2, 5, 32, requires_grad=True)
    weight = torch.randn(2, 5, module.base.shape[0])
    (module(x) * weight).sum().backward()
    found = [x.grad, module.lora_a.grad, module.lora_b.grad]
    x, a, b = (tensor.detach().clone().requires_grad_() for tensor in (x, module.lora_a, module.lora_b))
    ((F.linear(x, module.base) + module.scale * F.linear(F.linear(x, a), b)) * weight).sum().backward()
    for one, other in zip(found, (x.grad, a.grad, b.grad)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_adapters_train_and_checkpointing_changes_nothing():
    gpt = adapted_gpt()
    trained = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 5 and all(".lora_" in name for name in trained)
    condition, tokens = torch.tensor([1, 3]), torch.zeros(2, 12, dtype=torch.long)
    grads = []
    for gpt.gradient_checkpointing in (False, True):
        gpt.zero_grad()
        Scorer(gpt, SamplingConfig(cfg_scale=2.0))(condition, tokens)[0].sum().backward()
        grads.append({name: gpt.get_parameter(name).grad for name in trained})
    assert all(torch.equal(grads[0][name], grads[1][name]) and grads[0][name].any() for name in trained)
    assert gpt.layers[0].attention.wqkv.base.grad is None


@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 0.1)))
def test_the_sampler_samples_what_the_scorer_scores(dtype, tolerance):
    gpt, sampling, condition = adapted_gpt(), SamplingConfig(cfg_scale=2.0), torch.tensor([0, 2])
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = generate(gpt, condition, sampling, seeds=[1, 2])
        logps, _ = Scorer(gpt, sampling)(condition, out.tokens)
    assert (out.logps - logps).abs().max() < tolerance
    with base_alone(gpt), torch.no_grad():
        assert (out.logps - Scorer(gpt, sampling)(condition, out.tokens)[0]).abs().max() > 3 * tolerance


def test_bf16_forwards_round_the_merged_matrix():
    module = adapted_gpt().layers[0].attention.wo
    x = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), F.linear(x, module.weight))


def test_targets_and_mistakes():
    gpt = tiny_gpt("c2i")
    add_adapters(gpt, LoRAConfig(lora_rank=2, lora_targets=["wqkv", "w2"]))
    assert [name.split(".")[-1] for name, _ in adapted(gpt)] == ["wqkv", "w2"] * 2
    with pytest.raises(ValueError, match="lora_targets must be some of wqkv, .* got output"):
        LoRAConfig(lora_targets=["wo", "output"])
    with pytest.raises(ValueError, match="--reference bf16 does not go with --lora_rank"):
        Reference(Scorer(gpt, SamplingConfig()), "bf16")
    with pytest.raises(ValueError, match="--reference lora_base does not go without --lora_rank"):
        Reference(Scorer(tiny_gpt("c2i"), SamplingConfig()), "lora_base")


# ---- a run ----------------------------------------------------------------------------------------------------------

FLAGS = ["--lora_rank", 2, "--lora_alpha", 8, "--cfg_scale", 2, "--beta", 0.05, "--save_steps", 2, "--exit_step", 4,
         "--eval_steps", 0, "--learning_rate", "1e-2", "--save_total_limit", 9]


def train(world, output, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_trainer, "write_report", lambda folder: None)
        patch.setattr(sys, "argv", ["train_c2i.py", *command_line(world, output, *FLAGS, *more)])
        with one_line_errors():
            train_c2i.main()
    return output / "run"


def test_a_run_resumes_bit_for_bit_and_exports_merged_weights(world, tmp_path, capsys):
    whole = train(world, tmp_path / "whole")
    train(world, tmp_path / "parts", "--exit_step", 2)
    parts = train(world, tmp_path / "parts")
    first, last = (whole / f"checkpoint-{step}" / "model.safetensors" for step in (2, 4))
    assert last.read_bytes() == (parts / "checkpoint-4" / "model.safetensors").read_bytes() != first.read_bytes()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kl" in line]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-4  # to the base, adapters off
    assert max(line["logp_gap_max"] for line in steps) < 1e-4

    base, final = load_file(world / "gpt" / "model.safetensors"), load_file(last)
    assert final.keys() == base.keys()  # LlamaGen's
    moved = {name for name in base if not torch.equal(base[name], final[name])}
    assert moved == {f"layers.{i}.{name}.weight" for i in range(2) for name in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}
    loaded = load_gpt(last.parent)
    add_adapters(loaded, CONFIG)
    assert merged_state(loaded).keys() == final.keys() and sum(".lora_" in name for name in loaded.state_dict()) == 20

    [shards] = (last.parent / "optimizer").iterdir()
    kinds = [name.rpartition(".")[2] for name in load_file(shards)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"value": 20, "exp_avg": 20, "exp_avg_sq": 20}

    with pytest.raises(SystemExit):
        train(world, tmp_path / "whole", "--lora_rank", 3)
    assert "lora_rank: 2 -> 3" in capsys.readouterr().err


def test_adapters_on_another_base_are_refused(world, tmp_path, capsys):
    run = train(world, tmp_path, "--exit_step", 2)
    gpt = load_gpt(world / "gpt")
    gpt.layers[0].attention.wo.weight.data += 0.01
    other = tmp_path / "other"
    save_model(other, gpt)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "gpt_ckpt": str(other)}))
    with pytest.raises(SystemExit):
        train(world, tmp_path, "--gpt_ckpt", other)
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "adapters for other base weights" in error and "Traceback" not in error
