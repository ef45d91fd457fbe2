"""How cost grows: seconds per image against batch, tokens of an image and model size, measured and drawn.

    python -m benchmark.speed.cost
    python -m benchmark.speed.cost --models GPT-L GPT-XL GPT-3B --image_sizes 128 256 384 512 --batches 1 8 64 512 \\
        --dtype bfloat16 --rounds 3

Each point is a rollout with guidance and a training step (reference and update) on random weights, the fastest of
`rounds`. The exponent is the slope of a line through the points' logarithms: seconds per image ~ x^exponent. Where one
quantity varies, the others are the first model, the smallest image size and the middle batch. Writes --output (PNG).
The default models need 16 GB (GPT-XL).
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmark.speed import end_to_end
from benchmark.speed.end_to_end import EndToEndConfig
from benchmark.speed.roofline import synchronize
from benchmark.speed.setup import DOWNSAMPLE, machine_name
from models.gpt import GPT, GPTConfig
from utils.config import flag, one_line_errors, parse_args
from utils.distributed import Metrics

KINDS = {"rollout": ("sample",), "training": ("reference", "update")}  # phases of a step


@dataclass(frozen=True)
class CostConfig:
    models: list[str] = flag(lambda: ["GPT-B", "GPT-L", "GPT-XL"], "rows of GPT_SIZES")
    image_sizes: list[int] = flag(lambda: [64, 96, 128, 192], "pixels of a side")
    batches: list[int] = flag(lambda: [2, 4, 8, 16], "images of a step")
    dtype: str = flag("float32", "of matrix products")
    rounds: int = field(default=1, metadata={"help": "timed steps of a point; the fastest counts"})
    output: str = flag(str(Path(__file__).with_name("cost.png")), "the plot")
    device: str = flag(lambda: "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's choice"})

    def __post_init__(self):
        for name in ("models", "image_sizes", "batches"):
            if len(set(getattr(self, name))) < 2:
                raise ValueError(f"{name} needs at least two different values to fit a line, got "
                                 f"{' '.join(map(str, getattr(self, name)))}")
        for model in self.models:  # each point's own checks, before any is measured
            for size in self.image_sizes:
                for batch in self.batches:
                    self.point(model, size, batch)

    def point(self, model: str, image_size: int, batch: int) -> EndToEndConfig:
        return EndToEndConfig(gpt_model=model, image_size=image_size, batch_size=batch, dtype=self.dtype,
                              device=self.device, rounds=max(1, self.rounds))


class Panel(NamedTuple):
    """Seconds per image against one quantity."""

    name: str
    fixed: str
    x: list[float]
    seconds: dict[str, list[float]]  # by kind

    def exponent(self, kind: str) -> float:
        return float(np.polyfit(np.log(self.x), np.log(self.seconds[kind]), 1)[0])


def seconds_per_image(config: EndToEndConfig) -> dict[str, float]:
    """By kind; a first step warms up and makes the optimizer's state."""
    device, timed = torch.device(config.device), []
    trainer = end_to_end.trainer_of(config.job, device)
    for number in range(1 + config.rounds):
        timed.append(Metrics(device))
        end_to_end.step(trainer, number, timed[-1])
        synchronize(device)
    return {kind: min(sum(metrics.seconds[f"seconds/{phase}"] for phase in phases) for metrics in timed[1:])
            / config.batch_size for kind, phases in KINDS.items()}


def parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def panels(config: CostConfig, say: Callable[[str], None]) -> list[Panel]:
    model, size, batch = config.models[0], min(config.image_sizes), config.batches[len(config.batches) // 2]
    tokens = (size // DOWNSAMPLE) ** 2
    series = [("images of a batch", f"{model}, {tokens} tokens",
               [(b, config.point(model, size, b)) for b in config.batches]),
              ("tokens of an image", f"{model}, {batch} images",
               [((s // DOWNSAMPLE) ** 2, config.point(model, s, batch)) for s in config.image_sizes]),
              ("million parameters", f"{batch} images, {tokens} tokens",
               [(parameters(point.gpt) / 1e6, point) for point in
                (config.point(name, size, batch) for name in config.models)])]
    known, result = {}, []
    for name, fixed, points in series:
        for x, point in points:
            if point not in known:
                known[point] = seconds_per_image(point)
            say(f"{name:<20}{x:>8.0f}" + "".join(f"{value:>11.4f}" for value in known[point].values()))
        panel = Panel(name, fixed, [x for x, _ in points],
                      {kind: [known[point][kind] for _, point in points] for kind in KINDS})
        say(f"{'  exponent':<28}" + "".join(f"{panel.exponent(kind):>11.2f}" for kind in KINDS) + f"   ({fixed})")
        result.append(panel)
    return result


def draw(found: list[Panel], title: str, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), sharey=True)
    for axis, panel in zip(axes, found):
        for kind, marker in zip(KINDS, "os"):
            axis.loglog(panel.x, panel.seconds[kind], marker=marker, label=f"{kind}: x^{panel.exponent(kind):.2f}")
        axis.set(xlabel=f"{panel.name}\n({panel.fixed})")
        axis.set_xticks(panel.x, [f"{x:g}" for x in panel.x])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("seconds per image")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> list[Panel]:
    [config] = parse_args((CostConfig,), argv, __doc__)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    title = f"{machine_name(torch.device(config.device))}; torch {torch.__version__}; " + (
        config.dtype)
    print(f"{title}\n{'seconds per image':<28}" + "".join(f"{kind:>11}" for kind in KINDS), flush=True)
    found = panels(config, lambda line: print(line, flush=True))
    draw(found, title, Path(config.output))
    print(f"drawn: {config.output}")
    return found


if __name__ == "__main__":
    with one_line_errors():
        main()
