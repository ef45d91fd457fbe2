"""From flags to a `Policy`: transformer, tokenizer and text encoder, loaded and put together; and back to a folder.

A checkpoint folder is model.safetensors (LlamaGen's keys) + model.json, which names everything else that sampling
needs: the tokenizer, the text encoder, the labels and the sampling settings.
"""
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.checkpoint import load_gpt, load_vq, read_manifest, save_model
from models.generate import SamplingConfig
from models.gpt import GPT
from models.policy import Policy
from models.text import TextEncoder
from utils.config import check_flags, flag

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PolicyConfig:
    """The models: transformer, tokenizer, text encoder, precision."""

    gpt_ckpt: str = flag(help="LlamaGen .pt, safetensors, an AR-GRPO folder, or a folder of ours")
    vq_ckpt: str = flag(help="VQ tokenizer, likewise")
    gpt_type: Literal["c2i", "t2i"] = flag("c2i", "class to image, or text to image")
    gpt_model: str | None = flag(None, "row of GPT_SIZES; none: what the folder's model.json says")
    vq_model: str | None = flag(None, "row of VQ_SIZES; none: what the folder's model.json says, VQ-16 for other files")
    use_ema: bool = flag(False, "of a gpt_ckpt that also holds an average of its weights, the average")
    image_size: int = flag(256, "pixels of a side, as decoded", least=1)
    num_classes: int = flag(1000, "classes of a class-to-image model", least=1)
    class_names: str = flag("imagenet", "imagenet, shapes, a list file (.txt, .json), or a folder of class folders")
    cls_token_num: int = flag(1, "condition tokens: 1 for classes, 120 for captions", least=1)
    caption_dim: int = flag(2048, "width of the caption features that the model reads", least=1)
    t5_path: str = flag("google/flan-t5-xl", "text encoder: a hub id or a folder")
    t5_cache: str | None = flag(None, "caption embeddings of dataset.encode_prompts")
    dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "of matrix products in sampling and training, by autocast; weights stay float32. float16 keeps "
        "sampler and trainer 8 times closer than bfloat16, and scales the loss")
    bf16: bool = flag(False, "the same as --dtype bfloat16")
    decode_batch_size: int = flag(64, "images decoded at a time", least=1, resume=True)
    vq_dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "of the decoding to images; bfloat16 changes pixels by a level or two, and is slow on most CPUs")
    rollout_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the sampler's matrix products; auto: as in training, float32 on CPUs that would emulate it")

    def __post_init__(self):
        check_flags(self)
        if self.bf16 and self.dtype == "float16":
            raise ValueError("bf16 means --dtype bfloat16, but --dtype float16 is given: leave one of the two out")
        if self.bf16 or self.dtype == "bfloat16":  # two names of one setting: stored alike
            object.__setattr__(self, "dtype", "bfloat16")
            object.__setattr__(self, "bf16", True)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """None: float32 throughout."""
        return None if self.dtype == "float32" else DTYPES[self.dtype]


def load_policy(config: PolicyConfig, sampling: SamplingConfig, device: torch.device) -> Policy:
    """Frozen tokenizer and text encoder, float32 transformer in eval mode, on `device`."""
    vq_model = config.vq_model or (None if read_manifest(config.vq_ckpt) else "VQ-16")
    vq = load_vq(config.vq_ckpt, vq_model).to(device).requires_grad_(False)
    vq.to(memory_format=torch.channels_last)  # what convolutions read fastest, and how looked-up codes lie anyway
    gpt = load_transformer(config, vq.config.downsample, vq.config.codebook_size).to(device)
    encoder = None
    if config.gpt_type == "t2i":
        encoder = TextEncoder(config.t5_path, max_length=gpt.config.cls_token_num, device=str(device),
                              cache_path=config.t5_cache)
        if encoder.width != gpt.config.caption_dim:
            raise ValueError(f"{config.t5_path} gives {encoder.width}-dimensional caption features, but "
                             f"{config.gpt_ckpt} reads {gpt.config.caption_dim}: it was trained with another --t5_path")
    return Policy(gpt, vq, sampling, encoder, config.autocast_dtype, config.decode_batch_size,
                  DTYPES[config.rollout_dtype], DTYPES[config.vq_dtype])


def load_transformer(config: PolicyConfig, downsample: int, codebook_size: int) -> GPT:
    side = config.image_size // downsample
    if config.gpt_model is None and read_manifest(config.gpt_ckpt) is None:
        raise ValueError(f"{config.gpt_ckpt}: name its size with --gpt_model (only folders of ours carry a model.json)")
    if config.gpt_model is None:
        gpt = load_gpt(config.gpt_ckpt, use_ema=config.use_ema)
    else:
        gpt = load_gpt(config.gpt_ckpt, config.gpt_model, config.use_ema, model_type=config.gpt_type,
                       block_size=side ** 2, vocab_size=codebook_size, num_classes=config.num_classes,
                       cls_token_num=config.cls_token_num, caption_dim=config.caption_dim)
    if gpt.config.model_type != config.gpt_type:
        raise ValueError(f"{config.gpt_ckpt} is a {gpt.config.model_type} model, but --gpt_type is {config.gpt_type}")
    if gpt.config.grid != (side, side):
        raise ValueError("{} writes {} x {} tokens".format(config.gpt_ckpt, *gpt.config.grid)
                         + f", but --image_size {config.image_size} with a tokenizer that downsamples by {downsample} "
                         f"needs {side} x {side}")
    if gpt.config.vocab_size != codebook_size:
        raise ValueError(f"{config.gpt_ckpt} has {gpt.config.vocab_size} tokens, the tokenizer {config.vq_ckpt} "
                         f"{codebook_size}")
    return gpt


def save_policy(folder: Path, policy: Policy, config: PolicyConfig, weights: dict[str, Tensor] | None = None) -> None:
    """model.safetensors (weights: a copy of the transformer's) and model.json; tokenizer and text encoder are named,
    not copied."""
    save_model(folder, policy.gpt, weights=weights, policy=asdict(config), sampling=asdict(policy.sampling))


def stored_settings(path: str | Path) -> tuple[dict, dict]:
    """(PolicyConfig fields, SamplingConfig fields) that a checkpoint folder of a run carries; empty for other files."""
    manifest = read_manifest(path) or {}
    stored = []
    for name, cls in (("policy", PolicyConfig), ("sampling", SamplingConfig)):
        known = {f.name for f in fields(cls)}
        stored.append({key: value for key, value in manifest.get(name, {}).items() if key in known})
    return tuple(stored)
