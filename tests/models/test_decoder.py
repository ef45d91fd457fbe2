"""The rollout engine against a slow path that runs the whole sequence anew for every token."""
import gc
import logging
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import decoder
from models.decoder import Decoder, linear, prepared, rows_that_fit
from models.generate import Engine, Rollout, SamplingConfig, even_parts, generate, row_batches, row_uniforms
from models.gpt import GPT_SIZES, GPTConfig
from models.graphs import StepGraphs
from models.policy import Policy, default_rollout_dtype
from tests.tiny_gpt import SAMPLING, L, tiny_condition, tiny_gpt

SEEDS = list(range(40, 46))


def slow_tokens(gpt, condition, sampling, mask, seeds, group):
    """What `generate` promises, from teacher-forced logits of both halves and a filter written out per row."""
    gpt.eval()
    rows = torch.arange(len(condition)).repeat_interleave(group)
    condition, mask = condition[rows], None if mask is None else mask[rows]
    uniforms, tokens = row_uniforms(seeds, L), torch.zeros(len(rows), 0, dtype=torch.long)
    for i in range(L):
        logits = gpt(condition, tokens, mask)[:, -1].double()
        if i < sampling.num_guided(L):
            uncond = gpt(gpt.null_condition(len(rows)), tokens, mask)[:, -1].double()
            logits = uncond + sampling.cfg_scale * (logits - uncond)
        picks = [slow_pick(row / sampling.temperature, sampling, u) for row, u in zip(logits, uniforms[:, i].tolist())]
        tokens = torch.cat([tokens, torch.tensor(picks)[:, None]], dim=1)
    return tokens


def slow_pick(logits, sampling, uniform):
    probs = logits.softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda v: -probs[v])
    if sampling.greedy:
        return order[0]
    kept = order[: sampling.top_k or None]
    mass, nucleus = 0.0, []
    for v in kept:
        if mass <= sampling.top_p * sum(probs[v] for v in kept):
            nucleus.append(v)
        mass += probs[v]
    target, total = uniform * sum(probs[v] for v in nucleus), 0.0
    for v in sorted(nucleus):
        total += probs[v]
        if total > target:
            return v
    return max(nucleus)


def begun(gpt, sampling, condition, mask, seeds, group, **options):
    rollout = Rollout(gpt.eval(), sampling, options.pop("capacity", len(seeds)), torch.float32, **options)
    rollout.begin(condition, mask, row_uniforms(seeds, L), group)
    return rollout


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
@pytest.mark.parametrize("name", (*SAMPLING, "greedy"))
@torch.no_grad()
def test_tokens_equal_the_slow_path(model_type, name):
    gpt, (condition, mask) = tiny_gpt(model_type), tiny_condition(model_type)
    sampling = SamplingConfig(**SAMPLING.get(name, dict(cfg_scale=2.0, greedy=True)))
    expected = slow_tokens(gpt, condition, sampling, mask, SEEDS, 2)
    assert torch.equal(generate(gpt, condition, sampling, mask, SEEDS, 2).tokens, expected)


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
@pytest.mark.parametrize("bucket,capacity", ((5, 6), (64, 9)))
@torch.no_grad()
def test_static_shapes_change_no_token(model_type, bucket, capacity):
    """Buckets, idle rows, and what an earlier rollout left in the buffers: as on a GPU."""
    gpt, (condition, mask) = tiny_gpt(model_type), tiny_condition(model_type)
    sampling = SamplingConfig(**SAMPLING["all"])
    rollout = begun(gpt, sampling, condition.flip(0), None, range(6), 2, bucket=bucket, capacity=capacity)
    rollout.run()
    gpt.output.weight.mul_(1.5)  # an update between two rollouts
    gpt.layers[0].feed_forward.w3.weight.mul_(0.5)
    rollout.begin(condition, mask, row_uniforms(SEEDS, L), 2)
    rollout.run()
    plain = generate(gpt, condition, sampling, mask, SEEDS, 2)
    assert torch.equal(rollout.tokens[:6], plain.tokens)
    torch.testing.assert_close(rollout.logps[:6], plain.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.entropies[:6], plain.entropies, atol=1e-5, rtol=0)


def test_a_step_reads_written_positions_of_unrepeated_heads(monkeypatch):
    gpt, (condition, mask) = tiny_gpt("c2i"), tiny_condition("c2i")
    shapes, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(decoder.F, "scaled_dot_product_attention",
                        lambda q, k, v, **kwargs: shapes.append((q.shape, k.shape)) or attention(q, k, v, **kwargs))
    monkeypatch.setattr(type(gpt), "forward_hidden", lambda self, x, start, mask, cache: x)
    generate(gpt, condition, SamplingConfig(), mask, [1, 2, 3])
    assert shapes == [((3, 2, 2, 8), (3, 2, 1 + i, 8)) for i in range(1, L) for _ in range(2)]


def test_the_unguided_tail_feeds_conditional_rows_alone(monkeypatch):
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i")
    fed, feed = [], Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda self, tokens, *at: fed.append(len(tokens)) or feed(self, tokens, *at))
    generate(gpt, condition, SamplingConfig(cfg_scale=2.0, cfg_interval=3), mask, [1, 2, 3])
    assert fed == [6] * 4 + [3] * (L - 1 - 4)


# ---- weights ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_packed_weights_give_the_same_tokens(monkeypatch):
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i")
    sampling = SamplingConfig(cfg_scale=2.0, cfg_interval=4)
    expected = generate(gpt, condition, sampling, mask, SEEDS, 2)
    monkeypatch.setattr(decoder, "worth_packing", lambda weight: True)
    packed = generate(gpt, condition, sampling, mask, SEEDS, 2)
    assert torch.equal(packed.tokens, expected.tokens)
    torch.testing.assert_close(packed.logps, expected.logps, atol=1e-5, rtol=0)


def test_what_is_packed():
    large, small = torch.randn(512, 512), torch.randn(64, 64)
    assert decoder.worth_packing(large) and not decoder.worth_packing(small)
    assert decoder.worth_packing(large.bfloat16()) == decoder.native_bfloat16()
    stacked = prepared([large, large[:256]], torch.float32, 4)
    x = torch.randn(4, 512)
    assert stacked.is_mkldnn
    torch.testing.assert_close(linear(x, stacked), x @ torch.cat([large, large[:256]]).T, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_rollouts_are_near_float32():
    gpt, (condition, mask) = tiny_gpt("c2i"), tiny_condition("c2i")
    policy = Policy(gpt, None, SamplingConfig(cfg_scale=2.0), rollout_dtype=torch.bfloat16)
    out = policy.sample(condition, mask, SEEDS, 2)
    logps, _ = policy.scorer("guided", 1024).eval()(condition.repeat_interleave(2), out.tokens, mask)
    gap = (out.logps - logps).abs().max().item()
    assert 1e-4 < gap < 0.3 and out.logps.dtype == torch.float32


def test_rollout_dtype_follows_training(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for native in (False, True):
        monkeypatch.setattr("models.policy.native_bfloat16", lambda native=native: native)
        assert default_rollout_dtype(None, cpu) == torch.float32
        assert default_rollout_dtype(torch.bfloat16, gpu) == torch.bfloat16
        assert default_rollout_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if native else torch.float32)


# ---- memory ----------------------------------------------------------------------------------------------------------

def test_row_batches_cover_every_row_once_in_order():
    for num_prompts, group, limit in ((3, 4, 100), (3, 4, 8), (5, 4, 4), (3, 4, 3), (2, 7, 3), (1, 1, 1), (4, 8, 1)):
        rows = torch.arange(num_prompts * group).view(num_prompts, group)
        parts = [rows[part].flatten() for part in row_batches(num_prompts, group, limit)]
        assert torch.cat(parts).tolist() == rows.flatten().tolist()
        assert max(map(len, parts)) <= limit
    assert [part.stop - part.start for part in even_parts(10, 4)] == [4, 4, 2]
    assert [part.stop - part.start for part in even_parts(9, 8)] == [5, 4]


@pytest.mark.parametrize("limit", (4, 3))
def test_splitting_a_rollout_changes_no_image(monkeypatch, limit):
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i")
    policy = Policy(gpt, None, SamplingConfig(cfg_scale=2.0))
    whole = policy.sample(condition, mask, range(12), 4)
    monkeypatch.setattr(Engine, "limit", lambda *args: limit)
    split = policy.sample(condition, mask, range(12), 4)
    assert torch.equal(whole.tokens, split.tokens)
    torch.testing.assert_close(whole.logps, split.logps, atol=1e-5, rtol=0)


def test_rows_that_fit():
    config, gigabyte = GPTConfig(**GPT_SIZES["GPT-XL"], block_size=576), 10 ** 9
    cache = 36 * 2 * 1280 * (576 + 1) * 2  # bytes of a row in bf16
    rows = rows_that_fit(config, torch.bfloat16, 40 * gigabyte)
    assert 0.9 < rows * cache / (40 * gigabyte - 775e6 * 2) < 1
    assert rows_that_fit(config, torch.float32, 40 * gigabyte) < 0.6 * rows
    assert rows_that_fit(replace(config, n_kv_head=5), torch.bfloat16, 40 * gigabyte) > 3.5 * rows
    assert rows_that_fit(config, torch.bfloat16, gigabyte) == 1
    dense = decoder.KVCache(replace(config, n_layer=2), 3, 577, torch.bfloat16, torch.device("cpu"))
    assert dense.data.nbytes == 3 * cache * 2 // 36


def test_buffers_serve_rollouts_of_their_kind():
    gpt, sampling = tiny_gpt("c2i"), SamplingConfig(cfg_scale=2.0)
    rollout = Rollout(gpt, sampling, 8, torch.float32)
    assert rollout.serves(gpt, sampling, 8, torch.float32) and rollout.serves(gpt, sampling, 5, torch.float32)
    assert not rollout.serves(gpt, sampling, 4, torch.float32) and not rollout.serves(gpt, sampling, 9, torch.float32)
    assert not rollout.serves(gpt, SamplingConfig(), 8, torch.float32)
    assert not rollout.serves(tiny_gpt("c2i"), sampling, 8, torch.float32)
    engine = Engine()
    assert engine.rollout(gpt, sampling, 8, torch.float32) is not engine.rollout(gpt, sampling, 8, torch.float32)
    assert engine.kept is None and engine.limit(gpt, sampling, 8) == 8  # CPUs keep nothing and split nothing


# ---- graphs, with stand-ins for what a GPU does -----------------------------------------------------

def fake_cuda_graphs(monkeypatch, buffers, replay):
    """Capturing runs the step, and takes back what it did to `buffers`; replaying calls `replay`."""
    captured = []

    class Graph:
        def replay(self):
            replay(*self.key)

        def pool(self):
            return "pool"

    @contextmanager
    def graph(recorded, pool, capture_error_mode):
        captured.append((recorded, pool))
        before = [buffer.clone() for buffer in buffers]
        yield
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return captured


@torch.no_grad()
def test_a_dropped_rollout_frees_its_buffers_at_once():
    """They are gigabytes: nothing may keep them until the garbage collector runs."""
    condition, mask = tiny_condition("c2i")
    rollout = begun(tiny_gpt("c2i"), SamplingConfig(), condition, mask, SEEDS, 2)
    rollout.run()
    freed = weakref.ref(rollout)
    gc.disable()
    try:
        del rollout
        assert freed() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_captured_steps_write_what_plain_ones_write(monkeypatch):
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i")
    sampling = SamplingConfig(cfg_scale=2.0, cfg_interval=3)
    rollout = begun(gpt, sampling, condition, mask, SEEDS, 2, bucket=4)
    buffers = [rollout.hidden, rollout.index, rollout.tokens, rollout.logps, rollout.entropies,
               rollout.decoder.cache.data]
    captured = fake_cuda_graphs(monkeypatch, buffers, rollout.plain_step)
    rollout.graphs.enabled = True
    capture = rollout.graphs.capture
    monkeypatch.setattr(rollout.graphs, "capture",
                        lambda step, key: (capture(step, key), setattr(rollout.graphs.graphs[key], "key", key)))
    for _ in range(2):
        rollout.begin(condition, mask, row_uniforms(SEEDS, L), 2)
        rollout.run()
        assert torch.equal(rollout.tokens, generate(gpt, condition, sampling, mask, SEEDS, 2).tokens)
    assert set(rollout.graphs.graphs) == {(8, True, True), (12, True, True), (12, True, False), (12, False, False),
                                        (16, False, False), (20, False, False)}
    assert len(captured) == 6 and [pool for _, pool in captured] == [None] + ["pool"] * 5


def test_a_failed_capture_is_told_and_decoding_goes_on(monkeypatch, caplog):
    ran = []
    steps = StepGraphs(enabled=True)

    @contextmanager
    def graph(recorded, pool, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            steps(lambda *key: ran.append(key), 64, True)
    assert ran == [(64, True)] * 3
    assert len(caplog.records) == 1 and "not permitted when stream is capturing" in caplog.text
