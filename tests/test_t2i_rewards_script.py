"""DrawBench: its prompts, the scores of GenEval folders, and test_t2i_rewards_drawbench.sh on the shipped weights."""
import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_t2i
import test_t2i_rewards
from benchmark.drawbench import prepare
from benchmark.prompt_scores import (
    TRAINING_SCALE,
    ImageScores,
    format_summary,
    prompt_table,
    read_prompt_folders,
    read_scores,
    score_images,
    summarise,
    write_scores,
)
from dataset import shapes
from dataset.prompts import load_prompts
from img_gen_grpo_rewards import REWARDS, Reward, RewardResult, RewardSet
from utils.config import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "models" / "pretrained" / "shapes" / "gpt_t2i"
NAN = math.nan


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Red(Reward):
    """5 x the share of red; an image whose first pixel is black cannot be scored."""

    def score(self, names, images, prompts, metadata):
        red, failed = images[:, 0].float().mean(dim=(1, 2)) / 255, images[:, :, 0, 0].sum(1) == 0
        reasons = {i: "the judge is gone" for i in failed.nonzero().flatten().tolist()}
        return RewardResult({name: 5 * red.masked_fill(failed, NAN) for name in names}, {n: reasons for n in names})


@pytest.fixture
def red(monkeypatch):
    monkeypatch.setitem(REWARDS, "clip_text", Red)
    return monkeypatch


def make_folder(root, prompts, levels, size=8, suffix="png"):
    """GenEval's layout; levels[p][m]: the red of image m of prompt p; 0 is black."""
    for p, (record, row) in enumerate(zip(prompts, levels)):
        samples = root / f"{p:05d}" / "samples"
        samples.mkdir(parents=True)
        record = {"prompt": record} if isinstance(record, str) else record
        (root / f"{p:05d}" / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        for m, level in enumerate(row):
            Image.new("RGB", (size, size), (level, 0, 0)).save(samples / f"{m:05d}.{suffix}")
    return root


def refused(capsys, *words):
    """The one line on stderr of a call that fails."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        test_t2i_rewards.main([str(word) for word in words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code in (1, 2) and error.startswith("error: "), error
    return error


# ---- prompts ---------------------------------------------------------------------------------------------------------

def call_prepare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    with one_line_errors():
        prepare.main()


def test_the_public_csv_becomes_a_prompt_file_with_categories(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "DrawBench.csv", tmp_path / "new" / "drawbench.json"
    rows = [("A red car.", "Colors"), ("Rain, umbrella, \"wet\" café", "Misspellings"), ("A red car.", "Counting")]
    with open(source, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *rows])
    call_prepare(monkeypatch, source, out)
    assert "3 prompts of 3 categories" in capsys.readouterr().out
    assert [(c.prompt, c.metadata) for c in load_prompts(out)] == [(p, {"category": c}) for p, c in rows]
    first = json.loads(out.read_text(encoding="utf-8"))[0]
    assert first["id"] == "draw_bench_test_00000" and first["image_num"] == 0
    assert first["conversations"] == [{"from": "human", "value": "A red car."}, {"from": "gpt", "value": ""}]


@pytest.mark.parametrize("content, words", [
    (b"prompt,kind\na,b\n", ["no column Prompts and Category", "prompt, kind"]),
    (b"Prompts\na\n", ["no column Category"]),
    (b"", ["no column Prompts"]),
    (b"Prompts,Category\n", ["no prompts"]),
    (b"Prompts,Category\na,b\na dog, a cat,Colors\n", ["line 3", "quotes"]),
    (b"Prompts,Category\n,Colors\n", ["line 2"]),
    (b"Prompts,Category\na\n", ["line 2"]),
    (b'Prompts,Category\n"a,b\n', ["line", "not valid CSV"]),
    (b"Prompts,Category\n\xff,b\n", ["not UTF-8"]),
    (None, ["cannot be read"]),
])
def test_a_csv_that_cannot_be_understood_is_one_line(tmp_path, monkeypatch, capsys, content, words):
    source = tmp_path / "in.csv"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(SystemExit):
        call_prepare(monkeypatch, source, tmp_path / "out.json")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(source) in error and all(word in error for word in words), error
    assert not (tmp_path / "out.json").exists()


def test_prepare_refuses_names_that_the_reader_would_not_take(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_text("Prompts,Category\na,b\n")
    for words in ((), (tmp_path / "a.csv", tmp_path / "out.csv")):
        with pytest.raises(SystemExit):
            call_prepare(monkeypatch, *words)
    assert "must end in .json" in capsys.readouterr().err


def test_the_embedded_prompts_are_held_out_and_cover_every_task():
    prompts, held_out = load_prompts(test_t2i_rewards.SHAPES_PROMPTS), shapes.split_prompts("test")
    assert all(condition.metadata in held_out for condition in prompts)
    assert len({condition.prompt for condition in prompts}) == len(prompts) == 60
    counts = [sum(c.metadata["tag"] == task for c in prompts) for task in shapes.TASKS]
    assert counts == [4, 12, 12, 6, 10, 16]
    choice = test_t2i_rewards.PromptChoice(num_prompts=12)
    assert {c.metadata["tag"] for c in choice.load(True, 0)} == set(shapes.TASKS)


def test_copies_of_a_prompt_are_kept_unless_unwanted(tmp_path):
    path = tmp_path / "five.json"
    records = [{"id": f"draw_bench_test_{i:05d}", "image_num": 0, "conversations": [
        {"from": "human", "value": f"prompt {i * 3 % 4}"}, {"from": "gpt", "value": ""}]} for i in range(20)]
    path.write_text(json.dumps(records))
    choice = test_t2i_rewards.PromptChoice(prompt_files=[str(path)])
    assert len(choice.load(False, 0)) == 20
    choice = test_t2i_rewards.PromptChoice(prompt_files=[str(path)], unique_prompts=True)
    assert [c.prompt for c in choice.load(False, 0)] == ["prompt 0", "prompt 3", "prompt 2", "prompt 1"]


def test_rewards_are_chosen_by_name_and_left_out_by_flag():
    choice = test_t2i_rewards.RewardChoice
    assert choice().names(True) == ["shapes_strict", "shapes_graded", "shapes_quality"]
    assert choice(None, ["shapes_strict"]).names(True) == ["shapes_graded", "shapes_quality"]
    assert choice(["shapes_quality"]).names(False) == ["shapes_quality"]
    with pytest.raises(ValueError, match="--without deqqa: not among the rewards .clip_text .*deqa aesthetic"):
        choice(None, ["unireward", "deqqa"]).names(False)
    with pytest.raises(ValueError, match="leaves none"):
        choice(["shapes_graded"], ["shapes_graded"]).names(True)
    with pytest.raises(ValueError, match="unknown reward 'shapes_grade'.*did you mean shapes_graded"):
        choice(["shapes_grade"]).names(True)


def test_a_training_preset_brings_its_reward_models_but_not_its_prompts(tmp_path, monkeypatch):
    preset = tmp_path / "preset.yaml"
    preset.write_text("clip_model: large\nprompt_files: [train.json]\nreward_funcs: [fid]\nlearning_rate: 1\n")
    jobs = []
    monkeypatch.setattr(test_t2i_rewards, "score_model", jobs.append)
    test_t2i_rewards.main(["--model", str(WEIGHTS), "--step", "base", "--config", str(preset)])
    assert jobs[0].more[1].clip_model == "large" and jobs[0].own.prompt_files is None
    monkeypatch.setattr(sample_t2i, "load_conditions", jobs.append)
    monkeypatch.setattr(sample_t2i, "sample_prompts", lambda *args: [])
    monkeypatch.setattr(sample_t2i.distributed, "is_main", lambda: False)
    sample_t2i.main(["--model", str(WEIGHTS), "--step", "base", "--config", str(preset)])
    assert len(jobs) == 2


# ---- means -----------------------------------------------------------------------------------------------------------

def scored(prompt, score, folder=0, category="", **failures):
    return ImageScores(f"{folder:05d}/samples/00000.png", prompt, category, {"clip": score}, failures)


def test_means_and_errors_are_over_prompts():
    rows = [scored("a", 0.1), scored("a", 0.3), scored("a", 0.2, folder=7), scored("b", 0.6), scored("b", 0.6),
            scored("c", 0.1)]
    cell = summarise(rows)["rewards"]["clip"]
    assert cell["mean"] == pytest.approx(0.3) and cell["num_prompts"] == 3  # a: 0.2 in two folders, b: 0.6, c: 0.1
    assert cell["standard_error"] == pytest.approx(np.std([0.2, 0.6, 0.1], ddof=1) / math.sqrt(3))
    assert summarise(rows[:2])["rewards"]["clip"]["standard_error"] is None


def test_failures_leave_the_means_and_are_counted_with_reasons():
    rows = [scored("a", 0.2), scored("a", NAN, clip="timeout"), scored("b", NAN, clip="timeout"),
            scored("b", NAN, clip="no number"), scored("c", 0.4)]
    summary = summarise(rows)
    cell = summary["rewards"]["clip"]
    assert cell["mean"] == pytest.approx(0.3) and cell["num_prompts"] == 2 and cell["num_failed"] == 3
    assert cell["failures"] == {"timeout": 2, "no number": 1}
    text = format_summary(summary)
    assert "3 of 5" in text and "FAILED clip: 2 images: timeout" in text
    nothing = summarise(rows[2:4])["rewards"]["clip"]
    assert nothing["mean"] is None and nothing["num_failed"] == 2


def test_categories_have_means_of_their_own():
    rows = [scored("a", 0.2, 0, "Colors"), scored("b", 0.4, 1, "Colors"), scored("c", 0.9, 2, "Counting")]
    categories = summarise(rows)["categories"]
    assert categories["Colors"]["clip"]["mean"] == pytest.approx(0.3)
    assert categories["Colors"]["clip"]["standard_error"] == pytest.approx(0.1)
    assert categories["Counting"]["clip"]["standard_error"] is None
    assert summarise([scored("a", 0.2)])["categories"] == {}


def test_files_read_back_and_the_csv_has_a_line_per_prompt(tmp_path):
    rows = [scored('a, "b"', 0.25, 0, "x"), scored('a, "b"', NAN, 3, "x", clip="timeout"), scored("é\u2028z", NAN, 1)]
    summary = write_scores(tmp_path, rows[:1] + rows[2:], {"model": "m"})
    assert json.loads((tmp_path / "rewards.json").read_text()) == summary and summary["model"] == "m"
    assert repr(read_scores(tmp_path)) == repr(rows[:1] + rows[2:])
    table = list(csv.DictReader(io.StringIO(prompt_table(rows), newline="")))
    assert table[0] == {"folders": "00000 00003", "prompt": 'a, "b"', "category": "x", "images": "2", "clip": "0.25",
                        "clip_failed": "1"}
    assert table[1]["clip"] == "" and table[1]["clip_failed"] == "1"


# ---- folders from elsewhere ------------------------------------------------------------------------------------------

def test_a_folder_is_scored_with_raw_cosines(tmp_path, red, capsys):
    folder = make_folder(tmp_path / "in", ["a dog", {"prompt": "a cat", "category": "Colors"}, "a dog"],
                         [[51, 102], [255, 0], [153]])
    test_t2i_rewards.main(["--images", str(folder), "--rewards", "clip_text", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "rewards.json").read_text())
    cell = summary["rewards"]["clip_text"]
    assert cell["mean"] == pytest.approx((0.4 + 1.0) / 2, abs=1e-6)  # the factor 5 is out; two folders of one prompt
    assert cell["num_failed"] == 1 and cell["failures"] == {"the judge is gone": 1}
    assert summary["categories"]["Colors"]["clip_text"]["mean"] == pytest.approx(1.0)
    assert summary["reward_settings"]["preprocess"] == "exact" and "reward_api_key" not in summary["reward_settings"]
    assert "clip_text (cosine)" in printed and "1 of 5" in printed and "the judge is gone" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "rewards.jsonl").read_text().splitlines()]
    assert [line["filename"] for line in lines][1:3] == ["00000/samples/00001.png", "00001/samples/00000.png"]
    assert lines[3]["scores"] == {"clip_text": None} and lines[3]["failures"] == {"clip_text": "the judge is gone"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the judge is gone" in page and "a dog" in page
    assert not (folder / "rewards.jsonl").exists()


def test_a_reward_that_scores_nothing_ends_in_an_error_with_the_rest_written(tmp_path, red, capsys):
    folder = make_folder(tmp_path, ["a dog"], [[0, 0]])
    error = refused(capsys, "--images", folder, "--rewards", "clip_text")
    assert "clip_text could not score any image: the judge is gone" in error
    assert json.loads((folder / "rewards.json").read_text())["rewards"]["clip_text"]["mean"] is None


def test_only_the_cosine_rewards_are_unscaled(tmp_path, red):
    for name in ("hpsv2_text", "pickscore", "clip_text_quantize"):
        red.setitem(REWARDS, name, Red)
    folder = make_folder(tmp_path, ["a dog"], [[255]])
    [prompt] = read_prompt_folders(folder)
    names = ["clip_text", "hpsv2_text", "pickscore", "clip_text_quantize"]
    [row] = score_images(RewardSet(names), folder, [(prompt.files[0], prompt.condition)])
    assert row.scores == pytest.approx({"clip_text": 1, "hpsv2_text": 1, "pickscore": 5, "clip_text_quantize": 5})


def test_the_scales_and_names_are_those_of_the_table_of_rewards():
    assert {name: REWARDS[name].scale for name in TRAINING_SCALE} == TRAINING_SCALE
    unscaled = set(test_t2i_rewards.REWARDS) - set(TRAINING_SCALE)
    assert [REWARDS[name].scale for name in unscaled] == [1.0] * len(unscaled)


def test_a_server_gets_one_batch_at_a_time(tmp_path, red):
    running, most = [], []

    class Remote(Red):
        remote = True

        def score(self, *args):
            running.append(1)
            most.append(len(running))
            time.sleep(0.02)
            running.pop()
            return super().score(*args)

    red.setitem(REWARDS, "deqa", Remote)
    folder = make_folder(tmp_path, ["a", "b", "c"], [[51, 51]] * 3)
    test_t2i_rewards.main(["--images", str(folder), "--rewards", "deqa", "--reward_batch_size", "1"])
    assert most == [1] * 6 and len(read_scores(folder)) == 6


def test_images_of_several_sizes_and_kinds(tmp_path, red):
    make_folder(tmp_path, ["a"], [[255]])
    Image.new("RGB", (12, 20), (255, 0, 0)).save(tmp_path / "00000" / "samples" / "00001.webp", lossless=True)
    Image.new("L", (8, 8), 255).save(tmp_path / "00000" / "samples" / "00002.jpg")
    (tmp_path / "00000" / "samples" / "00003.txt").write_text("passed over")
    (tmp_path / "00000" / "samples" / "grid.png").write_text("passed over")
    test_t2i_rewards.main(["--images", str(tmp_path), "--rewards", "clip_text"])
    assert [row.scores["clip_text"] for row in read_scores(tmp_path)] == pytest.approx([1, 1, 1], abs=0.01)


def break_folder(folder, how):
    samples = folder / "00001" / "samples"
    if how == "truncated":
        path = samples / "00000.png"
        path.write_bytes(path.read_bytes()[:40])
    elif how == "no samples":
        (samples / "00000.png").unlink()
    elif how == "two records":
        (folder / "00001" / "metadata.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    else:
        (folder / "00001" / "metadata.jsonl").write_text(how)


@pytest.mark.parametrize("how, words", [
    ("truncated", ["00001/samples/00000.png", "not a readable image"]),
    ("no samples", ["00001/samples", "no images"]),
    ("{not json", ["00001/metadata.jsonl line 1", "not valid JSON"]),
    ('{"tag": "x"}', ["00001/metadata.jsonl line 1", "no text"]),
    ("two records", ["00001/metadata.jsonl", "2 records"]),
])
def test_a_broken_folder_is_one_line_that_names_the_file(tmp_path, red, capsys, how, words):
    folder = make_folder(tmp_path / "in", ["a", "b"], [[10], [20]])
    break_folder(folder, how)
    error = refused(capsys, "--images", folder, "--rewards", "clip_text")
    assert all(word in error for word in words), error
    assert not (folder / "rewards.json").exists()


def test_flags_that_cannot_be_met_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(capsys, "--images", tmp_path / "none", "--rewards", "shapes_strict")
    assert "no folders 00000" in refused(capsys, f"--images={tmp_path / 'empty'}", "--rewards", "shapes_strict")
    assert "unknown reward" in refused(capsys, "--images", tmp_path, "--rewards", "nothing")
    error = refused(capsys, "--model", WEIGHTS, "--step", "base", "--class_names", "imagenet", "--rewards",
                    "shapes_strict")
    assert "--prompt_files" in error and "benchmark.drawbench.prepare" in error
    assert "num_prompts must be at least 1" in refused(capsys, "--model", WEIGHTS, "--num_prompts", "0")


def test_a_missing_reward_model_is_told_before_sampling(tmp_path, red, capsys):
    def unavailable(self, settings, device):
        raise ValueError("no weights for --clip_model: fetch them")

    red.setattr(Red, "__init__", unavailable)
    error = refused(capsys, "--model", WEIGHTS, "--step", "base", "--rewards", "clip_text", "--results_dir",
                    tmp_path / "results")
    assert "no weights for --clip_model: fetch them; or leave it out: --without clip_text" in error
    assert not (tmp_path / "results").exists()


# ---- the script ------------------------------------------------------------------------------------------------------

def test_processes_share_the_scoring_in_order(tmp_path, red):
    """What each of three processes would score, put together, is what one process writes."""
    folder = make_folder(tmp_path / "in", ["a", "b", "c"], [[51, 0], [102], [153, 204]])
    words = ["--images", str(folder), "--rewards", "clip_text", "--output"]
    test_t2i_rewards.main([*words, str(tmp_path / "one")])
    distributed, shares = test_t2i_rewards.distributed, []
    red.setattr(distributed, "world_size", lambda: 3)
    red.setattr(distributed, "gather_objects", lambda share: shares.append(share) or shares)
    red.setattr(distributed, "is_main", lambda: len(shares) == 3)
    for rank in range(3):
        red.setattr(distributed, "rank", lambda: rank)
        test_t2i_rewards.main([*words, str(tmp_path / "three")])
    assert [len(share) for share in shares] == [1, 2, 2]
    for name in ("rewards.jsonl", "rewards.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_the_shell_script_samples_as_sample_t2i_and_scores(tmp_path):
    flags = ["--num_prompts", "3", "--num_images_per_prompt", "2", "--without", "shapes_graded"]
    command = ["bash", str(ROOT / "test_t2i_rewards_drawbench.sh"), str(WEIGHTS), "0", "base", "2.0", "--results_dir",
               str(tmp_path / "sh"), *flags]
    environment = {**os.environ, "PYTHON": sys.executable, "SKIP_SETUP": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "sh" / "gpt_t2i_base_2.0_drawbench"
    assert {path.name for path in out.iterdir()} == {"00000", "00001", "00002", "rewards.csv", "rewards.json",
                                                     "rewards.jsonl", "report.html", "sampling.json"}
    assert "sampling: 100%" in done.stderr and "scoring: 100%" in done.stderr
    assert "6 images of 3 prompts" in done.stdout and "cfg_scale 2.0" in done.stdout
    summary = json.loads((out / "rewards.json").read_text())
    assert list(summary["rewards"]) == ["shapes_strict", "shapes_quality"] and summary["num_images"] == 6
    assert len(list(out.glob("*/samples/*.png"))) == 6 and len(list(out.glob("*/grid.png"))) == 3

    prompts = tmp_path / "prompts.txt"  # the same prompts through sample_t2i.py: there is one sampler
    prompts.write_text("".join(f"{folder.condition.prompt}\n" for folder in read_prompt_folders(out)))
    sample_t2i.main(["--model", str(WEIGHTS), "--step", "base", "--cfg_scale", "2", "--prompt_files", str(prompts),
                     "--num_images_per_prompt", "2", "--results_dir", str(tmp_path / "t2i")])
    for image in ("00000/samples/00001.png", "00002/samples/00000.png"):
        assert (tmp_path / "t2i" / "gpt_t2i_base_2" / image).read_bytes() == (out / image).read_bytes()


def test_the_shell_script_asks_for_four_arguments():
    command = ["bash", str(ROOT / "test_t2i_rewards_drawbench.sh"), "x", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "MODEL_NAME GPU_RANK STEP CFG" in done.stderr
