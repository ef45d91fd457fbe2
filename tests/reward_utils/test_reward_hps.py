"""HPS v2.1 against numbers of hpsv2 1.2.0 (golden/rewards/hps_small.json), through the code that loads real weights."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from reward_utils import hps
from reward_utils.hps import HPSScorer, hps_pixels
from reward_utils.pixels import normalize
from reward_utils.settings import RewardSettings

GOLDEN = Path(__file__).parents[1] / "golden/rewards"
SMALL = json.loads((GOLDEN / "hps_small.json").read_text(encoding="utf-8"))
SIZES = {"sq256": (256, 256), "wide": (192, 320)}
CPU = torch.device("cpu")


def golden_rule():
    spec = importlib.util.spec_from_file_location("golden_rule", GOLDEN / "rule.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULE = golden_rule()


@pytest.fixture(scope="module")
def small_state():
    from open_clip.model import CLIP

    weights = RULE.fill_state_dict(CLIP(**SMALL["cfg"]).double().state_dict())
    return {key: value.float() for key, value in weights.items()}


@pytest.fixture
def checkpoint(small_state, tmp_path, monkeypatch):
    """The small model in the original's file format; ViT-H-14's sizes stand in MODEL_CONFIG otherwise."""
    monkeypatch.setattr(hps, "MODEL_CONFIG", SMALL["cfg"])
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": small_state, "epoch": 1}, path)
    return path


@pytest.fixture
def scorer(checkpoint):
    return HPSScorer(RewardSettings(hpsv2_model=str(checkpoint), reward_batch_size=2), CPU)


def golden_image(name):
    height, width = SIZES[name]
    blocks = Image.fromarray(RULE.image_u8(f"hps/{name}", height // 8, width // 8, 3))
    return torch.from_numpy(np.array(blocks.resize((width, height), Image.NEAREST))).permute(2, 0, 1)[None]


def noise(num_images, height, width):
    return torch.randint(0, 256, (num_images, 3, height, width), generator=torch.Generator().manual_seed(1),
                         dtype=torch.uint8)


def naive_pixels(image, size=224):
    """One PIL image, as the original goes about it: to floats first, then the resize, then black borders."""
    pixels = TF.to_tensor(image)
    scale = size / float(max(pixels.shape[1:]))
    if scale != 1:
        pixels = TF.resize(pixels, [round(side * scale) for side in pixels.shape[1:]],
                           interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    rows, columns = size - pixels.shape[1], size - pixels.shape[2]
    pixels = TF.pad(pixels, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
    return TF.normalize(pixels, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("name", SIZES)
def test_golden_pixels(name):
    pixels, golden = hps_pixels(golden_image(name), 224)[0], SMALL["out"][name]
    assert pixels.double().mean().item() == pytest.approx(golden["pix_mean"], abs=1e-6)
    assert pixels[:, 0, 0].tolist() == pytest.approx(golden["pix_000"], abs=1e-6)
    assert pixels[:, 112, 100].tolist() == pytest.approx(golden["pix_c"], abs=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_golden_cosines(scorer, name):
    images, golden = golden_image(name).expand(3, -1, -1, -1), SMALL["out"][name]["cos"]
    scores = scorer(images, SMALL["prompts"])
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx(golden, abs=1e-6)
    scorer.double()
    scorer.text_cache.clear()
    cosines = (scorer.image_features(images) * scorer.text_features(SMALL["prompts"])).sum(dim=-1)
    assert cosines.tolist() == pytest.approx(golden, abs=1e-12)


def test_golden_tokens(scorer):
    ids = scorer.tokenize(SMALL["prompts"], scorer.model.context_length)
    assert [row[row != 0].tolist() for row in ids] == SMALL["tokens"] and ids.shape == (3, 77)


@pytest.mark.parametrize("shape", [(384, 384), (224, 224), (64, 64), (320, 192), (100, 333), (225, 150), (224, 101)])
def test_pixels_are_the_naive_ones(shape):
    images = noise(2, *shape)
    theirs = torch.stack([naive_pixels(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    torch.testing.assert_close(hps_pixels(images, 224), theirs, rtol=0, atol=1e-6)


def test_an_overshoot_beyond_white_is_kept():
    """PIL's resize, and so open_clip's transform, would cut it off."""
    edge = torch.zeros(1, 3, 384, 384, dtype=torch.uint8)
    edge[..., 192:] = 255
    white = normalize(torch.ones(1, 3, 1, 1))
    assert (hps_pixels(edge, 224).amax(dim=(0, 2, 3)) > white.flatten() + 0.03).all()


def test_batch_equals_one_by_one(scorer):
    images, prompts = noise(5, 48, 64), ["a cat", "a dog", "a cat", "", "long " * 100]
    batch = scorer(images, prompts)
    scorer.text_cache.clear()
    singles = []
    for image, prompt in zip(images, prompts):
        scorer.text_cache.clear()
        singles.append(scorer(image[None], [prompt]))
    torch.testing.assert_close(batch, torch.cat(singles), rtol=0, atol=1e-6)
    assert batch.unique().numel() == 5


def test_the_logit_scale_plays_no_part(small_state, checkpoint):
    settings = RewardSettings(hpsv2_model=str(checkpoint))
    before = HPSScorer(settings, CPU)(noise(1, 64, 64), ["a cat"])
    torch.save({"state_dict": {**small_state, "logit_scale": torch.tensor(0.5)}}, checkpoint)
    assert torch.equal(HPSScorer(settings, CPU)(noise(1, 64, 64), ["a cat"]), before)


def test_bfloat16_moves_the_cosine_little_and_is_not_rounded_itself(checkpoint, scorer):
    half = HPSScorer(RewardSettings(hpsv2_model=str(checkpoint), reward_dtype="bfloat16"), CPU)
    images, prompts = noise(6, 64, 64), list("abcdef")
    scores = half(images, prompts)
    assert next(half.model.parameters()).dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(scores, scorer(images, prompts), rtol=0, atol=2e-2)
    assert not torch.equal(scores, scores.bfloat16().float())  # the product is float32's


def test_fp16_weights_as_the_compressed_file_has_them(small_state, checkpoint, scorer):
    torch.save({"state_dict": {key: value.half() for key, value in small_state.items()}}, checkpoint)
    loaded = HPSScorer(RewardSettings(hpsv2_model=str(checkpoint)), CPU)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    images = noise(2, 64, 64)
    torch.testing.assert_close(loaded(images, ["a", "b"]), scorer(images, ["a", "b"]), rtol=0, atol=2e-3)


def test_the_device_is_that_of_the_weights_at_the_time(scorer):
    scorer.to("meta")
    assert scorer.device.type == "meta" and scorer.image_features(noise(2, 64, 64)).device.type == "meta"
    assert scorer.encode_prompts(["a"]).device.type == "meta"


def test_real_sizes():
    """The configuration is open_clip's ViT-H-14: 986.1 M parameters, counted without making them."""
    from open_clip import get_model_config
    from open_clip.model import CLIP

    assert hps.MODEL_CONFIG == get_model_config("ViT-H-14")
    with torch.device("meta"):
        state = CLIP(**hps.MODEL_CONFIG).state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 986_109_441


@pytest.mark.parametrize("damage, words", [
    (lambda state: state.pop("visual.proj"), 'Missing key(s) in state_dict: "visual.proj"'),
    (lambda state: state.update(extra=torch.zeros(1)), 'Unexpected key(s) in state_dict: "extra"'),
    (lambda state: state.update({"visual.proj": torch.zeros(2, 2)}), "size mismatch for visual.proj"),
])
def test_weights_that_do_not_fit_are_refused_in_one_line(small_state, checkpoint, damage, words):
    state = dict(small_state)
    damage(state)
    torch.save({"state_dict": state}, checkpoint)
    with pytest.raises(ValueError) as error:
        HPSScorer(RewardSettings(hpsv2_model=str(checkpoint)), CPU)
    assert words in str(error.value) and str(checkpoint) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_says_what_to_fetch(tmp_path):
    with pytest.raises(ValueError, match="hf download xswu/HPSv2 HPS_v2.1_compressed.pt"):
        HPSScorer(RewardSettings(hpsv2_model=str(tmp_path / "nowhere.pt")), CPU)
