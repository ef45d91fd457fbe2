"""A folder of images and a file of prompts -> scores, as a table and a CSV: what `python -m img_gen_grpo_rewards` does.

`result` stands for img_gen_grpo_rewards.RewardResult, `reward_set` for its RewardSet. Shapes: N images, K rewards.
"""
import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import Condition
from dataset.prompts import load_prompts
from utils.config import flag
from utils.image_files import IMAGE_SUFFIXES, read_image


@dataclass(frozen=True)
class ScoreConfig:
    reward_funcs: list[str] = field(metadata={"help": "names of REWARDS"})
    images: str = field(metadata={"help": "folder of PNG, JPEG or WebP files, read in the order of their names"})
    prompts: str | None = field(default=None, metadata={
        "help": "prompt file (.txt .json .jsonl), one per image in that order, or a single one for all"})
    output: str | None = field(default=None, metadata={"help": "the CSV (default: IMAGES/rewards.csv)"})
    device: str = flag(lambda: "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")


def read_folder(config: ScoreConfig) -> tuple[list[Path], list[Condition]]:
    """The folder's image files and a prompt for each."""
    folder = Path(config.images)
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"--images {folder}: no images ({' '.join(IMAGE_SUFFIXES)}); folders in GenEval's layout are "
                         "scored by test_t2i_rewards.py")
    prompts = load_prompts(config.prompts) if config.prompts else [Condition("")]
    if len(prompts) == 1:
        prompts *= len(files)
    if len(prompts) != len(files):
        raise ValueError(f"--prompts {config.prompts} holds {len(prompts)} prompts for {len(files)} images: give one "
                         "per image, in the order of their names, or a single one")
    return files, prompts


def score_files(reward_set, files: list[Path], prompts: list[Condition]):
    """Scores in batches of equal-sized neighbours; an unreadable image ends it, with its name."""
    pending, batch = [], []

    def flush(end: int) -> None:
        images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        asked = prompts[end - len(batch): end]
        if pending:
            pending[-1].result()  # a server gets one batch at a time, not all that can be read from the disk
        pending.append(reward_set.start(images, [c.prompt for c in asked], [c.metadata for c in asked]))
        batch.clear()

    for i, file in enumerate(tqdm(files, desc="scoring", unit="img")):
        image = read_image(file, file)
        if batch and (image.shape != batch[0].shape or len(batch) == reward_set.settings.reward_batch_size):
            flush(i)
        batch.append(image)
    flush(len(files))
    return reward_set.collect(pending)


def as_csv(files: list[Path], prompts: list[Condition], result) -> str:
    """A line per image; a score that failed is empty, and its reason stands in the last column."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "prompt", *result.scores, "failures"])
    for i, (file, condition, row) in enumerate(zip(files, prompts, result.table.tolist())):
        reasons = [f"{name}: {reasons[i]}" for name, reasons in result.failures.items() if i in reasons]
        writer.writerow([file.name, condition.prompt, *("" if math.isnan(x) else f"{x:.6g}" for x in row),
                         "; ".join(reasons)])
    return text.getvalue()


def as_table(result) -> str:
    """A line per reward: mean and its standard error, extremes, failed images with the first reason."""
    lines = [f"{'reward':<20}{'mean':>10}{'std. err.':>11}{'min':>10}{'max':>10}{'failed':>8}"]
    for name, scores in result.scores.items():
        valid, reasons = scores[~scores.isnan()], list(result.failures[name].values())
        numbers = [math.nan] * 4
        if len(valid):
            error = valid.std().item() / math.sqrt(len(valid)) if len(valid) > 1 else math.nan
            numbers = [valid.mean().item(), error, valid.min().item(), valid.max().item()]
        cells = ["-" if math.isnan(x) else f"{x:.4f}" for x in numbers]
        lines.append(f"{name:<20}{cells[0]:>10}{cells[1]:>11}{cells[2]:>10}{cells[3]:>10}{len(reasons):>8}"
                     + (f"  {reasons[0]}" if reasons else ""))
    return "\n".join(lines)
