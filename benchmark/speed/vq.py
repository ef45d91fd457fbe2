"""Images per second of decoding tokens to images, on random weights: batched, by dtype and memory format.

    python -m benchmark.speed.vq --image_size 256 --batch_size 8
    python -m benchmark.speed.vq --device cuda --image_size 384 --batch_size 64 --vq_dtype float32 bfloat16

The baseline decodes one image at a time in float32 with weights as torch makes them. `pixels` is the largest and the
mean difference from it, in levels of 0 to 255 (random weights: a trained decoder is smoother).
"""
import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmark.speed.roofline import seconds_of
from models.generate import SamplingConfig
from models.gpt import GPT, GPTConfig
from models.policy import Policy
from models.vq import VQ_SIZES, VQConfig, VQModel
from trainer_utils.memory import peak_bytes
from utils.config import flag, one_line_errors, parse_args


@dataclass(frozen=True)
class VQSpeedConfig:
    vq_model: str = flag("VQ-16", "row of VQ_SIZES")
    image_size: int = flag(256, "pixels of a side")
    batch_size: int = field(default=8, metadata={"help": "images at a time"})
    vq_dtype: list[str] = field(default_factory=lambda: ["float32"], metadata={"help": "float32, bfloat16, or both"})
    rounds: int = field(default=3, metadata={"help": "of each; the fastest counts"})
    device: str = flag(lambda: "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's choice"})

    def __post_init__(self):
        if self.vq_model not in VQ_SIZES:
            raise ValueError(f"vq_model must be one of {', '.join(VQ_SIZES)}, got {self.vq_model!r}")
        if not set(self.vq_dtype) <= {"float32", "bfloat16"}:
            raise ValueError(f"vq_dtype must be float32 or bfloat16, got {' '.join(self.vq_dtype)}")
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        side = VQConfig(**VQ_SIZES[self.vq_model]).downsample
        if self.image_size < side or self.image_size % side:
            raise ValueError(f"image_size must be a multiple of {side}, got {self.image_size}")


class VQSpeed(NamedTuple):
    name: str
    images_per_second: float
    peak_bytes: int
    largest_gap: float  # levels
    mean_gap: float


def policy_of(vq: VQModel, config: VQSpeedConfig, at_once: int, dtype: torch.dtype) -> Policy:
    """A policy whose `decode` is measured; its transformer only tells the grid."""
    tokens = (config.image_size // vq.config.downsample) ** 2
    gpt = GPT(GPTConfig(dim=8, n_layer=1, n_head=1, vocab_size=1, block_size=tokens))
    return Policy(gpt.to(config.device), vq, SamplingConfig(), decode_batch_size=at_once, vq_dtype=dtype)


def measure(config: VQSpeedConfig) -> list[VQSpeed]:
    device = torch.device(config.device)
    torch.manual_seed(0)
    plain = VQModel(VQConfig(**VQ_SIZES[config.vq_model])).to(device).eval().requires_grad_(False)
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # as models.build loads it
    side = config.image_size // plain.config.downsample
    tokens = torch.randint(plain.config.codebook_size, (config.batch_size, side ** 2), device=device)
    cases = [("one at a time", policy_of(plain, config, 1, torch.float32))]
    cases += [(name, policy_of(ours, config, config.batch_size, getattr(torch, name))) for name in config.vq_dtype]
    speeds, exact = [], None
    for name, policy in cases:
        images = policy.decode(tokens).float()  # warms up too
        exact = images if exact is None else exact
        gap = (images - exact).abs()
        seconds = seconds_of(lambda: policy.decode(tokens), device, config.rounds)
        speeds.append(VQSpeed(name, config.batch_size / seconds, peak_bytes(lambda: policy.decode(tokens), device),
                              gap.max().item(), gap.mean().item()))
    return speeds


def main(argv: list[str] | None = None) -> list[VQSpeed]:
    [config] = parse_args((VQSpeedConfig,), argv, __doc__)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    print(f"{config.device}; torch {torch.__version__}; {config}", flush=True)
    speeds = measure(config)
    print(f"{'':<16}{'images/s':>10}{'ratio':>7}{'peak GB':>9}{'pixels: largest':>17}{'mean':>7}")
    for speed in speeds:
        print(f"{speed.name:<16}{speed.images_per_second:>10.2f}"
              f"{speed.images_per_second / speeds[0].images_per_second:>7.2f}{speed.peak_bytes / 1e9:>9.3f}"
              f"{speed.largest_gap:>17.0f}{speed.mean_gap:>7.3f}")
    return speeds


if __name__ == "__main__":
    with one_line_errors():
        main()
