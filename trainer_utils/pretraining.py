"""The loop that all stages of pretrain.py share: configuration, optimizer, schedule, resumable state."""
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.gpt import GPT_SIZES
from utils.config import changeable, flag


class Stage(NamedTuple):
    """The recipe of the shapes world (how its shipped weights differ: benchmark/RESULTS.md); flags override it."""

    steps: int
    batch_size: int
    learning_rate: float
    num_images: int = flag(0, "training images; none: the stage's own")


STAGES = {
    "vq": Stage(1800, 32, 2e-3),
    "features": Stage(800, 128, 1e-2),
    "text": Stage(600, 128, 3e-3),
    "c2i": Stage(2800, 128, 2e-3, num_images=60000),
    "t2i": Stage(2850, 128, 2e-3, num_images=100000),
}
VALIDATION_SEED = 1_000_003  # scenes that no stage trains on
# What may change between a killed stage and its continuation.


@dataclass(frozen=True)
class PretrainConfig:
    stage: str = flag("all", "all, or one of vq features text c2i t2i", resume=True)
    data: str = flag("shapes", "shapes, or a folder: class folders (vq, c2i) or captioned images (t2i)")
    output_dir: str = flag("models/pretrained/shapes", "where the weights go", resume=True)
    work_dir: str = flag("checkpoints/pretrain", "resumable state and cached tokens", resume=True)
    vq_model: str = flag("VQ-shapes", "row of VQ_SIZES")
    gpt_model: str = flag("shapes", "shapes, or a name of GPT_SIZES")
    image_size: int = flag(64, "pixels of a side")
    steps: int | None = flag(None, "updates; none: the stage's own")
    batch_size: int | None = flag(None, "images of an update; none: the stage's own")
    learning_rate: float | None = flag(None, "AdamW's; none: the stage's own")
    num_images: int | None = flag(None, "training images; none: the stage's own")
    t5_path: str | None = flag(None, "text encoder; None: the stage `text`'s own")
    t5_length: int = flag(16, "caption slots; LlamaGen has 120")
    eval_images: int = flag(640, "samples and validation images of the closing measurements", resume=True)
    save_every: int = flag(200, "steps between resumable states", resume=True)
    bf16: bool = flag(True, "bf16 autocast")
    num_threads: int = flag(0, "0: torch's choice", resume=True)
    seed: int = flag(0, "of data and weights")

    def __post_init__(self):
        if self.stage != "all" and self.stage not in STAGES:
            raise ValueError(f"--stage must be all or one of {' '.join(STAGES)}, got {self.stage!r}")
        if self.gpt_model != "shapes" and self.gpt_model not in GPT_SIZES:
            raise ValueError(f"--gpt_model must be shapes or one of {' '.join(GPT_SIZES)}, got {self.gpt_model!r}")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(config: PretrainConfig):
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=config.bf16)


def stage_settings(config: PretrainConfig, stage: str) -> Stage:
    flags = {name: getattr(config, name) for name in Stage._fields}
    return STAGES[stage]._replace(**{name: value for name, value in flags.items() if value is not None})


def batch_indices(config: PretrainConfig, stage: str, step: int, size: int, limit: int) -> np.ndarray:
    """The items of one step, keyed by (seed, stage, step), so that a resumed run sees the same batches."""
    return np.random.default_rng((config.seed, list(STAGES).index(stage), step)).integers(0, limit, size)


def fit(config: PretrainConfig, stage: str, model: nn.Module, loss_fn: Callable) -> None:
    """AdamW, linear warm-up and cosine decay. loss_fn(step) -> (loss, {name: number} for the progress bar)."""
    steps, _, peak_rate, *_ = stage_settings(config, stage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.01)
    path, start = Path(config.work_dir) / f"{stage}.pt", 0
    settings = dataclasses.asdict(config) | stage_settings(config, stage)._asdict()
    settings = {name: value for name, value in settings.items() if name not in changeable(PretrainConfig)}
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")  # on a GPU Adam's counters would be slow
        refuse_changes(path, state.get("settings", settings), settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    warmup = max(1, steps // 20)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=5)
    for step in bar:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_rate * min(1.0, (step + 1) / warmup) * max(0.02, decay)
        torch.manual_seed(hash((config.seed, step)))
        loss, shown = loss_fn(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            numbers = {name: f"{value.item():.3f}" for name, value in shown.items()}
            bar.set_postfix(loss=f"{loss.item():.4f}", **numbers)
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            save_state(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                              "settings": settings})


def refuse_changes(path: Path, stored: dict, settings: dict) -> None:
    """A finished stage would else count as finished whatever the flags say now."""
    changes = [f"{name}: {stored.get(name)} -> {value}" for name, value in settings.items()
               if stored.get(name) != value]
    if changes:
        raise ValueError(f"{path} holds this stage with other settings ({'; '.join(changes)}): delete it, or give "
                         "another --work_dir")


def save_state(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1
