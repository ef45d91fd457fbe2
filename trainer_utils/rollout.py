"""Sampling images and having them scored, batch by batch: what training and its evaluations share."""
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset import Condition
from img_gen_grpo_rewards import RewardSet, Scoring
from models.policy import Policy
from models.streams import SideStream


@dataclass
class Samples:
    """Images of P prompts, being scored; rows are prompt-major."""

    encoded: tuple[Tensor, Tensor | None]  # the prompts' conditions and their mask, P rows
    tokens: Tensor  # int64 [N, L]
    logps: Tensor  # float32 [N, L]
    entropies: Tensor  # float32 [N, L]
    images: Tensor  # uint8 [N, 3, H, W]
    pending: list[Scoring]  # of consecutive rows, for RewardSet.collect


def no_timer(name: str):
    return nullcontext()


@torch.no_grad()
def sample_and_score(policy: Policy, conditions: list[Condition], seeds: list[int], num_generations: int,
                     reward_set: RewardSet, batch_size: int = 0, timed: Callable = no_timer) -> Samples:
    """Samples and decodes `num_generations` images per condition, about batch_size at a time (0: all). On GPUs each
    batch is decoded and scored while the next is sampled.

    `reward_set.collect(samples.pending)` waits for the scores. timed(name) is a context that counts the seconds spent
    inside.
    """
    group = num_generations
    per_batch = max(1, batch_size // group) if batch_size else len(conditions)
    overlapping = policy.device.type == "cuda" and len(conditions) > per_batch
    clock = no_timer if overlapping else timed  # what a clock awaits is the next rollout's queue, too
    if overlapping and policy.side_stream is None:
        policy.side_stream = SideStream(policy.device, enabled=True)  # kept: memory is cached by stream
    stream = policy.side_stream if overlapping else SideStream(policy.device, enabled=False)
    with timed("seconds/encode"):
        encoded = policy.encode(conditions)
    generations, scored = [], []
    for start in range(0, len(conditions), per_batch):
        prompts = slice(start, start + per_batch)
        asked = [condition for condition in conditions[prompts] for _ in range(group)]
        with timed("seconds/sample"):
            condition, mask = (None if part is None else part[prompts] for part in encoded)
            generation = policy.sample(condition, mask, seeds[start * group: (start + per_batch) * group], group)

        def decode_and_score(tokens: Tensor, asked: list = asked) -> tuple[Tensor, object]:
            with clock("seconds/decode"):
                images = policy.decode(tokens)
            with clock("seconds/score"):
                return images, reward_set.start(images, [c.prompt for c in asked], [c.metadata for c in asked])

        generations.append((generation.tokens, generation.logps, generation.entropies))
        scored.append(stream.run(decode_and_score, generation.tokens))
    with timed("seconds/score"):
        images, pending = zip(*(wait() for wait in scored))
    return Samples(encoded, *(torch.cat(column) for column in zip(*generations)), torch.cat(images), list(pending))
