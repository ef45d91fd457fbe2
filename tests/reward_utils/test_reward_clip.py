"""CLIP score, PickScore and the aesthetic predictor: tiny random models in the original folders' format, through the
code that loads real weights, against transformers' own path of one PIL image at a time; and the step maps."""
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging

from img_gen_grpo_rewards import ClipReward, RewardSet
from reward_utils import clip
from reward_utils.aesthetic import AestheticHead, AestheticScorer
from reward_utils.clip import ClipScorer
from reward_utils.pickscore import PickScorer
from reward_utils.pixels import to_pil
from reward_utils.quantize import COSINE_BOUNDS, COSINE_REWARDS, FID_BOUNDS, FID_REWARDS, quantize, scaled_or_quantized
from reward_utils.settings import RewardSettings

CPU = torch.device("cpu")
IMAGE_SIZE = 32
PROMPTS = ["a photo of tench, Tinca tinca", "Crème brûlée & naïve café 😀", "", "very " * 100 + "long",
           "a photo of tench, Tinca tinca"]
HEAD_NAMES = ("0", "2", "4", "6", "7")


def noise(num_images=5, height=40, width=56, seed=0):
    return torch.randint(0, 256, (num_images, 3, height, width), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)


@functools.cache
def vocabulary():
    return clip._clip_vocabulary()


@functools.cache
def tokenizer():
    return CLIPTokenizer(*vocabulary())


def write_clip(folder, projection_dim=48, seed=0, tokenizer=True, **vision):
    """A folder as the hub has them: config.json, model.safetensors and, for most models, the tokenizer."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 projection_dim=projection_dim)
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": 8, **vision},
                        projection_dim=projection_dim, logit_scale_init_value=4.6052)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for weight in model.parameters():  # the usual initialisation leaves images nearly indistinguishable
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # buffers that old checkpoints carry
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        ids, merges = vocabulary()
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
                                           encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(AestheticHead().state_dict(), root / "head.pth")
    return {"clip_model": write_clip(root / "clip", seed=1),
            "pickscore_model": write_clip(root / "pick", seed=2, tokenizer=False),
            "aesthetic_clip_model": write_clip(root / "aesthetic", projection_dim=768, seed=3),
            "aesthetic_model": root / "head.pth"}


@pytest.fixture
def settings(folders):
    return lambda **flags: RewardSettings(**{**{flag: str(path) for flag, path in folders.items()}, **flags})


@pytest.fixture(scope="module")
def default(folders):
    """default(class): its scorer with default flags, made once; a test must not change it."""
    flags = RewardSettings(**{flag: str(path) for flag, path in folders.items()})
    return functools.cache(lambda scorer_class: scorer_class(flags, CPU))


def naive_features(folder, images, prompts):
    """(images [N, D], texts [N, D]) of length 1, one pair at a time as AR-GRPO does, from CLIPModel's own forward."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    size = model.config.vision_config.image_size
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": size},
                                                    crop_size={"height": size, "width": size}), tokenizer())
    outputs = []
    with torch.no_grad():
        for image, prompt in zip(to_pil(images), prompts):
            inputs = processor(text=prompt, images=image, return_tensors="pt", padding=True, truncation=True,
                               max_length=77)
            output = model(**inputs)
            outputs.append((output.image_embeds, output.text_embeds))
    image, text = (torch.cat(features) for features in zip(*outputs))
    return image, text, model.logit_scale.exp().item()


# ---- the scores ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(40, 56), (32, 32), (64, 64), (35, 32)])
def test_clip_is_the_naive_score(default, folders, shape):
    images = noise(5, *shape)
    image, text, _ = naive_features(folders["clip_model"], images, PROMPTS)
    scores = default(ClipScorer)(images, PROMPTS)
    assert scores.dtype == torch.float32 and scores.device == CPU and scores.unique().numel() == 5
    torch.testing.assert_close(scores, (image * text).sum(dim=-1), rtol=0, atol=1e-6)


def test_sizes_come_from_the_folder(settings, tmp_path):
    """ViT-L/14's shape of things: another patch, another image size, other heads."""
    folder = write_clip(tmp_path, image_size=42, patch_size=14, hidden_size=48, num_attention_heads=3)
    image, text, _ = naive_features(folder, noise(), PROMPTS)
    scores = ClipScorer(settings(clip_model=str(folder)), CPU)(noise(), PROMPTS)
    torch.testing.assert_close(scores, (image * text).sum(dim=-1), rtol=0, atol=1e-6)


def test_pickscore_is_the_diagonal_of_the_original(default, folders):
    image, text, scale = naive_features(folders["pickscore_model"], noise(), PROMPTS)
    original = (scale * text @ image.T).diagonal() / 26
    torch.testing.assert_close(default(PickScorer)(noise(), PROMPTS), original, rtol=0, atol=5e-6)


def test_pickscore_keeps_its_scale_in_bfloat16(default, settings):
    """bfloat16 has 4.59375 for 4.6052: the score would be 1.1 % low."""
    half, full = PickScorer(settings(reward_dtype="bfloat16"), CPU), default(PickScorer)
    assert half.model.logit_scale.dtype == torch.bfloat16 and half.logit_scale == full.logit_scale
    assert full.logit_scale == pytest.approx(100, rel=1e-4)
    cosines = (half.image_features(noise()) * half.text_features(PROMPTS)).sum(dim=-1)
    torch.testing.assert_close(half(noise(), PROMPTS), cosines * 100 / 26, rtol=1e-3, atol=0)


def test_aesthetic_is_the_head_on_unit_features_and_reads_no_prompt(default, folders):
    model = CLIPVisionModelWithProjection.from_pretrained(folders["aesthetic_clip_model"]).eval()
    head, images, naive = torch.load(folders["aesthetic_model"], weights_only=True), noise(), []
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE},
                                      crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    with torch.no_grad():
        for image in to_pil(images):
            x = model(processor(image, return_tensors="pt")["pixel_values"]).image_embeds
            x = x / x.norm()
            for name in HEAD_NAMES:
                x = x @ head[f"layers.{name}.weight"].T + head[f"layers.{name}.bias"]
            naive.append(x.item())
    scorer = default(AestheticScorer)
    torch.testing.assert_close(scorer(images, PROMPTS), torch.tensor(naive), rtol=0, atol=1e-6)
    assert torch.equal(scorer(images, PROMPTS), scorer(images, ["something else"] * 5))


def test_the_aesthetic_head_is_affine():
    """No activation between the layers: one vector and one number give the same score (the real ones: README)."""
    head, features = AestheticHead().double(), torch.randn(20, 768, dtype=torch.float64)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items() if "weight" in key} == {
        "layers.0.weight": (1024, 768), "layers.2.weight": (128, 1024), "layers.4.weight": (64, 128),
        "layers.6.weight": (16, 64), "layers.7.weight": (1, 16)}
    weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for layer in head.layers:
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    torch.testing.assert_close(head(features), features @ weight[0] + bias)


REAL_HEAD = Path(os.environ.get("REWARD_MODELS", "REWARD_MODELS")) / "sac+logos+ava1-l14-linearMSE.pth"


@pytest.mark.skipif(not REAL_HEAD.exists(), reason=f"weights not present at {REAL_HEAD}")
def test_the_real_aesthetic_head(settings):
    head = AestheticScorer(settings(aesthetic_model=str(REAL_HEAD)), CPU).head
    features = torch.stack([torch.full((768,), 768 ** -0.5), torch.eye(768)[0], torch.zeros(768)])
    assert head(features).tolist() == pytest.approx([4.883285, 4.545053, 5.236646], abs=1e-5)


# ---- batches, cache, dtypes, devices ---------------------------------------------------------------------------------

@pytest.mark.parametrize("preprocess", ["exact", "fast"])
@pytest.mark.parametrize("scorer_class", [ClipScorer, PickScorer, AestheticScorer])
def test_batch_equals_one_by_one(settings, scorer_class, preprocess):
    images = noise()
    scorer = scorer_class(settings(reward_batch_size=3, preprocess=preprocess), CPU)
    batch, singles = scorer(images, PROMPTS), []
    for image, prompt in zip(images, PROMPTS):
        getattr(scorer, "text_cache", {}).clear()
        singles.append(scorer(image[None], [prompt]))
    singles = torch.cat(singles)
    torch.testing.assert_close(batch, singles, rtol=0, atol=1e-6 if scorer_class is not PickScorer else 5e-6)


def test_one_image_encoding_per_image_and_one_text_encoding_per_prompt(settings):
    """Whatever names are asked: plain and quantised, label and caption share the model and its one pass."""
    names = ["clip_distance", "clip_quantize", "clip_text", "clip_text_quantize"]
    rewards = RewardSet(names, settings=settings(reward_batch_size=2))
    model, counts = rewards.rewards[ClipReward].scorer.model, {"images": 0, "prompts": 0}
    model.vision_model.register_forward_hook(
        lambda module, inputs, output: counts.update(images=counts["images"] + len(output.pooler_output)))
    model.text_model.register_forward_hook(
        lambda module, inputs, output: counts.update(prompts=counts["prompts"] + len(output.pooler_output)))
    _, scores = rewards(noise(), PROMPTS)
    assert counts == {"images": 5, "prompts": 4}  # the last prompt is the first again
    rewards(noise(seed=1), PROMPTS[::-1])
    rewards(noise(2), ["new", "new"])
    assert counts == {"images": 12, "prompts": 5}
    assert torch.equal(scores["clip_distance"], scores["clip_text"])
    assert torch.equal(scores["clip_quantize"],
                       quantize(scores["clip_text"] / 5, COSINE_BOUNDS, COSINE_REWARDS))


def test_the_cache_drops_the_oldest_prompts(settings, monkeypatch):
    monkeypatch.setattr(clip, "CACHED_PROMPTS", 3)
    scorer = ClipScorer(settings(), CPU)
    wanted = scorer.text_features(list("abcde"))  # more than fit, in one call
    assert list(scorer.text_cache) == ["c", "d", "e"]
    torch.testing.assert_close(scorer.text_features(["a", "e", "a"]), wanted[[0, 4, 0]], rtol=0, atol=1e-6)
    assert list(scorer.text_cache) == ["d", "e", "a"]
    assert {value.device.type for value in scorer.text_cache.values()} == {"cpu"}


@pytest.mark.parametrize("scorer_class, tolerance", [(ClipScorer, 0.02), (PickScorer, 0.08), (AestheticScorer, 0.02)])
def test_bfloat16_is_near_float32_and_the_product_is_float32(default, settings, scorer_class, tolerance):
    half, full = scorer_class(settings(reward_dtype="bfloat16"), CPU), default(scorer_class)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in full.model.parameters()} == {torch.float32}
    scores = half(noise(8), list("abcdefgh"))
    torch.testing.assert_close(scores, full(noise(8), list("abcdefgh")), rtol=0, atol=tolerance)
    assert not torch.equal(scores, scores.bfloat16().float())


def test_fast_moves_the_cosine_by_little(default, settings):
    """2e-4 measured; "exact" and "fast" differ by single levels (tests/reward_utils/test_pixels.py)."""
    exact, fast = (scorer(noise(8), list("abcdefgh"))
                   for scorer in (default(ClipScorer), ClipScorer(settings(preprocess="fast"), CPU)))
    assert not torch.equal(exact, fast)
    torch.testing.assert_close(exact, fast, rtol=0, atol=5e-4)


def test_the_device_is_that_of_the_weights_at_the_time(settings):
    scorer = ClipScorer(settings(), CPU).to("meta")
    assert scorer.image_features(noise()).device.type == "meta"
    assert scorer.encode_prompts(["a"]).device.type == "meta"
    aesthetic = AestheticScorer(settings(), CPU).to("meta")
    with torch.no_grad():
        assert aesthetic.score(noise()).device.type == "meta"


def test_a_zero_feature_is_a_failure_and_no_number():
    assert clip.unit(torch.zeros(1, 4)).isnan().all()


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

def test_a_folder_without_a_tokenizer_gets_clips_own(default, folders):
    bundled, of_folder = default(PickScorer).tokenizer, default(ClipScorer).tokenizer
    assert not (folders["pickscore_model"] / "vocab.json").exists() and (folders["clip_model"] / "vocab.json").exists()
    ids = [each(PROMPTS, truncation=True, max_length=77)["input_ids"] for each in (bundled, of_folder)]
    assert ids[0] == ids[1] and len(ids[0][3]) == 77 and ids[0][3][-1] == 49407 and ids[0][2] == [49406, 49407]
    # hps_small.json's ids for the same words
    assert ids[0][0] == [49406, 320, 1125, 539, 1149, 634, 267, 1310, 1684, 1310, 1684, 49407]


def test_a_tokenizer_file_of_one_piece_is_read_too(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    assert clip.load_tokenizer(tmp_path, 49408)(PROMPTS)["input_ids"] == tokenizer()(PROMPTS)["input_ids"]


def test_tokenizers_that_do_not_belong_to_the_model_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "_clip_vocabulary", vocabulary)
    with pytest.raises(ValueError, match="with 100 tokens the model's is not CLIP's own"):
        clip.load_tokenizer(tmp_path, 100)
    with pytest.raises(ValueError, match="its tokenizer has 49408 tokens and its model 100"):
        clip.load_tokenizer(folders["clip_model"], 100)


# ---- what is no CLIP -------------------------------------------------------------------------------------------------

def without(*keys):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        save_file({key: value for key, value in state.items() if key not in keys}, folder / "model.safetensors",
                  metadata={"format": "pt"})
    return damage


def other_shape(folder):
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] = torch.zeros(16, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut_in_half(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])


OTHER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("damage, words", [
    (without("visual_projection.weight"), "1 weights are missing or of another shape (visual_projection.weight is"),
    (without("logit_scale", "text_projection.weight"), "2 weights are missing"),
    (other_shape, "visual_projection.weight is [16, 32], not [48, 32]"),
    (cut_in_half, "cannot be loaded as CLIP"),
    (replaced("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "cannot be loaded as CLIP"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json in it"),
    (replaced("config.json", "{"), "not a valid JSON file"),
    (replaced("config.json", json.dumps({"model_type": "bert", "text_config": OTHER, "vision_config": OTHER})),
     "not the CLIP of its config.json, 109 weights are missing or of another shape"),
    (replaced("vocab.json", "{bad"), "its tokenizer cannot be loaded"),
])
def test_damage_is_told_in_one_line(settings, folders, tmp_path, capfd, damage, words):
    folder = shutil.copytree(folders["clip_model"], tmp_path / "copy")
    damage(folder)
    verbosity = logging.get_verbosity()
    with pytest.raises(ValueError) as error:
        ClipScorer(settings(clip_model=str(folder)), CPU)
    assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    assert "fetch" in str(error.value) or "--clip_model takes a folder as `hf download" in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err and logging.get_verbosity() == verbosity


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_folder_is_run(settings, folders, tmp_path):
    """Neither a pickle's calls nor the module that an auto_map names; and torch's advice to do so is not passed on."""
    folder, trace = shutil.copytree(folders["clip_model"], tmp_path / "copy"), tmp_path / "it_ran"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoTokenizer": "evil.Tokenizer", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer",
                                                              "auto_map": config["auto_map"]}))
    assert ClipScorer(settings(clip_model=str(folder)), CPU)(noise(), PROMPTS).isfinite().all()
    (folder / "model.safetensors").unlink()
    torch.save({"visual_projection.weight": Evil(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing in it was run") as error:
        ClipScorer(settings(clip_model=str(folder)), CPU)
    assert not trace.exists() and "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_weights_in_a_pytorch_model_bin(default, settings, folders, tmp_path):
    """openai/clip-vit-base-patch32 has its weights in this file."""
    folder = shutil.copytree(folders["clip_model"], tmp_path / "copy")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(ClipScorer(settings(clip_model=str(folder)), CPU)(noise(), PROMPTS),
                       default(ClipScorer)(noise(), PROMPTS))


def test_half_precision_weights_are_read_as_float32(settings, folders, tmp_path):
    """transformers 5 would take the file's dtype where none is named."""
    folder = shutil.copytree(folders["clip_model"], tmp_path / "copy")
    save_file({key: value.half() if value.is_floating_point() else value for key, value in
               load_file(folder / "model.safetensors").items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    scorer = ClipScorer(settings(clip_model=str(folder)), CPU)
    assert {weight.dtype for weight in scorer.model.parameters()} == {torch.float32}


def test_aesthetic_needs_features_of_768_numbers_and_its_own_head(settings, folders, tmp_path):
    with pytest.raises(ValueError, match="its features have 48 numbers, .* fetch openai/clip-vit-large-patch14"):
        AestheticScorer(settings(aesthetic_clip_model=str(folders["clip_model"])), CPU)
    torch.save({"layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="not the weights of the linear head"):
        AestheticScorer(settings(aesthetic_model=str(tmp_path / "head.pth")), CPU)


# ---- the step maps ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bounds, rewards", [(COSINE_BOUNDS, COSINE_REWARDS), (FID_BOUNDS, FID_REWARDS)])
def test_steps_hold_their_lower_bound(bounds, rewards):
    values = torch.tensor([bound + shift for bound in bounds for shift in (-1e-9, 0, 1e-9)], dtype=torch.float64)
    wanted = [rewards[i + k] for i in range(len(bounds)) for k in (0, 1, 1)]
    assert quantize(values, bounds, rewards).tolist() == pytest.approx(wanted)


def test_cosines_of_one_and_more_have_a_reward_and_failures_stay_failures():
    values = torch.tensor([1.0, 1.5, -1.0, float("nan"), float("inf"), -float("inf")])
    steps = quantize(values, COSINE_BOUNDS, COSINE_REWARDS)
    assert steps[:3].tolist() == [1.5, 1.5, -1.0] and not steps[3:].isfinite().any()


def test_the_name_chooses_between_scale_and_steps():
    values = torch.tensor([-0.1, 0.25, 0.3])
    out = scaled_or_quantized(["clip_distance", "clip_text_quantize"], values, 5.0)
    torch.testing.assert_close(out["clip_distance"], torch.tensor([-0.5, 1.25, 1.5]))
    assert out["clip_text_quantize"].tolist() == [-1.0, 0.5, 1.0]
