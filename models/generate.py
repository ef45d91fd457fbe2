"""Cached sampling of image tokens, and the one definition of the distribution that they are drawn from.

A ladder of small functions: guide hidden states, turn them into filtered log-probabilities, draw, decode one token,
generate all. `models/policy.py` scores given tokens through the same `guide` and `log_distribution`, so that the
log-probability used in training is that of the distribution that was sampled.

Left out: min-p, repetition penalties, end-of-sequence logic (images have a fixed length).

Shapes: P prompts, G generations per prompt, N = P G rows, T condition positions, L image tokens, D width, V codebook.
"""
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Decoder, rows_that_fit
from models.gpt import GPT, KVCache, as_mask, prefix_mask
from models.graphs import StepGraphs
from utils.config import check_flags, flag
from utils.gpu import free_bytes


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = flag(1.0, "of the softmax", above=0)
    top_k: int = flag(0, "keep the k most likely tokens; 0: all", least=0)
    top_p: float = flag(1.0, "keep the smallest set of likeliest tokens whose mass reaches p; 1: all")
    cfg_scale: float = flag(1.0, "classifier-free guidance, uncond + s (cond - uncond); 1: none", least=0,
                            aliases=("gen_cfg_cfg_scale",))
    cfg_interval: int = flag(-1, "guide tokens 0 .. cfg_interval + 1 only (LlamaGen's counting); -1: all")
    greedy: bool = flag(False, "take the most likely token; for sampling alone, as it is no distribution")

    def __post_init__(self):
        check_flags(self)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

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
    return F.log_softmax(filtered_logits(logits, sampling, taken), dim=-1)


def filtered_logits(logits: Tensor, sampling: SamplingConfig, taken: Tensor | None = None) -> Tensor:
    """float32 [n, V]: logits / temperature, -inf where top-k and top-p leave nothing."""
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        logits = logits.masked_fill(~kept_tokens(logits.detach(), sampling, taken), -torch.inf)
    return logits


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
    log_probs = log_probs.detach()
    surprise = -log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # finite, as a filtered token has 0 * inf
    return logps, torch.linalg.vecdot(log_probs.exp(), surprise)


def row_uniforms(seeds, length: int) -> Tensor:
    """float64 [N, length] in [0, 1): row r comes from a Philox counter generator keyed by seeds[r] alone."""
    rows = [np.random.Generator(np.random.Philox(key=int(seed) % 2 ** 64)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. [n, V], [n] -> int64 [n].

    In float64, where u * total < total always holds, so a token of probability zero is never drawn. Where there are no
    probabilities (NaN), the last token is; its log-probability tells.
    """
    cdf = log_probs.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(-1)
    return token.clamp(max=cdf.shape[-1] - 1)


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
class Prefix:
    """The conditions of P prompts, run once each, and of U unconditional rows, one per distinct caption mask."""

    cache: KVCache  # T positions of P + U rows
    hidden: Tensor  # [P + U, D], predicts the first image token
    mask: Tensor | None  # bool [P + U, T]
    cond_rows: Tensor  # int64 [P], 0 .. P - 1
    uncond_rows: Tensor | None  # int64 [P]: the row that is each prompt's unconditional half; None: not guided

    def rows(self, group: int, capacity: int) -> Tensor:
        """int64 [R]: where each row of a rollout of `capacity` images starts; rows past P G repeat the first."""
        halves = [self.cond_rows] if self.uncond_rows is None else [self.cond_rows, self.uncond_rows]
        rows = torch.stack(halves).repeat_interleave(group, dim=1)  # [1 or 2, P G]
        padding = rows[:, :1].expand(-1, capacity - rows.shape[1])
        return torch.cat([rows, padding], dim=1).flatten()


def prefill(gpt: GPT, condition: Tensor, condition_mask: Tensor | None, guided: bool, dtype: torch.dtype) -> Prefix:
    cond_rows, uncond_rows = torch.arange(len(condition), device=condition.device), None
    if guided:
        num_uncond, uncond_of_prompt = 1, torch.zeros_like(cond_rows)
        if condition_mask is not None:
            masks, uncond_of_prompt = condition_mask.unique(dim=0, return_inverse=True)
            condition_mask, num_uncond = torch.cat([condition_mask, masks]), len(masks)
        uncond_rows = len(condition) + uncond_of_prompt
        condition = torch.cat([condition, gpt.null_condition(num_uncond).to(condition.dtype)])
    length = gpt.config.cls_token_num
    cache = KVCache(gpt.config, len(condition), length, dtype, condition.device)
    mask = None if condition_mask is None else prefix_mask(condition_mask, length)
    kind, matrices = condition.device.type, gpt.layers[0].attention.wqkv.weight.dtype
    # A float32 rollout of weights that a sharded run gathers in 16 bits.
    rounded = matrices != torch.float32 and not torch.is_autocast_enabled(kind)
    with torch.autocast(kind, dtype=matrices) if rounded else nullcontext():
        hidden = gpt.forward_hidden(gpt.cls_embedding(condition), 0, mask, cache)[:, -1]  # [P + U, D]
    return Prefix(cache, hidden, condition_mask, cond_rows, uncond_rows)


class Rollout:
    """Buffers of a rollout of `capacity` images, and the step that fills in the next token of each.

    Rows 0 .. capacity - 1 are conditional, the others, when guided, unconditional. Everything that a step reads and
    writes stays in place, so that a GPU replays it as a captured graph, in this rollout and in later ones.
    """

    def __init__(self, gpt: GPT, sampling: SamplingConfig, capacity: int, dtype: torch.dtype, bucket: int = 0,
                 fused: bool | None = None, graphs: bool | None = None):
        config, weight = gpt.config, gpt.output.weight
        self.gpt, self.sampling, self.capacity, self.dtype = gpt, sampling, capacity, dtype
        self.num_tokens, self.num_guided = config.block_size, sampling.num_guided(config.block_size)
        num_rows = 2 * capacity if self.num_guided else capacity
        self.decoder = Decoder(config, num_rows, dtype, weight.device, bucket, fused, graphs)
        self.hidden = weight.new_zeros(num_rows, config.dim)  # predicts the token at `index`
        self.index = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.uniforms = torch.zeros(capacity, self.num_tokens, dtype=torch.float64, device=weight.device)
        self.tokens = torch.zeros_like(self.uniforms, dtype=torch.long)
        self.logps, self.entropies = (torch.zeros_like(self.uniforms, dtype=torch.float32) for _ in range(2))
        self.graphs = StepGraphs(enabled=weight.is_cuda if graphs is None else graphs)

    def begin(self, condition: Tensor, condition_mask: Tensor | None, uniforms: Tensor, group: int) -> None:
        """Loads the weights as they are now and the conditions; uniforms float64 [P group, L]."""
        self.decoder.load(self.gpt)
        prefix = prefill(self.gpt, condition, condition_mask, self.num_guided > 0, self.dtype)
        rows = prefix.rows(group, self.capacity)
        self.decoder.begin(prefix.cache, rows, prefix.mask)
        self.hidden.copy_(prefix.hidden[rows])
        self.uniforms[: len(uniforms)] = uniforms
        self.index.zero_()

    def run(self) -> None:
        for i in range(self.num_tokens - 1):
            length = self.decoder.read_length(self.gpt.config.cls_token_num + i)
            self.graphs(self.plain_step, length, i < self.num_guided, i + 1 < self.num_guided)
        self.sample(self.num_tokens - 1 < self.num_guided)

    def plain_step(self, length: int, guided: bool, next_guided: bool) -> None:
        """Draws the token at `index`, and feeds it to whatever rows the token after it needs."""
        token = self.sample(guided)
        fed = torch.cat([token, token]) if next_guided else token
        self.hidden[: len(fed)] = self.decoder.feed(fed, self.index + self.gpt.config.cls_token_num, length)
        self.index += 1

    def sample(self, guided: bool) -> Tensor:
        """int64 [capacity]: the token at `index`, written down with its statistics."""
        hidden = self.hidden[: self.capacity]
        if guided:
            hidden = guide(hidden, self.hidden[self.capacity:], self.sampling.cfg_scale)
        logits = filtered_logits(self.decoder.logits(hidden), self.sampling)  # [capacity, V]
        if self.decoder.kernels:
            return self.decoder.kernels.draw(logits, self.uniforms, self.index, self.tokens, self.logps, self.entropies,
                                             self.sampling.greedy)
        log_probs = F.log_softmax(logits, dim=-1)
        if self.sampling.greedy:
            token = log_probs.argmax(-1)
        else:
            token = draw(log_probs, self.uniforms.index_select(1, self.index).squeeze(1))
        columns = (token, *token_statistics(log_probs, token))
        for buffer, column in zip((self.tokens, self.logps, self.entropies), columns):
            buffer.index_copy_(1, self.index, column[:, None])
        return token

    def serves(self, gpt: GPT, sampling: SamplingConfig, num_rows: int, dtype: torch.dtype) -> bool:
        """Whether its buffers do for such a rollout, at most half of them idle."""
        return (self.gpt is gpt and self.sampling == sampling and self.dtype == dtype
                and num_rows <= self.capacity < 2 * num_rows and self.hidden.device == gpt.output.weight.device)


class Engine:
    """What GPUs keep from one rollout for the next: buffers, prepared weights, graphs. CPUs keep nothing."""

    def __init__(self):
        self.kept: Rollout | None = None
        self.limits: dict[tuple, int] = {}

    def rollout(self, gpt: GPT, sampling: SamplingConfig, num_rows: int, dtype: torch.dtype) -> Rollout:
        if self.kept is not None and self.kept.serves(gpt, sampling, num_rows, dtype):
            return self.kept
        self.release()
        rollout = Rollout(gpt, sampling, num_rows, dtype)
        if gpt.output.weight.is_cuda:
            self.kept = rollout
        return rollout

    def release(self) -> None:
        self.kept = None

    def limit(self, gpt: GPT, sampling: SamplingConfig, num_rows: int) -> int:
        """Images at a time, of num_rows. On GPUs, half of the memory that was free the first time: buffers are kept,
        and training needs the rest; asked once, so that the next rollout has the same shapes and replays its graphs."""
        device, dtype = gpt.output.weight.device, compute_dtype(gpt)
        if device.type != "cuda":
            return num_rows
        key = (gpt.config, sampling, dtype, num_rows)
        if key not in self.limits:
            self.release()
            halves = 2 if sampling.num_guided(gpt.config.block_size) else 1
            self.limits[key] = max(1, rows_that_fit(gpt.config, dtype, free_bytes(device) // 2) // halves)
        return self.limits[key]


def row_batches(num_prompts: int, group: int, limit: int) -> list[tuple[slice, slice]]:
    """Even parts (prompts, members of their groups) of at most `limit` rows, in order of rows."""
    per_prompt = even_parts(group, limit)
    if len(per_prompt) > 1:
        return [(slice(i, i + 1), members) for i in range(num_prompts) for members in per_prompt]
    return [(prompts, slice(0, group)) for prompts in even_parts(num_prompts, limit // group)]


def even_parts(count: int, limit: int) -> list[slice]:
    size = -(-count // -(-count // limit))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def compute_dtype(gpt: GPT) -> torch.dtype:
    """Of matrix products here: autocast's, or the parameters'."""
    device = gpt.output.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gpt.output.weight.dtype


@torch.no_grad()
def generate(gpt: GPT, condition: Tensor, sampling: SamplingConfig, condition_mask: Tensor | None = None,
             seeds=None, num_generations: int = 1, engine: Engine | None = None) -> Generation:
    """Samples `num_generations` token sequences for each of P conditions.

    condition: class ids int [P], or caption embeddings float [P, T, C] with condition_mask bool [P, T].
    seeds: one integer per row (N = P * num_generations, prompt-major). A row's tokens depend on its seed and condition
    alone, not on its batch neighbours. None draws fresh seeds from torch's global generator.
    engine: keeps a GPU's buffers and graphs for the next call. Under autocast, matrix products are in its dtype.
    """
    num_rows, dtype, condition_mask = len(condition) * num_generations, compute_dtype(gpt), as_mask(condition_mask)
    if seeds is None:
        seeds = torch.randint(2 ** 62, (num_rows,))
    if len(seeds) != num_rows:
        raise ValueError(f"one seed per row is needed: {num_rows} rows, {len(seeds)} seeds")
    uniforms = row_uniforms(seeds, gpt.config.block_size)  # [N, L]
    rollout = (engine or Engine()).rollout(gpt, sampling, num_rows, dtype)
    with evaluation_mode(gpt):
        rollout.begin(condition, condition_mask, uniforms.to(condition.device), num_generations)
        with torch.autocast(condition.device.type, enabled=False):  # the decoder's weights have its dtype already
            rollout.run()
    return Generation(*(buffer[:num_rows].clone() for buffer in (rollout.tokens, rollout.logps, rollout.entropies)))
