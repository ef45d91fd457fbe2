"""benchmark/speed/rewards.py end to end at tiny sizes: every reward that it knows, from files in their own formats.

What it prints is not judged: time on a shared machine says nothing.
"""
import pytest
import torch

from benchmark.speed import rewards
from img_gen_grpo_rewards import REWARDS, RewardResult
from reward_utils import hps


@pytest.mark.parametrize("joined", [
    "clip_text+clip_text_quantize", "hpsv2_text", "pickscore", "aesthetic", "imagereward", "maniqa", "lpips+mse",
    "qwenvl_3b_text+qwenvl_fake+qwenvl_weird"])
def test_both_ways_are_measured(joined, capsys):
    [speed] = rewards.main(["--rewards", joined, "--size", "tiny", "--batch_size", "3", "--rounds", "1",
                            "--seconds", "0", "--device", "cpu", "--image_size", "64"])
    assert speed.rewards == joined and speed.batch > 0 and speed.single > 0 and speed.parameters > 0
    assert joined in capsys.readouterr().out
    assert hps.MODEL_CONFIG is rewards.HPS  # as it was


def test_every_turn_begins_without_cached_prompts_and_takes_so_many_images_at_once():
    class Set:
        names, calls = ["shapes_strict"], []
        rewards = {}

        def start(self, images, prompts, metadata):
            self.calls.append((images[:, 0, 0, 0].tolist(), prompts[0], len(metadata)))
            return self

        def result(self):
            return RewardResult({"shapes_strict": torch.zeros(self.calls[-1][2])})

    class Reward:
        class scorer:
            text_cache = {"old": 1}

    fake = Set()
    fake.rewards = {Reward: Reward}
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4)
    assert rewards.turn(fake, images, 10, 0.0) > 0 and rewards.turn(fake, images, 1, 0.0) > 0
    assert [call[0] for call in fake.calls] == [list(range(10)), [0]] and Reward.scorer.text_cache == {}


def test_rewards_without_random_weights_are_named(capsys):
    with pytest.raises(SystemExit):
        rewards.main(["--rewards", "clip_text", "fid"])
    assert "no random weights for fid" in capsys.readouterr().err
    own = {name for name, cls in REWARDS.items() if cls.__module__ == RewardResult.__module__}  # tests add theirs
    local = {name for name in own if not name.startswith("shapes_")} - {"fid", "geneval", "deqa", "unireward"}
    assert local == set(rewards.WRITERS)


def test_sizes_are_cut_in_depth_and_width():
    cut = rewards.at_size(rewards.HPS, rewards.SIZES["tiny"])
    assert cut["vision_cfg"] == {"image_size": 224, "patch_size": 14, "layers": 1, "width": 80, "head_width": 80}
    assert rewards.at_size(rewards.HPS, rewards.SIZES["full"]) == rewards.HPS
