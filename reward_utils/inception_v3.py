"""The Inception network of 2015-12-05, by which ADM's evaluator and every published FID measure images.

torchvision's inception_v3 with the pooling of the TensorFlow graph and its image resize. pytorch-fid's and
torch-fidelity's copies of the weights fit key for key. Left out: the TensorFlow graph's own file.

Legend: N images, H W pixels, C channels.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

NUM_CLASSES = 1008
INPUT_SIZE = 299
SPATIAL_CHANNELS = 7


class _Pooling:
    """The pool branch, last of a block's branches, as the graph pools: averages leave the padding out."""

    largest = False  # of Mixed_7c alone: the graph takes the maximum there

    def _forward(self, x: Tensor) -> list[Tensor]:
        if self.largest:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]


class _BlockA(_Pooling, InceptionA):
    pass


class _BlockC(_Pooling, InceptionC):
    pass


class _BlockE(_Pooling, InceptionE):
    pass


class InceptionFeatures(Inception3):
    """State-dict keys are those of pt_inception-2015-12-05-6726825d.pth."""

    image_size = None  # any: the graph resizes
    feature_dim = 2048
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS

    def __init__(self):
        blocks = [BasicConv2d, _BlockA, InceptionB, _BlockC, InceptionD, _BlockE, InceptionAux]
        super().__init__(NUM_CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c.largest = True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [N, 3, H, W] -> pooled features [N, 2048], logits [N, 1008], spatial features [N, 2023].

        The logits have no bias, as the evaluator's; the spatial features are seven channels of Mixed_6d's 1x1 branch in
        the order of TensorFlow's memory (height, width, channel). Everything is computed in the weights' dtype.
        """
        x = (resize_tf1(images.to(self.fc.weight.dtype), INPUT_SIZE, INPUT_SIZE) - 128) / 128  # [N, 3, 299, 299]
        for name, layer in self.named_children():  # torchvision's, in the order of the graph
            if name == "avgpool":
                break
            if name == "Mixed_6d":
                spatial = layer.branch1x1(x)[:, :SPATIAL_CHANNELS].movedim(1, -1).flatten(1)  # [N, 17 17 7]
            x = layer(x)
        features = x.mean(dim=(2, 3))  # [N, 2048, 8, 8] -> [N, 2048]
        return features, features @ self.fc.weight.T, spatial


def resize_tf1(pixels: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear, bit for bit in float32: float [N, C, H, W] -> [N, C, height, width].

    Pixel i reads from i * old / new (no half-pixel centres, no antialiasing), a position in float32. Widths are
    interpolated before heights: the order decides the last bit.
    """
    low, high, share = _neighbours(pixels.shape[3], width, pixels.device)
    left = pixels[..., low]
    rows = left + (pixels[..., high] - left) * share  # [N, C, H, width]
    low, high, share = _neighbours(pixels.shape[2], height, pixels.device)
    top = rows[:, :, low]
    return top + (rows[:, :, high] - top) * share[:, None]


def _neighbours(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each new pixel: the two old ones that it lies between, and how near it is to the second; each [new]."""
    scale = torch.tensor(old, dtype=torch.float32) / torch.tensor(new, dtype=torch.float32)
    position = torch.arange(new, dtype=torch.float32) * scale
    low = position.floor().long()
    return tuple(x.to(device) for x in (low, (low + 1).clamp(max=old - 1), position - low))
