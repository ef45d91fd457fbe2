"""From the sampler's uint8 images to what a reward model reads: resizing and normalising, exactly or on the device.

"exact" resizes with PIL on the CPU, as the original packages do; "fast" makes PIL's two passes with float weights on
the images' device, so that near a half some values round to the next level: at most 2 % of them by one, 0.02 % by two
(tests/reward_utils/test_pixels.py). On a CPU "exact" is the faster one.
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NUM_THREADS = 8  # PIL resizes outside the interpreter's lock


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [N, 3, H, W] -> N RGB images."""
    assert images.dtype == torch.uint8, f"images are uint8 levels, got {images.dtype}"
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]


def normalize(pixels: Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> Tensor:
    """float [N, 3, H, W] in [0, 1] -> (pixels - mean) / std per channel."""
    mean, std = (torch.tensor(x, dtype=pixels.dtype)[:, None, None].to(pixels.device) for x in (mean, std))
    return (pixels - mean) / std


def unit_range(images: Tensor) -> Tensor:
    """uint8 levels -> float32 in [0, 1], the nearest float to level / 255 on every device."""
    assert images.dtype == torch.uint8, f"images are uint8 levels, got {images.dtype}"
    # a tensor: CUDA would multiply by a number's reciprocal, which is off in the last bit
    return images.float() / torch.full((), 255.0, device=images.device)


def clip_pixels(images: Tensor, size: int, preprocess: str, device: torch.device | str,
                crop: str = "transformers") -> Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, size, size]: short side to `size` (bicubic), centre crop, CLIP's mean.

    With "exact" equal, bit for bit, to transformers' CLIPImageProcessor on PIL images (4.x; in 5.x that is
    CLIPImageProcessorPil), or with crop="torchvision" to open_clip's and torchvision's Resize + CenterCrop: of an odd
    number of rows or columns transformers cuts the smaller half first, torchvision the half rounded to even.
    """
    height, width = images.shape[2:]
    # both packages cut the long side to a whole number of pixels
    new_height = size if height <= width else int(size * height / width)
    new_width = size if width <= height else int(size * width / height)
    if (new_height, new_width) != (height, width):
        images = (_resize_with_pil(images, new_height, new_width) if preprocess == "exact" else
                  _resize_on_device(images.to(device), new_height, new_width))
    half = (lambda cut: cut // 2) if crop == "transformers" else (lambda cut: round(cut / 2))
    top, left = half(new_height - size), half(new_width - size)
    return normalize(unit_range(images[:, :, top: top + size, left: left + size].to(device)))


def _resize_with_pil(images: Tensor, height: int, width: int) -> Tensor:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        resized = pool.map(lambda image: np.asarray(image.resize((width, height), Image.BICUBIC)), to_pil(images))
        return torch.from_numpy(np.stack(list(resized))).permute(0, 3, 1, 2)


def _resize_on_device(images: Tensor, height: int, width: int) -> Tensor:
    """PIL's bicubic: the widths first, then the heights, whole levels after each (so an overshoot is cut twice)."""
    for shape in ((images.shape[2], width), (height, width)):
        if shape != images.shape[2:]:
            pixels = F.interpolate(images.float(), shape, mode="bicubic", antialias=True)
            images = pixels.add(0.5).floor().clamp(0, 255).to(torch.uint8)
    return images


def in_batches(function: Callable, batch_size: int, *columns) -> Tensor:
    """torch.cat of function(*slices), batch_size rows of every column (tensor or list) at a time."""
    return torch.cat([function(*(column[i: i + batch_size] for column in columns))
                      for i in range(0, len(columns[0]), batch_size)])
