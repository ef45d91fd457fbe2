"""Feature networks for FID, Inception Score, precision and recall: a table, one row per network.

`inception` is ADM's Inception of 2015-12-05 (reward_utils/inception_v3.py), `shapes` a small classifier of the embedded
world.

Legend: N images, D feature width, S width of the spatial features, K classes.
"""
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from reward_utils.weights import CHECKPOINTS, fill, load_state
from utils.download import download

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_DIGEST = "6726825d"
PRETRAINED = Path(__file__).resolve().parent.parent / "models" / "pretrained"


class ShapesFeatures(nn.Module):
    """Classifier of the 32 shape-and-colour classes (68,668 parameters); its pooled activations are the features.

    GroupNorm, not BatchNorm: train() and eval() compute the same function, and no image sees its batch.
    """

    image_size = 64
    feature_dim = 64
    spatial_dim = None
    widths = (24, 36, 64, 64)

    def __init__(self, num_classes: int = 32):
        super().__init__()
        layers = []
        for c_in, c_out in zip((3, *self.widths[:-1]), self.widths):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(4, c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.widths[-1], num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images uint8 [N, 3, 64, 64] -> features float32 [N, 64], logits float32 [N, 32]."""
        x = self.body(images.float() / 127.5 - 1)  # [N, 64, 4, 4]
        features = x.mean(dim=(2, 3))  # [N, 64]
        return features, self.head(features)


def find_inception() -> Path:
    """Inception's weights: in the folder REWARD_MODELS, in torch.hub's cache, or downloaded into that once."""
    name = CHECKPOINTS["inception_model"].local
    places = [Path(folder) / name for folder in filter(None, [os.environ.get("REWARD_MODELS")])]
    places.append(Path(torch.hub.get_dir()) / "checkpoints" / name)  # shared with pytorch-fid
    for place in places:
        if place.is_file():
            return place
    return download(INCEPTION_URL, places[-1], INCEPTION_DIGEST)


def _build_inception() -> nn.Module:
    from reward_utils.inception_v3 import InceptionFeatures  # torchvision's models take a second to import

    return InceptionFeatures()


class FeatureRow(NamedTuple):
    """One feature network."""

    build: Callable[[], nn.Module]
    find: Callable[[], Path]  # where its weights lie
    fetch: str  # how to get them
    title: str


FEATURES = {
    "inception": FeatureRow(_build_inception, find_inception, f"fetch them from {INCEPTION_URL}",
                            "Inception 2015-12-05"),
    "shapes": FeatureRow(ShapesFeatures, lambda: PRETRAINED / "shapes" / "features.safetensors",
                         "make them with `python pretrain.py --stage features`", "shapes classifier"),
}


def load_features(name: str, path: str | Path | None = None) -> nn.Module:
    """The network of table row `name` in eval mode, with the weights at `path` (default: the row's own)."""
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r}; known: {', '.join(FEATURES)}")
    row, what = FEATURES[name], f"the {name} feature network"
    path = Path(path or row.find())
    if not path.is_file():
        raise ValueError(f"{path}: no weights of {what}; {row.fetch}")
    return fill(row.build(), load_state(path, what), path, what)


def extract(net: nn.Module, images: torch.Tensor, batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """images uint8 [N, 3, H, W] -> features float32 [N, D], class probabilities float32 [N, K], both on the CPU."""
    features, probs, _ = extract_all(net, images, batch_size)
    return features, probs


@torch.no_grad()
def extract_all(net: nn.Module, images: torch.Tensor,
                batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `extract` gives, and the spatial features float32 [N, S] of sFID (None: the network has none)."""
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, \
        f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}"
    if net.image_size is not None and images.shape[2:] != (net.image_size, net.image_size):
        raise ValueError(f"the feature network reads {net.image_size}x{net.image_size} images, "
                         f"not {images.shape[2]}x{images.shape[3]}")
    device = next(net.parameters()).device
    parts = []
    with _without_tf32(), torch.autocast(device.type, enabled=False):
        for batch in images.split(batch_size):
            features, logits, *spatial = net(batch.to(device))
            parts.append([x.float().cpu() for x in (features, F.softmax(logits.float(), dim=1), *spatial)])
    features, probs, *spatial = map(torch.cat, zip(*parts))
    return features, probs, spatial[0] if spatial else None


@contextmanager
def _without_tf32():
    """TF32 rounds the factors of products to ten bits; the evaluator's numbers are float32's."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value
