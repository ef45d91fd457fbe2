"""trainer_utils/report.py: one page that needs no other file, whatever the run managed to log."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from trainer_utils.report import PANELS, read_metrics, write_report

PICTURE = re.compile(r'<figcaption>([^<]*)</figcaption><img alt="[^"]*" src="data:image/png;base64,([^"]*)"')


def make_run(path: Path, lines: list[dict], config: dict | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"run_name": "tiny"}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pictures(page: Path) -> dict[str, bytes]:
    return {title: base64.b64decode(data) for title, data in PICTURE.findall(page.read_text(encoding="utf-8"))}


def full_run(path: Path) -> Path:
    train = [
        {"step": step, "reward": step / 30, "rewards/strict": step / 40, "kl": None if step == 3 else 0.1, "entropy": 2,
         "clip_low": 0.0, "clip_high": 0.1, "grad_norm": 1.0, "logp_gap_max": 1e-5, "seconds/sample": 1, "odd": 3}
        for step in range(1, 31)
    ]  # fmt: skip
    held_out = [
        {"step": step, "eval/reward": 0.25 + step / 100, "eval/rewards/strict": 0.5, "eval/rewards/strict_stderr": 0.02}
        for step in (0, 30)
    ]
    return make_run(path, train + held_out, {"run_name": "a<b", "prompt": "<script>alert(1)</script>", "beta": 0.01})


def test_page_holds_curves_grids_and_numbers(tmp_path):
    run = full_run(tmp_path / "run")
    (run / "samples").mkdir()
    for step in (0, 999999, 1000000):
        Image.new("RGB", (8, 8), (step % 7, 0, 0)).save(run / "samples" / f"step_{step:06d}.png")
    page = write_report(run)
    assert page == run / "report.html"
    shown = pictures(page)
    assert shown["step 000000"] == (run / "samples" / "step_000000.png").read_bytes()
    assert shown["step 1000000"] == (run / "samples" / "step_1000000.png").read_bytes()
    assert "step 999999" not in shown
    panels = [title for title in PANELS if title in shown]
    assert {title.split()[0] for title in panels} == {
        "Training", "Held-out", "KL", "Entropy", "Clipped", "Gradient", "Sampler", "Seconds"
    }  # fmt: skip
    assert all(shown[title].startswith(b"\x89PNG") for title in panels)
    assert (run / "reward_curve.png").read_bytes() == shown["Training reward"]
    text = page.read_text(encoding="utf-8")
    row = "<tr><td>reward</td><td>0.25 (step 0)</td><td>0.55 (step 30)</td><td>+0.3</td></tr>"
    assert row in text and "0.5 ± 0.02 (step 30)" in text
    assert "rewards/strict_stderr" not in text
    assert "torch" in text and "git commit" in text


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path):
    text = write_report(full_run(tmp_path)).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "<h1>a&lt;b</h1>" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


@pytest.mark.parametrize("line", [{"step": 0, "eval/reward": 0.5}, {"step": 7, "reward": 1}, {"step": 1, "unheard": 2}])
def test_a_single_line_is_enough(tmp_path, line):
    page = write_report(make_run(tmp_path, [line], {"beta": 1}))
    assert f"Step {line['step']}" in page.read_text(encoding="utf-8")
    assert (tmp_path / "reward_curve.png").exists() == ("reward" in line)


def test_the_error_bars_are_drawn(tmp_path):
    line = {"step": 0, "eval/rewards/strict": 0.5}
    pages = [
        write_report(make_run(tmp_path / name, [{**line, **extra}]))
        for name, extra in (("without", {}), ("with", {"eval/rewards/strict_stderr": 0.2}))
    ]
    title = next(title for title in PANELS if title.startswith("Held-out reward"))
    assert pictures(pages[0])[title] != pictures(pages[1])[title]


def test_damaged_lines_are_counted_and_the_later_of_two_wins(tmp_path):
    run = make_run(tmp_path, [{"step": 1, "reward": 1.0}, {"step": 1, "reward": 2.0, "kl": None}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward": NaN}\n[1]\n{"step": 2, "rew')
    assert read_metrics(run / "metrics.jsonl") == ({"reward": {1: 2.0}}, 2)
    assert "2 lines of metrics.jsonl were unreadable" in write_report(run).read_text(encoding="utf-8")


def test_no_metrics_or_no_run_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="folder of a run"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no metrics yet"):
        write_report(make_run(tmp_path, [{"step": 1, "reward": None}]))


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", [{"step": 1, "reward": 1.0}])
    root = Path(__file__).resolve().parents[2]

    def call(folder):
        command = [sys.executable, "-m", "trainer_utils.report", str(folder)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)

    assert call(run).stdout.strip() == str(run / "report.html")
    failed = call(tmp_path / "absent")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_events_are_shown_and_half_a_line_is_not(tmp_path):
    run = full_run(tmp_path / "run")
    assert "Events" not in write_report(run).read_text(encoding="utf-8")
    event = {"time": "2026-01-02T03:04:05", "event": "diverged", "step": 7, "reason": "kl <b>", "action": "rollback"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n" + '{"event": "cut')
    page = write_report(run).read_text(encoding="utf-8")
    assert "<td>diverged</td><td>reason: kl &lt;b&gt;, action: rollback</td>" in page and "cut" not in page
