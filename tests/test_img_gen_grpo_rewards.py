"""RewardSet: names, weights, failures, threads, offloading, shared models; and the command that scores a folder."""
import csv
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from img_gen_grpo_rewards import REWARDS, Reward, RewardResult, RewardSet, main
from reward_utils.settings import RewardSettings

IMAGES = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 8, 8) * 10
PROMPTS = ["a", "b", "c", "d", "e"]


class Level(Reward):
    """Mean level, under two names; counts its calls."""

    def __init__(self, settings=RewardSettings(), device="cpu"):
        self.scorer, self.calls, self.seen_on = torch.nn.Linear(1, 1), 0, []

    def score(self, names, images, prompts, metadata):
        self.calls += 1
        self.seen_on.append(next(self.scorer.parameters()).device.type)
        level = images.float().mean(dim=(1, 2, 3))
        return {name: -level if name.endswith("minus") else level for name in names}


class Failing(Reward):
    """Fails on image 1 with a reason, is infinite on image 3, and NaN without a reason on image 4."""

    def score(self, names, images, prompts, metadata):
        values = [1.0, float("nan"), 2.0, float("inf"), float("nan")]
        return RewardResult({name: torch.tensor(values[:len(images)]) for name in names},
                            {name: {1: "no answer"} for name in names})


class Server(Level):
    """Answers when it is told to, from another thread."""

    remote, open, thread = True, threading.Event(), None

    def score(self, names, images, prompts, metadata):
        assert self.open.wait(10)
        type(self).thread = threading.current_thread()
        return super().score(names, images, prompts, metadata)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    for name, cls in (("level", Level), ("level_minus", Level), ("failing", Failing), ("server", Server)):
        monkeypatch.setitem(REWARDS, name, cls)
    Server.open.clear()


def test_a_class_scores_all_its_names_in_one_call():
    rewards = RewardSet(["level_minus", "level"], [0.5, 2.0])
    total, scores = rewards(IMAGES, PROMPTS)
    torch.testing.assert_close(scores["level"], torch.tensor([0.0, 10, 20, 30, 40]))
    torch.testing.assert_close(total, 1.5 * scores["level"])
    assert list(scores) == ["level_minus", "level"] and total.dtype == torch.float32
    assert len(rewards.rewards) == 1 and rewards.rewards[Level].calls == 1


def test_failures_are_nan_with_reasons_and_never_numbers():
    rewards = RewardSet(["level", "failing"])
    result = rewards.start(IMAGES, PROMPTS).result()
    assert result.failures == {"level": {}, "failing": {1: "no answer", 3: "the score is inf", 4: "no score"}}
    assert result.scores["failing"].isnan().tolist() == [False, True, False, True, True]
    total, _ = rewards(IMAGES, PROMPTS)
    assert total.isnan().tolist() == [False, True, False, True, True] and total[2] == 22
    assert result.table.shape == (5, 2)


def test_a_reward_of_weight_zero_is_only_watched():
    total, scores = RewardSet(["level", "failing"], [1.0, 0.0])(IMAGES, PROMPTS)
    assert total.tolist() == [0, 10, 20, 30, 40] and scores["failing"].isnan().sum() == 3


def test_remote_rewards_wait_in_threads_while_local_ones_are_done():
    rewards = RewardSet(["server", "level"])
    scoring = rewards.start(IMAGES, PROMPTS)  # returns although the server is silent
    assert rewards.rewards[Level].calls == 1
    Server.open.set()
    result = scoring.result()
    assert list(result.scores) == ["server", "level"] and torch.equal(*result.scores.values())
    assert Server.thread is not threading.main_thread()


def test_many_parts_under_way_come_back_in_order():
    rewards = RewardSet(["server", "failing"])
    pending = [rewards.start(part, PROMPTS[: len(part)]) for part in (IMAGES[:2], IMAGES[2:4], IMAGES[4:])]
    Server.open.set()
    result = rewards.collect(pending)
    assert result.scores["server"].tolist() == [0, 10, 20, 30, 40]
    assert result.failures["failing"] == {1: "no answer", 3: "no answer"}  # by the sample's place in the whole


def test_sets_share_models_by_class():
    models = {}
    first = RewardSet(["level"], instances=models)
    second = RewardSet(["level_minus", "failing"], instances=models)
    assert first.rewards[Level] is second.rewards[Level]
    first(IMAGES, PROMPTS)
    second(IMAGES, PROMPTS)
    assert models[Level].calls == 2


def test_offloaded_models_are_on_the_device_only_while_they_score():
    rewards = RewardSet(["level"], settings=RewardSettings(reward_device="meta", offload_rewards=True))
    level = rewards.rewards[Level]
    moves = []
    level.scorer.to = lambda device: moves.append(str(device)) or level.scorer
    rewards(IMAGES, PROMPTS)
    assert moves == ["meta", "cpu"]


@pytest.mark.parametrize("values, complaint", (
    ({}, "Level.score returned nothing for 'level'"),
    ({"level": torch.zeros(3)}, r"Level.score returned shape \[3\] for 'level', wanted \[5\]"),
))
def test_a_reward_that_breaks_its_contract_is_named(monkeypatch, values, complaint):
    monkeypatch.setattr(Level, "score", lambda self, *inputs: values)
    with pytest.raises(ValueError, match=complaint):
        RewardSet(["level"])(IMAGES, PROMPTS)


@pytest.mark.parametrize("arguments, complaint", (
    ((["levle"],), "did you mean level"),
    (([],), "reward_funcs is empty"),
    ((["level", "level"],), "named twice"),
    ((["level"], [1, 2]), "reward_weights has 2 values for 1"),
))
def test_mistakes_in_names_and_weights(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        RewardSet(*arguments)


def test_the_batch_size_is_the_flags_or_the_devices(monkeypatch):
    class Noted(Reward):
        def __init__(self, settings, device):
            self.batch_size = settings.reward_batch_size

    monkeypatch.setitem(REWARDS, "noted", Noted)
    for device, flags, size in (("cpu", {}, 4), ("cpu", {"reward_batch_size": 7}, 7), ("meta", {}, 64)):
        reward_set = RewardSet(["noted"], settings=RewardSettings(**flags), device=device)
        assert reward_set.rewards[Noted].batch_size == size


def test_no_images_have_no_scores_and_no_failures():
    total, scores = RewardSet(["level", "failing"])(IMAGES[:0], [])
    assert total.shape == (0,) and {name: one.shape for name, one in scores.items()} == {"level": (0,), "failing": (0,)}
    assert RewardSet(["failing"]).start(IMAGES[:0], []).result().failures == {"failing": {}}


def test_mistakes_in_inputs():
    rewards = RewardSet(["level"])
    with pytest.raises(ValueError, match="images must be uint8"):
        rewards(IMAGES.float(), PROMPTS)
    with pytest.raises(ValueError, match="5 images, 4 prompts, 4 metadata"):
        rewards(IMAGES, PROMPTS[:4])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i, side in enumerate((8, 8, 16, 8)):  # sizes may differ
        Image.fromarray(np.full((side, side, 3), 10 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("one\ntwo, with a comma\nthree\nfour\n")
    return tmp_path


def test_a_folder_is_scored_into_a_table_and_a_csv(folder, capsys):
    main(["--reward_funcs", "level", "failing", "--images", str(folder / "images"),
          "--prompts", str(folder / "prompts.txt"), "--reward_batch_size", "2"])
    rows = list(csv.DictReader((folder / "images" / "rewards.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert [row["level"] for row in rows] == ["0", "10", "20", "30"]
    assert rows[1]["prompt"] == "two, with a comma"
    assert (rows[1]["failing"], rows[1]["failures"]) == ("", "failing: no answer")
    table = capsys.readouterr().out
    assert "level" in table and "15.0000" in table and "no answer" in table


@pytest.mark.parametrize("spoil, complaint", (
    (lambda f: (f / "images" / "2.png").write_bytes(b"no picture"), "2.png: not a readable image"),
    (lambda f: (f / "prompts.txt").write_text("one\ntwo\n"), "2 prompts for 4 images"),
    (lambda f: [path.unlink() for path in (f / "images").iterdir()], "no images"),
    (lambda f: (f / "prompts.txt").unlink(), "prompts.txt cannot be read"),
))
def test_bad_input_is_named_and_leaves_no_csv(folder, spoil, complaint):
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        main(["--reward_funcs", "level", "--images", str(folder / "images"), "--prompts",
              str(folder / "prompts.txt")])
    assert not (folder / "images" / "rewards.csv").exists()


def test_rewards_that_read_prompts_need_them(folder):
    with pytest.raises(ValueError, match="level mse: these rewards read prompts, .*; give --prompts"):
        main(["--reward_funcs", "level", "maniqa", "mse", "--images", str(folder / "images")])


def test_reference_images_come_from_the_prompt_file(folder, capsys):
    lines = (f'{{"prompt": "a", "image": "images/{i}.png"}}\n' for i in (0, 1, 2, 9))
    (folder / "pairs.jsonl").write_text("".join(lines))
    main(["--reward_funcs", "mse", "--images", str(folder / "images"), "--prompts", str(folder / "pairs.jsonl")])
    rows = list(csv.DictReader((folder / "images" / "rewards.csv").open()))
    assert [row["mse"] for row in rows] == ["2", "2", "2", ""] and "images/9.png" in rows[3]["failures"]


def test_an_image_that_claims_too_many_pixels_is_refused(folder, monkeypatch):
    monkeypatch.setattr("utils.image_files.MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="2.png: 16x16 pixels, more than the 100 allowed"):
        main(["--reward_funcs", "level", "--images", str(folder / "images"), "--prompts",
              str(folder / "prompts.txt")])
