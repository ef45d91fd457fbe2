"""The autoregressive transformer over image tokens: LlamaGen's GPT, key for key and number for number.

Pre-norm blocks with RMSNorm, grouped-query attention, 2D rotary positions and SwiGLU (arXiv 2406.06525; code facts
pinned by tests/golden). A prefix of T condition positions (one class token, or T caption slots) is followed by
image tokens. The same `forward_hidden` serves teacher forcing and cached decoding; sampling is models/generate.py.

Shapes: N rows, T condition positions, l <= L image tokens, S = T + l, D width, H heads, K key/value heads, d head
size, V codebook size.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """LlamaGen's field names and defaults; the last three fields are ours."""

    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None  # None: as many as query heads
    multiple_of: int = 256  # the SwiGLU width is rounded up to it
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    vocab_size: int = 16384
    block_size: int = 256  # L, image tokens
    num_classes: int = 1000
    caption_dim: int = 2048
    cls_token_num: int = 1  # T: 1 for a class, 120 for LlamaGen's captions
    model_type: str = "c2i"
    class_dropout_prob: float = 0.1  # share of conditions replaced by the null condition in pretraining
    token_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    initializer_range: float = 0.02
    uncond_token_num: int = 120  # rows of the null caption; LlamaGen's files always hold 120
    grid_size: tuple[int, int] | None = None  # (h, w) of the token grid; None: square

    def __post_init__(self):
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type must be c2i or t2i, got {self.model_type!r}")
        if self.dim % self.n_head or self.n_head % self.kv_heads:
            raise ValueError(f"dim {self.dim} must divide by n_head {self.n_head}, and n_head by n_kv_head "
                             f"{self.kv_heads}")
        if self.model_type == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"c2i models have one condition token, got cls_token_num {self.cls_token_num}")
        if self.model_type == "t2i" and self.uncond_token_num < self.cls_token_num:
            raise ValueError(f"uncond_token_num {self.uncond_token_num} is below cls_token_num {self.cls_token_num}")
        h, w = self.grid
        if h * w != self.block_size:
            raise ValueError(f"block_size {self.block_size} is no {h} x {w} grid: set grid_size to (height, width)")
        if (self.dim // self.n_head) % 2:
            raise ValueError(f"head size {self.dim // self.n_head} must be even for rotary positions")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def grid(self) -> tuple[int, int]:
        if self.grid_size is not None:
            return tuple(self.grid_size)
        side = round(self.block_size ** 0.5)
        return side, side

    @property
    def ffn_dim(self) -> int:
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of


GPT_SIZES = {
    "GPT-B": dict(n_layer=12, n_head=12, dim=768),
    "GPT-L": dict(n_layer=24, n_head=16, dim=1024),
    "GPT-XL": dict(n_layer=36, n_head=20, dim=1280),
    "GPT-XXL": dict(n_layer=48, n_head=24, dim=1536),
    "GPT-XXXL": dict(n_layer=48, n_head=40, dim=2560),
    "GPT-1B": dict(n_layer=22, n_head=32, dim=2048),
    "GPT-3B": dict(n_layer=24, n_head=32, dim=3200),
    "GPT-7B": dict(n_layer=32, n_head=32, dim=4096),
}


def rope_table(config: GPTConfig) -> Tensor:
    """(cos, sin) of 2D rotary positions: float32 [T + L, d/2, 2].

    The first half of a head's pairs turns with the row, the second half with the column. Condition positions are all
    zeros, not identity: their queries and keys vanish, so attention to them has logit 0 and attention from them is
    uniform. LlamaGen was trained that way.
    """
    h, w = config.grid
    half = config.dim // config.n_head // 2
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)  # [d/4]
    rows = torch.outer(torch.arange(h).float(), frequencies)  # [h, d/4]
    columns = torch.outer(torch.arange(w).float(), frequencies)  # [w, d/4]
    angles = torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], dim=-1)  # [h, w, d/2]
    table = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(0, 1)  # [L, d/2, 2]
    return torch.cat([table.new_zeros(config.cls_token_num, *table.shape[1:]), table])


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """x [N, S, H, d] with rope [S, d/2, 2]: rotates neighbouring pairs, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each [N, S, H, d/2]
    cos, sin = rope[:, None].unbind(-1)  # each [S, 1, d/2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class KVCache:
    """Keys and values of all layers: [layers, 2, N, K, S, d]: the heads of all rows are one batch of products."""

    def __init__(self, config: GPTConfig, num_rows: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layer, 2, num_rows, config.kv_heads, length, config.dim // config.n_head)
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [N, K, s, d] at positions start.. and returns views of everything written so far."""
        end = start + k.shape[2]
        keys, values = self.data[layer]  # [N, K, S, d] each
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def begin(self, prefix: "KVCache", rows: Tensor) -> None:
        """Row r starts as row rows[r] of `prefix` (int64 [N]); later positions keep what they held."""
        self.data[..., : prefix.data.shape[4], :] = prefix.data.index_select(2, rows)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, cast back before the gain (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.head_dim = config.dim // config.n_head
        self.wqkv = nn.Linear(config.dim, (self.n_head + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.resid_dropout_p)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, write) -> Tensor:
        """write(k, v) -> keys and values to attend to; None in teacher forcing, where k and v are the whole row."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [N, s, H + 2K, d]
        q, k, v = heads.split([self.n_head, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v))  # [N, heads, s, d]
        if write is not None:
            k, v = write(k, v)
        causal = mask is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           enable_gqa=self.n_head != self.kv_heads)
        return self.resid_dropout(self.wo(y.transpose(1, 2).flatten(2)))  # [N, s, D]


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, write=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, write)
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedder(nn.Module):
    """Class ids, and `num_classes` as the null class."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)
        self.null_class = config.num_classes

    def forward(self, class_ids: Tensor) -> Tensor:
        return self.embedding_table(class_ids).unsqueeze(1)  # [N, 1, D]

    def null_condition(self, num_rows: int) -> Tensor:
        return torch.full((num_rows,), self.null_class, device=self.embedding_table.weight.device)


class CaptionProjection(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, captions: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(captions), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features [N, T, C] -> [N, T, D]; the null caption is a buffer, never trained."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.num_slots = config.cls_token_num
        null = torch.randn(config.uncond_token_num, config.caption_dim) / config.caption_dim ** 0.5
        self.register_buffer("uncond_embedding", null)

    def forward(self, captions: Tensor) -> Tensor:
        return self.cap_proj(captions.to(self.cap_proj.fc1.weight.dtype))

    def null_condition(self, num_rows: int) -> Tensor:
        return self.uncond_embedding[: self.num_slots].expand(num_rows, -1, -1)  # [N, T, C]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(config) if config.model_type == "c2i" else CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config), persistent=False)  # [T + L, d/2, 2]
        self.gradient_checkpointing = False
        self.apply(self._init_weights)
        nn.init.zeros_(self.output.weight)  # LlamaGen starts from a uniform distribution over codes

    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def null_condition(self, num_rows: int) -> Tensor:
        """The unconditional half's condition: null class ids int64 [N], or the null caption [N, T, C]."""
        return self.cls_embedding.null_condition(num_rows)

    def forward_hidden(self, x: Tensor, start: int, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Embeddings x [N, s, D] at positions start.. -> normalised hidden states [N, s, D].

        mask: bool, broadcastable to [N, H, s, keys], True = attend; None is causal, or everything written when s = 1.
        With `cache`, keys and values are written to it and attention reads positions 0 .. start + s.
        """
        rope = self.rope[start: start + x.shape[1]]
        for i, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, rope, mask, lambda k, v, i=i: cache.update(i, start, k, v))
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask)
        return self.norm(x)

    def hidden(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Hidden states that predict image tokens 0 .. l: [N, l + 1, D]. Arguments as in `forward`."""
        if tokens.shape[1] >= self.config.block_size:
            raise ValueError(f"at most {self.config.block_size - 1} tokens can precede a prediction, "
                             f"got {tokens.shape[1]}")
        prefix = self.cls_embedding(condition)  # [N, T, D]
        x = torch.cat([prefix, self.tok_embeddings(tokens)], dim=1)  # [N, T + l, D]
        condition_mask = as_mask(condition_mask)
        mask = None if condition_mask is None else prefix_mask(condition_mask, x.shape[1])
        return self.forward_hidden(self.tok_dropout(x), 0, mask)[:, prefix.shape[1] - 1:]

    def forward(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced logits float32 [N, l + 1, V]: entry i predicts token i from the condition and tokens < i.

        condition: class ids int [N], or caption embeddings float [N, T, C] with condition_mask bool [N, T] (True =
        a real caption slot, left-padded). tokens: int [N, l], l < L.
        """
        return self.output(self.hidden(condition, tokens, condition_mask)).float()


def as_mask(condition_mask: Tensor | None) -> Tensor | None:
    """bool, also from the 0 and 1 that tokenizers give; ValueError for other numbers."""
    if condition_mask is None or condition_mask.dtype == torch.bool:
        return condition_mask
    if condition_mask.is_floating_point() or ((condition_mask != 0) & (condition_mask != 1)).any():
        low, high = condition_mask.min().item(), condition_mask.max().item()
        raise ValueError("condition_mask must be bool, or whole numbers 0 and 1 (1: a real slot), got "
                         f"{condition_mask.dtype} from {low:g} to {high:g}")
    return condition_mask.bool()


def prefix_mask(condition_mask: Tensor, length: int) -> Tensor:
    """Causal attention that skips padded caption slots, except that each position sees itself: bool [N, 1, S, S]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=condition_mask.device).tril()
    columns = F.pad(condition_mask, (0, length - condition_mask.shape[1]), value=True)  # [N, S]
    diagonal = torch.eye(length, dtype=torch.bool, device=condition_mask.device)
    return ((causal & columns[:, None]) | diagonal)[:, None]
