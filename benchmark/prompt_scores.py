"""Scores of images in GenEval's folders (00000/metadata.jsonl, 00000/samples/*.png): reading, averaging, writing.

    folders = read_prompt_folders(DIR)
    rows = score_images(reward_set, DIR, [(file, folder.condition) for folder in folders for file in folder.files])
    summary = summarise(rows)

A score of an evaluation is raw: the training scale of a cosine is divided out. Images of one prompt are not
independent, so every mean is over prompts (each the mean of its images) and so is its standard error; a prompt that
stands in several folders is one prompt. An image that could not be scored has NaN and a reason, leaves the means and is
counted.
"""
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset import Condition
from dataset.prompts import load_prompts
from img_gen_grpo_rewards import RewardSet
from reward_utils.score_folder import score_files
from utils.atomic import atomic_write_text
from utils.files import parse_json, read_text
from utils.image_files import IMAGE_SUFFIXES

SCORES_FILE, SUMMARY_FILE, TABLE_FILE = "rewards.jsonl", "rewards.json", "rewards.csv"
GENEVAL_FILE, GENEVAL_SCORE = "results.jsonl", "geneval_correct"  # GenEval's evaluator writes one, we name the other
TRAINING_SCALE = {"clip_text": 5.0, "clip_distance": 5.0, "hpsv2_text": 5.0, "hpsv2": 5.0}  # rewards: 5 x cosine
MAX_REASONS, MAX_REASON_LENGTH = 5, 200  # of failures, in a summary


@dataclass(frozen=True)
class PromptFolder:
    """One prompt and its images."""

    path: Path
    condition: Condition
    files: list[Path]


@dataclass(frozen=True)
class ImageScores:
    """One image's line."""

    filename: str  # below the evaluation's folder: 00000/samples/00000.png
    prompt: str
    category: str  # of the prompt: GenEval's tag, DrawBench's category, or empty
    scores: dict[str, float]  # name -> raw score; NaN: failed
    failures: dict[str, str] = field(default_factory=dict)  # name -> reason


# ---- GenEval's folders -----------------------------------------------------------------------------------------------

def read_prompt_folders(root: Path) -> list[PromptFolder]:
    """In the order of the folders' numbers; names that are no numbers are passed over, as GenEval does."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    paths = sorted((path for path in root.iterdir() if path.name.isdecimal() and path.is_dir()), key=_by_number)
    if not paths:
        raise ValueError(f"{root} holds no folders 00000, 00001, ... (GenEval's layout: in each a metadata.jsonl and "
                         "samples/00000.png ...)")
    return [_read_prompt_folder(path) for path in paths]


def _read_prompt_folder(path: Path) -> PromptFolder:
    conditions = load_prompts(path / "metadata.jsonl")
    if len(conditions) != 1:
        raise ValueError(f"{path / 'metadata.jsonl'} holds {len(conditions)} records: GenEval's layout has one")
    samples = path / "samples"
    files = [file for file in samples.iterdir() if file.stem.isdecimal()
             and file.suffix.lower() in IMAGE_SUFFIXES] if samples.is_dir() else []
    if not files:
        raise ValueError(f"{samples} holds no images named by digits (00000.png, ...; {' '.join(IMAGE_SUFFIXES)})")
    return PromptFolder(path, conditions[0], sorted(files, key=_by_number))


def _by_number(path: Path) -> tuple[int, str]:
    return int(path.stem), path.name


def category_of(condition: Condition) -> str:
    return str(condition.metadata.get("category") or condition.metadata.get("tag") or "")


def score_images(reward_set: RewardSet, root: Path, images: Sequence[tuple[Path, Condition]]) -> list[ImageScores]:
    """Raw scores of image files below `root`, in their order; an unreadable file is a ValueError that names it."""
    if not images:  # a process without a share
        return []
    result = score_files(reward_set, *map(list, zip(*images)))
    columns = {name: (scores.double() / TRAINING_SCALE.get(name, 1.0)).tolist()
               for name, scores in result.scores.items()}
    return [ImageScores(file.relative_to(root).as_posix(), condition.prompt, category_of(condition),
                        {name: column[i] for name, column in columns.items()},
                        {name: reasons[i] for name, reasons in result.failures.items() if i in reasons})
            for i, (file, condition) in enumerate(images)]


# ---- means -----------------------------------------------------------------------------------------------------------

def score_names(rows: Iterable[ImageScores]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def by_prompt(rows: Iterable[ImageScores]) -> dict[str, list[ImageScores]]:
    groups: dict[str, list[ImageScores]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    return groups


def by_category(rows: Iterable[ImageScores]) -> dict[str, list[ImageScores]]:
    """Empty where no prompt has a category."""
    groups: dict[str, list[ImageScores]] = {}
    for row in rows:
        groups.setdefault(row.category, []).append(row)
    return groups if any(groups) else {}


def mean_of(rows: Sequence[ImageScores], name: str) -> float:
    """Over the images that have this score; NaN where none has."""
    values = [row.scores[name] for row in rows if not math.isnan(row.scores.get(name, math.nan))]
    return math.fsum(values) / len(values) if values else math.nan


def prompt_means(rows: Iterable[ImageScores], name: str) -> dict[str, float]:
    """{prompt: mean over its images}, without the prompts that have no score."""
    means = {prompt: mean_of(group, name) for prompt, group in by_prompt(rows).items()}
    return {prompt: mean for prompt, mean in means.items() if not math.isnan(mean)}


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there is no value, or one only."""
    count = len(values)
    if not count:
        return None, None
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def mean_over_categories(rows: list[ImageScores], name: str) -> tuple[float | None, float | None]:
    """Unweighted, as GenEval's overall score, and its standard error; None where a category has no score, or a single
    prompt."""
    cells = [mean_and_error(list(prompt_means(group, name).values())) for group in by_category(rows).values()]
    means, errors = zip(*cells)
    mean = None if None in means else math.fsum(means) / len(means)
    return mean, None if None in errors else math.hypot(*errors) / len(errors)


def summarise(rows: Sequence[ImageScores]) -> dict:
    """{"num_prompts", "num_images", "rewards": {name: cell}, "categories": {category: {name: cell}}}; a cell is
    {"mean", "standard_error", "num_prompts", "num_failed", "failures": {reason: count}}."""
    names = score_names(rows)
    return {"num_prompts": len(by_prompt(rows)), "num_images": len(rows),
            "rewards": {name: _cell(rows, name) for name in names},
            "categories": {category: {name: _cell(group, name) for name in names}
                           for category, group in by_category(rows).items()}}


def _cell(rows: Sequence[ImageScores], name: str) -> dict:
    means = prompt_means(rows, name)
    mean, error = mean_and_error(list(means.values()))
    asked = [row for row in rows if name in row.scores]
    reasons = Counter(row.failures.get(name, "no score")[:MAX_REASON_LENGTH] for row in asked
                      if math.isnan(row.scores[name]))
    return {"mean": mean, "standard_error": error, "num_prompts": len(means), "num_failed": reasons.total(),
            "failures": dict(reasons.most_common(MAX_REASONS))}


def title(name: str) -> str:
    """What a score is, where the name alone would mislead."""
    return f"{name} (cosine)" if name in TRAINING_SCALE else name


def spell(mean: float | None, error: float | None, digits: int = 4) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def format_summary(summary: dict) -> str:
    """Tables for the terminal: all prompts, each category, and the failures."""
    cells = summary["rewards"]
    rows = [("reward", "mean ± std. error", "prompts", "failed images")]
    rows += [(title(name), spell(cell["mean"], cell["standard_error"]), str(cell["num_prompts"]),
              f"{cell['num_failed']} of {summary['num_images']}") for name, cell in cells.items()]
    lines = [aligned(rows)]
    if summary["categories"]:
        rows = [("category", *map(title, cells))]
        rows += [(category or "(none)", *(spell(cell["mean"], cell["standard_error"]) for cell in row.values()))
                 for category, row in summary["categories"].items()]
        lines += ["", aligned(rows)]
    for name, cell in cells.items():
        lines += [f"FAILED {name}: {count} images: {reason}" for reason, count in cell["failures"].items()]
    return "\n".join(lines)


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# ---- files -----------------------------------------------------------------------------------------------------------

def write_scores(root: Path, rows: Sequence[ImageScores], about: dict) -> dict:
    """rewards.jsonl (a line per image), rewards.csv (a line per prompt), rewards.json (`about` and the summary, which
    is returned). What an earlier call left under these names is replaced."""
    summary = about | summarise(rows)
    atomic_write_text(root / SCORES_FILE, "".join(_json_line(row) for row in rows))
    atomic_write_text(root / TABLE_FILE, prompt_table(rows))
    atomic_write_text(root / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def _json_line(row: ImageScores) -> str:
    """JSON has no NaN: a failed score is null."""
    scores = {name: None if math.isnan(score) else score for name, score in row.scores.items()}
    return json.dumps({"filename": row.filename, "prompt": row.prompt, "category": row.category, "scores": scores,
                       "failures": row.failures}, ensure_ascii=False, allow_nan=False) + "\n"


def prompt_table(rows: Sequence[ImageScores]) -> str:
    """CSV: a line per prompt with each score's mean and how many of its images failed; no score is an empty cell."""
    names, text = score_names(rows), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folders", "prompt", "category", "images", *names, *(f"{name}_failed" for name in names)])
    for prompt, group in by_prompt(rows).items():
        means = [mean_of(group, name) for name in names]
        failed = [sum(math.isnan(row.scores.get(name, 0.0)) for row in group) for name in names]
        folders = dict.fromkeys(row.filename.split("/")[0] for row in group)
        writer.writerow([" ".join(folders), prompt, group[0].category, len(group),
                         *("" if math.isnan(mean) else f"{mean:.6g}" for mean in means), *failed])
    return text.getvalue()


def read_scores(root: Path) -> list[ImageScores]:
    """The lines of rewards.jsonl, each with GenEval's verdict of results.jsonl as one more score; either may lack."""
    rows = {row.filename: row for row in _lines(root / SCORES_FILE, _score_row)}
    for verdict in _lines(root / GENEVAL_FILE, _geneval_row):
        row = rows.get(verdict.filename)
        if row is None:
            rows[verdict.filename] = verdict
            continue
        if row.prompt != verdict.prompt:
            raise ValueError(f"{root}: {verdict.filename} was made for {row.prompt[:80]!r} says {SCORES_FILE}, for "
                             f"{verdict.prompt[:80]!r} says {GENEVAL_FILE}: score it again")
        rows[verdict.filename] = ImageScores(row.filename, row.prompt, row.category or verdict.category,
                                             row.scores | verdict.scores, row.failures)
    return list(rows.values())


def _lines(path: Path, parse) -> list[ImageScores]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(parse(parse_json(line, "it", by_line=False)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} line {number} is not an image's scores ({type(error).__name__}: {error}): "
                                 "score the images again") from None
    return rows


def _score_row(record: dict) -> ImageScores:
    scores = {name: math.nan if score is None else float(score) for name, score in record["scores"].items()}
    return ImageScores(str(record["filename"]), str(record["prompt"]), str(record["category"]), scores,
                       dict(record["failures"]))


def _geneval_row(record: dict) -> ImageScores:
    filename = "/".join(Path(record["filename"]).parts[-3:])  # GenEval writes the path that it was called with
    name = f"{GENEVAL_SCORE} ({record['detector']})" if "detector" in record else GENEVAL_SCORE  # not to be mixed
    return ImageScores(filename, str(record["prompt"]), str(record["tag"]), {name: float(bool(record["correct"]))})
