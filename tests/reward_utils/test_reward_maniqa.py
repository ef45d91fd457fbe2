"""MANIQA against the number of its original code (golden/rewards/maniqa.json), and through a file in its format."""
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from reward_utils.maniqa import ManiqaScorer, crop_offsets
from reward_utils.maniqa_net import ManiqaNet, from_windows, shift_mask, sizes_of, to_windows, used
from reward_utils.settings import RewardSettings
from reward_utils.weights import fill

GOLDEN = Path(__file__).parents[1] / "golden/rewards"
FULL = json.loads((GOLDEN / "maniqa.json").read_text(encoding="utf-8"))
SPEC = importlib.util.spec_from_file_location("golden_rule", GOLDEN / "rule.py")
RULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(RULE)

CPU = torch.device("cpu")
# sizes of the original -> of a network on crops of 64 pixels: 8 x 8 patches, 64 channels, then 32
TINY = {768: 64, 2304: 192, 3072: 256, 785: 65, 784: 64, 384: 32, 1152: 96, 1000: 10}


def pseudo_weights(shapes):
    """float32 tensors by the golden rule."""
    with ThreadPoolExecutor(2) as pool:
        values = pool.map(lambda item: torch.from_numpy(RULE.fill(*item)).float(), shapes.items())
        return dict(zip(shapes, values))


def test_golden_score_at_full_size():
    """The slow test: 114 million pseudo-weights and 220 GFLOP in float64, 20 seconds on a core of its own."""
    state = pseudo_weights(used(FULL["keys"]))
    shapes = {key: torch.empty(shape, device="meta") for key, shape in FULL["keys"].items()}
    net = fill(ManiqaNet(sizes_of(shapes)), state, Path("golden"), "the golden weights").double()
    crop = torch.from_numpy(RULE.image_u8("maniqa/crop", 224, 224, 3)).permute(2, 0, 1)[None]
    with torch.no_grad():
        score = net(((crop.float() / 255 - 0.5) / 0.5).double())
    assert score.tolist() == pytest.approx([FULL["score"]], abs=1e-8)


# ---- the parts whose mistakes would be silent ------------------------------------------------------------------------


def test_windows_hold_neighbours_and_go_back():
    grid = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    windows = to_windows(grid)
    assert windows.shape == (2, 4, 16, 3)
    assert torch.equal(windows[1, 1].view(4, 4, 3), grid[1, :4, 4:]) and torch.equal(windows[0, 2, 0], grid[0, 4, 0])
    assert torch.equal(from_windows(windows, 8), grid)


def test_only_patches_that_the_shift_brought_together_are_masked():
    mask, rows = shift_mask(8, 2), (torch.arange(8) + 2) % 8  # the row that a shifted place came from
    assert not shift_mask(8, 0).any() and mask.unique().tolist() == [-100, 0]
    place = to_windows(torch.stack(torch.meshgrid(rows, rows, indexing="ij"), dim=-1)[None])[0]  # [W, K, 2]
    apart = (place[:, None] - place[:, :, None]).abs().amax(dim=-1)
    assert torch.equal(mask < 0, apart >= 4)


# ---- through the file, as real weights come --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """ckpt_koniq10k.pt with all keys of the original, those that it never uses too."""
    path = tmp_path_factory.mktemp("reward_models") / "ckpt_koniq10k.pt"
    shapes = {key: [TINY.get(size, size) for size in shape] for key, shape in FULL["keys"].items()}
    torch.save(pseudo_weights(shapes), path)
    return path


@pytest.fixture(scope="module")
def scorer(checkpoint):
    """In float64: pseudo-weights magnify float32's rounding a thousandfold."""
    settings = RewardSettings(reward_models=str(checkpoint.parent), maniqa_crops=5, reward_batch_size=7)
    return ManiqaScorer(settings, CPU).double()


def images(num_images=3, height=80, width=72):
    noise = torch.rand(num_images, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * 256 * torch.linspace(0.4, 1, num_images)[:, None, None, None]).to(torch.uint8)


def test_the_sizes_are_read_off_the_file(scorer):
    assert scorer.net.crop_size == 64 and len(scorer.net.vit.blocks) == 10
    assert scorer.net.sizes.second_width == 32 and scorer.net.vit.blocks[0].attn.num_heads == 1


def test_the_score_is_the_mean_over_the_crops(scorer):
    offsets, counts = crop_offsets(80, 72, 64, 5)
    assert counts.sum() == 5 and len(offsets) > 2
    for image, score in zip(images(), scorer(images(), [""] * 3).tolist()):
        crops = [((image[:, top:, left:][:, :64, :64].float() / 255 - 0.5) / 0.5)[None].double()
                 for (top, left), count in zip(offsets.tolist(), counts.tolist()) for _ in range(count)]
        assert score == pytest.approx(np.mean([scorer.net(crop).item() for crop in crops]), abs=1e-6)


def test_a_batch_equals_its_images_one_by_one(scorer):
    scores = scorer(images(), ["", "a", "b"])
    assert scores.dtype == torch.float32 and scores.shape == (3,) and scores.std() > 1e-3
    torch.testing.assert_close(scores, torch.cat([scorer(image[None], [""]) for image in images()]), atol=1e-6, rtol=0)


def test_scores_repeat_and_equal_images_score_equally(scorer):
    same = images(1).expand(4, -1, -1, -1)
    assert torch.equal(scorer(same, [""] * 4), scorer(same, [""] * 4))
    assert scorer(same, [""] * 4).std() < 1e-6  # every image of a group is seen through the same crops
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(scorer(same[:1], [""]), scorer(same[:1], [""]))


def test_offsets_are_the_originals_range():
    offsets, counts = crop_offsets(256, 230, 224, 2000)
    assert counts.sum() == 2000
    assert offsets.amin(dim=0).tolist() == [0, 0]
    assert offsets.amax(dim=0).tolist() == [31, 5]  # 32 and 6 are never drawn
    assert crop_offsets(224, 224, 224, 20)[0].tolist() == [[0, 0]]  # where the original raises


def test_images_below_the_crop_are_refused(scorer):
    with pytest.raises(ValueError, match=r"crops of 64x64 pixels, the images have 63x64: sample larger"):
        scorer(images(2, 64, 63), [""] * 2)
    assert scorer(images(2, 64, 64), [""] * 2).isfinite().all()


def test_float32_whatever_reward_dtype_says(checkpoint):
    scorer = ManiqaScorer(RewardSettings(maniqa_model=str(checkpoint), reward_dtype="bfloat16"), CPU)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float32}
    assert scorer(images(1), [""]).dtype == torch.float32


@pytest.mark.parametrize("damage, complaint", (
    (lambda state: state.pop("conv2.weight"), "not the weights of MANIQA.*conv2.weight"),
    (lambda state: state.pop("tablock2.1.c_v.bias"), "not the weights of MANIQA.*Missing"),
    (lambda state: state.update({"vit.blocks.9.ls1.gamma": torch.zeros(1)}), "Unexpected.*ls1"),
    (lambda state: state.update({"vit.cls_token": torch.zeros(1, 1, 7)}), "size mismatch"),
))
def test_a_foreign_file_is_refused_in_one_line(checkpoint, tmp_path, damage, complaint):
    state = torch.load(checkpoint, weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=complaint) as caught:
        ManiqaScorer(RewardSettings(maniqa_model=str(tmp_path / "other.pt")), CPU)
    assert "other.pt" in str(caught.value) and "\n" not in str(caught.value)
