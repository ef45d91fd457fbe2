"""Sampler against scorer, and the sampler against itself in other batches."""
import itertools

import pytest
import torch

from models.generate import SamplingConfig, draw, generate, log_distribution
from models.policy import Policy, Scorer
from models.vq import VQConfig, VQModel
from tests.golden.recipe import recipe_
from tests.tiny_gpt import SAMPLING, L, V, tiny_condition, tiny_gpt


@pytest.mark.parametrize("model_type,name", list(itertools.product(("c2i", "t2i"), SAMPLING)))
def test_sampler_logps_equal_score(model_type, name):
    gpt, (condition, mask) = tiny_gpt(model_type), tiny_condition(model_type)
    sampling = SamplingConfig(**SAMPLING[name])
    out = generate(gpt, condition, sampling, mask, seeds=range(6), num_generations=2)
    rows = torch.arange(3).repeat_interleave(2)
    scorer = Scorer(gpt, sampling, chunk_tokens=7).eval()
    logps, entropies = scorer(condition[rows], out.tokens, None if mask is None else mask[rows])
    torch.testing.assert_close(out.logps, logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.entropies, entropies, atol=1e-4, rtol=0)
    assert out.tokens.unique().numel() > 3


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
def test_rows_depend_on_their_seed_alone(model_type):
    gpt, (condition, mask) = tiny_gpt(model_type), tiny_condition(model_type, 5)
    sampling = SamplingConfig(cfg_scale=2.0, top_p=0.95)
    seeds = list(range(100, 120))
    whole = generate(gpt, condition, sampling, mask, seeds, num_generations=4).tokens
    rows = torch.arange(5).repeat_interleave(4)
    for parts in ([7, 13], [1] * 20):
        starts = [sum(parts[:i]) for i in range(len(parts))]
        split = [generate(gpt, condition[rows[s: s + n]], sampling, None if mask is None else mask[rows[s: s + n]],
                          seeds[s: s + n]).tokens for s, n in zip(starts, parts)]
        assert torch.equal(whole, torch.cat(split))
    assert not torch.equal(whole[0], whole[1])


def test_sampled_frequencies_follow_the_distribution():
    gpt = tiny_gpt("c2i").eval()
    sampling = SamplingConfig(cfg_scale=2.0, temperature=0.9)
    out = generate(gpt, torch.tensor([2]), sampling, seeds=range(4000), num_generations=4000)
    counts = torch.bincount(out.tokens[:, 0], minlength=V) / 4000
    cond = gpt(torch.tensor([2]), torch.zeros(1, 0, dtype=torch.long))[0, 0]
    uncond = gpt(gpt.null_condition(1), torch.zeros(1, 0, dtype=torch.long))[0, 0]
    expected = ((uncond + 2 * (cond - uncond)) / 0.9).softmax(-1)
    assert (counts - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_draw_never_picks_a_filtered_token():
    log_probs = log_distribution(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), SamplingConfig(top_k=2))
    uniforms = torch.tensor([0.0, 0.3, 0.999, 1 - 2 ** -53], dtype=torch.float64)
    assert set(draw(log_probs.expand(4, -1), uniforms).tolist()) <= {0, 1}
    shifted = log_distribution(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), SamplingConfig(top_p=0.5))
    assert draw(shifted.expand(4, -1), uniforms).tolist() == [1, 1, 1, 1]


def test_a_token_outside_the_filter_keeps_a_finite_logp():
    log_probs = log_distribution(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), SamplingConfig(top_k=2), torch.tensor([3]))
    assert torch.isfinite(log_probs[0, 3]) and torch.isinf(log_probs[0, 2])
    torch.testing.assert_close(log_probs.exp().sum(), torch.tensor(1.0))


def test_each_prefix_is_computed_once(monkeypatch):
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i", 5)  # caption lengths 2, 6, 4, 1, 2
    seen = []
    forward = gpt.cls_embedding.forward
    monkeypatch.setattr(gpt.cls_embedding, "forward", lambda c: seen.append(len(c)) or forward(c))
    generate(gpt, condition, SamplingConfig(cfg_scale=2.0), mask, range(40), num_generations=8)
    assert seen == [5 + 4]  # five prompts, four distinct lengths


@pytest.mark.parametrize("mode", ("guided", "guided_detach_uncond", "conditional"))
def test_guidance_modes(mode):
    gpt = tiny_gpt("c2i", token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    condition, sampling = torch.tensor([1, 3]), SamplingConfig(cfg_scale=3.0)
    out = generate(gpt, condition, sampling, seeds=[5, 6])
    logps, _ = Scorer(gpt, sampling, mode)(condition, out.tokens)
    gap = (logps - out.logps).abs().max().item()
    assert gap > 0.1 if mode == "conditional" else gap < 1e-4
    logps.sum().backward()
    null_row = gpt.cls_embedding.embedding_table.weight.grad[gpt.config.num_classes]
    assert bool(null_row.any()) == (mode == "guided")


def test_chunked_head_has_the_gradient_of_the_plain_one():
    gpt = tiny_gpt("c2i", token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    condition, tokens = torch.tensor([1, 3]), torch.randint(V, (2, L), generator=torch.Generator().manual_seed(0))
    Scorer(gpt, SamplingConfig(), chunk_tokens=5)(condition, tokens)[0].sum().backward()
    chunked = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
    gpt.zero_grad()
    gpt(condition, tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[..., None]).sum().backward()
    for name, grad in chunked.items():
        torch.testing.assert_close(grad, gpt.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    gpt = tiny_gpt("c2i", token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    condition, tokens = torch.tensor([1, 3]), torch.zeros(2, L, dtype=torch.long)
    grads = []
    for gpt.gradient_checkpointing in (False, True):
        gpt.zero_grad()
        Scorer(gpt, SamplingConfig())(condition, tokens)[0].sum().backward()
        grads.append(gpt.layers[0].attention.wqkv.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
def test_train_mode_changes_only_dropout(model_type):
    gpt = tiny_gpt(model_type, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    condition, mask = tiny_condition(model_type)
    tokens = torch.zeros(3, L - 1, dtype=torch.long)
    assert torch.equal(gpt.train()(condition, tokens, mask), gpt.eval()(condition, tokens, mask))
    with_dropout = tiny_gpt(model_type).train()
    first, second = (generate(with_dropout, condition, SamplingConfig(), mask, [1, 2, 3]) for _ in range(2))
    assert torch.equal(first.logps, second.logps) and with_dropout.training


def test_policy_decodes_non_square_grids_to_uint8():
    vq = recipe_(VQModel(VQConfig(codebook_size=V, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), z_channels=8,
                                  ch=32, num_res_blocks=1)), "vq").eval()
    policy = Policy(tiny_gpt("c2i"), vq, SamplingConfig(), decode_batch_size=2)

    class Condition:
        prompt, class_id = "a photo of one", 1

    generation = policy.sample(*policy.encode([Condition]), seeds=[7, 8, 9], num_generations=3)
    images = policy.decode(generation.tokens)
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 3 * 2, 4 * 2)
    Condition.class_id = 5
    with pytest.raises(ValueError, match="class ids from 0 to 4, got 5"):
        policy.encode([Condition])
    assert vq.encode(torch.zeros(1, 3, 4, 10)).shape == (1, 2, 5)


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8))
def test_masks_of_whole_numbers_are_taken_as_tokenizers_give_them(dtype):
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i")
    sampling = SamplingConfig(cfg_scale=2.0)
    plain, given = (generate(gpt, condition, sampling, part, range(3)) for part in (mask, mask.to(dtype)))
    assert torch.equal(plain.tokens, given.tokens)
    scorer = Scorer(gpt, sampling).eval()
    assert torch.equal(scorer(condition, plain.tokens, mask)[0], scorer(condition, plain.tokens, mask.to(dtype))[0])
    assert torch.equal(gpt(condition, plain.tokens[:, :2], mask), gpt(condition, plain.tokens[:, :2], mask.to(dtype)))


def test_other_masks_are_refused_in_one_line():
    gpt, (condition, mask) = tiny_gpt("t2i"), tiny_condition("t2i")
    for wrong in (mask.float(), mask.long() * 2):
        with pytest.raises(ValueError, match="condition_mask must be bool, or whole numbers 0 and 1") as error:
            generate(gpt, condition, SamplingConfig(), wrong, range(3))
        assert "\n" not in str(error.value)
