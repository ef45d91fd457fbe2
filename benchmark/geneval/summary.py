"""The score of a results file of GenEval's format, laid out as GenEval prints it.

    python -m benchmark.geneval.summary IMAGES_DIR/results.jsonl
"""
import sys
from pathlib import Path

import numpy as np

from utils.config import one_line_errors
from utils.files import parse_json, read_text

COUNTED = ("tag", "correct", "metadata")  # of a line's fields


def read_results(path: Path) -> list[dict]:
    """One dict per image; ValueError names the line that is none."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = parse_json(line, f"{path} line {number}", by_line=False)
        except ValueError as error:
            raise ValueError(f"{error}: evaluate the images again") from None
        if not isinstance(row, dict) or any(key not in row for key in COUNTED) or row["correct"] not in (True, False):
            raise ValueError(f"{path} line {number} is no result of an image: it needs {', '.join(COUNTED)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: evaluate the images again")
    return rows


def summarize(rows: list[dict]) -> dict:
    """Shares of correct images: of all, per task (in order of appearance), and the plain mean over tasks ("overall").

    A prompt is its metadata, as GenEval has it, and is correct if any of its images is. Images of one prompt are not
    independent, so the standard error is that of the prompts' means; None with a single prompt in a task.
    """
    tasks: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        tasks.setdefault(row["tag"], {}).setdefault(row["metadata"], []).append(bool(row["correct"]))
    prompts: dict[str, list[bool]] = {}
    for group in tasks.values():
        for metadata, correct in group.items():
            prompts.setdefault(metadata, []).extend(correct)
    table = {}
    for tag, group in tasks.items():
        correct = [value for values in group.values() for value in values]
        table[tag] = {"score": float(np.mean(correct)), "correct": sum(correct), "images": len(correct)}
    means = [[np.mean(values) for values in group.values()] for group in tasks.values()]
    squares = [np.var(task, ddof=1) / len(task) if len(task) > 1 else None for task in means]
    counts = [len(values) for values in prompts.values()]
    return {"num_images": len(rows), "num_prompts": len(prompts), "images_per_prompt": [min(counts), max(counts)],
            "correct_images": float(np.mean([row["correct"] for row in rows])),
            "correct_prompts": float(np.mean([any(values) for values in prompts.values()])), "tasks": table,
            "overall": float(np.mean([task["score"] for task in table.values()])),
            "overall_standard_error": None if None in squares else float(np.sqrt(sum(squares)) / len(squares))}


def format_summary(summary: dict) -> str:
    """GenEval's lines, and below them what it leaves out."""
    lines = ["Summary", "=======", f"Total images: {summary['num_images']}",
             f"Total prompts: {summary['num_prompts']}", f"% correct images: {summary['correct_images']:.2%}",
             f"% correct prompts: {summary['correct_prompts']:.2%}", "", "Task breakdown", "=============="]
    lines += [f"{tag:<16} = {task['score']:.2%} ({task['correct']} / {task['images']})"
              for tag, task in summary["tasks"].items()]
    lines += ["", f"Overall score (avg. over tasks): {summary['overall']:.5f}"]
    if summary["overall_standard_error"] is not None:
        lines.append(f"Standard error (over prompts): {summary['overall_standard_error']:.5f}")
    least, most = summary["images_per_prompt"]
    if least != most:
        lines.append(f"Note: prompts have {least} to {most} images")
    if not summary.get("is_geneval", True):
        lines.append(f"Note: detector {summary['detector']}: not comparable with published GenEval scores")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("usage: python -m benchmark.geneval.summary RESULTS.jsonl")
    rows = read_results(Path(argv[0]))
    detector = next((row["detector"] for row in rows if "detector" in row), None)
    summary = summarize(rows) | ({"detector": detector, "is_geneval": False} if detector else {})
    print(format_summary(summary))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
