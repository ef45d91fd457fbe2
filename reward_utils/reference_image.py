"""Rewards against a reference image of each sample, metadata["image"]: how it is read, and the MSE.

The reference is the path of an image file or a uint8 tensor [3, H, W]; another size is brought to the sample's with
ADM's centre crop, as the datasets are. A sample without a readable one fails, with the reason.
"""
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reward_utils.pixels import in_batches, unit_range
from reward_utils.settings import RewardSettings
from utils.image_files import read_image


def compare_with_references(function: Callable[[Tensor, Tensor], Tensor], batch_size: int, images: Tensor,
                            metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
    """function(images, references), both uint8 [n, 3, H, W], over all samples that have a reference.

    -> (scores float32 [N] on the CPU, NaN where there is no reference; {sample: reason}).
    """
    references, failures = find_references(metadata, *images.shape[2:])
    scores = torch.full((len(images),), math.nan)
    if references:
        rows = torch.tensor(list(references))
        scores[rows] = in_batches(function, batch_size, images[rows.to(images.device)],
                                  torch.stack(list(references.values()))).float().cpu()
    return scores, failures


def find_references(metadata: list[dict], height: int, width: int) -> tuple[dict[int, Tensor], dict[int, str]]:
    """({sample: uint8 [3, height, width]}, {sample: why it has none}); a path is read once however often it occurs."""
    read, references, failures = {}, {}, {}
    for i, record in enumerate(metadata):
        source = record.get("image")
        key = source if isinstance(source, str) else id(source)
        try:
            if key not in read:
                read[key] = _as_tensor(centre_crop(_pixels(source), height, width))
            references[i] = read[key]
        except ValueError as error:
            failures[i] = str(error)
    return references, failures


def _pixels(source) -> np.ndarray:
    """uint8 [H, W, 3]"""
    if source is None:
        raise ValueError('no reference image: the sample\'s metadata has no "image" (a path, or uint8 [3, H, W])')
    if isinstance(source, (str, Path)):
        return read_image(source, source)
    if not isinstance(source, Tensor) or source.dtype != torch.uint8 or source.ndim != 3 or len(source) != 3:
        got = f"{source.dtype} {list(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        raise ValueError(f'the reference in metadata["image"] is {got}, wanted a path or uint8 [3, H, W]')
    return source.permute(1, 2, 0).cpu().numpy()


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def centre_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3] as ADM crops: halved (box) while twice too large, bicubic, the middle."""
    image = Image.fromarray(pixels)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


class MseScorer(nn.Module):
    """scorer(images uint8 [N, 3, H, W], prompts, metadata) -> (1 - MSE to the reference, float32 [N], failures).

    Both images are in [0, 1], so that the score is too. AR-GRPO mixes [0, 1] with [-1, 1] and raises below 0.
    """

    def __init__(self, settings: RewardSettings, device: torch.device):
        super().__init__()
        self.batch_size = settings.reward_batch_size

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        return compare_with_references(self.score, self.batch_size, images, metadata)

    @staticmethod
    def score(images: Tensor, references: Tensor) -> Tensor:
        difference = unit_range(images) - unit_range(references.to(images.device))
        return 1 - difference.square().mean(dim=(1, 2, 3))
