"""Damage, failure and interruption never cost more than the work since the last checkpoint."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from trainer_utils.run_folder import RunFolder, checkpoint_damage
from utils.atomic import atomic_write_bytes

MAY_CHANGE = ("exit_step", "num_processes")
CONFIG = {"num_generations": 4, "beta": 0.01, "reward_weights": (1.0,), "exit_step": 10}


def make(path, **changes) -> RunFolder:
    return RunFolder(path, {**CONFIG, **changes}, "none", MAY_CHANGE)


def writer(content: bytes = b"weights"):
    def write(folder):
        (folder / "model.safetensors").write_bytes(content)
        (folder / "nested").mkdir()
        (folder / "nested" / "trainer.pt").write_bytes(b"state" * 100)

    return write


def names(path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_config_is_written_and_the_same_one_resumes(tmp_path):
    make(tmp_path / "a" / "run")
    make(tmp_path / "a" / "run", exit_step=20)
    stored = json.loads((tmp_path / "a" / "run" / "config.json").read_text())
    assert stored == {**CONFIG, "reward_weights": [1.0], "exit_step": 20}


def test_changed_config_is_refused_with_every_change(tmp_path):
    make(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError) as error:
        make(tmp_path, beta=0.5, num_generations=8, seed=1)
    message = str(error.value)
    for part in ("beta: 0.01 -> 0.5", "num_generations: 4 -> 8", "seed: (absent) -> 1", "--run_name"):
        assert part in message
    assert "exit_step" not in message and "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_caller_chooses_what_may_change(tmp_path):
    make(tmp_path)
    RunFolder(tmp_path, {**CONFIG, "beta": 0.5}, report_to="none", may_change=("beta",))
    with pytest.raises(ValueError, match="exit_step"):
        RunFolder(tmp_path, {**CONFIG, "exit_step": 1}, report_to="none", may_change=("beta",))


def test_settings_that_did_not_exist_must_have_their_defaults(tmp_path):
    """An old run goes on under a version with more flags; bf16 has become a value of dtype."""
    make(tmp_path, bf16=True)
    now = {**CONFIG, "bf16": True, "dtype": "bfloat16", "max_kl": None}
    defaults = {"bf16": False, "dtype": "float32", "max_kl": None}
    with pytest.raises(ValueError, match="max_kl: null -> 0.5"):
        RunFolder(tmp_path, {**now, "max_kl": 0.5}, "none", (), defaults)
    RunFolder(tmp_path, now, "none", (), defaults)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"beta": ')
    with pytest.raises(ValueError, match="config.json is damaged"):
        make(tmp_path)


@pytest.mark.parametrize("folder", ["file/run", "file"])
def test_unwritable_folder_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=f"cannot write to the run folder .*{folder}.*--output_dir"):
        make(tmp_path / folder)


def test_unknown_report_to(tmp_path):
    with pytest.raises(ValueError, match="wandb"):
        RunFolder(tmp_path, CONFIG, report_to=["wandb"])


def test_metrics_are_valid_json(tmp_path):
    run = make(tmp_path)
    run.log(1, {"reward": np.float32(0.5), "kl": float("nan"), "grad_norm": float("inf")})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "reward": 0.5, "kl": None, "grad_norm": None}


def test_truncate_drops_later_steps_and_half_a_line(tmp_path):
    run = make(tmp_path)
    for step in (0, 1, 2, 2, 3):
        run.log(step, {"reward": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "rew')
    resumed = make(tmp_path)
    resumed.truncate(2)
    assert steps(tmp_path) == [0, 1, 2, 2]
    resumed.log(3, {"reward": 3})
    assert steps(tmp_path) == [0, 1, 2, 2, 3]
    resumed.truncate(-1)
    assert steps(tmp_path) == []


def test_truncate_without_metrics(tmp_path):
    make(tmp_path).truncate(5)
    assert names(tmp_path) == ["config.json"]


def test_tensorboard_gets_the_scalars_and_hides_what_is_redone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((1, 3, 1.0), (2, 4, 2.0)):
        run = RunFolder(tmp_path, CONFIG)
        run.truncate(first - 1)
        for step in range(first, last + 1):
            run.log(step, {"rewards/strict": value})
        run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("rewards/strict")] == [
        (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)
    ]  # fmt: skip


def test_checkpoint_is_found_with_its_content(tmp_path):
    run = make(tmp_path)
    assert run.latest_checkpoint() is None
    for step in (9, 10, 100):
        run.save_checkpoint(step, writer(str(step).encode()), None)
    folder, step = make(tmp_path).latest_checkpoint()
    assert step == 100 and (folder / "model.safetensors").read_bytes() == b"100"
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-9", "config.json"]


@pytest.mark.parametrize("limit, left", [(1, {3}), (2, {2, 3}), (None, {1, 2, 3})])
def test_total_limit_keeps_the_newest(tmp_path, limit, left):
    run = make(tmp_path)
    for step in (1, 2, 3):
        run.save_checkpoint(step, writer(), limit)
    assert {int(name.split("-")[1]) for name in names(tmp_path) if name.startswith("checkpoint")} == left


def test_total_limit_never_prefers_a_damaged_newer_one(tmp_path):
    run = make(tmp_path)
    for step in (10, 20, 30):
        run.save_checkpoint(step, writer(), None)
    (tmp_path / "checkpoint-30" / "model.safetensors").unlink()
    run.save_checkpoint(25, writer(), 2)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-25", "config.json"]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "model.safetensors", 0),
        lambda folder: flip(folder / "nested" / "trainer.pt", -1),
        lambda folder: flip(folder / "checksums.json", -4),
        lambda folder: flip(folder / "checksums.json", 0),
        lambda folder: (folder / "nested" / "trainer.pt").write_bytes(b"state" * 99),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "checksums.json").unlink(),
        lambda folder: (folder / "checksums.json").write_text("[]"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    run = make(tmp_path)
    run.save_checkpoint(1, writer(), None)
    run.save_checkpoint(2, writer(), None)
    assert checkpoint_damage(tmp_path / "checkpoint-2") is None
    damage(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        assert run.latest_checkpoint() == (tmp_path / "checkpoint-1", 1)
    assert "checkpoint-2 is damaged" in caplog.text and "checkpoint-1" not in caplog.text


def test_every_single_bit_of_a_checkpoint_counts(tmp_path):
    make(tmp_path).save_checkpoint(1, writer(b"\x00\xff"), None)
    folder = tmp_path / "checkpoint-1"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        good = path.read_bytes()
        visible = [at for at in range(len(good)) if good[at : at + 1] not in b" \n"]  # JSON's blanks carry nothing
        for at in visible:
            flip(path, at)
            assert checkpoint_damage(folder) is not None, (path.name, at)
            path.write_bytes(good)
    assert checkpoint_damage(folder) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()])
def test_a_failing_write_keeps_the_old_checkpoints(tmp_path, error):
    run = make(tmp_path)
    run.save_checkpoint(1, writer(), 1)

    def failing(folder):
        writer()(folder)
        raise error

    for step in (1, 2):  # over an existing one, and a new one
        with pytest.raises(type(error)):
            run.save_checkpoint(step, failing, 1)
    assert names(tmp_path) == ["checkpoint-1", "config.json"]
    assert run.latest_checkpoint() == (tmp_path / "checkpoint-1", 1)


def test_a_disk_error_after_the_write_keeps_the_old_checkpoints(tmp_path, monkeypatch):
    run = make(tmp_path)
    run.save_checkpoint(1, writer(), 1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer_utils.run_folder.fsync", full)
    with pytest.raises(OSError):
        run.save_checkpoint(2, writer(), 1)
    assert names(tmp_path) == ["checkpoint-1", "config.json"]


def test_saving_a_step_again_replaces_it(tmp_path):
    run = make(tmp_path)
    run.save_checkpoint(5, writer(b"old"), 1)
    run.save_checkpoint(5, writer(b"new"), 1)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() == b"new"
    assert names(tmp_path) == ["checkpoint-5", "config.json"]


def test_construction_mends_what_a_kill_left(tmp_path):
    run = make(tmp_path)
    for step in (1, 2):
        run.save_checkpoint(step, writer(), None)
    (tmp_path / ".tmp-checkpoint-3").mkdir()
    (tmp_path / ".tmp-checkpoint-3" / "half").write_bytes(b"x")
    (tmp_path / ".tmp-config.json").write_text("half")
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.replaced")  # killed between the two renames
    assert make(tmp_path).latest_checkpoint() == (tmp_path / "checkpoint-2", 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "config.json"]


def test_atomic_write_leaves_the_old_content_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")

    def broken(source, target):
        raise OSError("disk")

    monkeypatch.setattr("trainer_utils.run_folder.os.replace", broken)
    with pytest.raises(OSError):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_grid_enlarges_exactly_and_shows_every_caption(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (3, 32, 32, 3), dtype=np.uint8)
    captions = ["short", "two words\nreward 0.5", "a very long caption " * 20 + "W" * 100]
    path = make(tmp_path).save_grid(123, images, captions, columns=2)
    assert path == tmp_path / "samples" / "step_000123.png"
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 2 * 128 + 3 * 6
    cell_height = (sheet.shape[0] - 6) // 2
    for index, image in enumerate(images):
        top, left = 6 + index // 2 * cell_height, 6 + index % 2 * 134
        shown = sheet[top : top + 128, left : left + 128]
        assert np.array_equal(shown[::4, ::4], image) and np.array_equal(shown[3::4, 3::4], image)
        under = sheet[top + 128 : top + cell_height - 6, left : left + 128]
        assert under.min() < 100, "no caption under the picture"
    assert (sheet[:, 128 + 6 : 128 + 12] == 255).all(), "a caption runs into its neighbour"


def test_grid_of_large_pictures_keeps_their_size(tmp_path):
    path = make(tmp_path).save_grid(0, np.zeros((1, 100, 160, 3), np.uint8), [""], columns=1)
    assert Image.open(path).size[0] == 160 + 12
