"""Rewards: the base class, the table of names, and the weighted sum that a trainer or an evaluation calls.

To add one: a batched scorer in reward_utils/, a `Reward` here whose `score` returns a tensor per name, and a row in
REWARDS for each name. Rewards see prompts and metadata, so label and caption models share every class.

A score that could not be computed is NaN, never a number; the total of such a sample is NaN as well.
"""
import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from reward_utils.shapes import SHAPES_SCORES, score_shapes


class Reward:
    """One scoring model. Several registered names may share it: `score` gets the names asked for, once per batch."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    def score(self, names: list[str], images: Tensor, prompts: list[str], metadata: list[dict]) -> dict[str, Tensor]:
        """images uint8 [N, 3, H, W] -> {name: float [N]}, NaN where an image could not be scored."""
        raise TypeError(f"{type(self).__name__} does not define score")


class ShapesReward(Reward):
    """The exact detector of the shapes world: correctness (graded, strict) and well-formedness (quality)."""

    def score(self, names, images, prompts, metadata):
        return {name: torch.from_numpy(scores) for name, scores in
                score_shapes([name.removeprefix("shapes_") for name in names], images, prompts, metadata).items()}


REWARDS: dict[str, type[Reward]] = {f"shapes_{name}": ShapesReward for name in SHAPES_SCORES}


class RewardSet:
    """Weighted rewards: `reward_set(images, prompts, metadata)` -> (total float32 [N], {name: float32 [N]})."""

    def __init__(self, names: Sequence[str], weights: Sequence[float] | None = None,
                 device: str | torch.device = "cpu"):
        self.names = list(names)
        self.weights = [1.0] * len(self.names) if not weights else [float(weight) for weight in weights]
        if not self.names:
            raise ValueError("reward_funcs is empty: name at least one of " + ", ".join(REWARDS))
        for name in self.names:
            if name not in REWARDS:
                close = difflib.get_close_matches(name, REWARDS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(REWARDS)}"
                raise ValueError(f"unknown reward {name!r} in reward_funcs: {hint}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a reward is named twice in reward_funcs: {' '.join(self.names)}")
        if len(self.weights) != len(self.names):
            raise ValueError(f"reward_weights has {len(self.weights)} values for {len(self.names)} reward_funcs "
                             f"({' '.join(self.names)})")
        classes = dict.fromkeys(REWARDS[name] for name in self.names)
        self.rewards = {cls: cls(device) for cls in classes}

    def __call__(self, images: Tensor, prompts: Sequence[str],
                 metadata: Sequence[dict] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        prompts = list(prompts)
        metadata = list(metadata) if metadata is not None else [{}] * len(prompts)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata records")
        scores = {}
        for cls, reward in self.rewards.items():
            asked = [name for name in self.names if REWARDS[name] is cls]
            scores.update(reward.score(asked, images, prompts, metadata))
        scores = {name: scores[name].to(torch.float32) for name in self.names}
        total = sum(weight * scores[name].to(images.device) for name, weight in zip(self.names, self.weights))
        return total, scores
