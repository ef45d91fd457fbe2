"""A plain decoder, as image generators are usually sampled: the baseline of `benchmark.speed.rollout`.

In the style of LlamaGen's `generate`, in our own words and on our modules: eager; the conditional and the
unconditional rows side by side through every layer and the head; a cache of full length, written by index, read whole
behind a full mask, its heads repeated into a copy in every layer and step even where nothing is to be repeated;
attention spelled out as two products and a softmax; top-k filter, softmax and multinomial on full logits. It keeps no
log-probabilities. Class-to-image models, and captions without padding.

Shapes: N images, R = 2 N rows, S cache positions, V codebook size.
"""
import torch
from torch import Tensor

from models.gpt import GPT, Attention, apply_rope


class FullCache:
    """Keys and values [R, K, S, d] of one layer."""

    def __init__(self, num_rows: int, kv_heads: int, length: int, like: Tensor):
        self.keys = like.new_zeros(num_rows, kv_heads, length, like.shape[-1])
        self.values = torch.zeros_like(self.keys)

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        return self.keys, self.values


def attention(layer: Attention, x: Tensor, rope: Tensor, mask: Tensor, positions: Tensor, cache: FullCache) -> Tensor:
    heads = layer.wqkv(x).unflatten(-1, (-1, layer.head_dim))  # [R, s, H + 2K, d]
    q, k, v = heads.split([layer.n_head, layer.kv_heads, layer.kv_heads], dim=2)
    q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v))
    k, v = (t.repeat_interleave(layer.n_head // layer.kv_heads, dim=1) for t in cache.update(positions, k, v))
    scores = (q @ k.transpose(-2, -1)) / layer.head_dim ** 0.5  # [R, H, s, S]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return layer.wo((weights @ v).transpose(1, 2).flatten(2))


def forward(gpt: GPT, x: Tensor, positions: Tensor, causal: Tensor, caches: list[FullCache]) -> Tensor:
    """Embeddings [R, s, D] at `positions` -> logits float32 [R, s, V]."""
    rope, mask = gpt.rope[positions], causal[positions]
    for block, cache in zip(gpt.layers, caches):
        x = x + attention(block.attention, block.attention_norm(x), rope, mask, positions, cache)
        x = x + block.feed_forward(block.ffn_norm(x))
    return gpt.output(gpt.norm(x)).float()


def pick(logits: Tensor, scale: float, temperature: float, top_k: int) -> Tensor:
    """Logits [R, V] of both halves -> tokens int64 [N]."""
    cond, uncond = logits.chunk(2)
    logits = (uncond + (cond - uncond) * scale) / temperature
    if top_k:
        smallest = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


@torch.no_grad()
def decode(gpt: GPT, condition: Tensor, scale: float, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """Class ids int64 [N], or caption embeddings [N, T, C] -> tokens int64 [N, L], guided by `scale`."""
    config, num_images = gpt.config, len(condition)
    prefix = gpt.cls_embedding(torch.cat([condition, gpt.null_condition(num_images).to(condition.dtype)]))
    length = config.cls_token_num + config.block_size
    kind = prefix.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else prefix.dtype
    like = prefix.new_empty(config.dim // config.n_head, dtype=dtype)
    caches = [FullCache(2 * num_images, config.kv_heads, length, like) for _ in gpt.layers]
    causal = torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril()
    positions = torch.arange(config.cls_token_num, device=prefix.device)
    token = pick(forward(gpt, prefix, positions, causal, caches)[:, -1], scale, temperature, top_k)
    tokens = [token]
    for i in range(config.block_size - 1):
        position = torch.tensor([config.cls_token_num + i], device=prefix.device)
        x = gpt.tok_embeddings(torch.cat([token, token])[:, None])
        token = pick(forward(gpt, x, position, causal, caches)[:, -1], scale, temperature, top_k)
        tokens.append(token)
    return torch.stack(tokens, dim=1)
