"""Evaluation inside a training run: held-out prompts with the same seeds each time."""
import logging
import math

from torch import Tensor

from trainer_utils.rollout import sample_and_score
from trainer_utils.statistics import nan_std, token_hamming
from utils import distributed
from utils.lists import evenly

logger = logging.getLogger(__name__)

NUM_SHOWN = 32  # images in a sample grid


def positions_of_rank(num_prompts: int) -> list[int]:
    """This process's held-out prompts; the first ones again where the number of processes does not divide them."""
    rank, world = distributed.rank(), distributed.world_size()
    return [p % num_prompts for p in range(rank, math.ceil(num_prompts / world) * world, world)]


def evaluate(policy, reward_set, conditions: list, seeds: list[int], group: int, rollout_batch_size: int,
             step: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """-> (rewards with standard errors, entropy, diversity by name; images uint8 [M, 3, H, W]; scores [M, K]).

    seeds: of this process's images, `group` for each of its `positions_of_rank`. M = prompts x group, in order.
    """
    positions = positions_of_rank(len(conditions))
    samples = sample_and_score(policy, [conditions[p] for p in positions], seeds, group, reward_set, rollout_batch_size)
    result = reward_set.collect(samples.pending)
    tokens, entropies, images, scores = (
        distributed.gather_groups(rows, group)[: len(conditions) * group]
        for rows in (samples.tokens, samples.entropies, samples.images, result.table.to(policy.device)))
    if reason := distributed.failure_report(dict(zip(reward_set.names, scores.T)), result.failures):
        logger.warning("evaluation after step %d: %s", step, reason)
    numbers = {"eval/entropy": entropies.mean(), "eval/token_hamming": token_hamming(tokens, group)}
    for name, column in zip(reward_set.names, scores.T):
        numbers[f"eval/rewards/{name}"] = column.nanmean()
        numbers[f"eval/rewards/{name}_stderr"] = nan_std(column).squeeze() / (~column.isnan()).sum().sqrt()
    return numbers, images, scores


def shown(asked: list, names: list[str], scores: Tensor) -> tuple[list[int], list[str]]:
    """Up to NUM_SHOWN images over all prompts, and what stands under each. asked: the condition of each image."""
    picked = evenly(range(len(asked)), NUM_SHOWN)
    return picked, ["\n".join([asked[i].prompt, *(f"{name} {score:.2f}" for name, score
                                                  in zip(names, scores[i].tolist()))]) for i in picked]
