"""LPIPS (Zhang et al. 2018, version 0.1, VGG): a perceptual distance to the sample's reference image."""
from pathlib import Path

import torch
from torch import Tensor, nn

from reward_utils.pixels import unit_range
from reward_utils.reference_image import compare_with_references
from reward_utils.settings import RewardSettings
from reward_utils.weights import fill, load_state, locate

# convolutions of torchvision's vgg16().features, each with a ReLU behind it; between two blocks a pooling layer
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
MIN_SIDE = 16  # halved four times
# of ImageNet, for images in [-1, 1]; lpips' own rounding
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
VGG, HEADS = "torchvision's VGG16 (vgg16-397923af.pth)", "LPIPS' linear heads (version 0.1, vgg.pth)"


class LpipsNet(nn.Module):
    """float [N, 3, H, W] and another in [-1, 1] -> distance [N], at least 0; H and W at least MIN_SIDE.

    features: {convolution's number: (channels in, out)}; the keys are those of the two checkpoints.
    """

    def __init__(self, features: dict[int, tuple[int, int]]):
        super().__init__()
        layers = [nn.MaxPool2d(2) for _ in range(BLOCKS[-1][-1] + 2)]
        for i, channels in features.items():
            layers[i], layers[i + 1] = nn.Conv2d(*channels, 3, padding=1), nn.ReLU()
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})
        self.heads = nn.ModuleDict({
            f"lin{i}": nn.ModuleDict({"model": nn.Sequential(
                nn.Identity(), nn.Conv2d(features[block[-1]][1], 1, 1, bias=False))})
            for i, block in enumerate(BLOCKS)})
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        x = (torch.cat([images, references]) - self.shift) / self.scale  # [2N, 3, H, W]
        distance, start = 0.0, 0
        for block, head in zip(BLOCKS, self.heads.values()):
            x = self.vgg["features"][start: block[-1] + 2](x)
            start = block[-1] + 2
            first, second = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)  # [N, C, h, w] each
            distance = distance + head["model"]((first - second).square()).mean(dim=(1, 2, 3))
        return distance


def load_lpips(vgg_path: Path, heads_path: Path) -> LpipsNet:
    """Both checkpoints in float32 on the CPU, frozen; ValueError for a file that is not one."""
    vgg = {key: value for key, value in load_state(vgg_path, VGG).items() if not key.startswith("classifier.")}
    heads = load_state(heads_path, HEADS)
    try:
        features = {i: tuple(reversed(vgg[f"features.{i}.weight"].shape[:2])) for block in BLOCKS for i in block}
    except KeyError as error:
        raise ValueError(f"{vgg_path}: not the weights of {VGG} (it lacks {error})") from error
    net = LpipsNet(features)
    fill(net.vgg, vgg, vgg_path, VGG)
    fill(net.heads, heads, heads_path, HEADS)
    return net.eval()


class LpipsScorer(nn.Module):
    """scorer(images uint8 [N, 3, H, W], prompts, metadata) -> (1 - LPIPS to the reference, float32 [N], failures).

    Always in float32. LPIPS is 0 for equal images and seldom above 1.
    """

    def __init__(self, settings: RewardSettings, device: torch.device):
        super().__init__()
        self.net = load_lpips(locate("vgg16_model", settings), locate("lpips_model", settings)).to(device)
        self.batch_size = settings.reward_batch_size

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        if min(images.shape[2:]) < MIN_SIDE:
            raise ValueError(f"lpips needs {MIN_SIDE}x{MIN_SIDE} pixels, the images have {images.shape[3]}x"
                             f"{images.shape[2]}: sample larger images, or leave lpips out of --reward_funcs")
        # a pair's maps of 64 x H x W outgrow a CPU's caches already: four pairs at a time took 1.6 times as long
        batch_size = self.batch_size if self.net.shift.is_cuda else 1
        return compare_with_references(self.score, batch_size, images, metadata)

    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] and as many references -> [N] on the scorer's device."""
        images, references = (2 * unit_range(x.to(self.net.shift.device)) - 1 for x in (images, references))
        return 1 - self.net(images, references)
