"""Everything worth knowing from one GPU in one call: runs the stages of gpu_stages.py and puts their figures together.

    bash benchmark/gpu_check.sh                                # all stages, results under build/gpu_check
    bash benchmark/gpu_check.sh decoding exactness             # some of them
    OUT=/somewhere bash benchmark/gpu_check.sh --seconds 300   # what does not fit into the time is left out and named
    bash benchmark/gpu_check.sh --tiny --device cpu            # the script itself, on a laptop

Each stage is a process of its own with a time limit. It writes each figure down as soon as it has it, so that one that
fails or meets its limit keeps those it had, and its line goes into OUT/stages.jsonl when it ends. OUT/gpu_check.md is
the section for benchmark/RESULTS.md, with card, versions and date; --results puts it there, in place of an older one.
Needs no network and installs nothing.
"""
import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from utils.config import Parser, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmark" / "RESULTS.md"
TITLE = "## One GPU, `bash benchmark/gpu_check.sh`"
ORDER = ("machine", "tests", "exactness", "decoding", "training", "whole_job", "kernels", "scoring", "shapes",
         "planner")
GRACE = 10  # seconds from a stage's limit to its end


def run_stage(name: str, output: Path, flags: list[str], seconds: float) -> dict:
    """{"stage", "seconds", "figures"}, and "failed" with the reason where it did not come to its end."""
    line, result, started = {"stage": name, "figures": {}}, output / f"{name}.json", time.monotonic()
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmark.speed.gpu_check", "--inside", name, "--output", str(output), *flags]
    with open(output / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_group(process)
            code = f"its limit of {seconds:.0f} s"
    line["seconds"] = round(time.monotonic() - started, 1)
    if result.is_file():
        line["figures"] = json.loads(result.read_text())
    if code == 0:
        return line
    last = ((output / f"{name}.log").read_text().strip().splitlines() or ["no output"])[-1]
    return line | {"failed": f"ended with {code}: {last[:300]}"}


def end_group(process: subprocess.Popen) -> None:
    """A stage's processes are a group of their own."""
    import signal

    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def inside(name: str, output: Path, device: str, tiny: bool) -> None:
    import torch

    from benchmark.speed.gpu_stages import STAGES, Setting

    figures, partial = {}, output / f"{name}.json.partial"
    for found in STAGES[name].run(Setting(torch.device(device), output, tiny)):
        figures |= found
        partial.write_text(json.dumps(figures))
        partial.replace(output / f"{name}.json")


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def as_rows(figures: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in rounded(figures).items():
        if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            rows += as_rows(value, f"{prefix}{key}/")
        elif isinstance(value, dict):
            rows.append((prefix + key, ", ".join(f"{name} {one}" for name, one in value.items())))
        elif not (isinstance(value, list) and len(value) > 6):  # long lists are for the JSON
            rows.append((prefix + key, str(value)))
    return rows


def as_markdown(lines: list[dict], command: str, tiny: bool) -> str:
    machine = next((line.get("figures", {}) for line in lines if line["stage"] == "machine"), {})
    text = [TITLE, "", f"{machine.get('card', 'unknown card')}; torch {machine.get('torch', '?')}, transformers "
            f"{machine.get('transformers', '?')}, CUDA {machine.get('cuda', '-')}; {datetime.date.today()}"
            f"{'; TINY sizes, a try of the script' if tiny else ''}; `{command}`.", ""]
    for line in lines:
        text += [f"### {line['stage']} ({line['seconds']} s)", ""]
        if "failed" in line:
            text += [f"Not to its end: {line['failed']}", ""]
        if line["figures"]:
            text += ["| figure | value |", "|---|---|",
                     *(f"| {name} | {value} |" for name, value in as_rows(line["figures"])), ""]
    return "\n".join(text)


def put_into_results(section: str, path: Path = RESULTS) -> None:
    """In place of the section that an earlier run left, or at the end."""
    text = path.read_text()
    older = re.search(rf"^{re.escape(TITLE)}\n.*?(?=^## |\Z)", text, re.M | re.S)
    text = (text[: older.start()] + section + "\n" + text[older.end():]) if older else f"{text.rstrip()}\n\n{section}\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def limits(names: list[str], budget: float) -> dict[str, float]:
    from benchmark.speed.gpu_stages import STAGES

    return {name: min(STAGES[name].seconds, budget) for name in names}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bash benchmark/gpu_check.sh", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {' '.join(ORDER)}; none: all, in this order")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all stages together (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu_check"))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script with --tiny")
    parser.add_argument("--tiny", action="store_true", help="sizes for a laptop: no figure counts")
    parser.add_argument("--results", action="store_true", help=f"put the section into {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in (*args.stages, *filter(None, [args.inside])) if name not in ORDER]:
        raise ValueError(f"no stage {unknown[0]!r}; known: {', '.join(ORDER)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.inside:
        inside(args.inside, args.output, args.device, args.tiny)
        return 0
    if args.device == "cuda":
        import torch
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device is visible: run this where there is one, or try the script with --tiny "
                             "--device cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    names, started = args.stages or list(ORDER), time.monotonic()
    flags = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    lines, limit = [], limits(names, args.seconds)
    for name in names:
        left = args.seconds - (time.monotonic() - started)
        if left < min(30, limit[name] / 2):
            line = {"stage": name, "seconds": 0.0, "figures": {},
                    "failed": f"left out: {left:.0f} s were left of --seconds"}
        else:
            line = run_stage(name, args.output, flags, min(limit[name], left))
        lines.append(line)
        with open(args.output / "stages.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(rounded(line))[:2500], flush=True)
    section = as_markdown(lines, " ".join(["bash benchmark/gpu_check.sh", *(argv or sys.argv[1:])]), args.tiny)
    (args.output / "gpu_check.md").write_text(section + "\n")
    if args.results:
        put_into_results(section)
    print("\n" + "\n".join(f"{line['stage']:<12}{line['seconds']:>7.1f} s  {line.get('failed', 'done')}"
                           for line in lines))
    return int(all("failed" in line for line in lines))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
