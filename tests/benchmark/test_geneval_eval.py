"""benchmark/geneval/eval.sh and what it runs: GenEval folders in, results.jsonl and GenEval's summary out."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.geneval import evaluate, summary
from benchmark.geneval.summary import format_summary, read_results, summarize
from dataset import shapes
from reward_utils import mask2former
from reward_utils.geneval import COLORS
from tests.tiny_geneval import rendered, write_clip, write_folder, write_mmdet
from utils.config import one_line_errors

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes_records():
    """One held-out record of each task."""
    test = shapes.split_prompts("test")
    return [next(record for record in test if record["tag"] == task) for task in shapes.TASKS]


@pytest.fixture
def folder(tmp_path):
    """Six shapes prompts with two images each; one of the last two is blank, and things that don't count lie about."""
    records = shapes_records()
    images = [rendered(record, 2, seed) for seed, record in enumerate(records)]
    images[-1][1] = np.full_like(images[-1][1], 230)
    root = write_folder(tmp_path / "images", records, images)
    (root / "00000" / "samples" / "notes.png").write_text("not an image")
    (root / "00000" / "grid.png").write_text("neither")
    (root / "other").mkdir()
    (root / "²").mkdir()  # a digit, but no number
    return root


def run(folder, *flags):
    with one_line_errors():
        evaluate.main(["--images_dir", str(folder), *map(str, flags)])
    return read_results(Path(folder) / "results.jsonl")


def refused(capsys, folder, *flags):
    with pytest.raises(SystemExit):
        run(folder, *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert not (Path(folder) / "results.jsonl").exists() and not list(Path(folder).glob(".*"))
    return error


# ---- the shapes world ------------------------------------------------------------------------------------------------

def test_shapes_folder(folder, capsys):
    rows = run(folder, "--detector", "shapes")
    assert [row["filename"] for row in rows] == [str(folder / f"{i:05d}/samples/{j:04d}.png") for i in range(6)
                                                 for j in range(2)]
    assert [row["correct"] for row in rows] == [True] * 11 + [False]
    assert all(list(row) == [*FIELDS, "detector"] for row in rows) and "not GenEval's" in rows[0]["detector"]
    record = json.loads(rows[4]["metadata"])
    assert record == json.loads((folder / "00002/metadata.jsonl").read_text())
    assert list(json.loads(rows[4]["details"])) == [record["include"][0]["class"]]
    assert rows[-1]["reason"].startswith("expected ") and rows[0]["reason"] == ""
    printed = capsys.readouterr().out
    assert printed.startswith("Summary\n=======\nTotal images: 12\nTotal prompts: 6\n% correct images: 91.67%\n"
                              "% correct prompts: 100.00%\n\nTask breakdown\n==============\n"
                              "single_object    = 100.00% (2 / 2)\n")
    assert "color_attr       = 50.00% (1 / 2)\n\nOverall score (avg. over tasks): 0.91667\n" in printed
    assert "not comparable with published GenEval scores" in printed
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["overall"] == pytest.approx(5.5 / 6) and stored["tasks"]["counting"]["images"] == 2
    assert not stored["is_geneval"] and not list(folder.glob(".*"))


def shell(num_processes, *words, cwd=ROOT):
    env = {**os.environ, "SKIP_SETUP": "1", "PYTHON": sys.executable, "NPROC": str(num_processes),
           "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(ROOT / "benchmark/geneval/eval.sh"), *map(str, words)], env=env, cwd=cwd,
                          text=True, capture_output=True)


def test_eval_sh_with_two_processes_equals_one(folder):
    """From another folder, by a relative path."""
    rows = run(folder, "--detector", "shapes")
    (folder / "results.jsonl").unlink()
    done = shell(2, folder.name, "0", "--detector", "shapes", "--reward_batch_size", "5", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert read_results(folder / "results.jsonl") == rows and "Total images: 12" in done.stdout
    assert "evaluating" in done.stderr and done.stdout.count("Summary") == 1


def test_eval_sh_asks_for_its_arguments():
    done = shell(1, "folder")
    assert done.returncode == 2 and "IMAGES_DIR GPU_RANK" in done.stderr


# ---- real detectors, tiny --------------------------------------------------------------------------------------------

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}


def colored(color):
    return {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": color}], "prompt": f"a {color} dog"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """REWARD_MODELS with an mmdet checkpoint and a CLIP folder, under the names that are looked for."""
    root = tmp_path_factory.mktemp("models")
    write_mmdet(root / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth", "dog")
    write_clip(root / "clip-vit-large-patch14")
    return root


def test_mmdet_checkpoint_and_clip_end_to_end(models, tmp_path, capsys, monkeypatch):
    """A detector that sees dogs everywhere, and images of two sizes in one batch."""
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 160)
    rng = np.random.default_rng(0)
    images = [[rng.integers(0, 256, (size, 40, 3), dtype=np.uint8) for size in (40, 60)] for _ in range(3)]
    root = write_folder(tmp_path / "first", [DOG, CAT, colored("red")], images)
    rows = run(root, "--reward_models", models)
    assert [row["correct"] for row in rows[:4]] == [True, True, False, False]
    assert rows[2]["reason"] == "expected cat>=1, found 0" and "not GenEval's" in rows[0]["detector"]
    boxes = json.loads(rows[1]["details"])
    assert list(boxes) == ["dog"] and 1 <= len(boxes["dog"]) <= 16
    assert all(0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 60 and 0.3 < score <= 1 for x1, y1, x2, y2, score in boxes["dog"])
    seen = ["red" if row["correct"] else row["reason"].split()[-1] for row in rows[4:]]
    assert all(color in COLORS for color in seen)
    # asked for the colour that was seen, the same image is right
    again = write_folder(tmp_path / "again", [colored(color) for color in seen], [[image] for image in images[2]])
    monkeypatch.setattr(mask2former, "SWIN_SMALL", ([2] * 4, 12, 20))
    capsys.readouterr()
    rows = run(again, "--reward_models", models, "--reward_batch_size", 1)
    assert [row["correct"] for row in rows] == [True, True]
    assert [list(row) for row in rows] == [FIELDS] * 2  # of GenEval's own detector: its fields alone
    assert "comparable" not in capsys.readouterr().out


def test_a_hub_detector_is_labelled(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 96)
    monkeypatch.setattr(mask2former, "SWIN_SMALL", ([2] * 4, 12, 20))
    path = next(models.glob("*.pth"))
    mask2former.load_mask2former(path).model.save_pretrained(tmp_path / "mask2former-swin-small-coco-instance")
    root = write_folder(tmp_path / "images", [DOG], [[np.zeros((32, 32, 3), np.uint8)]])
    rows = run(root, "--reward_models", models, "--geneval_model", tmp_path / "mask2former-swin-small-coco-instance")
    assert rows[0]["detector"] == "mask2former-swin-small-coco-instance (not GenEval's)"
    stored = json.loads((root / "summary.json").read_text())
    assert stored["detector"] == rows[0]["detector"] and not stored["is_geneval"]
    assert "Note: detector mask2former-swin-small-coco-instance (not GenEval's)" in capsys.readouterr().out
    summary.main([str(root / "results.jsonl")])
    assert "Note: detector mask2former-swin-small" in capsys.readouterr().out


# ---- mistakes --------------------------------------------------------------------------------------------------------

def corrupt_png(folder):
    path = folder / "00003/samples/0001.png"
    path.write_bytes(path.read_bytes()[:200])



@pytest.mark.parametrize("change, words", [
    (corrupt_png, ["00003/samples/0001.png", "not a readable image"]),
    (lambda f: (f / "00003/samples/0001.png").write_text("hello"), ["00003/samples/0001.png", "not a readable image"]),
    (lambda f: (f / "00002/metadata.jsonl").write_text("{not json"), ["00002/metadata.jsonl", "its one JSON record"]),
    (lambda f: (f / "00002/metadata.jsonl").write_bytes(b"\xff\xfe"), ["00002/metadata.jsonl", "its one JSON record"]),
    (lambda f: (f / "00002/metadata.jsonl").write_text("[1]"), ["00002/metadata.jsonl", "a JSON object, not a list"]),
    (lambda f: (f / "00002/metadata.jsonl").write_text('{"prompt": "a circle"}'), ["metadata.jsonl", "no GenEval"]),
    (lambda f: (f / "00002/metadata.jsonl").write_text(json.dumps({"include": [{"class": "star", "count": 1}]})),
     ["metadata.jsonl", "'tag' and 'prompt'"]),
    (lambda f: (f / "00002/metadata.jsonl").write_text(json.dumps(DOG)), ["metadata.jsonl", "'dog' is none"]),
    (lambda f: (f / "00002/metadata.jsonl").unlink(), ["00002/metadata.jsonl", "No such file"]),
    (lambda f: shutil.rmtree(f / "00004/samples"), ["00004/samples", "no image"]),
    (lambda f: [shutil.rmtree(path) for path in f.iterdir()], ["no folder named by digits"]),
    (lambda f: shutil.rmtree(f), ["no such folder"]),
    (lambda f: Image.new("RGB", (32, 64)).save(f / "00005/samples/0001.png"), ["64 x 64 px, not 32 x 64"]),
])
def test_bad_folders_are_named(folder, capsys, change, words):
    change(folder)
    error = refused(capsys, folder, "--detector", "shapes")
    assert all(word in error for word in words), error


def test_mistaken_detectors_are_named(folder, tmp_path, capsys):
    assert "give --detector shapes" in refused(capsys, folder)
    root = write_folder(tmp_path / "real", [DOG], [[np.zeros((8, 8, 3), np.uint8)]])
    assert "openmmlab" in refused(capsys, root, "--reward_models", tmp_path)
    assert "--detector" in refused(capsys, folder, "--detector", "yolo")


def test_an_interrupted_run_leaves_the_old_results_or_none(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "summarize", interrupted)
    for before in (None, "old"):
        if before:
            (folder / "results.jsonl").write_text(before)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(["--images_dir", str(folder), "--detector", "shapes"])
        found = (folder / "results.jsonl").read_text() if (folder / "results.jsonl").exists() else None
        assert found == before and not list(folder.glob(".*"))


# ---- the summary -----------------------------------------------------------------------------------------------------

def row(tag, metadata, correct):
    return {"tag": tag, "metadata": metadata, "correct": correct}


def test_summary_is_the_mean_of_tasks():
    rows = [row("colors", "a", True), row("colors", "a", False), row("colors", "b", True), row("colors", "b", True),
            row("position", "c", False), row("position", "d", False), row("position", "d", True)]
    result = summarize(rows)
    assert list(result["tasks"]) == ["colors", "position"]
    assert (result["overall"], result["correct_images"], result["correct_prompts"]) == pytest.approx(
        ((3 / 4 + 1 / 3) / 2, 4 / 7, 3 / 4))
    assert (result["num_images"], result["num_prompts"], result["images_per_prompt"]) == (7, 4, [1, 2])
    # prompts' means: 0.5, 1 and 0, 0.5
    assert result["overall_standard_error"] == pytest.approx((2 * 0.125 / 2) ** 0.5 / 2)
    text = format_summary(result)
    assert "Overall score (avg. over tasks): 0.54167" in text and "Note: prompts have 1 to 2 images" in text
    assert summarize(rows[:2])["overall_standard_error"] is None


@pytest.mark.parametrize("content, words", [
    ("", "is empty"), ("{\n", "line 1 is not valid JSON"), ('{"tag": "colors"}\n', "line 1 is no result"),
    ('{"tag": "a", "metadata": "b", "correct": null}\n', "line 1 is no result")])
def test_damaged_results_are_named(tmp_path, content, words):
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        summary.main([str(tmp_path / "results.jsonl")])
