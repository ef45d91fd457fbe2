"""The policy: sample token sequences, score given ones, decode them to images.

`Scorer` is the differentiable half, a module whose forward gives the log-probabilities of given tokens under the
distribution that `generate` samples. `Policy` bundles the generator that a trainer or a sampling script works with.

Shapes: N rows, T condition positions, L image tokens, D width, V codebook size.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.decoder import native_bfloat16
from models.generate import (
    Engine,
    Generation,
    SamplingConfig,
    evaluation_mode,
    generate,
    guide,
    log_distribution,
    row_batches,
    token_statistics,
)
from models.gpt import GPT
from models.head import logits_of
from models.streams import SideStream
from models.vq import VQModel

GUIDANCE_MODES = ("guided", "guided_detach_uncond", "conditional")


class Scorer(nn.Module):
    """Teacher-forced log-probabilities of given tokens.

    guidance_logprob says which distribution they belong to when sampling is guided (cfg_scale s != 1):
    - guided: the sampled one, with gradient through the conditional and the unconditional half;
    - guided_detach_uncond: the sampled one, the unconditional half without gradient;
    - conditional: guidance ignored, as AR-GRPO does. Biased: these are not the sampled tokens' probabilities.
    """

    def __init__(self, gpt: GPT, sampling: SamplingConfig, guidance_logprob: str = "guided", chunk_tokens: int = 1024):
        super().__init__()
        if guidance_logprob not in GUIDANCE_MODES:
            raise ValueError(f"guidance_logprob must be one of {', '.join(GUIDANCE_MODES)}, got {guidance_logprob!r}")
        if sampling.greedy:
            raise ValueError("greedy decoding is no distribution: log-probabilities need greedy=False")
        self.gpt, self.sampling, self.guidance_logprob = gpt, sampling, guidance_logprob
        self.chunk_tokens = chunk_tokens

    def forward(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (logps float32 [N, L], entropies float32 [N, L] without gradient), nats.

        condition: class ids int [N], or caption embeddings [N, T, C] with condition_mask bool [N, T]; tokens int64
        [N, L]. Memory holds the logits of `chunk_tokens` tokens at a time, forward and backward.
        """
        hidden = self.guided_hidden(condition, tokens, condition_mask).flatten(0, 1)  # [N L, D]
        flat = tokens.flatten()
        chunks = [checkpoint(self.head, hidden[i: i + self.chunk_tokens], flat[i: i + self.chunk_tokens],
                             use_reentrant=False) for i in range(0, len(flat), self.chunk_tokens)]
        # Copies: the hooks of a sharded module would be lost with a view that is changed in place.
        logps, entropies = (torch.cat(parts).view(tokens.shape).clone() for parts in zip(*chunks))
        return logps, entropies

    def guided_hidden(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None) -> Tensor:
        """Hidden states [N, L, D] whose head product is the logits that the sampler used."""
        num_guided = self.sampling.num_guided(tokens.shape[1])
        if self.guidance_logprob == "conditional" or not num_guided:
            return self.gpt.hidden(condition, tokens[:, :-1], condition_mask)
        cond, uncond = self.halves(condition, tokens, condition_mask, num_guided)
        return torch.cat([guide(cond[:, :num_guided], uncond, self.sampling.cfg_scale), cond[:, num_guided:]], dim=1)

    def halves(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None,
               num_guided: int) -> tuple[Tensor, Tensor]:
        """Hidden states [N, L, D] with the condition, and [N, num_guided, D] without."""
        null = self.gpt.null_condition(len(tokens)).to(condition.dtype)
        if self.guidance_logprob == "guided" and num_guided == tokens.shape[1]:  # alike: 2 N rows in one pass
            mask = None if condition_mask is None else condition_mask.repeat(2, 1)
            packed = self.gpt.hidden(torch.cat([condition, null]), tokens[:, :-1].repeat(2, 1), mask)
            return packed.chunk(2)
        cond = self.gpt.hidden(condition, tokens[:, :-1], condition_mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.guidance_logprob == "guided"):
            return cond, self.gpt.hidden(null, tokens[:, : num_guided - 1], condition_mask)

    def head(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [n, D], tokens [n] -> log-probabilities and entropies [n]."""
        log_probs = log_distribution(logits_of(hidden, self.gpt.output.weight), self.sampling, tokens)  # [n, V]
        return token_statistics(log_probs, tokens)


def default_rollout_dtype(autocast_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The scorer's, so that both round alike; float32 on CPUs that would have to emulate it."""
    native = device.type != "cpu" or autocast_dtype == torch.bfloat16 and native_bfloat16()
    return autocast_dtype if native and autocast_dtype is not None else torch.float32


@dataclass
class Policy:
    """A generator ready for use: transformer, tokenizer, conditions, and how it samples."""

    gpt: GPT
    vq: VQModel
    sampling: SamplingConfig
    text_encoder: object | None = None  # models.text.TextEncoder for text-to-image models
    autocast_dtype: torch.dtype | None = None  # None: float32 throughout
    decode_batch_size: int = 64
    rollout_dtype: torch.dtype | None = None  # of the sampler's matrix products; None: `default_rollout_dtype`
    vq_dtype: torch.dtype = torch.float32  # of the decoding to images
    engine: Engine = field(default_factory=Engine, repr=False)
    side_stream: SideStream | None = field(default=None, repr=False)  # scores rollout batches beside the next ones

    @property
    def device(self) -> torch.device:
        return self.gpt.output.weight.device

    def autocast(self):
        """Context of every forward pass, so that sampler and scorer round alike."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def encode(self, conditions) -> tuple[Tensor, Tensor | None]:
        """`dataset.Condition`s -> (class ids int64 [P], None) or (embeddings float32 [P, T, C], mask bool [P, T])."""
        if self.text_encoder is not None:
            embeddings, mask = self.text_encoder.encode([c.prompt for c in conditions])
            return embeddings.to(self.device), mask.to(self.device)
        class_ids = [c.class_id for c in conditions]
        limit = self.gpt.config.num_classes
        bad = [c for c in class_ids if c is None or not 0 <= c < limit]
        if bad:
            raise ValueError(f"class-to-image models need class ids from 0 to {limit - 1}, got {bad[0]}")
        return torch.tensor(class_ids, device=self.device), None

    def scorer(self, guidance_logprob: str, chunk_tokens: int) -> Scorer:
        return Scorer(self.gpt, self.sampling, guidance_logprob, chunk_tokens)

    def sample(self, condition: Tensor, condition_mask: Tensor | None, seeds, num_generations: int = 1) -> Generation:
        """num_generations token sequences per encoded condition, prompt-major; one seed per sequence. As many at a time
        as fit into a GPU's memory, which changes none of them."""
        dtype = self.rollout_dtype or default_rollout_dtype(self.autocast_dtype, self.device)
        rows = torch.arange(len(condition) * num_generations).view(len(condition), num_generations)
        seeds = torch.randint(2 ** 62, (rows.numel(),)).tolist() if seeds is None else seeds
        parts = []
        # No cache: prefill, the one pass here, uses each weight once, and copies of all would stay till the end.
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
            limit = self.engine.limit(self.gpt, self.sampling, rows.numel())
            for prompts, members in row_batches(*rows.shape, limit):
                mask = None if condition_mask is None else condition_mask[prompts]
                part = rows[prompts, members]
                parts.append(generate(self.gpt, condition[prompts], self.sampling, mask,
                                      [seeds[row] for row in part.flatten()], part.shape[1], self.engine))
        return Generation(*map(torch.cat, zip(*((g.tokens, g.logps, g.entropies) for g in parts))))

    @torch.no_grad()
    def score(self, scorer: Scorer, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None,
              batch_size: int) -> Tensor:
        """log-probabilities float32 [N, L] of `tokens` under `scorer`, without gradient, in batches."""
        parts = []
        with self.autocast(), evaluation_mode(scorer):
            for i in range(0, len(tokens), batch_size):
                rows = slice(i, i + batch_size)
                mask = None if condition_mask is None else condition_mask[rows]
                parts.append(scorer(condition[rows], tokens[rows], mask)[0])
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """tokens int64 [N, L] -> images uint8 [N, 3, H, W], rounded to the nearest level as LlamaGen does.

        size: (H, W), by LlamaGen's protocol: bicubic, without antialiasing, on the decoder's floats; None: as decoded.
        """
        grids, images = tokens.unflatten(1, self.gpt.config.grid), []  # [N, h, w]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.vq_dtype == torch.bfloat16):
            for part in grids.split(self.decode_batch_size):
                pixels = self.vq.decode(part)
                images.append(to_uint8(pixels if size is None else F.interpolate(pixels, size=size, mode="bicubic")))
        return torch.cat(images)


def to_uint8(images: Tensor) -> Tensor:
    """images float in about [-1, 1] -> uint8 0 .. 255."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
