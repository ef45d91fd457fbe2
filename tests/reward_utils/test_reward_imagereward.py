"""ImageReward against numbers of image-reward 1.5 (golden/rewards/imagereward_small.json), and through its own file."""
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from reward_utils.imagereward import ImageRewardNet, ImageRewardScorer, converted, sizes_of
from reward_utils.pixels import CLIP_MEAN, CLIP_STD, to_pil
from reward_utils.settings import RewardSettings
from reward_utils.weights import fill

GOLDEN = Path(__file__).parents[1] / "golden/rewards"
SMALL = json.loads((GOLDEN / "imagereward_small.json").read_text(encoding="utf-8"))
SPEC = importlib.util.spec_from_file_location("golden_rule", GOLDEN / "rule.py")
RULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(RULE)

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "a", "##s", "dog", "cat", "red", "painting", "of"]
PROMPTS = ["A painting of a red dog", "cats", "", "Dog, " * 40, "zebra"]
# the golden sizes, with both encoders' widths made multiples of the 64 that tell the number of heads
WIDER = {96: 128, 288: 384, 384: 512, 48: 64}


def pseudo_weights(shapes):
    """float32 tensors by the golden rule, integers where the original has a buffer of positions."""
    return {key: torch.arange(shape[1])[None] if key.endswith("position_ids")
            else torch.from_numpy(RULE.fill(key, shape)).float() for key, shape in shapes.items()}


def golden_rewards(vision_changes={}, text_changes={}, eps=1e-6):
    state = converted(pseudo_weights(SMALL["keys"]))
    vision, text, mlp = sizes_of(state)
    net = ImageRewardNet({**vision, "num_attention_heads": SMALL["vit"]["heads"], **vision_changes},
                         {**text, "num_attention_heads": SMALL["text"]["heads"], **text_changes}, mlp)
    net = fill(net, state, Path("golden"), "the golden weights").double()
    for module in net.vision.modules():
        module.eps = eps
    ids = torch.from_numpy(RULE.ints("ir/ids", 3, 100, 3, 35))
    mask = (torch.arange(35) < torch.tensor(SMALL["lengths"])[:, None]).long()
    pixels = torch.from_numpy(RULE.gauss("ir/img", 3, 3, 64, 64))
    with torch.no_grad():
        patches = net.vision(pixel_values=pixels).last_hidden_state
        return net(pixels, ids, mask), patches, net(pixels, ids.where(mask > 0, 7), mask)


def test_golden_rewards():
    rewards, patches, other_padding = golden_rewards()
    assert patches.mean().item() == pytest.approx(SMALL["visual_mean"], abs=1e-12)
    assert patches[0, 0, :4].tolist() == pytest.approx(SMALL["visual_00"], abs=1e-9)
    assert rewards.tolist() == pytest.approx(SMALL["rewards"], abs=1e-9)
    assert torch.equal(rewards, other_padding)  # what stands under the mask is not read


@pytest.mark.parametrize("changes, least", (
    ({"text_changes": {"num_attention_heads": 2}}, 0.01), ({"eps": 1e-5}, 1e-5)))
def test_the_golden_numbers_see_what_shapes_do_not(changes, least):
    rewards, _, _ = golden_rewards(**changes)
    assert (rewards - torch.tensor(SMALL["rewards"], dtype=torch.float64)).abs().max() > least


# ---- through the file, as real weights come --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """REWARD_MODELS with ImageReward.pt in the original's keys, its unused ones too, and BERT's tokenizer."""
    folder = tmp_path_factory.mktemp("reward_models")
    shapes = {key: [WIDER.get(size, size) for size in shape] for key, shape in SMALL["keys"].items()}
    shapes |= {"blip.vision_proj.weight": [16, 128], "blip.vision_proj.bias": [16],
               "blip.text_proj.weight": [16, 64], "blip.text_proj.bias": [16]}
    torch.save(pseudo_weights(shapes), folder / "ImageReward.pt")
    (folder / "bert-base-uncased").mkdir()
    (folder / "bert-base-uncased/vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return ImageRewardScorer(RewardSettings(reward_models=str(folder), reward_batch_size=2), CPU)


def images(num_images=5, height=80, width=96):
    coarse = torch.rand(num_images, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(height))
    return (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) * 255).to(torch.uint8)


def test_sizes_and_heads_are_read_off_the_file(scorer):
    vision, text = scorer.net.vision.config, scorer.net.text.config
    assert (vision.num_attention_heads, text.num_attention_heads, vision.image_size) == (2, 1, 64)
    assert all(type(module).__name__ != "Tanh" for module in scorer.net.mlp) and len(scorer.net.mlp) == 5


@pytest.mark.parametrize("shape", ((80, 96), (64, 64), (97, 56)))
def test_scores_are_those_of_the_original_preprocessing(scorer, shape):
    batch = images(5, *shape)
    resize = [Resize(64, InterpolationMode.BICUBIC), CenterCrop(64)]
    transform = Compose([*resize, ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    tokens = [[2, 6, 11, 12, 6, 10, 8, 3], [2, 9, 7, 3], [2, 3], [2, *[8, 5] * 17][:34] + [3], [2, 1, 3]]
    for image, picture, prompt, ids in zip(batch, to_pil(batch), PROMPTS, tokens):
        ids = torch.tensor([ids])
        with torch.no_grad():
            alone = scorer.net(transform(picture)[None], ids, torch.ones_like(ids)).item()
        assert scorer(image[None], [prompt]).item() == pytest.approx(alone, abs=2e-5)


def test_a_batch_equals_its_images_one_by_one(scorer):
    scores = scorer(images(), PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (5,) and scores.std() > 0.01
    torch.testing.assert_close(scores, torch.cat([scorer(image[None], [prompt])
                                                  for image, prompt in zip(images(), PROMPTS)]), atol=2e-5, rtol=0)


def test_the_prompt_counts_but_not_beyond_35_tokens(scorer):
    batch = images(4)
    prompts = ["dog", "dog " * 33, "dog " * 34, "dog " * 33 + "cat"]
    first, long, longer, cut = scorer(batch[:1].expand(4, -1, -1, -1), prompts)
    assert abs(first - long) > 1e-4
    assert longer == long == cut


def test_bfloat16_keeps_the_head_in_float32(folder, scorer):
    half = ImageRewardScorer(RewardSettings(reward_models=str(folder), reward_dtype="bfloat16"), CPU)
    assert half.net.vision.dtype == half.net.text.dtype == torch.bfloat16
    assert half.net.mlp[0].weight.dtype == torch.float32
    torch.testing.assert_close(half(images(), PROMPTS), scorer(images(), PROMPTS), atol=0.1, rtol=0)


def without(key):
    return lambda state: state.pop(key)


@pytest.mark.parametrize("damage, complaint", (
    (without("blip.visual_encoder.patch_embed.proj.weight"), "not the weights of ImageReward.*patch_embedding.weight"),
    (without("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"), "not the weights of.*Missing"),
    (lambda state: state.update({"blip.extra": torch.zeros(1)}), "not the weights of ImageReward.*blip.extra"),
    (lambda state: state.update({"mlp.layers.7.bias": torch.tensor(math.e)}), "not the weights of.*mlp.7.bias"),
))
def test_a_foreign_file_is_refused_in_one_line(folder, tmp_path, damage, complaint):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "other.pt")
    settings = RewardSettings(reward_models=str(folder), imagereward_model=str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=complaint) as caught:
        ImageRewardScorer(settings, CPU)
    assert "other.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, text, complaint", (
    (None, "", "no tokenizer in it"),
    ("vocab.txt", "a\nb\n", "cannot be loaded .*lacks .UNK."),
    ("tokenizer.json", '{"model": ', "cannot be loaded"),
    ("vocab.txt", "\n".join([*WORDS, *map(str, range(100))]), "113 tokens and ImageReward 100"),
))
def test_a_bad_tokenizer_folder_is_named(folder, tmp_path, name, text, complaint):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        ImageRewardScorer(RewardSettings(reward_models=str(folder), bert_tokenizer=str(tmp_path)), CPU)
    assert str(tmp_path) in str(caught.value) and "hf download google-bert/bert-base-uncased" in str(caught.value)
