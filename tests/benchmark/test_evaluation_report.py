"""The report of an evaluation: everything in one page, for classes and captions, whatever the texts say."""
import base64
import io
import json
import math
import re
import sys

import numpy as np
import pytest
from PIL import Image

from benchmark import evaluation_report
from benchmark.evaluation_report import THUMBNAIL, contact_sheet, image_files, rank_prompts, write_report
from benchmark.prompt_scores import ImageScores, write_scores
from utils.config import one_line_errors

FIGURE = re.compile(r'<figcaption>([^<]*)</figcaption><img alt="[^"]*" src="data:image/jpeg;base64,([^"]*)"')


def make_prompts(root, count, members=2, size=16, noise=False):
    """GenEval's folders; -> rows whose score `a` grows with the prompt and `b` falls."""
    rng, rows = np.random.default_rng(0), []
    for p in range(count):
        samples = root / f"{p:05d}" / "samples"
        samples.mkdir(parents=True)
        (root / f"{p:05d}" / "metadata.jsonl").write_text(json.dumps({"prompt": f"prompt {p}"}) + "\n")
        for m in range(members):
            pixels = rng.integers(256, size=(size, size, 3)) if noise else np.full((size, size, 3), 10 * p)
            Image.fromarray(pixels.astype(np.uint8)).save(samples / f"{m:05d}.png")
            rows.append(ImageScores(f"{p:05d}/samples/{m:05d}.png", f"prompt {p}", f"kind {p % 2}",
                                    {"a": p / 10 + m / 100, "b": -p / 100}))
    return rows


def figures(page):
    return [(caption, Image.open(io.BytesIO(base64.b64decode(data)))) for caption, data in FIGURE.findall(page)]


def test_captions_tables_grid_worst_and_best(tmp_path):
    rows = make_prompts(tmp_path, 5)
    write_scores(tmp_path, rows, {"model": "m"})
    (tmp_path / "sampling.json").write_text(json.dumps({"seed": 3, "conditions": "prompts 12"}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    error = np.std([0.005, 0.105, 0.205, 0.305, 0.405], ddof=1) / math.sqrt(5)
    assert f"<tr><td>a</td><td>0.2050 ± {error:.4f}</td><td>5</td><td>0</td></tr>" in page
    assert "<td>kind 1</td><td>0.2050 ± 0.1000</td>" in page and "<td>seed</td><td>3</td>" in page
    assert re.findall(r"<h2>([^<]*)</h2>", page) == ["Metrics", "Images", "Worst prompts", "Best prompts", "Settings",
                                                     "Environment"]
    shown = figures(page)
    assert shown[0][1].size == (8 * THUMBNAIL, 2 * THUMBNAIL) and len(shown) == 5
    captions = [caption for caption, _ in shown[1:]]
    assert captions[0].startswith("prompt ") and "a 0." in captions[0] and "b " in captions[0]
    assert not {c.split(" —")[0] for c in captions[:2]} & {c.split(" —")[0] for c in captions[2:]}
    assert all(image.size == (2 * THUMBNAIL, THUMBNAIL) for _, image in shown[1:])


def test_worst_and_best_follow_the_scores_and_show_their_own_images(tmp_path):
    rows = [ImageScores(row.filename, row.prompt, "", {"a": row.scores["a"]}) for row in make_prompts(tmp_path, 6)]
    assert rank_prompts(rows) == [f"prompt {p}" for p in range(6)]
    write_scores(tmp_path, rows, {})
    shown = figures(write_report(tmp_path).read_text(encoding="utf-8"))[1:]
    assert [caption.split(" —")[0] for caption, _ in shown] == [f"prompt {p}" for p in (0, 1, 2, 5, 4, 3)]
    assert [round(np.asarray(image).mean() / 10) for _, image in shown] == [0, 1, 2, 5, 4, 3]


def test_scores_of_different_scales_count_alike_in_the_ranking():
    def row(prompt, small, large):
        return ImageScores("x", prompt, "", {"small": small, "large": large})

    rows = [row("low", 0.1, 500.0), row("mid", 0.2, 510.0), row("high", 0.4, 505.0)]
    assert rank_prompts(rows) == ["low", "mid", "high"]
    rows[2].scores["large"] = math.nan  # judged by what it has
    assert rank_prompts(rows)[-1] == "high"
    assert rank_prompts([row("only", math.nan, math.nan)]) == []


def test_classes_metrics_and_grid(tmp_path):
    folder = tmp_path / "c2i_latest_1.5"
    folder.mkdir()
    for i in range(200):
        Image.new("RGB", (16, 16), (i, i, i)).save(folder / f"{i:06d}.png")
    (tmp_path / "c2i_latest_1.5.json").write_text(json.dumps({
        "ref": "/a/ref.npz", "features": "shapes", "fid": 3.14159, "precision": None, "num_sample_images": 200,
        "bootstrap": {"fid": [3.0, 3.5]}, "warnings": ["too few <images>"]}))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<td>fid</td><td>3.1416</td><td>[3.0000, 3.5000]</td>" in page and "<td>precision</td><td>-</td>" in page
    assert "200 images" in page and "<p>Warning: too few &lt;images&gt;</p>" in page
    assert "/a/ref.npz" not in page and "Worst prompts" not in page
    [(_, grid)] = figures(page)
    assert grid.size == (8 * THUMBNAIL, 8 * THUMBNAIL)
    corners = np.asarray(grid.convert("L"))
    assert corners[0, 0] < 3 and corners[-1, -1] > 190  # from the first image to the last


def test_every_text_is_escaped_and_nothing_is_fetched(tmp_path):
    evil = '<script>alert("1")</script><img src="http://x/y.png">'
    rows = make_prompts(tmp_path, 2)
    rows = [ImageScores(row.filename, evil + row.prompt, evil, {evil: 0.5 + i, "b": math.nan}, {"b": evil})
            for i, row in enumerate(rows)]
    write_scores(tmp_path, rows, {"model": evil})
    (tmp_path / "sampling.json").write_text(json.dumps({evil: evil}))
    tmp_path.with_name(tmp_path.name + ".json").write_text(json.dumps({evil: evil}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page and "<link" not in page
    assert "Worst prompts" in page


def test_geneval_results_are_a_score_with_the_mean_over_tasks(tmp_path):
    rows = make_prompts(tmp_path, 3)
    lines = [{"filename": str(tmp_path / row.filename), "prompt": row.prompt, "tag": tag, "correct": correct}
             for row, tag, correct in zip(rows, ["one"] * 2 + ["two"] * 4, [True, True, True, False, False, False])]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<td>geneval_correct</td><td>0.5000 ± 0.2887</td><td>3</td>" in page  # over prompts: 1, 0.5, 0
    assert "<td>two</td><td>0.2500 ± 0.2500</td>" in page
    assert "(GenEval&#x27;s overall score)</td><td>0.6250</td>" in page  # of 1 and 0.25
    for line in lines:
        line["detector"] = "another"
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "<td>geneval_correct (another)</td>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_failures_are_shown_with_their_reasons(tmp_path):
    rows = make_prompts(tmp_path, 4)
    rows[0] = ImageScores(rows[0].filename, rows[0].prompt, "", {"a": math.nan, "b": 0.1}, {"a": "the server is gone"})
    write_scores(tmp_path, rows, {})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<tr><td>a</td><td>1</td><td>the server is gone</td></tr>" in page and "(1 failed)" in page


def test_the_page_stays_small_whatever_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_report, "environment", lambda: {"torch": "2"})
    rows = make_prompts(tmp_path, 20, members=5, size=160, noise=True)
    long = [ImageScores(row.filename, row.prompt + "x" * 50_000, f"category {i}", row.scores)
            for i, row in enumerate(rows)]
    write_scores(tmp_path, long, {})
    page = write_report(tmp_path)
    assert page.stat().st_size < 3e6
    text = page.read_text(encoding="utf-8")
    assert "... 40 more" in text and len(figures(text)) == 13


def test_broken_folders_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images"):
        write_report(tmp_path)
    rows = make_prompts(tmp_path, 2)
    (tmp_path / "rewards.jsonl").write_text('{"filename": "a"}\n')
    with pytest.raises(ValueError, match="rewards.jsonl line 1 is not an image's scores .KeyError: 'scores'"):
        write_report(tmp_path)
    outside = [ImageScores(f"../secret{i}.png", row.prompt, "", row.scores) for i, row in enumerate(rows)]
    write_scores(tmp_path, outside, {})
    with pytest.raises(ValueError, match="outside"):
        write_report(tmp_path)
    (tmp_path / "00000" / "samples" / "00000.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="00000.png: not a readable image"):
        contact_sheet(image_files(tmp_path), 2)


def test_command_line(tmp_path, monkeypatch, capsys):
    make_prompts(tmp_path / "run", 1)
    monkeypatch.setattr(sys, "argv", ["evaluation_report", str(tmp_path / "run")])
    evaluation_report.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    monkeypatch.setattr(sys, "argv", ["evaluation_report"])
    with pytest.raises(SystemExit), one_line_errors():
        evaluation_report.main()
    assert "usage: python -m benchmark.evaluation_report FOLDER" in capsys.readouterr().err
