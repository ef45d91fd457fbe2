"""Two evaluations of the same prompts and seeds: paired differences with intervals.

    python -m benchmark.compare test_results/RUN_A test_results/RUN_B [--json OUT.json] [--html OUT.html]

Differences are B - A. Scores of images (rewards.jsonl, GenEval's results.jsonl) are paired image by image and averaged
by prompt; the standard error is that of the prompts' differences, and the interval is the 95 % percentile interval of a
bootstrap over prompts. An image that failed in either run leaves both. Numbers of fid_evaluation.py belong to whole
sets of images: both are shown, and where both carry bootstrap intervals, so does their difference, as if the two were
independent (sharing seeds makes that interval too wide rather than too narrow).
"""
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.evaluation_report import NUM_EXTREMES, SETTINGS_FILE, prompt_figure, read_metrics
from benchmark.prompt_scores import (
    SUMMARY_FILE,
    ImageScores,
    aligned,
    by_category,
    by_prompt,
    mean_and_error,
    read_scores,
    score_names,
    title,
)
from trainer_utils.report import page, section, table
from utils.atomic import atomic_write_text
from utils.config import Parser, one_line_errors
from utils.files import read_object

RESULTS_DIR = "test_results"
COVERAGE = 95.0  # per cent
BLOCK = 1 << 22  # bootstrap draws at a time
# of fid_evaluation.py's JSON: what must agree -> how it is spelled, without what does not matter
MEASURED_ALIKE = {
    "ref": lambda path: path and Path(path).name,
    "features": lambda name: name,
    "protocol": lambda text: text and text.partition("; intervals:")[0],
    "num_ref_images": lambda count: count,
    "num_sample_images": lambda count: count,  # FID falls with their number
}
NO_DIFFERENCE = ("kid_std", *MEASURED_ALIKE, "num_skipped")  # numbers beside the metrics


@dataclass(frozen=True)
class Evaluation:
    folder: Path
    settings: dict  # sampling.json; empty for images from elsewhere
    scorers: dict  # settings of the reward models, of rewards.json
    rows: list[ImageScores]
    metrics: dict  # of fid_evaluation.py


def read_evaluation(name: str) -> Evaluation:
    """A folder, or its name in test_results/."""
    folder = Path(name) if Path(name).is_dir() else Path(RESULTS_DIR) / name
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder, nor one in {RESULTS_DIR}/")
    settings, summary = (read_object(folder / file) if (folder / file).is_file() else {}
                         for file in (SETTINGS_FILE, SUMMARY_FILE))
    found = Evaluation(folder, settings, summary.get("reward_settings", {}), read_scores(folder), read_metrics(folder))
    if not found.rows and not found.metrics:
        raise ValueError(f"{folder} holds no results: neither rewards.jsonl (test_t2i_rewards.py), results.jsonl "
                         "(benchmark/geneval/eval.sh) nor the metrics of fid_evaluation.py")
    return found


# ---- may they be compared? -------------------------------------------------------------------------------------------

def check_pair(a: Evaluation, b: Evaluation) -> None:
    """ValueError names the first difference that forbids a comparison."""
    if bool(a.rows) != bool(b.rows) or bool(a.metrics) != bool(b.metrics):
        kinds = [" and ".join(filter(None, ["scores of images" * bool(e.rows), "metrics of the set" * bool(e.metrics)]))
                 for e in (a, b)]
        raise ValueError(f"{a.folder} holds {kinds[0]}, {b.folder} holds {kinds[1]}: score both alike")
    if a.settings and b.settings and a.settings.get("seed") != b.settings.get("seed"):
        raise _mismatch("seeds", a, b, a.settings.get("seed"), b.settings.get("seed"))
    for key in a.scorers.keys() & b.scorers.keys():
        if a.scorers[key] != b.scorers[key]:
            raise _mismatch(f"reward models (--{key})", a, b, a.scorers[key], b.scorers[key])
    _check_images(a, b)
    for key, spelled in MEASURED_ALIKE.items():
        values = [spelled(e.metrics.get(key)) for e in (a, b)]
        if values[0] != values[1]:
            raise _mismatch(key, a, b, *values)


def _check_images(a: Evaluation, b: Evaluation) -> None:
    prompts = [{row.filename: row.prompt for row in e.rows} for e in (a, b)]
    for own, other, e in ((*prompts, a), (*reversed(prompts), b)):
        if extra := sorted(own.keys() - other.keys()):
            raise ValueError(f"not the same images: {extra[0]} is in {e.folder} only"
                             + (f", and {len(extra) - 1} more" if len(extra) > 1 else ""))
    for name, prompt in prompts[0].items():
        if prompt != prompts[1][name]:
            raise _mismatch(f"prompts of {name}", a, b, repr(prompt), repr(prompts[1][name]))
    names = [score_names(e.rows) for e in (a, b)]
    if a.rows and not set(names[0]) & set(names[1]):
        raise _mismatch("scores", a, b, *map(" ".join, names))


def _mismatch(what: str, a: Evaluation, b: Evaluation, value_a, value_b) -> ValueError:
    return ValueError(f"not the same {what}: {value_a} in {a.folder}, {value_b} in {b.folder}")


# ---- the statistics --------------------------------------------------------------------------------------------------

def bootstrap_interval(strata: Sequence[np.ndarray], num_draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean over strata of their means; a stratum's values [n] are drawn with replacement."""
    rng, means = np.random.default_rng(seed), np.zeros(num_draws)
    for values in strata:
        block = max(1, BLOCK // len(values))
        for start in range(0, num_draws, block):
            count = min(block, num_draws - start)
            picks = rng.integers(len(values), size=(count, len(values)))
            means[start:start + count] += values[picks].mean(axis=1) / len(strata)
    low, high = np.percentile(means, [50 - COVERAGE / 2, 50 + COVERAGE / 2])
    return float(low), float(high)


def independent_interval(a: float, b: float, interval_a: Sequence[float],
                         interval_b: Sequence[float]) -> tuple[float, float]:
    """Of b - a from each one's own interval (Zou and Donner 2008): distances to the limits add as squares."""
    (low_a, high_a), (low_b, high_b) = interval_a, interval_b
    return b - a - math.hypot(b - low_b, high_a - a), b - a + math.hypot(high_b - b, a - low_a)


def prompt_pairs(rows_a: Sequence[ImageScores], rows_b: Sequence[ImageScores],
                 name: str) -> tuple[dict[str, tuple[float, float]], int]:
    """({prompt: (mean in A, mean in B)} over the images that both could score, how many images were left out)."""
    others = {row.filename: row for row in rows_b}
    pairs: dict[str, list[tuple[float, float]]] = {}
    num_failed = 0
    for row in rows_a:
        pair = row.scores.get(name, math.nan), others[row.filename].scores.get(name, math.nan)
        if math.isnan(pair[0]) or math.isnan(pair[1]):
            num_failed += 1
        else:
            pairs.setdefault(row.prompt, []).append(pair)
    return {prompt: tuple(math.fsum(side) / len(side) for side in zip(*group)) for prompt, group in pairs.items()}, \
        num_failed


def paired_cell(pairs: dict, num_failed: int, num_draws: int, seed: int) -> dict:
    """Means of both, their difference, its standard error and interval: None where there are too few prompts."""
    cell = dict.fromkeys(("a", "b", "difference", "standard_error", "interval"))
    if pairs:
        table_ = np.array(list(pairs.values()))  # [prompts, 2]
        differences = table_[:, 1] - table_[:, 0]
        mean, error = mean_and_error(differences.tolist())
        cell |= {"a": float(table_[:, 0].mean()), "b": float(table_[:, 1].mean()), "difference": mean,
                 "standard_error": error}
        if error is not None:
            cell["interval"] = bootstrap_interval([differences], num_draws, seed)
    return cell | {"num_prompts": len(pairs), "num_failed": num_failed}


def mean_cell(strata: list[dict], num_draws: int, seed: int) -> dict:
    """As paired_cell, for the unweighted mean over categories: `strata` are their {prompt: (A, B)}."""
    cell = dict.fromkeys(("a", "b", "difference", "standard_error", "interval"))
    tables = [np.array(list(pairs.values())) for pairs in strata]
    if all(map(len, tables)):
        a, b = np.mean([table_.mean(axis=0) for table_ in tables], axis=0).tolist()
        cell |= {"a": a, "b": b, "difference": b - a}
        differences = [table_[:, 1] - table_[:, 0] for table_ in tables]
        errors = [mean_and_error(values.tolist())[1] for values in differences]
        if None not in errors:
            cell |= {"standard_error": math.hypot(*errors) / len(errors),
                     "interval": bootstrap_interval(differences, num_draws, seed)}
    return cell | {"num_prompts": sum(map(len, tables)), "num_failed": 0}


def compare_scores(a: Evaluation, b: Evaluation, num_draws: int, seed: int) -> dict:
    """{"scores": {name: cell}, "categories": {category: {name: cell}}, "mean_over_categories": {name: cell}}."""
    in_b = set(score_names(b.rows))
    names = [name for name in score_names(a.rows) if name in in_b]

    def cells(rows: list[ImageScores]) -> dict:
        return {name: paired_cell(*prompt_pairs(rows, b.rows, name), num_draws, seed) for name in names}

    groups = by_category(a.rows)
    means = {name: mean_cell([prompt_pairs(rows, b.rows, name)[0] for rows in groups.values()], num_draws, seed)
             for name in names if len(groups) > 1}
    return {"scores": cells(a.rows), "categories": {category: cells(rows) for category, rows in groups.items()},
            "mean_over_categories": means}


def compare_metrics(a: dict, b: dict) -> dict:
    """{metric: {"a", "b", "difference", "interval_a", "interval_b", "interval"}} of fid_evaluation.py's numbers."""
    cells = {}
    for key in a:
        values = a[key], b.get(key)
        if key in NO_DIFFERENCE or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            continue
        own = [metrics.get("bootstrap", {}).get(key) for metrics in (a, b)]
        interval = independent_interval(*values, *own) if all(own) else None
        cells[key] = {"a": values[0], "b": values[1], "difference": values[1] - values[0], "interval_a": own[0],
                      "interval_b": own[1], "interval": interval}
    return cells


def compare(a: Evaluation, b: Evaluation, num_draws: int = 2000, seed: int = 0) -> dict:
    """Everything that --json writes."""
    check_pair(a, b)
    keys = [key for key in {**a.settings, **b.settings} if a.settings.get(key) != b.settings.get(key)]
    return {"a": str(a.folder), "b": str(b.folder),
            "settings_that_differ": {key: [a.settings.get(key), b.settings.get(key)] for key in keys},
            "scores_in_one_only": sorted(set(score_names(a.rows)) ^ set(score_names(b.rows))),
            "seeds_checked": bool(a.settings and b.settings), "num_draws": num_draws, "bootstrap_seed": seed,
            "num_images": len(a.rows), "num_prompts": len(by_prompt(a.rows)),
            **compare_scores(a, b, num_draws, seed), "metrics": compare_metrics(a.metrics, b.metrics)}


# ---- the output ------------------------------------------------------------------------------------------------------

SCORE_HEADER = ("", "A", "B", "B - A", "std. error", "95 % interval", "prompts", "failed images")
METRIC_HEADER = ("metric", "A", "B", "B - A", "95 % interval")


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _interval(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else f"[{limits[0]:+.4f}, {limits[1]:+.4f}]"


def score_rows(result: dict, name: str) -> list[tuple[str, ...]]:
    cells = {"all prompts": result["scores"][name],
             **{category or "(none)": row[name] for category, row in result["categories"].items()}}
    if name in result["mean_over_categories"]:
        cells["mean over categories"] = result["mean_over_categories"][name]
    return [(label, _number(cell["a"]), _number(cell["b"]), _number(cell["difference"], "+.4f"),
             _number(cell["standard_error"]), _interval(cell["interval"]), str(cell["num_prompts"]),
             str(cell["num_failed"])) for label, cell in cells.items()]


def metric_rows(result: dict) -> list[tuple[str, ...]]:
    return [(key, _number(cell["a"]), _number(cell["b"]), _number(cell["difference"], "+.4f"),
             _interval(cell["interval"])) for key, cell in result["metrics"].items()]


def notes(result: dict) -> list[str]:
    """What the reader of the numbers must know."""
    lines = [f"{key}: {a} in A, {b} in B" for key, (a, b) in result["settings_that_differ"].items()]
    if result["scores_in_one_only"]:
        lines.append(f"not compared, as only one of the two has it: {', '.join(result['scores_in_one_only'])}")
    if not result["seeds_checked"]:
        lines.append(f"seeds not checked: a folder without {SETTINGS_FILE} does not say with which it was sampled")
    return lines


def format_result(result: dict) -> str:
    parts = [f"A: {result['a']}\nB: {result['b']}", *notes(result)]
    for name in result["scores"]:
        parts.append(aligned([(title(name), *SCORE_HEADER[1:]), *score_rows(result, name)]))
    if result["metrics"]:
        parts.append(aligned([METRIC_HEADER, *metric_rows(result)]))
    return "\n\n".join(parts)


def html_page(result: dict, a: Evaluation, b: Evaluation) -> str:
    """The same tables, and the prompts whose scores moved most, with the images of both."""
    heading = f"{a.folder.resolve().name} → {b.folder.resolve().name}"
    parts = [f"<h1>{html.escape(heading)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in notes(result))]
    parts += [section(title(name), table(SCORE_HEADER, score_rows(result, name))) for name in result["scores"]]
    if result["metrics"]:
        parts.append(section("Metrics", table(METRIC_HEADER, metric_rows(result))))
    ranked = rank_changes(a, b, list(result["scores"]))
    count = min(NUM_EXTREMES, len(ranked) // 2)
    groups = by_prompt(a.rows), by_prompt(b.rows)
    for heading_, prompts in (("Fell most (A, B)", ranked[:count]), ("Rose most (A, B)", ranked[::-1][:count])):
        parts.append(section(heading_, "".join(prompt_figure(e.folder, group[prompt]) for prompt in prompts
                                               for e, group in zip((a, b), groups))))
    return page(parts, heading)


def rank_changes(a: Evaluation, b: Evaluation, names: list[str]) -> list[str]:
    """Prompts by the mean change of their scores, each in units of its root mean square over prompts."""
    changes: dict[str, float] = {}
    for name in names:
        pairs, _ = prompt_pairs(a.rows, b.rows, name)
        scale = math.sqrt(math.fsum((y - x) ** 2 for x, y in pairs.values()) / max(1, len(pairs)))
        for prompt, (x, y) in pairs.items():
            changes[prompt] = changes.get(prompt, 0.0) + ((y - x) / scale if scale else 0.0)
    return sorted(changes, key=changes.get)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmark.compare", description=__doc__.splitlines()[0])
    parser.add_argument("run_a", help=f"folder of an evaluation, or its name in {RESULTS_DIR}/")
    parser.add_argument("run_b")
    parser.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="draws of the prompts")
    parser.add_argument("--seed", type=int, default=0, help="of these draws")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write the numbers")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="also write a page with images")
    args = parser.parse_args(argv)
    if args.bootstrap < 1:
        raise ValueError(f"--bootstrap must be at least 1, got {args.bootstrap}")
    a, b = read_evaluation(args.run_a), read_evaluation(args.run_b)
    result = compare(a, b, args.bootstrap, args.seed)
    print(format_result(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.json, json.dumps(result, indent=2, allow_nan=False) + "\n")
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(html_page(result, a, b), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main()
