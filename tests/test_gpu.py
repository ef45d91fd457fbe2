"""On a GPU: the same tokens, log-probabilities, updates and files as on the CPU. Skipped without one.

    ARGRPO_TEST_GPU=1 python -m pytest tests/test_gpu.py
"""
import pytest
import torch

from models.generate import Engine, SamplingConfig, generate
from models.lora import LoRAConfig, add_adapters
from models.policy import Policy, Scorer
from tests.tiny_gpt import SAMPLING, tiny_condition, tiny_gpt
from tests.tiny_world import CONDITIONS, make_trainer, make_world, weights
from trainer_utils.rollout import sample_and_score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SEEDS = list(range(40, 46))


def to_gpu(*tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
@pytest.mark.parametrize("name", SAMPLING)
@torch.no_grad()
def test_tokens_equal_the_cpus(model_type, name):
    gpt, (condition, mask), engine = tiny_gpt(model_type).eval(), tiny_condition(model_type), Engine()
    sampling = SamplingConfig(**SAMPLING[name])
    for factor in (1.0, 0.8):  # the second rollout replays the first one's graphs on updated weights
        gpt.cpu().output.weight.mul_(factor)
        expected = generate(gpt, condition, sampling, mask, SEEDS, 2)
        gpt.cuda()
        found = generate(gpt, *to_gpu(condition)[:1], sampling, *to_gpu(mask), SEEDS, 2, engine)
        assert torch.equal(found.tokens.cpu(), expected.tokens)
        torch.testing.assert_close(found.logps.cpu(), expected.logps, atol=1e-4, rtol=0)
        assert engine.kept.graphs.enabled, "the capture failed"


@torch.no_grad()
def test_one_graph_serves_a_rollout_and_later_ones():
    gpt, condition, engine = tiny_gpt("c2i").eval().cuda(), tiny_condition("c2i")[0].cuda(), Engine()
    first = generate(gpt, condition, SamplingConfig(cfg_scale=2.0), None, SEEDS, 2, engine)
    kept = engine.kept
    assert kept.graphs.enabled and len(kept.graphs.graphs) == 1
    gpt.layers[0].feed_forward.w2.weight.mul_(0.5)
    second = generate(gpt, condition, SamplingConfig(cfg_scale=2.0), None, SEEDS, 2, engine)
    fresh = generate(gpt, condition, SamplingConfig(cfg_scale=2.0), None, SEEDS, 2)
    assert engine.kept is kept and len(kept.graphs.graphs) == 1
    assert torch.equal(second.tokens, fresh.tokens) and not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("dtype,tolerance", ((torch.bfloat16, 0.3), (torch.float16, 0.05)))
def test_sampler_and_scorer_agree_in_16_bits(dtype, tolerance):
    gpt, condition = tiny_gpt("c2i").eval().cuda(), tiny_condition("c2i")[0].cuda()
    policy = Policy(gpt, None, SamplingConfig(cfg_scale=2.0), autocast_dtype=dtype)
    out = policy.sample(condition, None, SEEDS, 2)
    with policy.autocast(), torch.no_grad():
        logps, _ = Scorer(gpt, policy.sampling).eval()(condition.repeat_interleave(2), out.tokens)
    assert 0 < (logps - out.logps).abs().max() < tolerance


def test_adapters_are_sampled_as_they_are_scored():
    gpt = tiny_gpt("c2i").eval()
    add_adapters(gpt, LoRAConfig(lora_rank=2))
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    gpt, condition = gpt.cuda(), tiny_condition("c2i")[0].cuda()
    out = generate(gpt, condition, SamplingConfig(), None, SEEDS, 2)
    logps, _ = Scorer(gpt, SamplingConfig()).eval()(condition.repeat_interleave(2), out.tokens)
    torch.testing.assert_close(out.logps, logps.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", (dict(), dict(optimizer="adamw_fused", reference="cpu", rollout_batch_size=8),
                                     dict(optimizer="adamw_8bit", reference="bf16", micro_batch_size="auto")))
def test_training_equals_the_cpus(tmp_path, options):
    """Three steps of two updates; the shapes rewards read images on the CPU."""
    make_world(tmp_path)
    changes = dict(num_minibatches=2, exit_step=3, sampling=dict(cfg_scale=2.0), learning_rate=1e-4, beta=0.05)
    on_cpu, on_gpu = (make_trainer(tmp_path, None, device=device, **changes, **options) for device in ("cpu", "cuda"))
    for trainer in (on_cpu, on_gpu):
        trainer.train()
    starts = weights(make_trainer(tmp_path, None))
    # AdamW turns the rounding of a gradient near zero into a whole step, so single weights may differ by more.
    moves = [torch.cat([(end.cpu() - start).flatten() for end, start in zip(weights(one).values(), starts.values())])
             for one in (on_cpu, on_gpu)]
    assert (moves[0] - moves[1]).norm() < 0.05 * moves[0].norm()


@pytest.mark.parametrize("dtype,gap", (("bfloat16", 1.0), ("float16", 0.2)))
def test_training_in_16_bits_moves_as_in_32(tmp_path, dtype, gap):
    make_world(tmp_path)
    changes = dict(exit_step=3, learning_rate=1e-3, sampling=dict(cfg_scale=2.0))
    exact = make_trainer(tmp_path, None, device="cuda", **changes)
    rounded = make_trainer(tmp_path, None, device="cuda", dtype=dtype, max_logp_gap=gap, **changes)
    start = weights(exact)
    for trainer in (exact, rounded):
        trainer.train()
    assert rounded.scaler.is_enabled() == (dtype == "float16") and rounded.checkpoints.bad_updates == 0
    moves = [torch.cat([(new - old).flatten() for new, old in zip(weights(trainer).values(), start.values())])
             for trainer in (exact, rounded)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.5


def test_a_gpu_run_resumes_bit_for_bit(tmp_path):
    make_world(tmp_path)
    changes = dict(exit_step=4, save_steps=2, learning_rate=1e-3)
    whole = make_trainer(tmp_path, tmp_path / "whole", device="cuda", **changes)
    whole.train()
    first = make_trainer(tmp_path, tmp_path / "parts", device="cuda", **changes | dict(exit_step=2))
    first.train()
    config = tmp_path / "parts" / "config.json"
    config.write_text((tmp_path / "whole" / "config.json").read_text())
    second = make_trainer(tmp_path, tmp_path / "parts", device="cuda", **changes)
    second.train()
    for (name, expected), found in zip(weights(whole).items(), weights(second).values()):
        assert torch.equal(found, expected), name


def test_scoring_beside_the_next_batch_changes_nothing(tmp_path):
    make_world(tmp_path)
    trainer = make_trainer(tmp_path, None, device="cuda")
    parts = [sample_and_score(trainer.policy, CONDITIONS[:6], list(range(24)), 4, trainer.reward_set, batch_size=size)
             for size in (0, 4, 8)]
    assert trainer.policy.side_stream.stream is not None
    tables = [trainer.reward_set.collect(samples.pending).table for samples in parts]
    for samples, table in zip(parts[1:], tables[1:]):
        assert torch.equal(samples.tokens, parts[0].tokens)
        assert (samples.images.int() - parts[0].images.int()).abs().max() <= 1  # convolutions of another batch size
        torch.testing.assert_close(table, tables[0], atol=1e-2, rtol=0)
