"""Which prompts a rollout uses, and the seed of every image: pure functions of seed and step, so resume needs the step.

Everything is defined on the GLOBAL batch of a step and does not know the world size: a rank takes its part of it with
`shard`. `prompt` in the seed functions is a prompt's POSITION in that global batch (0 .. num_prompts-1), not its index
in the dataset: a small dataset may put one prompt into a batch twice, and the two groups must not be copies.
Rank r seeds its groups with `row_seeds(seed, step, shard(range(num_prompts), r, world_size), num_generations)`.
"""
import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np


class PromptSampler:
    """Shuffled epochs laid end to end; step s reads positions s*num_prompts ... without repeats or gaps in an epoch."""

    def __init__(self, num_conditions: int, seed: int):
        if num_conditions < 1:
            raise ValueError("the sampler needs at least one prompt")
        self.num_conditions, self.seed = num_conditions, seed

    def indices(self, step: int, num_prompts: int) -> list[int]:
        """The dataset indices of rollout `step`, for all ranks together."""
        if step < 0 or num_prompts < 1:
            raise ValueError(f"step {step} with {num_prompts} prompts: need step >= 0 and at least one prompt")
        return self.after(step * num_prompts, num_prompts)

    def after(self, position: int, num_prompts: int) -> list[int]:
        """The next dataset indices once `position` of them were used, in batches of whatever sizes."""
        positions = range(position, position + num_prompts)
        return [int(_permutation(self.seed, p // self.num_conditions, self.num_conditions)[p % self.num_conditions])
                for p in positions]


def shard(indices: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """Rank's part of the global batch: every world_size-th entry. Groups are kept whole because entries are prompts."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    if len(indices) % world_size:
        raise ValueError(f"{len(indices)} prompts a step cannot be shared evenly by {world_size} processes: "
                         "change the batch size or the number of processes")
    return indices[rank::world_size]


def row_seed(seed: int, step: int, prompt: int, member: int) -> int:
    """63 bits for the generator of one image: a hash, so that neighbouring keys give unrelated streams."""
    return int.from_bytes(_digest(seed, step, prompt, member)[:8], "little") >> 1


def row_seeds(seed: int, step: int, prompt_positions: Sequence[int], num_generations: int) -> list[int]:
    """`row_seed` for every row of a batch, prompt-major: all members of the first prompt, then of the second, ..."""
    return [row_seed(seed, step, prompt, member) for prompt in prompt_positions for member in range(num_generations)]


def _digest(*key: int) -> bytes:
    return blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=16).digest()


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # RandomState, not default_rng: numpy promises never to change its stream, so old runs resume under new versions
    return np.random.RandomState(np.frombuffer(_digest(seed, epoch), dtype="<u4")).permutation(size)
