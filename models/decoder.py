"""One decoding step of models/gpt.py's transformer, for speed: the same numbers from weights prepared once per rollout.

Against `GPT.forward_hidden` it changes where the weights lie (cast, w1 and w3 stacked, packed for oneDNN on CPUs), the
form of the rotation, and how grouped queries meet their keys; tests compare the two. On GPUs a step is
the Triton kernels of models/kernels.py, which read the position from a tensor, so that one CUDA graph serves all of a
rollout. Elsewhere, and as their plain twin, it is torch operations over cache positions up to a multiple of `bucket`.

Shapes: R rows, D width, H heads, K key/value heads, G = H / K, d head size, T condition positions, L image tokens,
S >= T + L - 1 cache positions (the last token is never fed back), V codebook size.
"""
import platform
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpt import GPT, Block, GPTConfig, KVCache, apply_rope
from models.head import float32_product, operand_dtype

# Matrices below 1 MB of float32 stay in a core's cache, where packing them gained nothing (benchmark/RESULTS.md).
PACKED_NUMEL = 2 ** 18


class LayerWeights(NamedTuple):
    attention_norm: Tensor  # [D]
    wqkv: Tensor  # [(H + 2K) d, D]
    wo: Tensor  # [D, D]
    ffn_norm: Tensor  # [D]
    w13: Tensor  # [2 F, D]
    w2: Tensor  # [D, F]


class OuterWeights(NamedTuple):
    embeddings: Tensor  # [V, D]
    norm: Tensor  # [D]
    output: Tensor  # [V, D]
    rope: Tensor  # [T + L, d/2, 2]


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; elsewhere they are many times slower than float32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def worth_packing(weight: Tensor) -> bool:
    """Whether oneDNN's blocked layout pays: about 15 % on AMD Zen 3, 40 % on the issue's machine, for 8 to 16 rows."""
    return (weight.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
            and torch.backends.mkldnn.is_available() and weight.numel() >= PACKED_NUMEL
            and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and native_bfloat16()))


def rows_that_fit(config: GPTConfig, dtype: torch.dtype, free_bytes: int) -> int:
    """Cache rows (a guided image takes two) that a rollout can have in `free_bytes`, at least 1.

    A row is its keys and values, and what a step makes of its logits: four float32, four float64 (the inverse CDF; the
    sort of top-p) of V each. Off the top go the prepared weights, and 2 % for activations and fragmentation.
    """
    head_size = config.dim // config.n_head
    per_layer = config.dim * ((config.n_head + 2 * config.kv_heads) * head_size + config.dim + 3 * config.ffn_dim)
    weights = (config.n_layer * per_layer + config.vocab_size * config.dim) * dtype.itemsize
    embeddings = config.vocab_size * config.dim * 4
    length = config.cls_token_num + config.block_size
    cache = 2 * config.n_layer * config.kv_heads * head_size * length * dtype.itemsize
    spare = int(0.98 * free_bytes) - weights - embeddings
    return max(1, spare // (cache + config.vocab_size * 4 * (4 + 8)))


def prepared(weights: list[Tensor], dtype: torch.dtype, num_rows: int, static: bool = False) -> Tensor:
    """Matrices [out, in], stacked, for `linear`; static: see Decoder."""
    parts = [weight.detach().to(dtype) for weight in weights]
    weight = torch.cat(parts) if parts[1:] else parts[0]
    return weight if static or not worth_packing(weight) else torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    x = x.to(weight.dtype)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def layer_weights(layer: Block, dtype: torch.dtype, num_rows: int, static: bool = False) -> LayerWeights:
    attention, mlp = layer.attention, layer.feed_forward
    matrices = ([attention.wqkv.weight], [attention.wo.weight], [mlp.w1.weight, mlp.w3.weight], [mlp.w2.weight])
    wqkv, wo, w13, w2 = (prepared(weights, dtype, num_rows, static) for weights in matrices)
    return LayerWeights(layer.attention_norm.weight.detach(), wqkv, wo, layer.ffn_norm.weight.detach(), w13, w2)


def rotate(heads: Tensor, count: int, rope: Tensor) -> Tensor:
    """heads [R, h, d] with the pairs of the first `count` heads turned by rope [1, d/2, 2] in float32."""
    if heads.device.type == "cpu":  # in place, one kernel instead of eight
        turned = heads[:, :count].float()  # float32 heads themselves
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(rope))
        if heads.dtype != torch.float32:
            heads[:, :count] = turned
        return heads
    return torch.cat([apply_rope(heads[:, None, :count], rope)[:, 0], heads[:, count:]], dim=1)


def attention_inputs(x: Tensor, weights: LayerWeights, rope: Tensor, turning: int, eps: float) -> Tensor:
    """x [R, D] -> queries, keys and values [R, H + 2K, d]; turning: H + K."""
    normed = F.rms_norm(x, x.shape[-1:], weights.attention_norm, eps)
    heads = linear(normed, weights.wqkv).unflatten(-1, (-1, 2 * rope.shape[1]))
    return rotate(heads, turning, rope)


def block_output(x: Tensor, attended: Tensor, weights: LayerWeights, eps: float) -> Tensor:
    """The rest of a block: x, attended [R, D] -> [R, D]."""
    x = x + linear(attended, weights.wo)
    gate, up = linear(F.rms_norm(x, x.shape[-1:], weights.ffn_norm, eps), weights.w13).chunk(2, dim=-1)
    return x + linear(F.silu(gate) * up, weights.w2)


def attend(queries: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
    """queries [R, H, d], cache [2, R, K, length, d] -> [R, D].

    The G queries of a key head stand where a sequence's queries would, so that no keys are repeated.
    """
    keys, values = cache  # [R, K, length, d]
    grouped = queries.to(cache.dtype).unflatten(1, (keys.shape[1], -1))  # [R, K, G, d]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)


class Decoder:
    """Prepared weights and the cache of `num_rows` rows.

    dtype: of matrix products and (on GPUs) the cache; the residual stream and the norms keep the parameters' dtype.
    bucket: cache positions read are a multiple of it; 0: whatever suits. fused: by Triton kernels; None: on GPUs.
    static: weights are copied to the same addresses in each rollout, so that captured steps stay valid; None: on GPUs.
    Elsewhere `load` makes them anew, or reads the parameters themselves.
    """

    def __init__(self, config: GPTConfig, num_rows: int, dtype: torch.dtype, device: torch.device, bucket: int = 0,
                 fused: bool | None = None, static: bool | None = None):
        on_gpu = device.type == "cuda"
        self.config, self.num_rows, self.dtype = config, num_rows, dtype
        self.static = on_gpu if static is None else static
        fused = on_gpu if fused is None else fused
        length = config.cls_token_num + config.block_size - 1
        self.bucket = bucket or (length if fused else 1)
        length = self.read_length(length - 1)
        # A CPU's SDPA, made for many queries, takes twice as long on bf16 as on the same numbers in float32.
        self.cache = KVCache(config, num_rows, length, dtype if on_gpu else torch.float32, device)
        self.positions = torch.arange(length, device=device)  # [S]
        self.columns: Tensor | None = None  # [R, 1, 1, S] of 0 and -inf; None: every written position is attended to
        self.layers: list[LayerWeights] = []
        self.outer: OuterWeights | None = None
        self.kernels = self.scratch = None
        if fused:
            from models import kernels  # Triton comes with torch's GPU builds alone
            self.kernels, self.scratch = kernels, kernels.Scratch(config, num_rows, dtype, device)
            if config.cls_token_num > 1:
                self.columns = self.cache.data.new_zeros(num_rows, 1, 1, length, dtype=torch.float32)

    def read_length(self, position: int) -> int:
        """How many cache positions a step at `position` reads: position + 1, rounded up to a bucket."""
        return -(-(position + 1) // self.bucket) * self.bucket

    def load(self, gpt: GPT) -> None:
        """Prepares the weights as they are now."""
        layers = (layer_weights(layer, self.dtype, self.num_rows, self.static) for layer in gpt.layers)
        head = prepared([gpt.output.weight], operand_dtype(gpt.output.weight.device, self.dtype), self.num_rows,
                        self.static)
        outer = OuterWeights(gpt.tok_embeddings.weight.detach(), gpt.norm.weight.detach(), head, gpt.rope)
        if not self.static:
            self.layers, self.outer = list(layers), outer
        elif self.outer is None:  # parameters may move and change: what is captured must not be theirs
            self.layers = [LayerWeights(*map(torch.clone, layer)) for layer in layers]
            self.outer = OuterWeights(*map(torch.clone, outer))
        else:
            for old, new in zip([*self.layers, self.outer], [*layers, outer]):
                for buffer, value in zip(old, new):
                    buffer.copy_(value)

    def begin(self, prefix: KVCache, rows: Tensor, condition_mask: Tensor | None) -> None:
        """Row r continues prefix row rows[r] (int64 [R]), whose padded slots condition_mask bool [P, T] leaves out."""
        self.cache.begin(prefix, rows)
        if condition_mask is None and (self.bucket == 1 or self.kernels and self.columns is None):
            self.columns = None
            return
        dtype = torch.float32 if self.kernels else self.cache.data.dtype
        columns = self.cache.data.new_zeros(self.num_rows, 1, 1, len(self.positions), dtype=dtype)
        if condition_mask is not None:
            columns[:, 0, 0, : condition_mask.shape[1]].masked_fill_(~condition_mask[rows], -torch.inf)
        if self.columns is None:
            self.columns = columns
        else:
            self.columns.copy_(columns)

    def mask(self, num_rows: int, position: Tensor, length: int) -> Tensor | None:
        """To be added to attention logits, [num_rows, 1, 1, length]: padded slots and what is not yet written."""
        if self.columns is None:
            return None
        columns = self.columns[:num_rows, ..., :length]
        return columns if self.bucket == 1 else columns.masked_fill(self.positions[:length] > position, -torch.inf)

    def feed(self, tokens: Tensor, position: Tensor, length: int) -> Tensor:
        """tokens int64 [r] at `position` (int64 [1]) of the first r rows -> hidden states [r, D] that predict the next
        ones. length: read_length(position), on the host because it is a shape."""
        config, num_rows = self.config, len(tokens)
        if self.kernels:
            mask = None if self.columns is None else self.columns[:, 0, 0]
            return self.kernels.feed(config, self.layers, self.outer, self.cache.data, mask, self.scratch, tokens,
                                     position)
        rope = self.outer.rope.index_select(0, position)  # [1, d/2, 2]
        mask = self.mask(num_rows, position, length)
        x = F.embedding(tokens, self.outer.embeddings)  # [r, D]
        for weights, cache in zip(self.layers, self.cache.data[:, :, :num_rows]):  # [2, r, K, S, d]
            heads = attention_inputs(x, weights, rope, config.n_head + config.kv_heads, config.norm_eps)
            written = heads[:, config.n_head:].unflatten(1, (2, -1)).transpose(0, 1)  # [2, r, K, d]
            if self.bucket == 1:  # a plain copy costs a third of one by index
                cache[..., length - 1, :] = written
            else:
                cache.index_copy_(3, position, written[..., None, :])
            attended = attend(heads[:, :config.n_head], cache[..., :length, :], mask)
            x = block_output(x, attended, weights, config.norm_eps)
        return F.rms_norm(x, x.shape[-1:], self.outer.norm, config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> float32 [n, V]."""
        weight = self.outer.output
        return float32_product(hidden.to(weight.dtype), weight.T) if weight.is_cuda else linear(hidden, weight)
