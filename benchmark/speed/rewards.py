"""Images per second of each reward: a batch at once against one image at a time. No download: the weights are random.

    python -m benchmark.speed.rewards
    python -m benchmark.speed.rewards --device cuda --rewards clip_text hpsv2_text qwenvl_3b_text+qwenvl_fake

Both ways use the same loaded model in the same run, in turns, and the median of the rounds counts. A prompt is shared
by 8 images, as in a GRPO group; its text features are dropped before each turn, and cached within it either way.
`--size small` (the default on CPUs) halves the widths and keeps 2 layers per encoder (Qwen: a toy, MANIQA: an eighth
and 2 crops), so that a run takes minutes.
Left out: fid (a batch has one score), geneval, the rewards on servers, and reading reference images (lpips and mse get
tensors).
"""
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmark.speed import random_weights as weights
from img_gen_grpo_rewards import RewardSet
from reward_utils import hps
from reward_utils.maniqa_net import ManiqaSizes
from reward_utils.settings import RewardSettings
from utils.config import flag, one_line_errors, parse_args

GROUP = 8  # images of a prompt


class Size(NamedTuple):
    layers: int  # at most, per encoder
    narrower: int  # widths and heads are divided by it
    qwen: dict
    maniqa: ManiqaSizes
    maniqa_crops: int


SIZES = {"full": Size(1000, 1, weights.QWEN_3B, ManiqaSizes(768, 8, 28, 384, 768, 4), 20),
         "small": Size(2, 2, weights.QWEN_TINY, ManiqaSizes(96, 8, 28, 48, 96, 4), 2),
         "tiny": Size(1, 16, weights.QWEN_TINY, ManiqaSizes(32, 8, 4, 16, 32, 2), 2)}  # for tests

CLIP_TEXT = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
CLIP_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32)
CLIP_L_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
CLIP_L_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     patch_size=14)
CLIP_H_TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                   hidden_act="gelu")
CLIP_H_VISION = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                     hidden_act="gelu", patch_size=14)
BLIP_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                   image_size=224, patch_size=16)
BLIP_TEXT = dict(hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, vocab_size=30524, max_position_embeddings=512)
VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
HPS = hps.MODEL_CONFIG
WIDTHS = ("hidden_size", "intermediate_size", "encoder_hidden_size", "num_attention_heads", "width", "heads",
          "embed_dim")
LAYERS = ("num_hidden_layers", "layers")


def at_size(config: dict, size: Size) -> dict:
    """`config`, nested ones too, with fewer layers and narrower."""
    cut = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = at_size(value, size)
        elif key in LAYERS:
            value = min(value, size.layers)
        elif key in WIDTHS:
            value = max(1, value // size.narrower)
        cut[key] = value
    return cut


# name of a reward -> writer (folder, size) of its weights, which returns {flag: path}
def clip(folder: Path, size: Size) -> dict[str, Path]:
    return {"clip_model": weights.write_clip(folder / "clip", at_size(CLIP_TEXT, size),
                                             at_size(CLIP_VISION, size), 512)}


def hpsv2(folder: Path, size: Size) -> dict[str, Path]:
    return {"hpsv2_model": weights.write_hps(folder / "hps.pt", at_size(HPS, size))}


def pickscore(folder: Path, size: Size) -> dict[str, Path]:
    return {"pickscore_model": weights.write_clip(folder / "pickscore", at_size(CLIP_H_TEXT, size),
                                                  at_size(CLIP_H_VISION, size), 1024)}


def aesthetic(folder: Path, size: Size) -> dict[str, Path]:
    return {"aesthetic_model": weights.write_aesthetic_head(folder / "aesthetic.pth"),
            "aesthetic_clip_model": weights.write_clip(folder / "clip_l", at_size(CLIP_L_TEXT, size),
                                                       at_size(CLIP_L_VISION, size), 768)}


def imagereward(folder: Path, size: Size) -> dict[str, Path]:
    return {"imagereward_model": weights.write_imagereward(folder / "imagereward.pt", at_size(BLIP_VISION, size),
                                                           at_size(BLIP_TEXT, size)),
            "bert_tokenizer": weights.write_bert_tokenizer(folder / "bert")}


def maniqa(folder: Path, size: Size) -> dict[str, Path]:
    return {"maniqa_model": weights.write_maniqa(folder / "maniqa.pt", size.maniqa)}


def lpips(folder: Path, size: Size) -> dict[str, Path]:
    paths = {"vgg16_model": folder / "vgg16.pth", "lpips_model": folder / "lpips.pth"}
    weights.write_lpips(*paths.values(), [max(1, width // size.narrower) for width in VGG])
    return paths


def qwen(folder: Path, size: Size) -> dict[str, Path]:
    return {"qwenvl_model": weights.write_qwen(folder / "qwen", **size.qwen)}


WRITERS: dict[str, Callable[[Path, Size], dict[str, Path]]] = {
    **dict.fromkeys(("clip_distance", "clip_quantize", "clip_text", "clip_text_quantize"), clip),
    **dict.fromkeys(("hpsv2", "hpsv2_quantize", "hpsv2_text", "hpsv2_text_quantize"), hpsv2),
    "pickscore": pickscore, "aesthetic": aesthetic, "imagereward": imagereward, "maniqa": maniqa,
    "lpips": lpips, "mse": lambda folder, size: {},
    **dict.fromkeys(("qwenvl_3b", "qwenvl_3b_text", "qwenvl_fake", "qwenvl_weird"), qwen),
}


@dataclass(frozen=True)
class SpeedConfig:
    rewards: list[str] = field(default_factory=lambda: [
        "clip_text", "clip_text+clip_text_quantize", "hpsv2_text", "pickscore", "aesthetic", "imagereward", "maniqa",
        "lpips", "qwenvl_3b_text", "qwenvl_3b_text+qwenvl_fake+qwenvl_weird"], metadata={
            "help": "one measurement each; names joined by + are scored together"})
    batch_size: int = flag(64, "images of a batch")
    image_size: int = flag(256, "pixels of a side")
    device: str = flag(lambda: "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    size: Literal["full", "small", "tiny"] | None = field(default=None, metadata={
        "help": "architectures: full (default on GPUs), small (default on CPUs), tiny (for tests)"})
    preprocess: str = flag("exact", "exact or fast, as in training")
    reward_dtype: str = flag("float32", "float32 or bfloat16, as in training")
    rounds: int = field(default=3, metadata={"help": "turns of each way; the median counts"})
    seconds: float = field(default=2.0, metadata={"help": "a turn ends after so long, and at least one call"})

    def __post_init__(self):
        unknown = [name for joined in self.rewards for name in joined.split("+") if name not in WRITERS]
        if unknown:
            raise ValueError(f"rewards: no random weights for {' '.join(unknown)}; known: {' '.join(WRITERS)}")
        for name in ("batch_size", "image_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sizes(self) -> Size:
        return SIZES[self.size or ("full" if self.device.startswith("cuda") else "small")]


class Speed(NamedTuple):
    rewards: str
    parameters: int
    batch: float  # images per second
    single: float
    gigabytes: float | None  # most GPU memory in use


@contextmanager
def random_rewards(names: list[str], size: Size, folder: Path, device: str | torch.device,
                   **settings) -> Iterator[RewardSet]:
    """A RewardSet whose models are loaded from random weights, which it writes into `folder`."""
    # HPS's sizes stand in the code, since its checkpoint can't tell the number of heads
    with patch.object(hps, "MODEL_CONFIG", at_size(HPS, size)):
        writers = dict.fromkeys(WRITERS[name] for name in names)
        paths = {flag: str(path) for write in writers for flag, path in write(folder, size).items()}
        yield RewardSet(names, settings=RewardSettings(maniqa_crops=size.maniqa_crops, **paths, **settings),
                        device=device)


def measure(joined: str, config: SpeedConfig) -> Speed:
    """One model, loaded from random weights: images per second in batches and one at a time."""
    names, on_gpu = joined.split("+"), config.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder, random_rewards(
            names, config.sizes, Path(folder), config.device, reward_batch_size=config.batch_size,
            preprocess=config.preprocess, reward_dtype=config.reward_dtype) as reward_set:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(config.device)
        images = torch.randint(0, 256, (config.batch_size, 3, config.image_size, config.image_size),
                               generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(config.device)
        speeds = {at_once: [] for at_once in (config.batch_size, 1)}
        for at_once in speeds if on_gpu else [1]:  # a CPU has little to warm up
            turn(reward_set, images, at_once, 0.0)
        for _ in range(config.rounds):
            for at_once, measured in speeds.items():
                measured.append(turn(reward_set, images, at_once, config.seconds))
    parameters = {id(p): p.numel() for reward in reward_set.rewards.values() for p in reward.scorer.parameters()}
    gigabytes = torch.cuda.max_memory_allocated(config.device) / 1e9 if on_gpu else None
    return Speed(joined, sum(parameters.values()), statistics.median(speeds[config.batch_size]),
                 statistics.median(speeds[1]), gigabytes)


def turn(reward_set: RewardSet, images: Tensor, at_once: int, seconds: float) -> float:
    """Images per second over calls with `at_once` images each. Scores arrive on the CPU: the GPU has been awaited."""
    for reward in reward_set.rewards.values():
        getattr(reward.scorer, "text_cache", {}).clear()
    prompts = [f"a photo of {i // GROUP} dogs on a beach, in the evening sun" for i in range(len(images))]
    metadata = [{"image": images[i - 1].cpu()} for i in range(len(images))]  # another image as the reference
    done, first, start = 0, 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < seconds:
        part = slice(first, first + at_once)
        result = reward_set.start(images[part], prompts[part], metadata[part]).result()
        assert reward_set.names == list(result.scores) and len(result.table) == at_once
        done += at_once
        first = (first + at_once) % len(images)
    return done / (time.perf_counter() - start)


def as_table(speeds: list[Speed]) -> str:
    lines = [f"{'reward':<42}{'million':>9}{'batch/s':>10}{'single/s':>10}{'ratio':>7}{'GB':>7}"]
    for speed in speeds:
        memory = "-" if speed.gigabytes is None else f"{speed.gigabytes:.1f}"
        lines.append(f"{speed.rewards:<42}{speed.parameters / 1e6:>9.1f}{speed.batch:>10.2f}{speed.single:>10.2f}"
                     f"{speed.batch / speed.single:>7.2f}{memory:>7}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Speed]:
    [config] = parse_args((SpeedConfig,), argv, __doc__)
    from transformers.utils import logging
    logging.disable_progress_bar()
    device = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{device}; torch {torch.__version__}; {config.image_size} px, batches of {config.batch_size}, "
          f"{config.reward_dtype}, preprocess {config.preprocess}, size {config.size or 'by device'}", flush=True)
    speeds = []
    for joined in config.rewards:
        speeds.append(measure(joined, config))
        print(as_table(speeds[-1:]).splitlines()[-1], flush=True)
    print("\n" + as_table(speeds))
    return speeds


if __name__ == "__main__":
    with one_line_errors():
        main()
