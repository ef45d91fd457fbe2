"""benchmark.compare: paired differences, their errors and intervals, and what may not be compared."""
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from benchmark import compare
from benchmark.prompt_scores import ImageScores, write_scores
from utils.config import one_line_errors

NAN = math.nan


def make_run(folder, scores, seed=0, categories=None, names=("clip",), **settings):
    """scores[p][m]: of image m of prompt p, a number or one per name."""
    rows = []
    for p, members in enumerate(scores):
        for m, values in enumerate(members):
            values = dict(zip(names, np.atleast_1d(values).tolist()))
            rows.append(ImageScores(f"{p:05d}/samples/{m:05d}.png", f"prompt {p}",
                                    categories[p] if categories else "", values,
                                    {name: "timeout" for name, value in values.items() if math.isnan(value)}))
    folder.mkdir()
    write_scores(folder, rows, {"reward_settings": {"clip_model": None}})
    (folder / "sampling.json").write_text(json.dumps({"seed": seed, **settings}))
    return folder


def compared(a, b, **options):
    return compare.compare(compare.read_evaluation(str(a)), compare.read_evaluation(str(b)), **options)


# ---- the statistics --------------------------------------------------------------------------------------------------

def test_differences_are_paired_and_averaged_by_prompt(tmp_path):
    a = make_run(tmp_path / "a", [[0.1, 0.3], [0.5, 0.5], [0.2, 0.4]])
    b = make_run(tmp_path / "b", [[0.3, 0.3], [0.4, 0.8], [0.2, 0.4]])
    cell = compared(a, b)["scores"]["clip"]
    differences = [0.1, 0.1, 0.0]
    assert (cell["a"], cell["b"]) == (pytest.approx(1 / 3), pytest.approx(0.4))
    assert cell["difference"] == pytest.approx(np.mean(differences)) and cell["num_prompts"] == 3
    assert cell["standard_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(3))
    low, high = cell["interval"]
    assert low == pytest.approx(0) and high == pytest.approx(0.1)  # the extremes of resampled 0.1, 0.1, 0
    back = compared(b, a)["scores"]["clip"]
    assert back["difference"] == pytest.approx(-cell["difference"])


def test_pairing_removes_what_the_prompts_share(tmp_path):
    rng = np.random.default_rng(0)
    base, gain = rng.uniform(0, 1, size=(60, 1)), rng.normal(0.05, 0.02, size=(60, 1))
    a, b = make_run(tmp_path / "a", base.tolist()), make_run(tmp_path / "b", (base + gain).tolist())
    cell = compared(a, b)["scores"]["clip"]
    low, high = cell["interval"]
    assert cell["standard_error"] < 0.005 and 0.03 < low < cell["difference"] < high < 0.07
    assert np.isclose(high - low, 2 * 1.96 * cell["standard_error"], rtol=0.15)


def test_copies_of_a_prompt_are_one_prompt(tmp_path):
    once = [[0.1], [0.5], [0.4]]
    rows_a = compare.read_evaluation(str(make_run(tmp_path / "a", once * 3))).rows
    copies = [ImageScores(row.filename, f"prompt {i % 3}", "", row.scores) for i, row in enumerate(rows_a)]
    pairs, _ = compare.prompt_pairs(copies, copies, "clip")
    assert len(pairs) == 3


def test_images_that_failed_in_either_run_leave_both(tmp_path):
    a = make_run(tmp_path / "a", [[0.2, NAN], [0.4, 0.6], [NAN, 0.1]])
    b = make_run(tmp_path / "b", [[0.3, 0.9], [NAN, 0.5], [0.9, NAN]])
    cell = compared(a, b)["scores"]["clip"]
    assert (cell["num_failed"], cell["num_prompts"]) == (4, 2)
    assert (cell["a"], cell["b"]) == (pytest.approx(0.4), pytest.approx(0.4))
    nothing = compared(make_run(tmp_path / "c", [[NAN]]), make_run(tmp_path / "d", [[0.5]]))["scores"]["clip"]
    assert nothing["difference"] is None and nothing["interval"] is None and nothing["num_failed"] == 1
    single = compared(make_run(tmp_path / "e", [[0.25]]), make_run(tmp_path / "f", [[0.5]]))["scores"]["clip"]
    assert single["difference"] == 0.25 and single["standard_error"] is None and single["interval"] is None


def test_categories_and_their_mean(tmp_path):
    kinds = ["one", "one", "two", "two", "two", "two"]
    a = make_run(tmp_path / "a", [[0.0]] * 6, categories=kinds)
    b = make_run(tmp_path / "b", [[0.2], [0.4], [1.0], [1.0], [1.0], [0.6]], categories=kinds)
    result = compared(a, b)
    assert result["categories"]["one"]["clip"]["difference"] == pytest.approx(0.3)
    assert result["categories"]["two"]["clip"]["difference"] == pytest.approx(0.9)
    assert result["scores"]["clip"]["difference"] == pytest.approx(0.7)
    cell = result["mean_over_categories"]["clip"]
    assert cell["difference"] == pytest.approx(0.6)
    assert cell["standard_error"] == pytest.approx(math.hypot(0.1, 0.1) / 2)
    low, high = cell["interval"]
    assert 0.45 <= low < 0.6 < high <= 0.7


def test_bootstrap_interval_is_seeded_and_right_for_a_known_spread():
    values = np.random.default_rng(1).normal(size=400)
    interval = compare.bootstrap_interval([values], 4000, 0)
    assert interval == compare.bootstrap_interval([values], 4000, 0) != compare.bootstrap_interval([values], 4000, 1)
    half = 1.96 * values.std() / 20
    assert np.allclose(interval, [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_bootstrap_in_blocks_has_every_draw(monkeypatch):
    monkeypatch.setattr(compare, "BLOCK", 7)
    interval = compare.bootstrap_interval([np.array([0.0, 1.0]), np.array([2.0, 2.0, 2.0])], 500, 0)
    assert interval == (1.0, 1.5)


def test_independent_intervals_add_as_squares():
    interval = compare.independent_interval(1.0, 3.0, (0.7, 1.4), (2.7, 3.3))
    assert interval == pytest.approx((1.5, 2 + math.hypot(.3, .3)))


# ---- what may not be compared ----------------------------------------------------------------------------------------

def refusal(a, b):
    with pytest.raises(ValueError) as error:
        compared(a, b)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_seeds_prompts_and_images_are_named(tmp_path):
    a = make_run(tmp_path / "a", [[0.1, 0.2], [0.3, 0.4]])
    assert "not the same seeds: 0 in" in refusal(a, make_run(tmp_path / "b", [[0.1, 0.2], [0.3, 0.4]], seed=5))
    error = refusal(a, make_run(tmp_path / "c", [[0.1, 0.2], [0.3]]))
    assert "00001/samples/00001.png is in" in error and str(a) in error
    error = refusal(make_run(tmp_path / "d", [[0.1, 0.2]]), a)
    assert "00001/samples/00000.png is in" in error and "1 more" in error
    other = make_run(tmp_path / "e", [[0.1, 0.2], [0.3, 0.4]])
    text = (other / "rewards.jsonl").read_text().replace("prompt 1", "a dog")
    (other / "rewards.jsonl").write_text(text)
    error = refusal(a, other)
    assert "prompts of 00001/samples/00000.png: 'prompt 1' in" in error and "'a dog' in" in error


def test_other_rewards_and_reward_models_are_named(tmp_path):
    a = make_run(tmp_path / "a", [[0.1]])
    assert "not the same scores: clip in" in refusal(a, make_run(tmp_path / "b", [[0.1]], names=("hps",)))
    other = make_run(tmp_path / "c", [[0.1]])
    summary = json.loads((other / "rewards.json").read_text())
    (other / "rewards.json").write_text(json.dumps(summary | {"reward_settings": {"clip_model": "large"}}))
    assert "reward models (--clip_model): None in" in refusal(a, other)


def test_folders_without_results_are_named(tmp_path, monkeypatch):
    a = make_run(tmp_path / "a", [[0.1]])
    (tmp_path / "empty").mkdir()
    assert "holds no results" in refusal(a, tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert "none: no such folder, nor one in test_results/" in refusal(a, "none")
    (tmp_path / "test_results").mkdir()
    (tmp_path / "a").rename(tmp_path / "test_results" / "a")
    assert compared("a", "a")["scores"]["clip"]["difference"] == 0
    (tmp_path / "empty.json").write_text(json.dumps({"fid": 1.0}))
    assert "metrics of the set: score both alike" in refusal("a", "empty")


def test_unknown_seeds_and_scores_of_one_side_are_said(tmp_path):
    a = make_run(tmp_path / "a", [[[0.1, 0.2]]], names=("clip", "hps"), cfg_scale=1.5)
    b = make_run(tmp_path / "b", [[[0.1]]], cfg_scale=2.0)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "rewards.jsonl").write_text((b / "rewards.jsonl").read_text())
    text = compare.format_result(compared(a, b))
    assert "cfg_scale: 1.5 in A, 2.0 in B" in text and "only one of the two has it: hps" in text
    assert "seeds not checked" not in text
    assert "seeds not checked" in compare.format_result(compared(a, tmp_path / "bare"))


# ---- GenEval and FID -------------------------------------------------------------------------------------------------

def geneval_run(folder, correct, root, **extra):
    """results.jsonl as GenEval writes it: the path that it was called with in front."""
    folder.mkdir()
    lines = [{"filename": f"{root}/{p:05d}/samples/{m:04d}.png", "tag": "colors" if p else "counting",
              "prompt": f"prompt {p}", "correct": value, "reason": "", "metadata": "{}", "details": "{}", **extra}
             for p, row in enumerate(correct) for m, value in enumerate(row)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_geneval_results_are_paired_by_the_images_place(tmp_path):
    a = geneval_run(tmp_path / "a", [[False, False], [True, False], [True, True]], "/elsewhere/x")
    b = geneval_run(tmp_path / "b", [[True, False], [True, True], [True, True]], "images")
    result = compared(a, b)
    assert result["scores"]["geneval_correct"]["difference"] == pytest.approx(1 / 3)
    assert result["categories"]["colors"]["geneval_correct"]["difference"] == pytest.approx(0.25)
    assert result["mean_over_categories"]["geneval_correct"]["difference"] == pytest.approx(0.375)
    assert result["mean_over_categories"]["geneval_correct"]["standard_error"] is None  # one prompt of counting
    other = geneval_run(tmp_path / "c", [[True, False], [True, True], [True, True]], "images", detector="hub's")
    assert "geneval_correct (hub's)" in refusal(a, other)


def c2i_run(folder, **metrics):
    folder.mkdir()
    values = {"ref": f"{folder.parent}/ref.npz", "samples": f"{folder}.npz", "features": "shapes", "fid": 5.0,
              "precision": None, "kid_std": 0.1, "num_sample_images": 100, "num_skipped": 0, "warnings": [],
              "protocol": "splits of 5000", **metrics}
    folder.with_name(folder.name + ".json").write_text(json.dumps(values))
    return folder


def test_metrics_stand_side_by_side(tmp_path):
    a = c2i_run(tmp_path / "a", inception_score=9.0, bootstrap={"fid": [4.7, 5.4]})
    b = c2i_run(tmp_path / "b", fid=4.0, inception_score=10.0, bootstrap={"fid": [3.7, 4.3]})
    result = compared(a, b)
    assert list(result["metrics"]) == ["fid", "inception_score"] and result["scores"] == {}
    fid = result["metrics"]["fid"]
    assert fid["difference"] == -1 and fid["interval"] == pytest.approx((-1.5, -1 + math.hypot(.3, .3)))
    assert result["metrics"]["inception_score"]["interval"] is None
    assert "fid              5.0000  4.0000   -1.0000" in compare.format_result(result)
    for name, key, value in (("c", "num_sample_images", 50), ("d", "features", "inception"), ("e", "ref", "b.npz"),
                             ("f", "protocol", "splits of 500")):
        assert f"not the same {key}: " in refusal(a, c2i_run(tmp_path / name, **{key: value}))
    with_intervals = c2i_run(tmp_path / "g", protocol="splits of 5000; intervals: 95 %, 100 resamples", ref="x/ref.npz")
    assert compared(a, with_intervals)["metrics"]["fid"]["difference"] == 0


# ---- the command -----------------------------------------------------------------------------------------------------

def test_command_writes_table_json_and_page(tmp_path, capsys):
    runs = [make_run(tmp_path / name, [[v, v] for v in values], categories=["x", "y", "x", "y"], weights=name)
            for name, values in (("a<b", [0.1, 0.2, 0.3, 0.4]), ("c", [0.5, 0.1, 0.3, 0.6]))]
    for run in runs:
        for p in range(4):
            (run / f"{p:05d}" / "samples").mkdir(parents=True)
            for m in range(2):
                Image.new("RGB", (8, 8), (p * 60, 0, 0)).save(run / f"{p:05d}" / "samples" / f"{m:05d}.png")
    out = tmp_path / "out"
    compare.main([*map(str, runs), "--json", str(out / "d.json"), "--html", str(out / "d.html"), "--bootstrap", "200"])
    printed = capsys.readouterr().out
    assert re.search(r"all prompts +0\.2500  0\.3750  \+0\.1250", printed)
    result = json.loads((out / "d.json").read_text())
    assert result["scores"]["clip"]["difference"] == pytest.approx(0.125) and result["num_draws"] == 200
    page = (out / "d.html").read_text()
    assert "a&lt;b" in page and "a<b" not in page and not re.search(r'(src|href)="(?!data:)', page)
    captions = re.findall(r"<figcaption>([^<]*)<", page)
    assert [caption.split(" —")[0] for caption in captions] == [f"prompt {p}" for p in (1, 1, 2, 2, 0, 0, 3, 3)]


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys):
    a = make_run(tmp_path / "a", [[0.1]])
    for words in ([str(a), str(tmp_path / "none")], [str(a), str(a), "--bootstrap", "0"]):
        with pytest.raises(SystemExit), one_line_errors():
            compare.main(words)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
