"""Triton kernels of the decode step: five a layer, and one from logits to token, log-probability and entropy.

A step reads every weight and every written key and value once, so bytes are what it costs; the rest is launches and
intermediate tensors, which these kernels fuse away:

    project_heads   RMS norm, query/key/value product, rotation, keys and values into the cache
    attend          one query a row and head over the written positions alone
    add_product     product added to the residual stream (attention's output; the feed-forward's)
    gated_product   RMS norm, gate and up products, SwiGLU

Kernels that write the residual stream leave the sums of squares of their columns beside it, so that those that norm it
need no pass over it. Intermediate numbers are rounded where models/gpt.py rounds them under autocast, which keeps
sampler and scorer close. models/decoder.py holds the plain twin of each; tests/models/test_kernels.py compares them on
a CPU through Triton's interpreter. Imported on GPUs only.

Shapes: R rows, D width, F feed-forward width, H heads, K key/value heads, d head size, S cache positions, V codebook.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.gpt import GPTConfig

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Of a product: rows, columns and inner numbers at a time, warps, and loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# {kernel: {largest number of rows: tile}}; chosen by `python -m benchmark.speed.kernels`, see benchmark/HISTORY.md.
MANY = 1 << 30
TILES = {
    "project_heads": {16: Tile(16, 64, 128, 4, 4), 32: Tile(32, 64, 128, 4, 4), 64: Tile(64, 32, 128, 4, 4),
                      MANY: Tile(128, 64, 64, 4, 4)},
    "add_product": {16: Tile(16, 16, 128, 2, 6), 32: Tile(32, 16, 128, 2, 6), 64: Tile(64, 16, 256, 4, 3),
                    MANY: Tile(64, 64, 64, 4, 4)},
    "gated_product": {16: Tile(16, 16, 128, 2, 6), 32: Tile(32, 16, 128, 2, 6), 64: Tile(64, 64, 64, 4, 4),
                      MANY: Tile(128, 64, 64, 4, 4)},
    "attend": {32: (128, 8), MANY: (64, 2)},  # cache positions at a time, warps
}


def tile_of(kernel: str, num_rows: int) -> Tile | tuple[int, int]:
    return next(tile for most, tile in TILES[kernel].items() if num_rows <= most)


class Scratch:
    """What the kernels of a step hand to each other; static, as captured graphs hold the addresses."""

    def __init__(self, config: GPTConfig, num_rows: int, dtype: torch.dtype, device: torch.device):
        width = config.n_head * (config.dim // config.n_head)
        self.x = torch.zeros(num_rows, config.dim, device=device)  # the residual stream, float32
        self.squares = torch.zeros(num_rows, -(-config.dim // 16), device=device)  # of x, summed by blocks of columns
        self.queries, self.attended = (torch.zeros(num_rows, width, dtype=dtype, device=device) for _ in range(2))
        self.gated = torch.zeros(num_rows, config.ffn_dim, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------- inside kernels


@triton.jit
def inverse_rms(squares, rows, num_rows, eps, D: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr):
    """[rows] of 1 / rms from the sums of squares float32 [R, parts]."""
    part = tl.arange(0, PARTS_2)
    sums = tl.load(squares + rows[:, None] * PARTS + part[None, :],
                   mask=(rows[:, None] < num_rows) & (part[None, :] < PARTS), other=0.0)
    return tl.rsqrt(tl.sum(sums, axis=1) / D + eps)


@triton.jit
def product(x, gain, scale, weight, rows, columns, num_rows, num_columns, INNER: tl.constexpr, NORMED: tl.constexpr,
            BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """float32 [BM, BN]: x [R, INNER] @ weight [columns, INNER]^T; NORMED: of x * scale [BM] * gain [INNER]."""
    total = tl.zeros([BM, BN], tl.float32)
    whole: tl.constexpr = INNER % BK == 0
    for start in range(0, INNER, BK):
        inner = start + tl.arange(0, BK)
        a_mask, w_mask = rows[:, None] < num_rows, columns[None, :] < num_columns
        if not whole:
            a_mask, w_mask = a_mask & (inner[None, :] < INNER), w_mask & (inner[:, None] < INNER)
        a = tl.load(x + rows[:, None] * INNER + inner[None, :], mask=a_mask, other=0.0)
        w = tl.load(weight + columns[None, :] * INNER + inner[:, None], mask=w_mask, other=0.0)
        if NORMED:
            g = tl.load(gain + inner, mask=inner < INNER, other=0.0)
            a = (a * scale[:, None] * g[None, :]).to(w.dtype)
        total = tl.dot(a, w, total, input_precision="ieee")
    return total


# ------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def embed_kernel(tokens, embeddings, x, squares, D: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr,
                 PARTS_2: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BD)
    token = tl.load(tokens + row)
    values = tl.load(embeddings + token * D + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(x + row * D + at, values, mask=at < D)
    part = tl.arange(0, PARTS_2)
    tl.store(squares + row * PARTS + part, tl.where(part == 0, tl.sum(values * values), 0.0), mask=part < PARTS)


@triton.jit
def project_heads_kernel(x, squares, gain, weight, rope, position, queries, cache, num_rows, eps,
                         which_stride, row_stride, head_stride, D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
                         SIZE: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr, BM: tl.constexpr,
                         BN: tl.constexpr, BK: tl.constexpr):
    num_columns: tl.constexpr = (H + 2 * K) * SIZE
    first = tl.program_id(0) * BN
    rows, columns = tl.program_id(1) * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    at = tl.load(position)
    pairs = first + 2 * tl.arange(0, BN // 2)  # the first column of each
    turning = pairs < (H + K) * SIZE
    angle = rope + at * SIZE + pairs % SIZE  # rope [T + L, d/2, 2]
    cos, sin = tl.load(angle, mask=turning, other=1.0), tl.load(angle + 1, mask=turning, other=0.0)
    scale = inverse_rms(squares, rows, num_rows, eps, D, PARTS, PARTS_2)
    total = product(x, gain, scale, weight, rows, columns, num_rows, num_columns, D, True, BK, BM, BN)
    heads = total.to(queries.dtype.element_ty).to(tl.float32)
    even, odd = tl.split(heads.reshape(BM, BN // 2, 2))
    turned = tl.join(even * cos[None, :] - odd * sin[None, :], odd * cos[None, :] + even * sin[None, :])
    heads = turned.reshape(BM, BN).to(queries.dtype.element_ty)
    written, inside = rows[:, None] < num_rows, columns[None, :] < num_columns
    is_query = columns[None, :] < H * SIZE
    tl.store(queries + rows[:, None] * (H * SIZE) + columns[None, :], heads, mask=written & is_query)
    column = columns - H * SIZE
    place = ((column // (K * SIZE)) * which_stride + (column // SIZE % K) * head_stride + at * SIZE
             + column % SIZE)
    tl.store(cache + rows[:, None].to(tl.int64) * row_stride + place[None, :], heads.to(cache.dtype.element_ty),
             mask=written & inside & (columns[None, :] >= H * SIZE))


@triton.jit
def attend_kernel(queries, cache, mask, position, attended, which_stride, row_stride, head_stride, mask_stride, scale,
                  H: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
                  MASKED: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(position) + 1
    at = tl.arange(0, BD)
    query = tl.load(queries + (row * H + head) * SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32) * scale
    keys = cache + row * row_stride + (head // GROUP) * head_stride
    largest, mass, total = -float("inf"), 0.0, tl.zeros([BD], tl.float32)
    for start in range(0, length, BS):
        slot = start + tl.arange(0, BS)
        inside = (slot[:, None] < length) & (at[None, :] < SIZE)
        place = slot[:, None] * SIZE + at[None, :]
        key = tl.load(keys + place, mask=inside, other=0.0)
        value = tl.load(keys + which_stride + place, mask=inside, other=0.0)
        logits = tl.sum(key.to(tl.float32) * query[None, :], axis=1)  # of base 2
        if MASKED:
            logits += tl.load(mask + row * mask_stride + slot, mask=slot < length, other=0.0)
        logits = tl.where(slot < length, logits, -float("inf"))
        above = tl.maximum(largest, tl.max(logits, axis=0))
        origin = tl.where(above == -float("inf"), 0.0, above)  # nothing but padding so far
        shares, kept = tl.exp2(logits - origin), tl.exp2(largest - origin)
        mass = mass * kept + tl.sum(shares, axis=0)
        total = total * kept + tl.sum(shares[:, None] * value.to(tl.float32), axis=0)
        largest = above
    tl.store(attended + (row * H + head) * SIZE + at, (total / mass).to(attended.dtype.element_ty), mask=at < SIZE)


@triton.jit
def add_product_kernel(inputs, weight, x, squares, num_rows, D: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    block = tl.program_id(0)
    rows, columns = tl.program_id(1) * BM + tl.arange(0, BM), block * BN + tl.arange(0, BN)
    total = product(inputs, inputs, 0.0, weight, rows, columns, num_rows, D, INNER, False, BK, BM, BN)
    place, inside = x + rows[:, None] * D + columns[None, :], (rows[:, None] < num_rows) & (columns[None, :] < D)
    values = tl.load(place, mask=inside, other=0.0) + total.to(inputs.dtype.element_ty).to(tl.float32)
    tl.store(place, values, mask=inside)
    values = tl.where(inside, values, 0.0)
    tl.store(squares + rows * PARTS + block, tl.sum(values * values, axis=1), mask=rows < num_rows)


@triton.jit
def gated_product_kernel(x, squares, gain, weight, gated, num_rows, eps, D: tl.constexpr, F: tl.constexpr,
                         PARTS: tl.constexpr, PARTS_2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                         BK: tl.constexpr):
    first = tl.program_id(0) * BN
    rows, columns = tl.program_id(1) * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    scale = inverse_rms(squares, rows, num_rows, eps, D, PARTS, PARTS_2)
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    whole: tl.constexpr = D % BK == 0
    for start in range(0, D, BK):  # the loop of `product`, twice, for one load of x
        inner = start + tl.arange(0, BK)
        a_mask, w_mask = rows[:, None] < num_rows, columns[None, :] < F
        if not whole:
            a_mask, w_mask = a_mask & (inner[None, :] < D), w_mask & (inner[:, None] < D)
        a = tl.load(x + rows[:, None] * D + inner[None, :], mask=a_mask, other=0.0)
        g = tl.load(gain + inner, mask=inner < D, other=0.0)
        place = weight + columns[None, :] * D + inner[:, None]
        w_gate, w_up = tl.load(place, mask=w_mask, other=0.0), tl.load(place + F * D, mask=w_mask, other=0.0)
        a = (a * scale[:, None] * g[None, :]).to(w_gate.dtype)
        gate = tl.dot(a, w_gate, gate, input_precision="ieee")
        up = tl.dot(a, w_up, up, input_precision="ieee")
    dtype = gated.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(gated + rows[:, None] * F + columns[None, :], (silu * up).to(dtype),
             mask=(rows[:, None] < num_rows) & (columns[None, :] < F))


@triton.jit
def draw_kernel(logits, uniforms, index, tokens, logps, entropies, drawn, num_tokens, V: tl.constexpr,
                BV: tl.constexpr, GREEDY: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BV)
    column = tl.load(index)
    raw = tl.load(logits + row.to(tl.int64) * V + at, mask=at < V, other=-float("inf"))
    shifted = raw - tl.max(raw, axis=0)
    weights = tl.exp(shifted)
    log_probs = shifted - tl.log(tl.sum(weights, axis=0))
    kept = log_probs > -float("inf")
    if GREEDY:
        token = tl.argmax(raw, axis=0, tie_break_left=True)
    else:
        mass = tl.where(kept, tl.exp(log_probs.to(tl.float64)), 0.0)
        cdf = tl.cumsum(mass, axis=0)
        target = tl.load(uniforms + row * num_tokens + column) * tl.max(cdf, axis=0)
        token = tl.min(tl.where((cdf > target) & kept, at, V - 1), axis=0)  # V - 1: where all are NaN
    place = row * num_tokens + column
    tl.store(tokens + place, token.to(tl.int64))
    tl.store(drawn + row, token.to(tl.int64))
    tl.store(logps + place, tl.sum(tl.where(at == token, log_probs, 0.0), axis=0))
    tl.store(entropies + place, -tl.sum(tl.where(kept, tl.exp(log_probs) * log_probs, 0.0), axis=0))


# ------------------------------------------------------------------------------------------------------- launches


class Step(NamedTuple):
    """What the launches of one step share."""

    config: GPTConfig
    scratch: Scratch
    num_rows: int
    position: Tensor  # int64 [1]
    rope: Tensor  # [T + L, d/2, 2]
    mask: Tensor | None  # float32 [R, S] of 0 and -inf; None: every written position is attended to

    @property
    def size(self) -> int:
        return self.config.dim // self.config.n_head

    @property
    def norm(self) -> dict[str, int]:
        """How the sums of squares lie."""
        parts = -(-self.config.dim // tile_of("add_product", self.num_rows).columns)
        return dict(PARTS=parts, PARTS_2=power_of_2(parts))

    def grid_and_tile(self, kernel: str, num_columns: int) -> tuple[tuple[int, int], dict]:
        tile = tile_of(kernel, self.num_rows)
        return ((-(-num_columns // tile.columns), -(-self.num_rows // tile.rows)),
                dict(BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=tile.warps, num_stages=tile.stages))


def power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def embed(step: Step, tokens: Tensor, embeddings: Tensor) -> None:
    width = step.config.dim
    embed_kernel[(step.num_rows,)](tokens, embeddings, step.scratch.x, step.scratch.squares, D=width,
                                   BD=power_of_2(width), **step.norm)


def project_heads(step: Step, gain: Tensor, weight: Tensor, cache: Tensor) -> None:
    """x -> queries; keys and values into `cache` [2, R, K, S, d]."""
    config, scratch = step.config, step.scratch
    grid, tile = step.grid_and_tile("project_heads", (config.n_head + 2 * config.kv_heads) * step.size)
    project_heads_kernel[grid](scratch.x, scratch.squares, gain, weight, step.rope, step.position, scratch.queries,
                               cache, step.num_rows, config.norm_eps, *cache.stride()[:3], D=config.dim,
                               H=config.n_head, K=config.kv_heads, SIZE=step.size, **step.norm, **tile)


def attend(step: Step, cache: Tensor) -> None:
    """Queries and `cache` -> attended."""
    config, scratch, mask = step.config, step.scratch, step.mask
    positions, warps = tile_of("attend", step.num_rows)
    attend_kernel[(step.num_rows, config.n_head)](
        scratch.queries, cache, scratch.x if mask is None else mask, step.position, scratch.attended,
        *cache.stride()[:3], 0 if mask is None else mask.stride(0), step.size ** -0.5 * LOG2_E, H=config.n_head,
        GROUP=config.n_head // config.kv_heads, SIZE=step.size, BD=power_of_2(step.size), BS=positions,
        MASKED=mask is not None, num_warps=warps)


def add_product(step: Step, inputs: Tensor, weight: Tensor) -> None:
    """x += inputs @ weight^T."""
    grid, tile = step.grid_and_tile("add_product", step.config.dim)
    add_product_kernel[grid](inputs, weight, step.scratch.x, step.scratch.squares, step.num_rows, D=step.config.dim,
                             INNER=inputs.shape[1], PARTS=grid[0], **tile)


def gated_product(step: Step, gain: Tensor, weight: Tensor) -> None:
    """x -> gated."""
    config, scratch = step.config, step.scratch
    grid, tile = step.grid_and_tile("gated_product", config.ffn_dim)
    gated_product_kernel[grid](scratch.x, scratch.squares, gain, weight, scratch.gated, step.num_rows, config.norm_eps,
                               D=config.dim, F=config.ffn_dim, **step.norm, **tile)


def feed(config: GPTConfig, layers: list, outer, cache: Tensor, mask: Tensor | None, scratch: Scratch, tokens: Tensor,
         position: Tensor) -> Tensor:
    """tokens int64 [r] at `position` (int64 [1]) of the first r rows -> hidden states float32 [r, D] that predict the
    next ones.

    layers, outer: models.decoder.LayerWeights and OuterWeights. cache [layers, 2, R, K, S, d]. mask: float32 [R, S] of
    0 and -inf, or None where every written position is attended to.
    """
    step = Step(config, scratch, len(tokens), position, outer.rope, mask)
    embed(step, tokens, outer.embeddings)
    for weights, keys_values in zip(layers, cache):
        project_heads(step, weights.attention_norm, weights.wqkv, keys_values)
        attend(step, keys_values)
        add_product(step, scratch.attended, weights.wo)
        gated_product(step, weights.ffn_norm, weights.w13)
        add_product(step, scratch.gated, weights.w2)
    return torch.nn.functional.rms_norm(scratch.x[: len(tokens)], (config.dim,), outer.norm, config.norm_eps)


def draw(logits: Tensor, uniforms: Tensor, index: Tensor, tokens: Tensor, logps: Tensor, entropies: Tensor,
         greedy: bool) -> Tensor:
    """int64 [n]: a token for each row of tempered, filtered logits float32 [n, V], by inverse CDF at uniforms float64
    [>= n, L] column `index`; it, its log-probability and the distribution's entropy go into that column of the others.
    """
    drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    block = power_of_2(logits.shape[1])
    draw_kernel[(len(logits),)](logits, uniforms, index, tokens, logps, entropies, drawn, uniforms.shape[1],
                                V=logits.shape[1], BV=block, GREEDY=greedy, num_warps=min(16, max(1, block // 256)))
    return drawn
