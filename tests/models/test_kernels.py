"""The Triton kernels of the decode step against their plain twins: through Triton's interpreter, or on a GPU.

The interpreter knows no bfloat16 products; float16 takes the same roundings.
"""
import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="this torch build has no Triton")
if not torch.cuda.is_available() and triton.__version__ < "3.7" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this Triton needs an older numpy", allow_module_level=True)

from models import kernels
from models.decoder import Decoder
from models.generate import Rollout, SamplingConfig, draw, generate, log_distribution, row_uniforms, token_statistics
from models.gpt import GPT, GPTConfig
from tests.tiny_gpt import C, L, T, tiny_condition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {  # widths that no tile divides, grouped queries, a head size that is no power of 2
    "plain": dict(dim=48, n_layer=1, n_head=3),
    "grouped": dict(dim=80, n_layer=1, n_head=4, n_kv_head=2),
    "wide": dict(dim=160, n_layer=1, n_head=2),
}


def random_gpt(**size) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{"block_size": 16, **size}, multiple_of=16, vocab_size=37)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return gpt.requires_grad_(False).to(DEVICE)


@pytest.mark.parametrize("size,num_rows,dtype", (
    ("plain", 5, torch.float32), ("plain", 5, torch.float16), ("grouped", 37, torch.float32),
    ("wide", 20, torch.float32)))
def test_a_step_equals_the_plain_one(size, num_rows, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    gpt, device = random_gpt(**SIZES[size]), torch.device(DEVICE)
    plain, fused = (Decoder(gpt.config, num_rows, dtype, device, bucket=64, fused=fused) for fused in (False, True))
    for decoder in (plain, fused):
        decoder.load(gpt)
        decoder.cache.data = decoder.cache.data.to(dtype)
    plain.cache.data.normal_(generator=torch.Generator(device).manual_seed(1))
    fused.cache.data.copy_(plain.cache.data)
    columns = torch.zeros(num_rows, 1, 1, 64, device=DEVICE)
    columns[1, ..., :2] = columns[3, ..., 0] = -torch.inf  # padded slots
    plain.columns, fused.columns = columns.to(dtype), columns
    for position in (4, 9)[: 1 if num_rows > 5 else 2]:
        tokens = torch.arange(num_rows, device=DEVICE) % 37
        at = torch.tensor([position], device=DEVICE)
        expected, hidden = (decoder.feed(tokens, at, 64) for decoder in (plain, fused))
        torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(fused.cache.data, plain.cache.data, atol=tolerance, rtol=0)


@pytest.mark.parametrize("vocabulary,sampling", ((37, SamplingConfig()), (300, SamplingConfig(top_k=4)),
                                                 (37, SamplingConfig(top_p=0.6))))
def test_drawing_equals_the_plain_way(vocabulary, sampling):
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(7, vocabulary, generator=generator)
    log_probs = log_distribution(logits, sampling)
    uniforms = torch.rand(9, L, dtype=torch.float64, generator=generator)
    uniforms[0, 3], uniforms[1, 3] = 0.0, 1 - 2.0 ** -53
    buffers = [torch.zeros(9, L, dtype=dtype, device=DEVICE) for dtype in (torch.long, torch.float32, torch.float32)]
    token = kernels.draw(logits.masked_fill(log_probs == -torch.inf, -torch.inf).to(DEVICE), uniforms.to(DEVICE),
                         torch.tensor([3], device=DEVICE), *buffers, greedy=False).cpu()
    tokens, logps, entropies = (buffer.cpu() for buffer in buffers)
    expected = draw(log_probs, uniforms[:7, 3])
    assert torch.equal(token, expected) and torch.equal(tokens[:7, 3], expected)
    for column, want in zip((logps, entropies), token_statistics(log_probs, expected)):
        torch.testing.assert_close(column[:7, 3], want, atol=2e-6, rtol=0)
        assert not column[:, :3].any() and not column[7:].any()


def test_not_a_number_draws_a_code_that_exists():
    """The trainer ends the run at the log-probability; an index outside the embeddings would end the process."""
    buffers = [torch.zeros(1, L, dtype=dtype, device=DEVICE) for dtype in (torch.long, torch.float32, torch.float32)]
    logits = torch.full((1, 37), torch.nan, device=DEVICE)
    uniforms = torch.full((1, L), 0.5, dtype=torch.float64, device=DEVICE)
    token = kernels.draw(logits, uniforms, torch.tensor([0], device=DEVICE), *buffers, greedy=False)
    assert 0 <= token.item() < 37 and not buffers[1][0, 0].isfinite()


@pytest.mark.parametrize("model_type,sampling", (
    ("t2i", SamplingConfig(cfg_scale=2.0, cfg_interval=3, top_k=12, temperature=1.3)),
    ("c2i", SamplingConfig(cfg_scale=2.0, greedy=True))))
@torch.no_grad()
def test_rollouts_draw_the_same_tokens(model_type, sampling):
    """A second rollout in the same buffers too, after an update, with idle rows and another caption mask."""
    extra = dict(cls_token_num=T, caption_dim=C, uncond_token_num=T) if model_type == "t2i" else {}
    gpt = random_gpt(dim=32, n_layer=1, n_head=4, n_kv_head=2, block_size=6, grid_size=(2, 3), num_classes=5,
                     model_type=model_type, **extra)
    condition, mask = (None if part is None else part.to(DEVICE) for part in tiny_condition(model_type, 2))
    rollout = Rollout(gpt, sampling, 5, torch.float32, fused=True)
    rollout.begin(condition.flip(0), None, row_uniforms(range(4), 6).to(DEVICE), 2)
    rollout.run()
    gpt.layers[0].feed_forward.w3.weight.mul_(0.5)
    rollout.begin(condition, mask, row_uniforms(range(40, 44), 6).to(DEVICE), 2)
    rollout.run()
    cpu = gpt.cpu()
    expected = generate(cpu, condition.cpu(), sampling, None if mask is None else mask.cpu(), range(40, 44), 2)
    assert torch.equal(rollout.tokens[:4].cpu(), expected.tokens)
    torch.testing.assert_close(rollout.logps[:4].cpu(), expected.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.entropies[:4].cpu(), expected.entropies, atol=1e-5, rtol=0)
