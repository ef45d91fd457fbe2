"""Feature networks for FID, Inception Score, precision and recall: a table, one row per network.

The only row so far is `shapes`, a small classifier of the embedded world; the ImageNet Inception is not here yet.

Legend: N images, D feature width, K classes.
"""
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

PRETRAINED = Path(__file__).resolve().parent.parent / "models" / "pretrained"


class ShapesFeatures(nn.Module):
    """Classifier of the 32 shape-and-colour classes (68,668 parameters); its pooled activations are the features.

    GroupNorm, not BatchNorm: train() and eval() compute the same function, and no image sees its batch.
    """

    image_size = 64
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


class FeatureRow(NamedTuple):
    """One feature network: how to build it, where its weights lie, who makes them, how distances are rounded."""

    build: Callable[[], nn.Module]
    weights: Path
    made_by: str
    half_distances: bool  # ADM's float16 distances; neighbours among shapes lie closer than float16 resolves


FEATURES = {
    "shapes": FeatureRow(ShapesFeatures, PRETRAINED / "shapes" / "features.safetensors",
                         "python pretrain.py --stage features", half_distances=False),
}


def load_features(name: str, path: str | Path | None = None) -> nn.Module:
    """The network of table row `name` in eval mode, with the weights at `path` (default: the row's own)."""
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r}; known: {', '.join(FEATURES)}")
    row = FEATURES[name]
    path = Path(path or row.weights)
    if not path.is_file():
        raise ValueError(f"{path}: no weights of the {name} feature network; make them with `{row.made_by}`")
    net = row.build()
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:  # damaged file; foreign or misshapen keys
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not the weights of the {name} feature network ({reason}); "
                         f"make them with `{row.made_by}`") from error
    return net.eval().requires_grad_(False)


@torch.no_grad()
def extract(net: nn.Module, images: torch.Tensor, batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """images uint8 [N, 3, H, W] -> features float32 [N, D], class probabilities float32 [N, K], both on the CPU."""
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, \
        f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}"
    if images.shape[2:] != (net.image_size, net.image_size):
        raise ValueError(f"the feature network reads {net.image_size}x{net.image_size} images, "
                         f"not {images.shape[2]}x{images.shape[3]}")
    device = next(net.parameters()).device
    features, probs = [], []
    for batch in images.split(batch_size):
        batch_features, logits = net(batch.to(device))
        features.append(batch_features.cpu())
        probs.append(F.softmax(logits.float(), dim=1).cpu())
    return torch.cat(features), torch.cat(probs)
