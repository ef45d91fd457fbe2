"""Score a folder of GenEval's layout; several processes share the images.

    bash benchmark/geneval/eval.sh IMAGES_DIR GPU_RANK [flags]
    python -m benchmark.geneval.evaluate --images_dir test_results/t2i_shapes_base_2 --detector shapes

Reads IMAGES_DIR/00000/metadata.jsonl (one record) and IMAGES_DIR/00000/samples/0000.png ...; only folders and PNG files
named by digits count. Writes IMAGES_DIR/results.jsonl, a line per image with GenEval's fields (and "detector", where it
is not GenEval's), and IMAGES_DIR/summary.json, prints GenEval's summary, and makes IMAGES_DIR/report.html anew. The
results appear whole or not at all.
"""
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from benchmark.evaluation_report import write_report
from benchmark.geneval.summary import format_summary, summarize
from dataset import shapes
from reward_utils.geneval import GenevalScorer, ShapesScorer, record_problem
from reward_utils.settings import RewardSettings
from utils import distributed
from utils.atomic import atomic_write_text
from utils.config import one_line_errors, parse_args
from utils.files import read_object
from utils.image_files import read_image

NUM_READERS = 4
SCORERS = {"mask2former": GenevalScorer, "shapes": lambda settings, device: ShapesScorer()}
CLASS_NAMES = {"mask2former": GenevalScorer.class_names, "shapes": ShapesScorer.class_names}


@dataclass(frozen=True)
class EvaluateConfig:
    images_dir: str = field(metadata={"help": "folder of digit-named folders, as sample_t2i.py writes it"})
    detector: Literal["mask2former", "shapes"] = field(default="mask2former", metadata={
        "help": "shapes: the exact detector of the shapes world, for its images"})


class Sample(NamedTuple):
    path: Path
    record: dict


def find_samples(folder: Path, detector: str) -> list[Sample]:
    """Every image with its prompt's record, by number; ValueError for a folder that cannot be evaluated as a whole."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    prompts = sorted((path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()), key=_number)
    if not prompts:
        raise ValueError(f"{folder}: no folder named by digits (00000, ...) in it, so nothing to evaluate")
    samples = []
    for prompt in prompts:
        record = read_record(prompt / "metadata.jsonl", detector)
        images = sorted((path for path in (prompt / "samples").glob("*.png") if re.fullmatch(r"\d+", path.stem)),
                        key=_number)
        if not images:
            raise ValueError(f"{prompt / 'samples'}: no image named by digits (0000.png, ...): sample again, or remove "
                             f"{prompt}")
        samples += [Sample(path, record) for path in images]
    return samples


def _number(path: Path) -> tuple[int, str]:
    return int(path.stem), path.name


def read_record(path: Path, detector: str) -> dict:
    """The record of a prompt, checked against the detector's classes."""
    try:
        record = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; each prompt's folder needs its one JSON record") from None
    problem = record_problem(record, CLASS_NAMES[detector])
    if problem is None and not all(isinstance(record.get(key), str) for key in ("tag", "prompt")):
        problem = "it needs the texts 'tag' and 'prompt'"
    if problem:
        is_shapes = record_problem(record, shapes.SHAPES) is None
        hint = "; for images of the shapes world give --detector shapes" if is_shapes else ""
        raise ValueError(f"{path}: {problem}{hint}")
    return record


def load_pixels(path: Path) -> torch.Tensor:
    """-> uint8 [3, H, W]"""
    return torch.tensor(read_image(path, path)).permute(2, 0, 1)


def evaluate_samples(scorer, samples: Sequence[Sample], batch_size: int) -> Iterator[dict]:
    """A row of results.jsonl for each sample, in order. Images of a batch may differ in size."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(samples), batch_size):
            batch = samples[start: start + batch_size]
            images = list(pool.map(load_pixels, [sample.path for sample in batch]))
            by_size: dict[tuple, list[int]] = {}
            for i, image in enumerate(images):
                by_size.setdefault(tuple(image.shape), []).append(i)
            verdicts = {}
            for group in by_size.values():
                verdicts.update(zip(group, scorer(torch.stack([images[i] for i in group]),
                                                  [batch[i].record for i in group])))
            yield from (result_row(sample, verdicts[i], scorer) for i, sample in enumerate(batch))


def result_row(sample: Sample, verdict: dict, scorer) -> dict:
    """GenEval's fields; its records and details are JSON inside JSON."""
    assert verdict["correct"] is not None, f"{sample.path}: {verdict['reason']}"  # read_record has looked
    row = {"filename": str(sample.path), "tag": sample.record["tag"], "prompt": sample.record["prompt"],
           "correct": verdict["correct"], "reason": verdict["reason"], "metadata": json.dumps(sample.record),
           "details": json.dumps(verdict["details"])}
    return row if scorer.is_geneval else row | {"detector": scorer.detector_name}


def evaluate_folder(config: EvaluateConfig, settings: RewardSettings, device: torch.device) -> dict | None:
    """Writes results.jsonl and summary.json; -> the summary, on rank 0."""
    folder = Path(config.images_dir)
    samples = find_samples(folder, config.detector)
    scorer = SCORERS[config.detector](settings, torch.device(settings.reward_device or device))
    own = samples[distributed.rank()::distributed.world_size()]
    rows = list(tqdm(evaluate_samples(scorer, own, settings.reward_batch_size), total=len(own), desc="evaluating",
                     unit="img", disable=not distributed.is_main()))
    shares = distributed.gather_objects(rows)
    if not distributed.is_main():
        return None
    rows = [shares[i % len(shares)][i // len(shares)] for i in range(len(samples))]
    summary = {"images_dir": str(folder), "detector": scorer.detector_name, "is_geneval": scorer.is_geneval,
               **summarize(rows)}
    atomic_write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    atomic_write_text(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def main(argv: list[str] | None = None) -> None:
    config, settings = parse_args((EvaluateConfig, RewardSettings), argv, __doc__)
    summary = evaluate_folder(config, settings, distributed.setup())
    if summary is not None:
        print(format_summary(summary))
        report = write_report(Path(config.images_dir))
        print(f"wrote {config.images_dir}/results.jsonl and summary.json, seen in {report}")
    distributed.shutdown()


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
