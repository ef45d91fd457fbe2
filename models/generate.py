"""Cached sampling of image tokens, and the one definition of the distribution that they are drawn from.

A ladder of small functions: guide hidden states, turn them into filtered log-probabilities, draw, decode one token,
generate all. `models/policy.py` scores given tokens through the same `guide` and `log_distribution`, so that the
log-probability used in training is that of the distribution that was sampled.

Left out: min-p, repetition penalties, end-of-sequence logic (images have a fixed length).

Shapes: P prompts, G generations per prompt, N = P G rows, T condition positions, L image tokens, D width, V codebook.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpt import GPT, KVCache, prefix_mask


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of likeliest tokens whose mass reaches p; 1: all
    cfg_scale: float = field(default=1.0, metadata={  # classifier-free guidance, uncond + s (cond - uncond)
        "aliases": ["gen_cfg_cfg_scale"], "help": "guidance scale; 1: none"})
    cfg_interval: int = -1  # guide tokens 0 .. cfg_interval + 1 only (LlamaGen's counting); -1: all
    greedy: bool = False  # take the most likely token

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature} (use greedy for the arg max)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale must not be negative, got {self.cfg_scale}")

    def num_guided(self, num_tokens: int) -> int:
        """How many of the first tokens are drawn with guidance."""
        if self.cfg_scale == 1.0:
            return 0
        return num_tokens if self.cfg_interval < 0 else min(self.cfg_interval + 2, num_tokens)


@dataclass
class Generation:
    tokens: Tensor  # int64 [N, L]
    logps: Tensor  # float32 [N, L], of the truncated, tempered, guided distribution that was sampled, nats
    entropies: Tensor  # float32 [N, L], of the same distribution, nats


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on hidden states [..., D].

    The head W has no bias, so W u + s (W c - W u) = W (u + s (c - u)): one head product instead of two.
    """
    return torch.lerp(uncond.float(), cond.float(), scale).type_as(cond)


def log_distribution(logits: Tensor, sampling: SamplingConfig, taken: Tensor | None = None) -> Tensor:
    """Log-probabilities float32 [n, V] of softmax(filter(logits / temperature)); filtered tokens are -inf.

    taken: int64 [n], tokens that stay in the kept set whatever the filter says. A sampled token is always kept, so
    this changes nothing for the sampler; when the policy has moved since, it keeps the log-probability finite.
    """
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        logits = logits.masked_fill(~kept_tokens(logits.detach(), sampling, taken), -torch.inf)
    return F.log_softmax(logits, dim=-1)


def kept_tokens(logits: Tensor, sampling: SamplingConfig, taken: Tensor | None) -> Tensor:
    """bool [n, V]: what top-k, then top-p (nucleus, arXiv 1904.09751) leave."""
    keep = torch.ones_like(logits, dtype=torch.bool)
    if sampling.top_k:
        k = min(sampling.top_k, logits.shape[-1])
        keep = logits >= logits.topk(k, dim=-1).values[:, -1:]
    if sampling.top_p < 1.0:
        ordered, order = logits.masked_fill(~keep, -torch.inf).sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        mass_before = probs.cumsum(dim=-1) - probs
        keep = keep & torch.zeros_like(keep).scatter(-1, order, mass_before <= sampling.top_p)
    if taken is not None:
        keep = keep.scatter(-1, taken[:, None], True)
    return keep


def token_statistics(log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """log_probs [n, V], tokens [n] -> (log-probability of each token [n], entropy of each distribution [n])."""
    logps = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
    entropies = torch.special.entr(log_probs.detach().exp()).sum(-1)
    return logps, entropies


def row_uniforms(seeds, length: int) -> Tensor:
    """float64 [N, length] in [0, 1): row r comes from a Philox counter generator keyed by seeds[r] alone."""
    rows = [np.random.Generator(np.random.Philox(key=int(seed) % 2 ** 64)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. [n, V], [n] -> int64 [n].

    In float64, where u * total < total always holds, so a token of probability zero is never drawn.
    """
    cdf = log_probs.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(-1)


@contextmanager
def evaluation_mode(module: torch.nn.Module):
    """Dropout off inside, the former mode back outside."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@dataclass
class Decoding:
    """The mutable state of one rollout: rows 0 .. N-1 are conditional, N .. 2N-1 unconditional when guided."""

    cache: KVCache
    columns: Tensor | None  # bool [rows, 1, 1, T + L]: positions that may be attended to; None: all
    hidden: Tensor  # [rows, D], predicts the next token
    num_rows: int  # N


def prefill(gpt: GPT, condition: Tensor, condition_mask: Tensor | None, guided: bool, group: int) -> Decoding:
    """Runs each prompt's condition prefix once, and the unconditional one once per distinct caption mask, and hands
    the result to all `group` rows of the prompt."""
    num_prompts, device = len(condition), condition.device
    rows = torch.arange(num_prompts, device=device).repeat_interleave(group)  # [N]
    if guided:
        if condition_mask is None:
            uncond_of_prompt, num_uncond = torch.zeros(num_prompts, dtype=torch.long, device=device), 1
        else:
            masks, uncond_of_prompt = condition_mask.unique(dim=0, return_inverse=True)
            condition_mask, num_uncond = torch.cat([condition_mask, masks]), len(masks)
        condition = torch.cat([condition, gpt.null_condition(num_uncond).to(condition.dtype)])
        rows = torch.cat([rows, num_prompts + uncond_of_prompt.repeat_interleave(group)])  # [2N]
    prefix = gpt.cls_embedding(condition)  # [P + U, T, D]
    length = gpt.config.cls_token_num
    total = length + gpt.config.block_size - 1  # the last token is never fed back
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else prefix.dtype
    cache = KVCache(gpt.config, len(condition), length, dtype, device)
    mask = None if condition_mask is None else prefix_mask(condition_mask, length)
    hidden = gpt.forward_hidden(prefix, 0, mask, cache)[:, -1]  # [P + U, D]
    columns = None
    if condition_mask is not None:
        columns = F.pad(condition_mask[rows], (0, total - length), value=True)[:, None, None]
    return Decoding(cache.expanded(rows, total), columns, hidden[rows], num_prompts * group)


def decode_one(gpt: GPT, state: Decoding, token: Tensor, index: int, guided: bool) -> None:
    """Feeds image token `index` (int64 [N]) and leaves in `state.hidden` what predicts the next one."""
    token = torch.cat([token, token]) if guided else token
    position = gpt.config.cls_token_num + index
    mask = None if state.columns is None else state.columns[: len(token), ..., : position + 1]
    x = gpt.tok_embeddings(token)[:, None]  # [rows, 1, D]
    state.hidden = gpt.forward_hidden(x, position, mask, state.cache)[:, 0]


@torch.no_grad()
def generate(gpt: GPT, condition: Tensor, sampling: SamplingConfig, condition_mask: Tensor | None = None,
             seeds=None, num_generations: int = 1) -> Generation:
    """Samples `num_generations` token sequences for each of P conditions.

    condition: class ids int [P], or caption embeddings float [P, T, C] with condition_mask bool [P, T].
    seeds: one integer per row (N = P * num_generations, prompt-major). A row's tokens depend on its seed and condition
    alone, not on its batch neighbours. None draws fresh seeds from torch's global generator.
    """
    num_tokens, num_rows, device = gpt.config.block_size, len(condition) * num_generations, condition.device
    if seeds is None:
        seeds = torch.randint(2 ** 62, (num_rows,))
    if len(seeds) != num_rows:
        raise ValueError(f"one seed per row is needed: {num_rows} rows, {len(seeds)} seeds")
    uniforms = row_uniforms(seeds, num_tokens).to(device)  # [N, L]
    num_guided = sampling.num_guided(num_tokens)
    tokens = torch.empty(num_rows, num_tokens, dtype=torch.long, device=device)
    logps = torch.empty(num_rows, num_tokens, device=device)
    entropies = torch.empty_like(logps)
    with evaluation_mode(gpt):
        state = prefill(gpt, condition, condition_mask, num_guided > 0, num_generations)
        for i in range(num_tokens):
            hidden = state.hidden[:num_rows]
            if i < num_guided:
                hidden = guide(hidden, state.hidden[num_rows:], sampling.cfg_scale)
            log_probs = log_distribution(gpt.output(hidden), sampling)  # [N, V]
            tokens[:, i] = log_probs.argmax(-1) if sampling.greedy else draw(log_probs, uniforms[:, i])
            logps[:, i], entropies[:, i] = token_statistics(log_probs, tokens[:, i])
            if i + 1 < num_tokens:
                decode_one(gpt, state, tokens[:, i], i, guided=i + 1 < num_guided)
    return Generation(tokens, logps, entropies)
