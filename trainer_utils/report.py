"""A finished (or running) run as one page: `report.html` and `reward_curve.png`, from what the run folder holds.

    python -m trainer_utils.report checkpoints/RUN

The page needs no other file: pictures and curves are embedded. It shows the first and the last sample grid, the
held-out evaluation, the curves, the configuration and the versions. Leaves out: anything that is not in config.json,
metrics.jsonl and samples/; the versions are those of the process that writes the report.
"""

import base64
import fnmatch
import html
import importlib.metadata
import io
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

from utils.config import one_line_errors
from utils.files import read_object

STDERR = "_stderr"
REWARD_PANEL = "Training reward"
# title -> metric names (shell patterns); a panel without data is left out
PANELS = {
    REWARD_PANEL: ("reward", "rewards/*"),
    "Held-out reward (bars: standard error)": ("eval/reward", "eval/rewards/*"),
    "KL to the starting policy": ("kl",),
    "Entropy (nats per token)": ("entropy", "eval/entropy"),
    "Clipped ratios (fraction of tokens)": ("clip_*",),
    "Gradient norm": ("grad_norm",),
    "Sampler and trainer log-probabilities: gap": ("logp_gap_*",),
    "Reward spread within a group": ("reward_std",),
    "Groups with zero spread": ("zero_spread_groups",),
    "Held-out token Hamming distance": ("eval/token_hamming",),
    "Held-out FID": ("eval/fid",),
    "Learning rate": ("learning_rate",),
    "Seconds per phase": ("seconds/*",),
    "Images per second": ("images_per_sec",),
}
_SMOOTH_FROM = 20  # shorter series are drawn as they are
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
img { max-width: 100%; vertical-align: top } figure { display: inline-block; margin: 0 1em 1em 0; max-width: 47% }
"""

Series = dict[str, dict[int, float]]  # metric -> step -> value


def write_report(run_folder: Path) -> Path:
    """Writes report.html and reward_curve.png into the run's folder; returns the page's path."""
    run_folder = Path(run_folder)
    config = _read_config(run_folder / "config.json")
    series, num_unreadable = read_metrics(run_folder / "metrics.jsonl")
    panels = {title: _select(series, patterns) for title, patterns in PANELS.items()}
    curves = {title: _curve(title, lines, series) for title, lines in panels.items() if lines}
    if REWARD_PANEL in curves:
        (run_folder / "reward_curve.png").write_bytes(curves[REWARD_PANEL])
    last_step = max(step for values in series.values() for step in values)
    parts = [
        f"<h1>{html.escape(str(config.get('run_name') or run_folder.resolve().name))}</h1><p>Step {last_step}</p>",
        section("Before and after", _before_after(run_folder / "samples")),
        section("Held-out evaluation", _evaluation_table(series)),
        *_events(run_folder / "events.jsonl"),
        section("Curves", "".join(figure(png, title) for title, png in curves.items())),
        section("Configuration", table(("option", "value"), [(key, json.dumps(config[key])) for key in config])),
        section("Environment", table(("", "version"), list(environment().items()))),
    ]
    if num_unreadable:
        parts.append(f"<p>{num_unreadable} lines of metrics.jsonl were unreadable and are not shown.</p>")
    path = run_folder / "report.html"
    path.write_text(page(parts), encoding="utf-8")
    return path


def _events(path: Path) -> list[str]:
    """What was rare: rollbacks, failed checkpoints, interruptions; nothing where there was none."""
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = dict(json.loads(text))
        except (ValueError, TypeError):  # half a line of a killed run
            continue
        details = ", ".join(f"{key}: {value}" for key, value in line.items() if key not in ("time", "event", "step"))
        rows.append((str(line.get("time")), str(line.get("step")), str(line.get("event")), details))
    return [section("Events", table(("time", "step", "event", ""), rows))] if rows else []


def read_metrics(path: Path) -> tuple[Series, int]:
    """metrics.jsonl -> every finite number by metric and step (of a step logged twice, the later), and the number of
    unreadable lines: a killed run may leave half a line."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: is {path.parent} the folder of a run?")
    series: Series = {}
    num_unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            num_unreadable += 1
            continue
        for key, value in values.items():
            if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
                series.setdefault(key, {})[step] = value
    if not series:
        raise ValueError(f"{path} holds no metrics yet: there is nothing to report")
    return series, num_unreadable


def environment() -> dict[str, str]:
    """What produced the numbers."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "git commit": _git_commit()}


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: is {path.parent} the folder of a run?")
    return read_object(path)


def _select(series: Series, patterns: tuple[str, ...]) -> list[str]:
    return [
        key
        for pattern in patterns
        for key in sorted(series)
        if fnmatch.fnmatchcase(key, pattern) and not key.endswith(STDERR)
    ]


def _curve(title: str, keys: list[str], series: Series) -> bytes:
    """One panel as PNG. Without pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for key in keys:
        steps = sorted(series[key])
        values = [series[key][step] for step in steps]
        errors = series.get(key + STDERR, {})
        if errors:
            bars = [errors.get(step, math.nan) for step in steps]
            axes.errorbar(steps, values, yerr=bars, label=key, marker="o", markersize=3, capsize=3)
        elif len(steps) < _SMOOTH_FROM:
            axes.plot(steps, values, label=key, marker="o", markersize=3)
        else:
            [raw] = axes.plot(steps, values, alpha=0.25)
            axes.plot(steps, _running_mean(values), label=key, color=raw.get_color())
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    encoded = io.BytesIO()
    FigureCanvasAgg(figure).print_png(encoded)
    return encoded.getvalue()


def _running_mean(values: list[float]) -> list[float]:
    """Centred mean over about a tenth of the series, narrower at its ends, so that the ends are not bent."""
    reach = max(1, len(values) // 20)
    windows = [values[max(0, at - reach) : at + reach + 1] for at in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _evaluation_table(series: Series) -> str:
    rows = []
    for key in _select(series, ("eval/*",)):
        first, last = min(series[key]), max(series[key])
        change = f"{series[key][last] - series[key][first]:+.4g}" if last > first else ""
        rows.append((key.removeprefix("eval/"), _value(series, key, first), _value(series, key, last), change))
    return table(("", "first", "last", "change"), rows) if rows else ""


def _value(series: Series, key: str, step: int) -> str:
    error = series.get(key + STDERR, {}).get(step)
    spread = "" if error is None else f" ± {error:.2g}"
    return f"{series[key][step]:.4g}{spread} (step {step})"


def _before_after(samples: Path) -> str:
    grids = sorted(samples.glob("step_*.png"), key=lambda path: (len(path.name), path.name))  # by number, past 999999
    shown = grids[:1] + grids[1:][-1:]  # the first and the last, once where there is only one
    return "".join(figure(path.read_bytes(), path.stem.replace("_", " ")) for path in shown)


# ---- blocks of a page, shared with benchmark/evaluation_report.py; they escape the text that they are given


def figure(picture: bytes, caption: str) -> str:
    """A PNG or JPEG file's bytes, embedded."""
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "png"
    data = base64.b64encode(picture).decode("ascii")
    text = html.escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/{kind};base64,{data}"></figure>\n'


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows]
    return f"<table><tr>{head}</tr>\n{''.join(body)}</table>"


def section(title: str, content: str) -> str:
    """content: HTML; empty: no section."""
    return f"<h2>{html.escape(title)}</h2>\n{content}\n" if content else ""


def page(parts: list[str], title: str = "Run report") -> str:
    # should a text ever stand in it unescaped: no script runs and nothing is fetched
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">' \
           f'<title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(parts)}</body></html>\n'


def main() -> None:
    if len(sys.argv) != 2:
        raise ValueError("usage: python -m trainer_utils.report RUN_FOLDER")
    sys.stdout.write(f"{write_report(Path(sys.argv[1]))}\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
