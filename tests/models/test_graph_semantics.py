"""Rollouts from captured steps, with tests/fake_graphs.py in place of a GPU's: the same tokens as without."""
import logging

import pytest
import torch
from torch import distributed as dist

from models.generate import Rollout, SamplingConfig, generate, row_uniforms
from models.graphs import StepGraphs
from models.policy import Scorer
from tests.fake_graphs import use_fake_graphs
from tests.tiny_gpt import SAMPLING, L, tiny_condition, tiny_gpt
from utils import distributed

SEEDS = list(range(40, 46))


@pytest.fixture(autouse=True)
def fake_graphs(monkeypatch):
    use_fake_graphs(monkeypatch)


def captured(gpt, sampling, capacity=6, **options) -> Rollout:
    return Rollout(gpt, sampling, capacity, torch.float32, graphs=True, **{"bucket": 64, **options})


@torch.no_grad()
def draw(rollout: Rollout, condition, mask, seeds, group=2):
    rollout.begin(condition, mask, row_uniforms(seeds, L), group)
    rollout.run()
    assert rollout.graphs.enabled, "a capture was refused"
    return rollout.tokens[: len(seeds)].clone(), rollout.logps[: len(seeds)].clone()


def assert_drawn(rollout, gpt, sampling, condition, mask, seeds=SEEDS, group=2):
    tokens, logps = draw(rollout, condition, mask, seeds, group)
    expected = generate(gpt, condition, sampling, mask, seeds, group)
    assert torch.equal(tokens, expected.tokens)
    torch.testing.assert_close(logps, expected.logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
@pytest.mark.parametrize("name", SAMPLING)
def test_replayed_steps_draw_the_same(model_type, name):
    """The first rollout replays most of its steps, the second one all, on other seeds."""
    gpt, (condition, mask), sampling = tiny_gpt(model_type).eval(), tiny_condition(model_type), SamplingConfig(
        **SAMPLING[name])
    rollout = captured(gpt, sampling)
    assert_drawn(rollout, gpt, sampling, condition, mask)
    kept = dict(rollout.graphs.graphs)
    assert_drawn(rollout, gpt, sampling, condition.flip(0), None if mask is None else mask.flip(0), range(6))
    assert rollout.graphs.graphs == kept and kept


def test_weights_of_an_optimizer_step_are_sampled():
    gpt, (condition, mask), sampling = tiny_gpt("c2i").eval(), tiny_condition("c2i"), SamplingConfig(cfg_scale=2.0)
    rollout, optimizer = captured(gpt, sampling), torch.optim.AdamW(gpt.parameters(), lr=0.05)
    tokens, _ = draw(rollout, condition, mask, SEEDS)
    logps, _ = Scorer(gpt, sampling)(condition.repeat_interleave(2), tokens)
    logps.sum().backward()
    optimizer.step()
    assert_drawn(rollout, gpt, sampling, condition, mask)
    assert not torch.equal(rollout.tokens[:6], tokens)


def test_another_batch_size_uses_the_same_buffers():
    gpt, (condition, mask), sampling = tiny_gpt("t2i").eval(), tiny_condition("t2i"), SamplingConfig(cfg_scale=2.0)
    rollout = captured(gpt, sampling)
    assert_drawn(rollout, gpt, sampling, condition, mask)
    count = len(rollout.graphs.graphs)
    assert_drawn(rollout, gpt, sampling, condition[:2], mask[:2], SEEDS[:4])
    assert len(rollout.graphs.graphs) == count


def test_parameters_may_move_between_rollouts():
    """Offloading gives every parameter another storage and brings it back to yet another."""
    gpt, (condition, mask), sampling = tiny_gpt("c2i").eval(), tiny_condition("c2i"), SamplingConfig(cfg_scale=2.0)
    rollout = captured(gpt, sampling)
    assert_drawn(rollout, gpt, sampling, condition, mask)
    with torch.no_grad():
        for parameter in gpt.parameters():
            old, parameter.data = parameter.data, parameter.data * 0.9
            old.fill_(torch.nan)  # whoever still reads there draws nothing
    assert_drawn(rollout, gpt, sampling, condition, mask)


def test_gathered_weights_are_sampled_and_given_back():
    """FSDP2 on a group of one process: gathered parameters are freed after each rollout."""
    gpt, (condition, mask), sampling = tiny_gpt("c2i").eval(), tiny_condition("c2i"), SamplingConfig(cfg_scale=2.0)
    expected = [generate(gpt, condition, sampling, mask, SEEDS, 2).tokens]
    with torch.no_grad():
        gpt.output.weight.mul_(0.7)
        expected.append(generate(gpt, condition, sampling, mask, SEEDS, 2).tokens)
        gpt.output.weight.div_(0.7)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        scorer = Scorer(gpt, sampling)
        distributed.shard(scorer, [[block.attention, block.feed_forward] for block in gpt.layers], "full")
        scorer(condition.repeat_interleave(2), expected[0], mask)  # the first pass makes the whole the root
        distributed.release(scorer)
        rollout = None
        for tokens in expected:
            with distributed.gathered(scorer):
                rollout = rollout or captured(gpt, sampling)
                assert torch.equal(draw(rollout, condition, mask, SEEDS)[0], tokens)
            with torch.no_grad():
                gpt.output.weight.mul_(0.7)
    finally:
        dist.destroy_process_group()


# ---- what a capture refuses ------------------------------------------------------------------------------------------

BUFFER = torch.zeros(4)


KEPT = []


def keeps_a_result() -> None:
    KEPT.append(BUFFER * 2)


@pytest.mark.parametrize("step", (
    lambda: BUFFER.fill_(BUFFER.sum().item()), lambda: BUFFER.nonzero(), lambda: BUFFER.unique(),
    lambda: BUFFER.add_(torch.tensor([1.0, 2.0, 3.0, 4.0])), lambda: BUFFER[BUFFER > 0], keeps_a_result))
def test_what_no_capture_can_hold_is_refused(step, caplog):
    steps = StepGraphs(enabled=True)

    def whole() -> None:
        step()

    with caplog.at_level(logging.WARNING), torch.no_grad():
        steps(whole)
    assert not steps.enabled and ("not permitted" in caplog.text or "outlives" in caplog.text)


def test_a_capture_changes_nothing_and_a_replay_does():
    steps, total = StepGraphs(enabled=True), torch.zeros(2)

    def add_one() -> None:
        total.add_(total.new_ones(2))

    with torch.no_grad():
        for expected in (1.0, 2.0, 3.0):
            steps(add_one)
            assert total.tolist() == [expected] * 2
