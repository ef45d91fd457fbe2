"""One evaluation as one page: report.html in the folder of its samples, from what that folder holds.

    python -m benchmark.evaluation_report test_results/NAME

Metrics with their errors (rewards.jsonl, GenEval's results.jsonl, fid_evaluation.py's JSON), a grid of images, the
prompts with the worst and the best scores, the settings. The page needs no other file; pictures are thumbnails of at
most THUMBNAIL pixels, so that it stays below about 3 MB however many images there are. test.sh, test_t2i.sh and
test_t2i_rewards_drawbench.sh write it; call this again after scoring the same folder with something else.
"""
import html
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmark.prompt_scores import (
    GENEVAL_SCORE,
    ImageScores,
    by_prompt,
    mean_of,
    mean_over_categories,
    prompt_means,
    read_prompt_folders,
    read_scores,
    score_names,
    spell,
    summarise,
    title,
)
from trainer_utils.report import environment, figure, page, section, table
from utils.config import one_line_errors
from utils.files import read_object
from utils.image_files import IMAGE_SUFFIXES, read_image
from utils.lists import evenly

REPORT_FILE, SETTINGS_FILE = "report.html", "sampling.json"
THUMBNAIL = 128  # pixels of the longer side
GRID_IMAGES, GRID_COLUMNS = 64, 8
NUM_EXTREMES, IMAGES_PER_PROMPT = 6, 4  # of the worst and of the best prompts
MAX_ROWS, MAX_TEXT = 60, 400  # of a table of categories; of a prompt
NO_ROWS = ("ref", "samples", "bootstrap", "warnings")  # of fid_evaluation.py's JSON: no numbers of their own


def write_report(folder: Path, images: Path | None = None) -> Path:
    """Writes folder/report.html; images: where the pictures are, if elsewhere."""
    folder, images = Path(folder), Path(images or folder)
    files = image_files(images)
    if not files:
        raise ValueError(f"{images} holds no images: neither GenEval's folders nor {' '.join(IMAGE_SUFFIXES)} files")
    rows, metrics = read_scores(folder), read_metrics(folder)
    name = folder.resolve().name
    parts = [
        f"<h1>{html.escape(name)}</h1><p>{len(files)} images</p>",
        section("Metrics", metrics_table(metrics) + score_tables(rows)),
        section("Images", figure(contact_sheet(evenly(files, GRID_IMAGES), GRID_COLUMNS), "evenly over all images")),
        *extremes(images, rows),
        section("Settings", _json_table(folder / SETTINGS_FILE)),
        section("Environment", table(("", "version"), list(environment().items()))),
    ]
    path = folder / REPORT_FILE
    path.write_text(page(parts, name), encoding="utf-8")
    return path


# ---- what the folder holds -------------------------------------------------------------------------------------------

def image_files(folder: Path) -> list[Path]:
    """Of GenEval's folders the images one after another, member by member; else the folder's own."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if any(path.name.isdecimal() and path.is_dir() for path in folder.iterdir()):
        groups = [prompt.files for prompt in read_prompt_folders(folder)]
        return [files[i] for i in range(max(map(len, groups))) for files in groups if i < len(files)]
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def metrics_file(folder: Path) -> Path | None:
    """fid_evaluation.py's JSON: beside the folder of samples, under its name."""
    path = folder.resolve().with_name(folder.resolve().name + ".json")
    return path if path.is_file() else None


def read_metrics(folder: Path) -> dict:
    """fid_evaluation.py's numbers; empty where there are none."""
    path = metrics_file(folder)
    return {} if path is None else read_object(path)


# ---- tables ----------------------------------------------------------------------------------------------------------

def metrics_table(metrics: dict) -> str:
    """fid_evaluation.py's numbers with their bootstrap intervals, and its warnings."""
    intervals = metrics.get("bootstrap", {})
    rows = [(key, _number(value), "[{:.4f}, {:.4f}]".format(*intervals[key]) if key in intervals else "")
            for key, value in metrics.items() if key not in NO_ROWS]
    warnings = "".join(f"<p>Warning: {html.escape(str(line))}</p>" for line in metrics.get("warnings", []))
    return table(("metric", "value", "95 % interval"), rows) + warnings if rows else ""


def _number(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def score_tables(rows: list[ImageScores]) -> str:
    """Means over prompts, per category, and why images have no score."""
    if not rows:
        return ""
    summary = summarise(rows)
    cells, categories = summary["rewards"], summary["categories"]
    parts = [table(("score", "mean ± standard error over prompts", "prompts", "failed images"), [
        (title(name), spell(cell["mean"], cell["standard_error"]), str(cell["num_prompts"]), str(cell["num_failed"]))
        for name, cell in cells.items()])]
    failures = [(name, str(count), reason) for name, cell in cells.items()
                for reason, count in cell["failures"].items()]
    if failures:
        parts.append("<h3>Failures</h3>" + table(("score", "images", "reason"), failures))
    if categories:
        lines = [(category[:MAX_TEXT] or "(none)", *(spell(c["mean"], c["standard_error"]) for c in row.values()))
                 for category, row in categories.items()]
        if any(name.startswith(GENEVAL_SCORE) for name in cells):
            lines.append(("mean over categories (GenEval's overall score)",
                          *(spell(*mean_over_categories(rows, name)) for name in cells)))
        more = [(f"... {len(lines) - MAX_ROWS} more", *[""] * len(cells))] if len(lines) > MAX_ROWS else []
        parts.append("<h3>By category</h3>" + table(("category", *map(title, cells)), lines[:MAX_ROWS] + more))
    return "\n".join(parts)


def _json_table(path: Path) -> str:
    if not path.is_file():
        return ""
    return table(("setting", "value"), [(key, json.dumps(value)) for key, value in read_object(path).items()])


# ---- pictures --------------------------------------------------------------------------------------------------------

def extremes(folder: Path, rows: list[ImageScores]) -> list[str]:
    """Sections of the prompts with the worst and the best scores."""
    ranked = rank_prompts(rows)
    count = min(NUM_EXTREMES, len(ranked) // 2)
    if not count:
        return []
    groups = by_prompt(rows)

    def shown(prompts: list[str]) -> str:
        return "".join(prompt_figure(folder, groups[prompt]) for prompt in prompts)

    note = "" if len(score_names(rows)) == 1 else (
        "<p>Ranked by the mean of all scores, each in standard deviations from its mean over prompts.</p>")
    return [section("Worst prompts", note + shown(ranked[:count])),
            section("Best prompts", shown(ranked[:-count - 1:-1]))]


def rank_prompts(rows: list[ImageScores]) -> list[str]:
    """Prompts from the worst to the best mean of standardised scores; those without any score are left out."""
    standings: dict[str, list[float]] = {}
    for name in score_names(rows):
        means = prompt_means(rows, name)
        values = np.array(list(means.values()))
        spread_of = values.std() if len(values) else 0.0
        for prompt, value in means.items():
            standings.setdefault(prompt, []).append((value - values.mean()) / spread_of if spread_of > 0 else 0.0)
    return sorted(standings, key=lambda prompt: sum(standings[prompt]) / len(standings[prompt]))


def prompt_figure(folder: Path, group: list[ImageScores]) -> str:
    """A prompt's images in a row, under its text and its mean scores."""
    chosen = group[:IMAGES_PER_PROMPT]
    files = [folder / row.filename for row in chosen]
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):  # the names come out of a file
            raise ValueError(f"{folder}: its scores name {file}, which is outside: score the images again")
    scores = []
    for name in score_names(group):
        mean, failed = mean_of(group, name), sum(math.isnan(row.scores.get(name, 0.0)) for row in group)
        scores.append(f"{title(name)} " + ("-" if math.isnan(mean) else f"{mean:.4f}")
                      + (f" ({failed} failed)" if failed else ""))
    return figure(contact_sheet(files, len(files)), f"{group[0].prompt[:MAX_TEXT]} — {', '.join(scores)}")


def contact_sheet(files: Sequence[Path], columns: int) -> bytes:
    """Thumbnails side by side, as JPEG."""
    columns = min(columns, len(files))
    thumbnails = [_thumbnail(file) for file in files]
    width, height = (max(image.size[axis] for image in thumbnails) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(files) / columns) * height), "white")
    for i, image in enumerate(thumbnails):
        sheet.paste(image, (i % columns * width, i // columns * height))
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def _thumbnail(file: Path) -> Image.Image:
    image = Image.fromarray(read_image(file, file))
    scale = THUMBNAIL / max(image.size)  # smaller images are enlarged, so that they can be seen
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def main() -> None:
    if len(sys.argv) != 2:
        raise ValueError("usage: python -m benchmark.evaluation_report FOLDER")
    print(write_report(Path(sys.argv[1])))


if __name__ == "__main__":
    with one_line_errors():
        main()
