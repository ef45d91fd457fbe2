"""Users' mistakes end a run before it starts: one `error:` line that names the mistake, no traceback, no leftovers."""
import hashlib
import io
import json
import os
import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import grpo_trainer
from tests.tiny_world import command_line
from trainer_utils.run_folder import CHECKSUMS
from utils import distributed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fails(world, tmp_path, monkeypatch, capfd):
    """fails(flags ...) runs train_c2i.py as a script, in this process, and returns its error line."""
    def run(*flags, script="train_c2i.py"):
        monkeypatch.setattr(sys, "argv", [script, *command_line(world, tmp_path / "out", *flags)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stopped.value.code not in (0, None)
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "Traceback" not in error, error
        assert error.splitlines()[-1] == lines[0]
        assert not list(tmp_path.glob("out/run/checkpoint-2"))
        return lines[0]
    return run


@pytest.fixture
def trains(world, tmp_path, monkeypatch):
    """The same without a mistake: the first half of a test, and proof that the flags are right otherwise."""
    monkeypatch.setattr(grpo_trainer, "write_report", lambda folder: None)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train_c2i.py", *command_line(world, tmp_path / "out", *flags)])
        runpy.run_path(str(ROOT / "train_c2i.py"), run_name="__main__")
    return run


# ------------------------------------------------------------------------------------------------- flags and presets


@pytest.mark.parametrize("flags,expected", [
    (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
    (["--learning_rate", "fast"], "flag --learning_rate: expected a number, got 'fast'"),
    (["--config", "c2i_shape"], "did you mean c2i_shapes?"),
    (["--reward_funcs", "shapes_qality"], "unknown reward 'shapes_qality' in reward_funcs: did you mean "
                                          "shapes_quality?"),
    (["--eval_reward_funcs", "beauty"], "unknown reward 'beauty'"),
    (["--reward_weights", "1", "2"], "reward_weights has 2 values for 1 reward_funcs (shapes_quality)"),
    (["--per_device_train_batch_size", "18"], "18 per_device_train_batch_size x 1 gradient_accumulation_steps = 18) "
                                              "must be a multiple of num_generations (4)"),
    (["--rollout_batch_size", "6"], "rollout_batch_size must be 0 or a multiple of num_generations (4), got 6"),
    (["--save_total_limit", "0"], "save_total_limit must be at least 1, got 0"),
    (["--decode_batch_size", "0"], "decode_batch_size must be at least 1, got 0"),
    (["--guidance_logprob", "both"], "--guidance_logprob: expected one of guided, guided_detach_uncond, conditional"),
    (["--report_to", "wandbb"], "--report_to wandbb"),
    (["--image_size", "100"], "--image_size 100"),
    (["--num_classes", "7"], "holds 32 names, but --num_classes is 7"),
    (["--gpt_type", "t2i"], "is a c2i model, but --gpt_type is t2i"),
], ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "")
def test_flags(fails, flags, expected):
    assert expected in fails(*flags)


def test_an_unknown_key_of_a_preset(fails, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("beta: 0.1\nnum_generation: 8\n")
    error = fails("--config", preset)
    assert "mine.yaml line 2: unknown key 'num_generation'; did you mean num_generations?" in error


def test_train_t2i_reports_in_the_same_way(fails, tmp_path):
    assert "unknown flag --prompt_file;" in fails("--prompt_file", "a.txt", script="train_t2i.py")
    (tmp_path / "empty.txt").write_text("")
    error = fails("--gpt_type", "t2i", "--prompt_files", tmp_path / "empty.txt", "--eval_prompt_files", "shapes",
                  script="train_t2i.py")
    assert "empty.txt" in error


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_missing_checkpoint(fails, tmp_path):
    assert f"no checkpoint at {tmp_path / 'nowhere.pt'}" in fails("--gpt_model", "GPT-B", "--gpt_ckpt",
                                                                  tmp_path / "nowhere.pt")
    assert "nowhere" in fails("--vq_ckpt", tmp_path / "nowhere")


def test_a_llamagen_preset_says_where_its_files_are(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_c2i.py", "--config", "c2i_llamagen_xl_384", "--vq_ckpt",
                                      str(tmp_path / "vq_ds16_c2i.pt")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train_c2i.py"), run_name="__main__")
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no checkpoint at ") and "https://huggingface.co/FoundationVision/LlamaGen" in error


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="2 are visible: start at most 2 processes"):
        distributed.setup()


def test_a_foreign_checkpoint(fails, world, tmp_path):
    assert "looks like a vq checkpoint" in fails("--gpt_model", "GPT-B", "--gpt_ckpt",
                                                 world / "vq" / "model.safetensors")
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "resnet.pt")
    assert "resnet.pt does not fit the gpt model" in fails("--gpt_model", "GPT-B", "--gpt_ckpt", tmp_path / "resnet.pt")
    assert "kind 'gpt', expected 'vq'" in fails("--vq_ckpt", world / "gpt")


@pytest.mark.parametrize("name", ("gpt/model.safetensors", "gpt.pt"))
def test_a_truncated_checkpoint(fails, world, tmp_path, name):
    source, folder = world / "gpt" / "model.safetensors", tmp_path / "short"
    (folder / name).parent.mkdir(parents=True)
    if name.endswith(".pt"):
        whole = io.BytesIO()
        torch.save({"model": {"tok_embeddings.weight": torch.zeros(64, 64)}}, whole)
        flags = ["--gpt_model", "GPT-B", "--gpt_ckpt", folder / name]
        content = whole.getvalue()
    else:
        (folder / "gpt" / "model.json").write_bytes((world / "gpt" / "model.json").read_bytes())
        flags = ["--gpt_ckpt", folder / "gpt"]
        content = source.read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    error = fails(*flags)
    assert str(folder / name) in error and "damaged" in error


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ("zip", "legacy", "plain"))
def test_a_pickle_that_would_run_code(fails, tmp_path, form):
    """torch's two formats, and a bare pickle; a load that trusts it would make the folder."""
    file, target = tmp_path / "evil.pt", tmp_path / "it_ran"
    if form == "plain":
        file.write_bytes(pickle.dumps({"model": Payload(str(target))}, protocol=2))
    else:
        torch.save({"model": Payload(str(target))}, file, _use_new_zipfile_serialization=form == "zip")
        assert zipfile.is_zipfile(file) == (form == "zip")
    error = fails("--gpt_model", "GPT-B", "--gpt_ckpt", file)
    assert "evil.pt" in error and not target.exists()
    if form == "zip":
        torch.load(file, weights_only=False)
        assert target.exists()  # the payload works


def test_a_training_state_that_would_run_code(fails, trains, tmp_path):
    """trainer.pt is read with the same care on resume, although its checksum holds."""
    flags = ["--eval_steps", "0", "--exit_step"]
    trains(*flags, "1")
    checkpoint, target = tmp_path / "out" / "run" / "checkpoint-1", tmp_path / "it_ran"
    torch.save({"optimizer": Payload(str(target))}, checkpoint / "trainer.pt")
    sums = json.loads((checkpoint / CHECKSUMS).read_text())
    sums["trainer.pt"] = hashlib.sha256((checkpoint / "trainer.pt").read_bytes()).hexdigest()
    (checkpoint / CHECKSUMS).write_text(json.dumps(sums))
    assert f"{checkpoint / 'trainer.pt'} was refused" in fails(*flags, "2")
    assert not target.exists()


# ------------------------------------------------------------------------------------------------------- run folders


def test_a_file_in_the_way_of_the_output_folder(fails, tmp_path):
    (tmp_path / "out").write_text("a file")
    error = fails()
    assert f"cannot write to the folder {tmp_path / 'out' / 'run'}" in error and "--output_dir" in error


def test_a_changed_configuration(fails, trains):
    trains("--exit_step", "1", "--eval_steps", "0")
    error = fails("--exit_step", "2", "--eval_steps", "0", "--cfg_scale", "3")
    assert "cfg_scale: 1.0 -> 3.0" in error and "another --run_name" in error and "exit_step" not in error
