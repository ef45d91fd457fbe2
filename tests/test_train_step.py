"""The lean training step against plain ones: the same numbers and gradients, less memory."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import grpo_trainer
from grpo_trainer import GRPOConfig
from models.build import load_policy
from models.generate import SamplingConfig
from models.gpt import GPT, GPTConfig
from models.head import MixedProduct, logits_of
from models.policy import Policy, Scorer
from models.text import TextEncoder, make_tiny_t5
from tests.tiny_gpt import L, V, tiny_condition, tiny_gpt
from tests.tiny_world import make_trainer, policy_config, weights
from trainer_utils import memory
from trainer_utils.optimizer import AdamW8bit, build_optimizer, dequantize, positive_levels, quantize, signed_levels
from trainer_utils.reference import Reference
from utils.config import parse_args


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "write_report", lambda folder: None)


def some_tokens(rows=3):
    return torch.randint(V, (rows, L), generator=torch.Generator().manual_seed(0))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        scale = expected[name].abs().max().clamp(min=1)
        assert (found[name] - expected[name]).abs().max() <= tolerance * scale, name


# ---- scoring ---------------------------------------------------------------------------------------------------------

def plain_logps(gpt, condition, tokens, mask, sampling, mode):
    """Two passes, whole logits [N, L, V], guidance on logits."""
    logits = gpt(condition, tokens[:, :-1], mask)
    guided = sampling.num_guided(L)
    if mode != "conditional" and guided:
        uncond = gpt.hidden(gpt.null_condition(len(tokens)), tokens[:, :-1], mask)
        uncond = gpt.output(uncond.detach() if mode == "guided_detach_uncond" else uncond)
        mixed = uncond + sampling.cfg_scale * (logits - uncond)
        logits = torch.cat([mixed[:, :guided], logits[:, guided:]], dim=1)
    return (logits / sampling.temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
@pytest.mark.parametrize("mode,options", (
    ("guided", dict(cfg_scale=2.0)), ("guided", dict(cfg_scale=3.0, cfg_interval=4, temperature=0.8)),
    ("guided_detach_uncond", dict(cfg_scale=2.0)), ("guided_detach_uncond", dict(cfg_scale=2.0, cfg_interval=0)),
    ("conditional", dict(cfg_scale=2.0)), ("guided", dict())))
def test_scoring_equals_full_logits_in_two_passes(model_type, mode, options):
    gpt, (condition, mask), tokens = tiny_gpt(model_type).eval(), tiny_condition(model_type), some_tokens()
    sampling, results = SamplingConfig(**options), []
    for score in (lambda: Scorer(gpt, sampling, mode, chunk_tokens=7)(condition, tokens, mask)[0],
                  lambda: plain_logps(gpt, condition, tokens, mask, sampling, mode)):
        gpt.zero_grad()
        logps = score()
        (logps * torch.linspace(-1, 1, L)).sum().backward()
        results.append((logps.detach(), gradients(gpt)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(results[0][1], results[1][1], 1e-5)


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
def test_one_packed_pass_equals_two(model_type, monkeypatch):
    gpt, (condition, mask), tokens = tiny_gpt(model_type).eval(), tiny_condition(model_type), some_tokens()
    scorer, results, passes, hidden = Scorer(gpt, SamplingConfig(cfg_scale=2.0)), [], [], gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda *inputs: passes.append(len(inputs[1])) or hidden(*inputs))

    def halves(condition, tokens, mask, num_guided):
        return hidden(condition, tokens[:, :-1], mask), hidden(gpt.null_condition(len(tokens)), tokens[:, :-1], mask)

    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr(scorer, "halves", halves)
        gpt.zero_grad()
        logps, entropies = scorer(condition, tokens, mask)
        logps.sum().backward()
        results.append((logps.detach(), entropies, gradients(gpt)))
    assert passes == [6]
    for one, other in zip(*(result[:2] for result in results)):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert_same_gradients(results[0][2], results[1][2], 1e-6)


def test_never_a_tensor_of_all_logits():
    vocabulary, length, rows, chunk = 3000, 16, 6, 20
    gpt = GPT(GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=vocabulary, block_size=length, num_classes=3)).eval()
    scorer = Scorer(gpt, SamplingConfig(cfg_scale=2.0), chunk_tokens=chunk)
    condition, tokens = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    with memory.Meter() as lean:
        scorer(condition, tokens)[0].sum().backward()
    assert lean.largest <= 4 * vocabulary * max(chunk, 32)  # a chunk of logits, or the head's gradient
    scorer.chunk_tokens = rows * length
    with memory.Meter() as whole:
        scorer(condition, tokens)[0].sum().backward()
    assert whole.largest >= 4 * rows * length * vocabulary  # so the meter would have seen it
    assert lean.peak < whole.peak / 2


def test_checkpointing_is_exact_and_keeps_less():
    gpt = GPT(GPTConfig(dim=32, n_layer=6, n_head=2, vocab_size=V, block_size=64, num_classes=3)).eval()
    gpt.output.weight.data.normal_(std=0.02)
    scorer, condition = Scorer(gpt, SamplingConfig(cfg_scale=2.0)), torch.tensor([0, 2])
    tokens, results = torch.randint(V, (2, 64)), []
    for gpt.gradient_checkpointing in (False, True):
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        gpt.zero_grad()
        with memory.Meter() as meter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                logps, _ = scorer(condition, tokens)
            logps.sum().backward()
        results.append((logps.detach(), gradients(gpt), sum(saved.values()), meter.peak))
    plain, checkpointed = results
    assert torch.equal(plain[0], checkpointed[0])
    assert all(torch.equal(plain[1][name], checkpointed[1][name]) for name in plain[1])
    assert checkpointed[2] < plain[2] / 3 and checkpointed[3] < plain[3] / 2


@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)))
def test_the_mixed_product_has_the_gradients_of_the_plain_one(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, factor = (torch.randn(size, generator=generator) for size in ((5, 32), (40, 32), (5, 40)))
    results = []
    for product in (lambda h, w: MixedProduct.apply(h, w, dtype), F.linear):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(h, w)
        assert out.dtype == torch.float32
        (out * factor).sum().backward()
        results.append((out.detach(), h.grad, w.grad))
    for one, other in zip(*results):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_logits_are_float32_under_autocast():
    hidden, weight = torch.randn(3, 32), torch.randn(V, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, rounded = logits_of(hidden, weight), F.linear(hidden, weight)
    assert rounded.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(hidden, weight))


# ---- micro-batches ---------------------------------------------------------------------------------------------------

def test_any_micro_batch_size_gives_the_same_gradient(world, monkeypatch):
    """`auto` with memory for 3 rows included; the gradient is caught before the optimizer sees it."""
    found = {}
    for size in (None, 1, 5, 16, 100, "auto"):
        trainer = make_trainer(world, None, micro_batch_size=size, beta=0.05, exit_step=1, learning_rate=0.0,
                               sampling=dict(cfg_scale=2.0))
        monkeypatch.setattr(memory, "measured_rows", lambda work, most, *_: work(2) or 3)
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda: found.update({size: gradients(trainer.scorer)}) or step()
        trainer.train()
        assert trainer.micro_batch_size == {None: 16, "auto": 3}.get(size, size)
    for size in (1, 5, 16, 100, "auto"):
        assert_same_gradients(found[size], found[None], 1e-6)


def test_auto_measures_what_fits(world, monkeypatch):
    """Per-row bytes are measured, so that with memory for so many rows, so many are taken."""
    trainer = make_trainer(world, None, micro_batch_size="auto", exit_step=1)
    sizes, forward = [], trainer.scorer.forward
    monkeypatch.setattr(trainer.scorer, "forward", lambda *inputs: sizes.append(len(inputs[1])) or forward(*inputs))
    one, two = [], []
    monkeypatch.setattr(memory, "rows_that_fit", lambda free, *measured: (one.append(measured[0]),
                                                                        two.append(measured[1]), 7)[-1])
    trainer.train()
    assert sizes[-6:] == [1, 1, 2, 7, 7, 2] and trainer.micro_batch_size == 7
    assert 1.2 < two[0] / one[0] < 2.0


def test_the_flag_takes_auto_a_number_or_none(capsys):
    for words, value in ((["auto"], "auto"), (["3"], 3), (["none"], None)):
        [config] = parse_args((GRPOConfig,), ["--micro_batch_size", *words])
        assert config.micro_batch_size == value
    for word, message in (("many", "expected auto or a whole number, got 'many'"), ("0", "must be at least 1, got 0")):
        with pytest.raises(SystemExit):
            parse_args((GRPOConfig,), ["--micro_batch_size", word])
        assert message in capsys.readouterr().err


def test_rows_that_fit():
    for rows in (1, 2, 5, 9):
        free = (50 + 10 * rows) / memory.SHARE + 1e-6
        assert memory.rows_that_fit(free, one=60, two=70, most=9) == rows
    assert memory.rows_that_fit(10 ** 9, 60, 70, most=9) == 9
    assert memory.rows_that_fit(0, 60, 70, most=9) == 1  # the run then fails where it would have anyway
    assert memory.free_bytes(torch.device("cpu")) > 0


def test_the_meter_counts_storages_once():
    with memory.Meter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)[:5]
        c = a + 1
        assert (meter.live, meter.peak, meter.largest) == (8000, 8000, 4000)
        del a, c
        assert meter.live == 4000  # b still holds a's
        c = torch.zeros(250, dtype=torch.float64)
    assert (meter.live, meter.peak) == (6000, 8000) and len(b) == 5 and len(c) == 250


# ---- the reference ---------------------------------------------------------------------------------------------------

def reference_logps(kind, autocast_dtype=None):
    gpt, (condition, mask) = tiny_gpt("t2i").eval(), tiny_condition("t2i")
    scorer = Scorer(gpt, SamplingConfig(cfg_scale=2.0)).eval()
    reference = Reference(scorer, kind)
    with torch.no_grad():
        gpt.layers[0].attention.wo.weight.add_(1.0)  # training moves the policy alone
    return reference.score(Policy(gpt, None, scorer.sampling, autocast_dtype=autocast_dtype), condition,
                           some_tokens(), mask, 2), reference


def test_forms_of_the_reference():
    exact, whole = reference_logps("float32")
    assert torch.equal(reference_logps("cpu")[0], exact) and torch.equal(reference_logps("auto")[0], exact)
    rounded, halved = reference_logps("bf16")
    assert 1e-4 < (rounded - exact).abs().max() < 0.2  # what bf16 costs in a float32 run
    in_bf16 = [reference_logps(kind, torch.bfloat16)[0] for kind in ("float32", "bf16")]
    assert torch.equal(*in_bf16)  # in a bf16 run: nothing
    sizes = [sum(p.nbytes for p in reference.scorer.gpt.layers.parameters()) for reference in (whole, halved)]
    assert sizes[1] < 0.52 * sizes[0]
    with pytest.raises(ValueError, match="reference must be one of auto, .* got 'half'"):
        reference_logps("half")


@pytest.mark.parametrize("kind", ("bf16", "cpu"))
def test_a_run_with_another_reference(world, kind):
    trainer = make_trainer(world, None, reference=kind, beta=0.05, num_iterations=2)
    start = weights(trainer)
    trainer.train()
    kept = trainer.reference.scorer.gpt.state_dict()
    assert all(torch.equal(kept[name], start[name].to(kept[name].dtype)) for name in start)


# ---- optimizers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", (signed_levels(), positive_levels()), ids=("signed", "positive"))
def test_rounding_is_unbiased_and_within_a_level(levels):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 256, generator=generator) ** 3
    values = values if levels[0] < 0 else values.abs() + 1e-6
    restored = torch.stack([dequantize(*quantize(values, levels, generator), levels) for _ in range(2000)])
    scale = values.abs().max()
    gap = 0.1 * values.abs() + levels.abs()[levels != 0].min() * scale
    assert ((restored - values).abs() <= gap).all()
    assert ((restored.mean(0) - values).abs() <= 5 * gap * (0.5 / 2000 ** 0.5)).all()
    zeros = dequantize(*quantize(torch.zeros(2, 256), levels, generator), levels)
    assert zeros.abs().max() < 1e-30


def fit(name, steps=150, between=lambda optimizer, step: optimizer):
    """Regression on a fixed teacher with noisy batches -> (losses, parameters, optimizer)."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(20, 40, generator=generator)
    parameters = [torch.zeros(20, 40, requires_grad=True), torch.zeros(20, requires_grad=True)]
    optimizer = build_optimizer(name, parameters, lr=0.02, beta2=0.99, weight_decay=0.01)
    losses = []
    for step in range(steps):
        optimizer = between(optimizer, step)
        x = torch.randn(32, 40, generator=generator)
        loss = (F.linear(x, *parameters) - F.linear(x, teacher)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in parameters]), optimizer


def test_optimizers_agree_with_adamw():
    losses, final, exact = fit("adamw")
    fused_losses, fused, _ = fit("adamw_fused")
    torch.testing.assert_close(fused, final, atol=1e-4, rtol=1e-4)
    rounded_losses, rounded, optimizer = fit("adamw_8bit")
    assert losses[-1] < losses[0] / 10
    torch.testing.assert_close(rounded_losses[1:], losses[1:], rtol=0.15, atol=0)
    assert (rounded - final).norm() < 0.03 * final.norm()
    torch.testing.assert_close(rounded_losses[1], losses[1])  # the first update is exact

    def state_bytes(optimizer):
        return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    padded = 1024 + 256
    assert state_bytes(optimizer) == 2 * padded + 2 * 4 * padded // 256 and state_bytes(exact) >= 8 * 820
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw_fused, adamw_8bit, got 'sgd'"):
        build_optimizer("sgd", [torch.zeros(1)], 1.0, 0.9, 0.0)


def test_the_8_bit_state_survives_a_checkpoint(tmp_path):
    """Bit for bit, whatever the global generator does meanwhile (other processes have other ones)."""
    def restart(optimizer, step):
        if step != 20:
            return optimizer
        torch.rand(5)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        fresh = AdamW8bit(optimizer.param_groups[0]["params"], lr=9.0, betas=(0.5, 0.5))
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        return fresh

    assert torch.equal(fit("adamw_8bit", 40)[1], fit("adamw_8bit", 40, restart)[1])


@pytest.mark.parametrize("name", ("adamw_fused", "adamw_8bit"))
def test_a_run_with_another_optimizer_resumes(world, tmp_path, name):
    for folder, steps in (("whole", (3,)), ("parts", (1, 3))):
        for exit_step in steps:
            trainer = make_trainer(world, tmp_path / folder, optimizer=name)
            trainer.config = replace(trainer.config, exit_step=exit_step)
            trainer.train()
    files = [(tmp_path / folder / "checkpoint-3" / "model.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]


# ---- decoding and offloading -----------------------------------------------------------------------------------------

def test_decoding_in_bf16_changes_pixels_by_little(world):
    exact, rounded = (load_policy(replace(policy_config(world), vq_dtype=dtype), SamplingConfig(), torch.device("cpu"))
                      for dtype in ("float32", "bfloat16"))
    tokens = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(0))
    gap = (exact.decode(tokens).float() - rounded.decode(tokens).float()).abs()
    assert 0 < gap.max() <= 8 and gap.mean() < 1
    assert exact.vq.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_text_encoder_is_on_its_device_only_while_it_encodes(tmp_path, monkeypatch):
    make_tiny_t5(tmp_path, ["a cat", "two dogs"])
    encoder = TextEncoder(str(tmp_path), max_length=4)
    expected = encoder.rows(["a cat", "two dogs"])
    encoder = TextEncoder(str(tmp_path), max_length=4)
    encoder.device, encoder.offload = torch.device("cpu", 0), True  # its name tells it from plain "cpu"
    events, run, move = [], encoder.model.forward, encoder.model.to
    monkeypatch.setattr(encoder.model, "forward", lambda **inputs: events.append("runs") or run(**inputs))
    monkeypatch.setattr(encoder.model, "to", lambda device: events.append(str(device)) or move(device))
    found = encoder.rows(["a cat", "two dogs"])
    encoder.rows(["two dogs"])  # remembered: no move
    assert events == ["cpu:0", "runs", "runs", "cpu"]
    assert all(torch.equal(found[text], expected[text]) for text in expected)
