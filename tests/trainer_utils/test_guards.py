"""Each guard by injection: what it does, and that it is written down."""
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import grpo_trainer
from grpo_trainer import GRPOConfig, TrainingStopped
from img_gen_grpo_rewards import REWARDS
from tests.tiny_world import Brightness, make_trainer, weights
from trainer_utils import checkpoints as training_state
from trainer_utils.guards import Interruption, divergence

NAN = float("nan")
FULL_DISK = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "write_report", lambda folder: None)


def lines(run, name="metrics.jsonl"):
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(run):
    return [line["step"] for line in lines(run)]


def checkpoints(run):
    return sorted(path.name for path in run.iterdir() if "checkpoint" in path.name)


def before_step(trainer, number, action, times=1):
    """Calls action() before the rollout of step `number` (the first is 1), the first `times` times."""
    rollout, left, seen = trainer.rollout, [times], []

    def changed(step, metrics):
        if step + 1 == number and left[0]:
            left[0] -= 1
            action()
        result = rollout(step, metrics)
        seen.append((step + 1, result.tokens.clone()))
        return result

    trainer.rollout = changed
    return seen


def sharper(trainer):
    """Makes the policy nearly deterministic: far from the reference, and of low entropy."""
    with torch.no_grad():
        trainer.scorer.gpt.output.weight.mul_(-30)


LIMITS = (dict(max_kl=1.0, beta=0.01), dict(min_entropy=0.2))


@pytest.mark.parametrize("limits", LIMITS, ids=("kl", "entropy"))
def test_a_diverged_step_stops_the_run_and_is_not_saved(world, tmp_path, limits):
    trainer = make_trainer(world, tmp_path, exit_step=6, save_steps=2, **limits)
    before_step(trainer, 4, lambda: sharper(trainer))
    flag = f"--{next(iter(limits))}"
    with pytest.raises(TrainingStopped, match=f"step 4: .*{flag}"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"] and steps(tmp_path) == [1, 2, 3]
    [event] = lines(tmp_path, "events.jsonl")
    assert (event["event"], event["action"], event["step"]) == ("diverged", "stop", 4) and flag in event["reason"]


@pytest.mark.parametrize("limits", LIMITS, ids=("kl", "entropy"))
def test_rollback_draws_other_images_from_the_checkpoint(world, tmp_path, limits):
    trainer = make_trainer(world, tmp_path, exit_step=6, save_steps=2, on_divergence="rollback", **limits)
    seen = before_step(trainer, 4, lambda: sharper(trainer))
    trainer.train()
    assert [step for step, _ in seen] == [1, 2, 3, 4, 3, 4, 5, 6] and steps(tmp_path) == list(range(1, 7))
    assert not torch.equal(seen[2][1], seen[4][1])  # step 3 again, with a new seed
    [event] = lines(tmp_path, "events.jsonl")
    assert (event["action"], event["to"], event["attempt"]) == ("rollback", 2, 1)
    assert torch.load(tmp_path / "checkpoint-6" / "trainer.pt", weights_only=True)["attempt"] == 1
    assert lines(tmp_path)[-1]["entropy"] > 0.2


def test_rollbacks_are_limited_and_need_a_checkpoint(world, tmp_path):
    options = dict(exit_step=6, min_entropy=0.2, on_divergence="rollback", max_rollbacks=2)
    trainer = make_trainer(world, tmp_path / "often", save_steps=2, **options)
    before_step(trainer, 4, lambda: sharper(trainer), times=9)
    with pytest.raises(TrainingStopped, match="gone back 2 times"):
        trainer.train()
    assert [line["action"] for line in lines(tmp_path / "often", "events.jsonl")] == ["rollback", "rollback", "stop"]
    trainer = make_trainer(world, tmp_path / "early", save_steps=5, **options)
    before_step(trainer, 2, lambda: sharper(trainer))
    with pytest.raises(TrainingStopped, match="no earlier checkpoint"):
        trainer.train()


def test_the_weights_that_diverged_are_not_returned_to(world, tmp_path):
    """Saved after the step that spoilt them, noticed in the next one's rollout: that checkpoint goes."""
    trainer = make_trainer(world, tmp_path, exit_step=6, save_steps=1, save_total_limit=None, min_entropy=0.2,
                           on_divergence="rollback")
    log, left = trainer.log, [1]

    def spoil(step, numbers):  # after the update of step 3, before it is saved
        log(step, numbers)
        if step == 3 and left:
            left.clear()
            sharper(trainer)

    trainer.log = spoil
    seen = before_step(trainer, 99, lambda: None)
    trainer.train()
    assert [step for step, _ in seen] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert [(line["to"], line["attempt"]) for line in lines(tmp_path, "events.jsonl")] == [(2, 1)]
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in range(1, 7)]


def test_a_kill_after_a_rollback_does_not_repeat_it(world, tmp_path):
    options = dict(exit_step=6, save_steps=2, min_entropy=0.2, on_divergence="rollback")
    trainer = make_trainer(world, tmp_path, **options)
    seen = before_step(trainer, 4, lambda: sharper(trainer))
    before_step(trainer, 3, lambda: killed.append(1) if len(seen) < 3 else (_ for _ in ()).throw(KeyboardInterrupt()),
                times=2)
    killed = []
    with pytest.raises(KeyboardInterrupt):  # in the first step after going back, which nothing has saved
        trainer.train()
    resumed = make_trainer(world, tmp_path, **options)
    assert resumed.checkpoints.resume() == 2 and resumed.checkpoints.attempt == 1


def test_gradients_that_stay_bad_go_back_too(world, tmp_path):
    trainer = make_trainer(world, tmp_path, exit_step=5, save_steps=2, max_bad_updates=2, on_divergence="rollback")
    count, bad = iter(range(99)), {3, 4}  # the updates of steps 4 and 5
    trainer.parameters[3].register_hook(lambda grad: grad * NAN if next(count) in bad else grad)
    start = weights(trainer)
    trainer.train()
    *skipped, event = lines(tmp_path, "events.jsonl")
    assert [(line["event"], line["step"]) for line in skipped] == [("skipped_update", 4), ("skipped_update", 5)]
    assert event["action"] == "rollback" and event["to"] == 2 and "non-finite" in event["reason"]
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    after = weights(trainer)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(start[name], after[name]) for name in start)


def test_numbers_that_count_as_diverged():
    config = GRPOConfig(max_kl=0.5, min_entropy=1.0)
    assert divergence({"kl": 0.5, "entropy": 1.0}, 0, config) == ""
    assert "--max_kl" in divergence({"kl": 0.51, "entropy": 2.0}, 0, config)
    assert "--min_entropy" in divergence({"kl": 0.1, "entropy": 0.99}, 0, config)
    assert "--max_kl" in divergence({"kl": NAN, "entropy": 2.0}, 0, config)
    assert divergence({"kl": 99.0, "entropy": 0.0}, 0, GRPOConfig()) == ""
    assert "2 updates" in divergence({}, 2, GRPOConfig(max_bad_updates=2))
    with pytest.raises(ValueError, match="max_kl needs a reference"):
        GRPOConfig(max_kl=0.5, beta=0.0)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
def test_a_signal_saves_after_the_step_and_the_run_continues(world, tmp_path, number):
    whole = make_trainer(world, tmp_path / "whole", exit_step=5)
    whole.train()
    trainer = make_trainer(world, tmp_path / "run", exit_step=5)
    handler = signal.getsignal(number)
    before_step(trainer, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + number and signal.getsignal(number) is handler
    assert steps(tmp_path / "run") == [1, 2, 3] and checkpoints(tmp_path / "run") == ["checkpoint-3"]
    assert lines(tmp_path / "run", "events.jsonl")[0]["event"] == "interrupted"
    make_trainer(world, tmp_path / "run", exit_step=5).train()
    first, second = (tmp_path / name / "checkpoint-5" / "model.safetensors" for name in ("run", "whole"))
    assert first.read_bytes() == second.read_bytes() and steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """One that a terminal and a launcher both pass on is still one."""
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGINT
        monkeypatch.setattr(Interruption, "SAME_SEC", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("rewards,options,what", (
    (("brightness", "brightness2"), dict(weights=[0.0, 0.0]), "every weight in --reward_weights is 0"),
    (("always",), dict(), "always is 0.2 for every image of a group")))
def test_rewards_that_say_the_same_of_all_end_the_run(world, tmp_path, monkeypatch, caplog, rewards, options, what):
    class Always(Brightness):
        def score(self, names, images, prompts, metadata):
            return {name: torch.full((len(images),), 0.2) for name in names}

    monkeypatch.setitem(REWARDS, "always", Always)
    monkeypatch.setitem(REWARDS, "brightness2", Always)
    trainer = make_trainer(world, tmp_path, rewards=rewards, exit_step=9, max_constant_steps=3, **options)
    with caplog.at_level("WARNING"), pytest.raises(TrainingStopped, match=f"3 steps in a row.*{what}"):
        trainer.train()
    assert caplog.text.count("teaches nothing") == 1 and what in caplog.text
    assert [line["zero_spread_share"] for line in lines(tmp_path)] == [1.0, 1.0]
    assert [event["action"] for event in lines(tmp_path, "events.jsonl")] == ["continue", "stop"]


def test_one_group_with_spread_is_enough(world, tmp_path):
    trainer = make_trainer(world, tmp_path, exit_step=3, max_constant_steps=1)
    trainer.train()
    assert all(line["zero_spread_share"] < 1 for line in lines(tmp_path))


@pytest.mark.parametrize("damage,event", (
    (lambda gpt: gpt.output.weight.fill_(torch.nan), "non_finite_logits"),
    (lambda gpt: gpt.output.weight.mul_(1e30), "certain_tokens")))
def test_logits_that_overflowed_end_the_run(world, tmp_path, damage, event):
    trainer = make_trainer(world, tmp_path, exit_step=3)
    with torch.no_grad():
        damage(trainer.scorer.gpt)
    with pytest.raises(TrainingStopped, match="step 1: .*--cfg_scale 1, --temperature 1 and the weights"):
        trainer.train()
    assert [line["event"] for line in lines(tmp_path, "events.jsonl")] == [event]


def test_background_checkpoints_hold_the_moment_of_their_step(world, tmp_path):
    for name, background in (("plain", False), ("async", True)):
        make_trainer(world, tmp_path / name, exit_step=4, save_steps=1, save_total_limit=None, num_minibatches=2,
                     async_save=background).train()
    for step in range(1, 5):
        folders = [tmp_path / name / f"checkpoint-{step}" for name in ("plain", "async")]
        files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders]
        assert files[0] == files[1] and len(files[0]) == 6  # two of the model, trainer.pt, checksums, optimizer/, shard
        for name in files[0]:
            if name.suffix == ".safetensors":
                plain, background = (load_file(folder / name) for folder in folders)
                assert plain.keys() == background.keys()
                assert all(torch.equal(plain[key], background[key]) for key in plain), name


def full_disk(monkeypatch, where, failing):
    """The disk has no room for checkpoints of the steps in `failing`."""
    step, start = [0], training_state.Checkpoints.start
    monkeypatch.setattr(training_state.Checkpoints, "start",
                        lambda self, number: step.__setitem__(0, number) or start(self, number))
    owner, name = {"folder": (training_state.Checkpoints, "open"),
                   "shards": (training_state.distributed, "save_shards")}[where]
    original = getattr(owner, name)

    def wrapped(*inputs, **options):
        result = original(*inputs, **options)
        if step[0] not in failing:
            return result
        if where == "folder":
            return None, str(FULL_DISK)

        def wait():
            result()
            raise FULL_DISK

        return wait

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("background", (False, True))
@pytest.mark.parametrize("where", ("folder", "shards"))
def test_a_full_disk_costs_a_checkpoint_not_the_run(world, tmp_path, monkeypatch, where, background):
    full_disk(monkeypatch, where, {2})
    make_trainer(world, tmp_path, exit_step=3, save_steps=1, async_save=background).train()
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-3"] and steps(tmp_path) == [1, 2, 3]
    [event] = lines(tmp_path, "events.jsonl")
    assert event["action"] == "continue" and "No space left" in event["reason"]


@pytest.mark.parametrize("background", (False, True))
def test_an_interruption_that_cannot_save_is_an_error(world, tmp_path, monkeypatch, background):
    full_disk(monkeypatch, "shards", {2, 3})
    trainer = make_trainer(world, tmp_path, exit_step=5, save_steps=2, async_save=background)
    before_step(trainer, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStopped, match="No space left"):
        trainer.train()
    assert checkpoints(tmp_path) == [] and [line["action"] for line in lines(tmp_path, "events.jsonl")] == [
        "continue", "stop"]


@pytest.mark.parametrize("options, failing, saved", (
    (dict(on_save_failure="stop"), {2}, ["checkpoint-1"]), (dict(), {3}, ["checkpoint-1", "checkpoint-2"])))
def test_a_full_disk_stops_by_flag_and_at_the_end(world, tmp_path, monkeypatch, options, failing, saved):
    full_disk(monkeypatch, "shards", failing)
    with pytest.raises(TrainingStopped, match="No space left on device.*those before it stand"):
        make_trainer(world, tmp_path, exit_step=3, save_steps=1, **options).train()
    assert checkpoints(tmp_path) == saved
    monkeypatch.undo()
    monkeypatch.setattr(grpo_trainer, "write_report", lambda folder: None)
    make_trainer(world, tmp_path, exit_step=3, save_steps=1, **options).train()
    assert checkpoints(tmp_path)[-1] == "checkpoint-3"


def test_prompts_go_on_without_repeats_or_gaps_when_the_batch_changes(world, tmp_path, monkeypatch):
    """As on another number of processes: two steps of 4 prompts, then one of 8."""
    monkeypatch.setattr("trainer_utils.run_folder.RunFolder._refuse_changes", lambda *_: None)
    asked = []
    for size, last in ((16, 2), (32, 3)):
        trainer = make_trainer(world, tmp_path, per_device_train_batch_size=size, exit_step=last)
        after = trainer.sampler.after
        trainer.sampler.after = lambda *place: asked.append(after(*place)) or asked[-1]
        trainer.train()
    assert [len(part) for part in asked] == [4, 4, 8]
    assert sum(asked, []) == trainer.sampler.indices(0, 16)
