"""What a machine can do at best, measured in the run that is judged by it: a large copy and a large matrix product.

`DecodeWork` counts what decoding has to move and multiply at least, whatever program does it. Bytes are 10^9 per GB.
"""
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from models.decoder import native_bfloat16
from models.gpt import GPTConfig

COPY_BYTES = {"cpu": 2 ** 28, "cuda": 2 ** 31}
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


class Ceilings(NamedTuple):
    bytes_per_second: float  # read and written
    flops_per_second: float  # a multiplication and an addition are two


class DecodeWork(NamedTuple):
    """Of a whole rollout: every matrix read once per step, the written cache positions of every row read once."""

    bytes: float
    flops: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The least that the ceilings allow."""
        return max(self.bytes / ceilings.bytes_per_second, self.flops / ceilings.flops_per_second)


def seconds_of(function: Callable[[], object], device: torch.device, rounds: int = 1) -> float:
    """The fastest of `rounds` calls, the device awaited."""
    fastest = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> Ceilings:
    """The product is in `dtype`, or in float32 on CPUs that emulate bf16: emulation is no ceiling."""
    if device.type == "cpu" and not native_bfloat16():
        dtype = torch.float32
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # its pages are mapped on first use
    copy = seconds_of(lambda: target.copy_(source), device, rounds)
    nbytes = source.nbytes + target.nbytes
    source = target = None
    side = MATMUL_SIDE[device.type]
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    a @ b
    product = seconds_of(lambda: a @ b, device, rounds)
    return Ceilings(nbytes / copy, 2 * side ** 3 / product)


def block_parameters(config: GPTConfig) -> int:
    """Of one layer's matrices."""
    kv_width = config.kv_heads * (config.dim // config.n_head)
    return config.dim * (config.dim + 2 * kv_width + config.dim + 3 * config.ffn_dim)


def forward_flops(config: GPTConfig, num_rows: int, num_images: int) -> tuple[float, float]:
    """(layers, head) of one teacher-forced pass: num_rows sequences, of which num_images pairs or singles have logits.
    A multiplication and an addition are two."""
    length = config.cls_token_num + config.block_size - 1
    attention = 2 * config.dim * length ** 2  # causal: half
    layers = config.n_layer * num_rows * (2 * block_parameters(config) * length + attention)
    return layers, 2 * config.dim * config.vocab_size * num_images * config.block_size


def decode_work(config: GPTConfig, num_images: int, num_guided: int, dtype: torch.dtype) -> DecodeWork:
    """L tokens of num_images images, the first num_guided with an unconditional row beside each; no prefill."""
    kv_width = config.kv_heads * (config.dim // config.n_head)
    body, head = config.n_layer * block_parameters(config), config.vocab_size * config.dim  # parameters
    numbers = flops = 0
    for token in range(1, config.block_size):  # the step that feeds one token and draws the next
        rows = num_images * (2 if token < num_guided else 1)
        positions = config.n_layer * rows * (config.cls_token_num + token)
        numbers += body + head + 2 * positions * kv_width
        flops += 2 * rows * body + 2 * num_images * head + 4 * positions * config.dim
    return DecodeWork(numbers * dtype.itemsize, flops)
