"""Speed of rollouts, on random weights: tokens and images per second, phases, memory, and the share of the roofline.

    python -m benchmark.speed.rollout --gpt_model GPT-B --image_size 256 --batch_size 8 --baseline
    python -m benchmark.speed.rollout --gpt_model GPT-XL --image_size 384 --rollout_dtype bfloat16 --baseline

--baseline runs the plain decoder of benchmark/speed/reference.py in turns with ours, in float32 or, on GPUs, in the
rollout's dtype. Parity is the gap between the sampler's log-probabilities and a float32 scorer's, for the same tokens.
Left out: the text encoder, decoding to images, rewards.
"""
import platform
import resource
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmark.speed import reference
from benchmark.speed.roofline import decode_work, measure_ceilings, seconds_of
from benchmark.speed.setup import ModelFlags, machine_name, random_condition, random_gpt
from models.generate import Rollout, SamplingConfig, row_uniforms
from models.gpt import GPT
from models.policy import Scorer
from utils.config import flag, one_line_errors, parse_args

SAMPLING_STEPS = 20  # timed to tell sampling from the layers
PARITY_IMAGES = 4


@dataclass(frozen=True)
class RolloutSpeedConfig(ModelFlags):
    num_generations: int = field(default=1, metadata={"help": "images of a prompt, which share its prefix"})
    top_k: int = flag(0, "keep the k most likely tokens; 0: all")
    top_p: float = flag(1.0, "nucleus; 1: all")
    rollout_dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "of matrix products")
    baseline: bool = field(default=False, metadata={"help": "also run the plain decoder, and print the ratio"})
    baseline_top_k: int = field(default=2000, metadata={"help": "the plain decoder's filter (LlamaGen's); 0: none"})
    rounds: int = field(default=3, metadata={"help": "rollouts of each, in turns; the median counts"})

    def __post_init__(self):
        super().__post_init__()
        if self.num_generations < 1 or self.batch_size % self.num_generations:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of num_generations "
                             f"{self.num_generations}")


class RolloutSpeed(NamedTuple):
    """Seconds are medians over rounds."""

    images: int
    tokens: int  # of an image
    prepare_seconds: float  # weights and condition prefix
    decode_seconds: float
    sampling_seconds: float  # of decoding: head product, filter, draw, statistics
    baseline_seconds: float | None
    peak_bytes: int
    bytes_per_second: float
    flops_per_second: float
    copy_bytes_per_second: float
    matmul_flops_per_second: float
    roofline_share: float  # the least seconds that the ceilings allow / decode_seconds
    parity_max: float  # nats
    parity_mean: float

    @property
    def seconds(self) -> float:
        return self.prepare_seconds + self.decode_seconds

    @property
    def ratio(self) -> float | None:
        return None if self.baseline_seconds is None else self.baseline_seconds / self.seconds


def measure(config: RolloutSpeedConfig) -> RolloutSpeed:
    device, dtype = torch.device(config.device), getattr(torch, config.rollout_dtype)
    on_gpu = device.type == "cuda"
    ceilings = measure_ceilings(device, dtype)
    gpt = random_gpt(config.gpt, device).requires_grad_(False)
    condition = random_condition(gpt.config, config.batch_size // config.num_generations, device)
    sampling = SamplingConfig(cfg_scale=config.cfg_scale, top_k=config.top_k, top_p=config.top_p)
    uniforms = row_uniforms(range(config.batch_size), gpt.config.block_size).to(device)
    autocast = torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    rollout = Rollout(gpt, sampling, config.batch_size, dtype)

    def prepare():
        with torch.no_grad(), autocast:
            rollout.begin(condition, None, uniforms, config.num_generations)

    def decode():
        with torch.no_grad():
            rollout.run()

    def plain():
        with autocast if on_gpu else nullcontext():
            images = condition.repeat_interleave(config.num_generations, dim=0)
            reference.decode(gpt, images, config.cfg_scale, top_k=config.baseline_top_k)

    if on_gpu:
        prepare(), decode()  # captures
        torch.cuda.reset_peak_memory_stats(device)
    turns, peaks = [], []
    for _ in range(config.rounds):
        turns.append((seconds_of(prepare, device), seconds_of(decode, device)))
        peaks.append(peak_bytes(device))  # the first: before the plain decoder's first turn
        turns[-1] += (seconds_of(plain, device),) if config.baseline else ()
    medians = [statistics.median(column) for column in zip(*turns)]
    work = decode_work(gpt.config, config.batch_size, sampling.num_guided(gpt.config.block_size), dtype)
    parity = logp_gap(gpt, rollout, condition.repeat_interleave(config.num_generations, dim=0))
    return RolloutSpeed(
        config.batch_size, gpt.config.block_size, *medians[:2],
        sampling_seconds(rollout, device), medians[2] if config.baseline else None, peaks[0],
        work.bytes / medians[1], work.flops / medians[1], *ceilings, work.seconds(ceilings) / medians[1], *parity)


@torch.no_grad()
def sampling_seconds(rollout: Rollout, device: torch.device) -> float:
    """What drawing the tokens of one rollout takes without the layers."""
    guided = rollout.num_guided > 0
    return rollout.num_tokens * min(seconds_of(lambda: rollout.sample(guided), device) for _ in range(SAMPLING_STEPS))


@torch.no_grad()
def logp_gap(gpt: GPT, rollout: Rollout, condition: Tensor) -> tuple[float, float]:
    """(max, mean) of |sampler's - float32 scorer's log-probability|, nats, for the first images."""
    tokens = rollout.tokens[:PARITY_IMAGES, :-1]  # the last column holds what timing the sampler drew
    logps, _ = Scorer(gpt, rollout.sampling)(condition[:PARITY_IMAGES], rollout.tokens[:PARITY_IMAGES])
    gap = (logps[:, :-1] - rollout.logps[: len(tokens), :-1]).abs()
    return gap.max().item(), gap.mean().item()


def peak_bytes(device: torch.device) -> int:
    """On GPUs of tensors, since the last reset; on CPUs of the process, since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def as_lines(config: RolloutSpeedConfig, speed: RolloutSpeed) -> list[str]:
    steps, giga, layers = speed.tokens, 1e9, speed.decode_seconds - speed.sampling_seconds
    images_per_second = speed.images / speed.seconds
    lines = [
        f"rollout      {images_per_second:.3f} images/s, {images_per_second * steps:.1f} tokens/s, "
        f"{1000 * speed.decode_seconds / steps:.1f} ms a step",
        f"seconds      {speed.seconds:.2f} = prepare {speed.prepare_seconds:.2f} + layers {layers:.2f} + sampling "
        f"{speed.sampling_seconds:.2f}",
        f"memory       {speed.peak_bytes / giga:.2f} GB at the peak",
        f"bytes        {speed.bytes_per_second / giga:.1f} of {speed.copy_bytes_per_second / giga:.1f} GB/s (copy)",
        f"arithmetic   {speed.flops_per_second / giga:.1f} of {speed.matmul_flops_per_second / giga:.1f} GFLOP/s "
        f"(matrix product)",
        f"roofline     {100 * speed.roofline_share:.0f} % of what these ceilings allow",
        f"parity       |sampler - float32 scorer| max {speed.parity_max:.2e}, mean {speed.parity_mean:.2e} nats"]
    if speed.ratio is not None:
        lines += [f"baseline     {speed.images / speed.baseline_seconds:.3f} images/s, "
                  f"{1000 * speed.baseline_seconds / steps:.1f} ms a step",
                  f"ratio        {speed.ratio:.2f}"]
    return lines


def main(argv: list[str] | None = None) -> RolloutSpeed:
    [config] = parse_args((RolloutSpeedConfig,), argv, __doc__)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    print(f"{machine_name(torch.device(config.device))}; torch {torch.__version__}; {config.gpt_model} "
          f"{config.gpt_type}, {config.image_size} px, {config.batch_size} images, guidance {config.cfg_scale}, "
          f"{config.rollout_dtype}", flush=True)
    speed = measure(config)
    print("\n".join(as_lines(config, speed)))
    return speed


if __name__ == "__main__":
    with one_line_errors():
        main()
