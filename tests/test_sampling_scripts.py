"""sample_c2i.py, sample_t2i.py and what they share, on tiny random models; test.sh is in test_c2i_evaluation.py."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample_c2i
import sample_t2i
from benchmark.lookup import find_model
from benchmark.sampling import (
    Job,
    SampleConfig,
    pending,
    prompt_samples,
    read_png,
    sample_images,
    write_batches,
    write_npz,
    write_samples,
)
from dataset import shapes
from models.build import PolicyConfig, load_policy, save_policy
from models.checkpoint import KINDS, export_llamagen, load_gpt, save_model
from models.generate import SamplingConfig
from models.gpt import GPT, GPTConfig
from models.policy import to_uint8
from models.text import make_tiny_t5
from models.vq import VQConfig, VQModel
from reward_utils.inception import ShapesFeatures
from tests.golden.recipe import recipe_
from utils.config import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
CODES, CLASSES, SLOTS, WIDTH, SIZE = 16, 32, 8, 16, 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """What pretrain.py writes, in miniature (vq, t5, gpt_c2i, gpt_t2i), and a run that started from gpt_c2i."""
    folder = tmp_path_factory.mktemp("world")
    vq = VQModel(VQConfig(codebook_size=CODES, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), z_channels=8, ch=8,
                          num_res_blocks=1, patch=8, local=True))
    save_model(folder / "vq", recipe_(vq, "vq"))
    make_tiny_t5(folder / "t5", [r["prompt"] for r in shapes.all_prompts()], d_model=WIDTH, num_layers=1, d_ff=16)
    tiny = dict(dim=32, n_layer=2, n_head=4, multiple_of=16, vocab_size=CODES, block_size=16, num_classes=CLASSES)
    save_model(folder / "gpt_c2i", recipe_(GPT(GPTConfig(**tiny)), "c2i"))
    t2i = GPTConfig(**tiny, model_type="t2i", cls_token_num=SLOTS, uncond_token_num=SLOTS, caption_dim=WIDTH)
    save_model(folder / "gpt_t2i", recipe_(GPT(t2i), "t2i"))
    stored = PolicyConfig(str(folder / "gpt_c2i"), str(folder / "vq"), image_size=SIZE, num_classes=CLASSES,
                          class_names="imagenet")
    policy = load_policy(stored, SamplingConfig(temperature=0.9, top_k=7), torch.device("cpu"))
    run = folder / "runs" / "try"
    for step in (5, 10):
        recipe_(policy.gpt, f"step {step}")
        save_policy(run / f"checkpoint-{step}", policy, stored)
    config = {"run_name": "try", "beta": 0.1, "temperature": 0.8, **stored.__dict__}
    (run / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def policy(world):
    stored = PolicyConfig(str(world / "gpt_c2i"), str(world / "vq"), image_size=SIZE, num_classes=CLASSES,
                          decode_batch_size=1)
    return load_policy(stored, SamplingConfig(cfg_scale=2.0, top_k=12), torch.device("cpu"))


def c2i_flags(world, results, *more, model="try"):
    return ["--model", model, "--runs_dir", str(world / "runs"), "--results_dir", str(results), "--num_images", "7",
            *map(str, more)]


def c2i(world, results, *more, **model):
    with one_line_errors():
        sample_c2i.main(c2i_flags(world, results, *more, **model))
    return Path(results)


def images_in(folder):
    files = sorted(folder.glob("*.png"))
    return np.stack([read_png(file) for file in files])


def samples_in(folder, count, seed=0):
    folder.mkdir(exist_ok=True)
    return sample_c2i.class_samples(folder, count, CLASSES, "random", seed)


def refused(capsys, call):
    with pytest.raises(SystemExit) as stop:
        call()
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- images ----------------------------------------------------------------------------------------------------------

def test_images_depend_on_neither_batch_nor_shards(policy, tmp_path):
    config = SampleConfig("any", batch_size=3)
    whole = samples_in(tmp_path / "whole", 7)
    write_samples(policy, whole, config)
    expected = images_in(tmp_path / "whole")
    assert expected.shape == (7, SIZE, SIZE, 3) and not np.array_equal(expected[0], expected[1])

    write_samples(policy, samples_in(tmp_path / "single", 7), replace(config, batch_size=1))
    assert np.array_equal(images_in(tmp_path / "single"), expected)

    samples = samples_in(tmp_path / "shards", 7)
    batches = [samples[i: i + 3] for i in (0, 3, 6)]
    todo = pending(batches, (SIZE, SIZE))
    for rank in (1, 0):
        write_batches(policy, [batches[i] for i in todo[rank::2]], (SIZE, SIZE))
    assert np.array_equal(images_in(tmp_path / "shards"), expected)


def test_whole_files_are_kept_and_broken_ones_made_again(policy, tmp_path):
    config, samples = SampleConfig("any", batch_size=3), samples_in(tmp_path / "out", 5)
    write_samples(policy, samples, config)
    expected = images_in(tmp_path / "out")
    for sample in samples:
        os.utime(sample.path, (1, 1))
    content = samples[1].path.read_bytes()
    samples[1].path.write_bytes(content[:-7])
    samples[3].path.unlink()
    Image.new("RGB", (8, 8)).save(samples[4].path)
    write_samples(policy, samples, config)
    assert [int(sample.path.stat().st_mtime) == 1 for sample in samples] == [True, False, True, False, False]
    assert np.array_equal(images_in(tmp_path / "out"), expected) and samples[1].path.read_bytes() == content
    assert not list((tmp_path / "out").glob(".*"))


def test_labels_are_seeded_one_by_one(tmp_path):
    def labels(count, kind="random", seed=0):
        return [s.condition.class_id for s in sample_c2i.class_samples(tmp_path, count, 10, kind, seed)]

    assert labels(50) == labels(400)[:50] and labels(50) != labels(50, seed=1)
    counts = np.bincount(labels(4000), minlength=10)
    assert counts.min() > 300 and counts.max() < 500 and len(set(counts)) > 1
    assert labels(12, "balanced") == [*range(10), 0, 1]
    assert len({s.seed for s in sample_c2i.class_samples(tmp_path, 50, 10, "random", 0)}) == 50


def test_resizing_is_bicubic_on_floats(policy):
    batch = samples_in(Path("."), 2)
    small = sample_images(policy, batch, (24, 24))
    condition, _ = policy.encode([sample.condition for sample in batch])
    tokens = policy.sample(condition, None, [sample.seed for sample in batch]).tokens
    decoded = policy.vq.decode(tokens.unflatten(1, (4, 4)))
    expected = to_uint8(F.interpolate(decoded, size=(24, 24), mode="bicubic", align_corners=False))
    assert np.array_equal(small, expected.permute(0, 2, 3, 1).numpy())
    assert policy.decode(tokens, (24, 24)).shape == (2, 3, 24, 24)


def test_npz_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(AssertionError, match="2 announced"):
        write_npz(path, iter(np.zeros((1, 4, 6, 3), np.uint8)), (2, 4, 6, 3))
    assert not list(tmp_path.iterdir())


# ---- which model -----------------------------------------------------------------------------------------------------

def test_find_model(world):
    runs = str(world / "runs")
    latest = find_model("try", "latest", runs)
    assert (latest.name, latest.step, Path(latest.gpt_ckpt).name) == ("try", "10", "checkpoint-10")
    assert latest.settings["temperature"] == 0.9 and latest.settings["vq_ckpt"] == str(world / "vq")
    base = find_model(str(world / "runs" / "try"), "base")
    assert base.gpt_ckpt == str(world / "gpt_c2i") and base.settings["temperature"] == 0.8
    assert find_model("try", "0", runs).gpt_ckpt == base.gpt_ckpt
    folder = find_model(str(world / "runs" / "try" / "checkpoint-5"), "five")
    assert (folder.name, folder.step, folder.settings["top_k"]) == ("try-checkpoint-5", "five", 7)
    bare = find_model(str(world / "gpt_t2i"), "base").settings
    assert (bare["gpt_type"], bare["image_size"], bare["t5_path"]) == ("t2i", SIZE, str(world / "t5"))
    assert find_model(str(world / "gpt_c2i" / "model.safetensors"), "base").settings["vq_ckpt"] == str(world / "vq")


@pytest.mark.parametrize("model, step, parts", [
    ("trie", "5", ["no model trie", "runs there: try"]),
    ("try", "7", ["no step 7", "5, 10, base"]),
    ("try", "final", ["no step final", "5, 10, base"]),
    ("empty", "5", ["no checkpoint", "no run"]),
    ("gpt", "a/b", ["'a/b'"]),
])
def test_unknown_models_and_steps(world, tmp_path, capsys, model, step, parts):
    (tmp_path / "empty").mkdir()
    model = {"empty": str(tmp_path / "empty"), "gpt": str(world / "gpt_c2i")}.get(model, model)
    error = refused(capsys, lambda: c2i(world, tmp_path, "--step", step, model=model))
    assert all(part in error for part in parts), error


def test_job_takes_flags_over_preset_over_stored(world, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("run_name: x\nbeta: 0.5\nseed: 3\ngpt_ckpt: elsewhere\ntop_k: 9\ngen_cfg_cfg_scale: 4\n")
    flags = c2i_flags(world, tmp_path, "--config", preset, "--cfg_scale", "1.50")

    def parse(flags) -> Job:
        keys = sample_c2i.key_names(sample_c2i.RunConfig, sample_c2i.GRPOConfig)
        return sample_c2i.parse_job(flags, "c2i", sample_c2i.ClassSampleConfig, keys, "")

    job = parse(flags)
    assert job.sampling == SamplingConfig(temperature=0.9, top_k=9, cfg_scale=1.5)
    assert job.policy.gpt_ckpt.endswith("checkpoint-10") and job.config.seed == 0 and job.policy.image_size == SIZE
    assert job.policy.decode_batch_size == 1
    assert job.folder == tmp_path / "try_10_1.5"
    assert parse(flags + ["--cfg_label", "1.50"]).folder == tmp_path / "try_10_1.50"


def test_llamagen_files_take_their_size_from_flags(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(KINDS["gpt"].sizes, "GPT-tiny", dict(dim=32, n_layer=2, n_head=4, multiple_of=16))
    file = tmp_path / "llama.pt"
    export_llamagen(load_gpt(world / "gpt_c2i"), file)
    flags = ["--vq_ckpt", world / "vq", "--step", "base"]
    assert "--gpt_model" in refused(capsys, lambda: c2i(world, tmp_path, *flags, model=str(file)))
    flags += ["--gpt_model", "GPT-tiny", "--image_size", SIZE, "--num_classes", CLASSES]
    c2i(world, tmp_path / "out", *flags, model=str(file))
    c2i(world, tmp_path / "out", "--step", "base", model=str(world / "gpt_c2i"))
    assert np.array_equal(images_in(tmp_path / "out" / "llama_base_1"), images_in(tmp_path / "out" / "gpt_c2i_base_1"))


# ---- the scripts -----------------------------------------------------------------------------------------------------

def shell(script, *words):
    """-> stdout"""
    env = {**os.environ, "SKIP_SETUP": "1", "PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(ROOT / script), *map(str, words)], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_sampled_and_packed(world, tmp_path, capsys):
    out = c2i(world, tmp_path, "--cfg_scale", "2") / "try_10_2"
    printed = capsys.readouterr().out
    assert "7 images" in printed and "top_k 7" in printed.splitlines()[-1]
    assert f"fid_evaluation.py REFERENCE.npz {out}.npz" in printed
    with np.load(f"{out}.npz") as data:
        assert data["arr_0"].dtype == np.uint8 and np.array_equal(data["arr_0"], images_in(out))


@pytest.mark.parametrize("script", ["test.sh", "test_t2i.sh"])
def test_shell_scripts_ask_for_four_arguments(script):
    done = subprocess.run(["bash", str(ROOT / script), "try", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "MODEL_NAME GPU_RANK STEP CFG" in done.stderr


def test_a_folder_of_other_settings_is_refused(world, tmp_path, capsys):
    c2i(world, tmp_path)
    c2i(world, tmp_path, "--num_images", "8")
    assert len(images_in(tmp_path / "try_10_1")) == 8
    capsys.readouterr()
    error = refused(capsys, lambda: c2i(world, tmp_path, "--top_k", "3", "--seed", "5"))
    assert "seed: 0 -> 5" in error and "top_k: 7 -> 3" in error
    (tmp_path / "try_10_1" / "sampling.json").write_text("{")
    assert "try_10_1/sampling.json" in refused(capsys, lambda: c2i(world, tmp_path))
    (tmp_path / "try_5_1").mkdir()
    (tmp_path / "try_5_1" / "000000.png").touch()
    assert "no sampling.json" in refused(capsys, lambda: c2i(world, tmp_path, "--step", "5"))


def test_text_models_and_class_models_are_told_apart(world, tmp_path, capsys):
    assert "test_t2i.sh" in refused(capsys, lambda: c2i(world, tmp_path, "--step", "0", model=str(world / "gpt_t2i")))


def test_shapes_reference_is_made_once(tmp_path):
    folder = tmp_path / "test_results" / "new"
    path = sample_c2i.shapes_reference(folder, 20)
    before = path.stat().st_mtime_ns
    assert sample_c2i.shapes_reference(folder, 20).stat().st_mtime_ns == before
    with np.load(path) as data:
        changed = data["arr_0"].copy()
    assert changed.shape == (20, SIZE, SIZE, 3)
    changed[3] = 0
    write_npz(path, changed, changed.shape)
    sample_c2i.shapes_reference(folder, 20)
    with np.load(path) as data:
        assert data["arr_0"][3].any()


def test_shapes_models_are_compared_with_rendered_images(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample_c2i, "NUM_REFERENCE", 20)
    monkeypatch.setattr(sample_c2i.fid_evaluation, "load_features", lambda *_: ShapesFeatures().eval())
    tmp_path = tmp_path / "test_results"  # nothing was evaluated yet
    c2i(world, tmp_path, "--class_names", "shapes")
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "try_10_1.json").read_text())
    assert results["num_ref_images"] == 20 and results["num_sample_images"] == 7 and f"{results['fid']:.4f}" in printed
    assert f"<td>fid</td><td>{results['fid']:.4f}" in (tmp_path / "try_10_1" / "report.html").read_text()
    c2i(world, tmp_path / "small", "--class_names", "shapes", "--eval_image_size", "32")
    printed = capsys.readouterr().out
    assert "fid_evaluation.py REFERENCE" in printed and "bicubic to 32 px" in printed.splitlines()[-1]


def t2i(world, results, *more):
    flags = ["--model", str(world / "gpt_t2i"), "--step", "base", "--results_dir", str(results), "--cfg_scale", "2"]
    with one_line_errors():
        sample_t2i.main([*flags, *map(str, more)])
    return Path(results) / "gpt_t2i_base_2"


def test_test_t2i_sh_writes_geneval_folders_and_scores(world, tmp_path):
    printed = shell("test_t2i.sh", world / "gpt_t2i", 0, "base", 2, "--results_dir", tmp_path, "--prompt_files",
                    "shapes", "--prompts_per_task", 2, "--num_images_per_prompt", 3)
    out = tmp_path / "gpt_t2i_base_2"
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == [f"{i:05d}" for i in range(12)]
    records = [json.loads((folder / "metadata.jsonl").read_text()) for folder in folders]
    assert [record["tag"] for record in records] == [task for task in shapes.TASKS for _ in range(2)]
    held_out = shapes.split_prompts("test")
    assert all(record in held_out for record in records)
    assert sorted(file.name for file in (folders[3] / "samples").iterdir()) == [f"{i:05d}.png" for i in range(3)]
    grid = read_png(folders[0] / "grid.png")
    assert np.array_equal(grid[:SIZE, SIZE:], read_png(folders[0] / "samples" / "00001.png"))
    assert grid.shape == (2 * SIZE, 2 * SIZE, 3)
    assert (out / "report.html").is_file() and len((out / "rewards.jsonl").read_text().splitlines()) == 36
    results = json.loads((out / "results.json").read_text())
    assert results["num_prompts"] == 12 and [*results["scores_mean_and_standard_error"]] == [*shapes.TASKS, "overall"]
    assert "overall" in printed


def test_prompt_files_for_other_models(world, tmp_path, capsys):
    assert "--prompt_files" in refused(capsys, lambda: t2i(world, tmp_path))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a dog\na photo of a cat\n")
    out = t2i(world, tmp_path, "--prompt_files", prompts, "--num_images_per_prompt", 1)
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == {"prompt": "a photo of a cat"}
    assert "GenEval" in capsys.readouterr().out and not (out / "results.json").exists()


def test_scores_of_rendered_images(tmp_path):
    """A perfect generator scores 1, and the error is that of the prompts' means."""
    groups = prompt_samples(tmp_path, sample_t2i.shapes_prompts(2), 2, seed=0)
    rng = np.random.default_rng(0)
    for group in groups:
        group[0].path.parent.mkdir(parents=True)
        for sample in group:
            image = shapes.render(shapes.sample_scene(sample.condition.metadata, rng))
            Image.fromarray(image).save(sample.path)
    table = sample_t2i.task_table(sample_t2i.shapes_scores(tmp_path, groups))
    assert table["overall"]["shapes_strict"] == [1.0, 0.0]
    for sample in groups[-1]:
        Image.new("RGB", (SIZE, SIZE), "white").save(sample.path)
    table = sample_t2i.task_table(sample_t2i.shapes_scores(tmp_path, groups))
    assert table["color_attr"]["shapes_strict"] == pytest.approx([0.5, 0.5])
    assert table["overall"]["shapes_strict"] == pytest.approx([5.5 / 6, 0.5 / 6])
