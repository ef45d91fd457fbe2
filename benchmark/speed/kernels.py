"""Times the Triton kernels of the decode step one by one, at several tiles, against the bytes that each must move.

    python -m benchmark.speed.kernels --gpt_model GPT-XL --image_size 384 --batch_size 8
    python -m benchmark.speed.kernels --rows 16 64 256 --kernels attend add_product

Each kernel runs once per layer on that layer's own weights, so that no cache holds them, in one CUDA graph; the least
of several replays counts. The best tile of each belongs into models/kernels.py (TILES). Needs a GPU.
"""
import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmark.speed.roofline import measure_ceilings
from benchmark.speed.setup import ModelFlags, machine_name
from models import kernels
from models.decoder import LayerWeights, OuterWeights
from models.gpt import GPTConfig, KVCache, rope_table
from models.kernels import Tile
from utils.config import flag, one_line_errors, parse_args

logger = logging.getLogger(__name__)

REPLAYS = 10
# What is tried for few, some and many rows; positions and warps of `attend`.
CANDIDATES: dict[str, dict[int, list[tuple]]] = {
    "project_heads": {
        32: [(64, 128, 4, 4), (32, 128, 4, 4), (32, 128, 2, 5), (32, 256, 4, 3), (16, 128, 2, 6), (16, 256, 2, 4),
             (64, 64, 4, 6)],
        64: [(32, 128, 4, 4), (64, 64, 4, 4), (32, 64, 4, 5), (32, 128, 2, 4)],
        kernels.MANY: [(64, 64, 4, 4), (128, 64, 8, 3), (64, 128, 8, 3), (64, 64, 8, 4)]},
    "gated_product": {
        32: [(16, 128, 2, 6), (32, 128, 4, 4), (16, 128, 2, 4), (16, 256, 2, 3), (32, 128, 2, 4), (32, 64, 4, 6),
             (16, 128, 1, 6)],
        64: [(64, 64, 4, 4), (32, 64, 4, 4), (32, 64, 2, 5), (16, 128, 2, 4)],
        kernels.MANY: [(64, 64, 4, 4), (64, 64, 8, 3), (64, 64, 8, 4), (64, 32, 4, 5)]},
    "attend": {32: [(128, 8), (128, 4), (256, 8), (256, 16), (512, 16), (64, 2)],
               kernels.MANY: [(64, 2), (32, 2), (32, 1), (64, 1)]},
    "add_product": {
        32: [(16, 128, 2, 6), (16, 128, 4, 4), (16, 256, 2, 4), (32, 128, 2, 5), (32, 256, 4, 3), (16, 128, 1, 6),
             (16, 64, 2, 8)],
        64: [(16, 256, 4, 3), (16, 128, 2, 5), (32, 128, 4, 4), (32, 64, 4, 4)],
        kernels.MANY: [(64, 64, 4, 4), (128, 128, 4, 3), (64, 128, 4, 3), (64, 64, 8, 4)]},
}


@dataclass(frozen=True)
class KernelSpeedConfig(ModelFlags):
    gpt_model: str = flag("GPT-XL", "row of GPT_SIZES")
    image_size: int = flag(384, "pixels of a side")
    rows: list[int] = field(default_factory=lambda: [16], metadata={
        "help": "rows of a step: two an image with guidance"})
    kernels: list[str] = field(default_factory=lambda: [*CANDIDATES], metadata={"help": "which to time"})
    dtype: str = flag("bfloat16", "of weights and cache")


class Timing(NamedTuple):
    kernel: str
    rows: int
    tile: tuple
    microseconds: float  # a launch
    share: float  # of the copy bandwidth, by the bytes that it must move


def candidates(kernel: str, num_rows: int) -> list[tuple]:
    chosen = next(tiles for most, tiles in CANDIDATES[kernel].items() if num_rows <= most)
    if kernel == "attend":
        return chosen
    rows = next((size for size in (16, 32, 64) if num_rows <= size), 128)
    return [Tile(rows, *rest) for rest in chosen] + ([Tile(64, *rest) for rest in chosen[:2]] if rows == 128 else [])


def random_layers(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> tuple[list, OuterWeights]:
    """Weights of the sizes that a decoder prepares; what stands outside of the layers is one row of each."""
    def weight(*shape):
        return 0.02 * torch.randn(shape, dtype=dtype, device=device)

    d, f = config.dim, config.ffn_dim
    wide = (config.n_head + 2 * config.kv_heads) * (d // config.n_head)
    ones = torch.ones(d, device=device)
    layers = [LayerWeights(ones, weight(wide, d), weight(d, d), ones, weight(2 * f, d), weight(d, f))
              for _ in range(config.n_layer)]
    return layers, OuterWeights(torch.randn(8, d, device=device), ones, weight(8, d), rope_table(config).to(device))


def launches(kernel: str, config: GPTConfig, num_rows: int, dtype: torch.dtype, device: torch.device,
             position: int) -> Callable[[tuple], Callable[[], None]]:
    """tile -> a function that launches `kernel` for every layer; "step" launches all."""
    layers, outer = random_layers(config, dtype, device)
    cache = KVCache(config, num_rows, config.cls_token_num + config.block_size, dtype, device).data.normal_()
    scratch = kernels.Scratch(config, num_rows, dtype, device)
    tokens, at = torch.zeros(num_rows, dtype=torch.long, device=device), torch.tensor([position], device=device)
    step = kernels.Step(config, scratch, num_rows, at, outer.rope, None)

    def launch(weights: LayerWeights, keys_values: torch.Tensor) -> None:
        if kernel == "project_heads":
            kernels.project_heads(step, weights.attention_norm, weights.wqkv, keys_values)
        elif kernel == "attend":
            kernels.attend(step, keys_values)
        elif kernel == "gated_product":
            kernels.gated_product(step, weights.ffn_norm, weights.w13)
        else:
            kernels.add_product(step, scratch.attended, weights.wo)
            kernels.add_product(step, scratch.gated, weights.w2)

    def with_tile(tile: tuple) -> Callable[[], None]:
        def run() -> None:
            if kernel == "step":
                kernels.feed(config, layers, outer, cache, None, scratch, tokens, at)
                return
            kernels.TILES[kernel] = {kernels.MANY: tile}
            for weights, keys_values in zip(layers, cache):
                launch(weights, keys_values)
        return run

    return with_tile


def least_bytes(kernel: str, config: GPTConfig, num_rows: int, itemsize: int, position: int) -> float:
    """Of one launch; `add_product` is launched twice a layer, and its mean counts."""
    d, f, size = config.dim, config.ffn_dim, config.dim // config.n_head
    numbers = {"project_heads": (config.n_head + 2 * config.kv_heads) * size * d, "add_product": (d * d + d * f) / 2,
               "gated_product": 2 * f * d, "attend": 2 * num_rows * config.kv_heads * size * (position + 1)}
    return itemsize * numbers[kernel]


def seconds_of_graph(run: Callable[[], None]) -> float:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return min(seconds)


def compile_ahead(config: KernelSpeedConfig, kernel: str, num_rows: int, part: int, parts: int) -> None:
    """Fills Triton's cache on disk from one of several processes."""
    device, model = torch.device(config.device), GPTConfig(**{**vars(config.gpt), "n_layer": 1})
    with_tile = launches(kernel, model, num_rows, getattr(torch, config.dtype), device, 0)
    for tile in candidates(kernel, num_rows)[part::parts]:
        attempt(with_tile(tile))


def attempt(run: Callable[[], None]) -> str | None:
    """None, or why the tile does not go: too much shared memory, too many registers."""
    try:
        run()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:  # triton.OutOfResources is a RuntimeError of some versions
        return str(error).splitlines()[0]
    return None


def measure(config: KernelSpeedConfig) -> list[Timing]:
    device, dtype, model = torch.device(config.device), getattr(torch, config.dtype), config.gpt
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_ahead, config, kernel, rows, part, 4)
                for rows in config.rows for kernel in config.kernels for part in range(4)]
        for job in jobs:
            job.result()
    copy = measure_ceilings(device, dtype).bytes_per_second
    position = model.block_size // 2
    timings = []
    for rows in config.rows:
        for kernel in config.kernels:
            with_tile = launches(kernel, model, rows, dtype, device, position)
            per_layer = 2 if kernel == "add_product" else 1
            for tile in candidates(kernel, rows):
                if reason := attempt(with_tile(tile)):
                    logger.warning("%s, %d rows, %s: %s", kernel, rows, tuple(tile), reason)
                    continue
                seconds = seconds_of_graph(with_tile(tile)) / model.n_layer / per_layer
                share = least_bytes(kernel, model, rows, dtype.itemsize, position) / seconds / copy
                timings.append(Timing(kernel, rows, tuple(tile), 1e6 * seconds, share))
            best = min((one for one in timings if one[:2] == (kernel, rows)), key=lambda one: one.microseconds).tile
            with_tile(best if kernel == "attend" else Tile(*best))()  # stays for the whole step
        seconds = seconds_of_graph(launches("step", model, rows, dtype, device, position)(()))
        least = model.n_layer * sum((2 if kernel == "add_product" else 1) * least_bytes(
            kernel, model, rows, dtype.itemsize, position) for kernel in CANDIDATES)
        timings.append(Timing("step", rows, (), 1e6 * seconds, least / seconds / copy))
    return timings


def main(argv: list[str] | None = None) -> list[Timing]:
    [config] = parse_args((KernelSpeedConfig,), argv, __doc__)
    print(f"{machine_name(torch.device(config.device))}; torch {torch.__version__}; {config.gpt_model} "
          f"{config.image_size} px, {config.dtype}", flush=True)
    timings = measure(config)
    for one in sorted(timings, key=lambda one: (one.rows, one.kernel, one.microseconds)):
        print(f"{one.kernel:<16}{one.rows:>6}{one.microseconds:>9.2f} us{100 * one.share:>6.0f} %  {one.tile}")
    return timings


if __name__ == "__main__":
    with one_line_errors():
        main()
