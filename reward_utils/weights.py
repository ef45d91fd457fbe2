"""Where a reward model's weights are: a local path, the folder of downloaded checkpoints, or the hub; or what to fetch.

    path = locate("clip_model", settings)        # the folder or file to load

The flag's value is a local path, or the id of a hub repository in place of the table's. A repository is looked for in
REWARD_MODELS, under the table's name or its own, and then on the hub. Nothing from outside is run: safetensors, or
torch.load with weights_only=True.
"""
import pickle
import re
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from reward_utils.settings import RewardSettings
from utils.files import one_line, refuse_compressed

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.safetensors)", re.ASCII)
# What torch.load and safetensors are seen to raise on damaged or foreign files, beside their own errors.
DAMAGE = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError,
          AssertionError, struct.error)


class Checkpoint(NamedTuple):
    local: str  # name inside REWARD_MODELS
    repo: str | None  # hub id; None: not on the hub
    is_file: bool  # one file, else a whole folder
    fetch: str  # how to get it


def _hub(local: str, repo: str, is_file: bool = False) -> Checkpoint:
    if is_file:
        return Checkpoint(local, repo, True, f"hf download {repo} {local} --local-dir REWARD_MODELS")
    return Checkpoint(local, repo, False, f"hf download {repo} --local-dir REWARD_MODELS/{local}")


CHECKPOINTS = {
    "clip_model": _hub("clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    "hpsv2_model": _hub("HPS_v2.1_compressed.pt", "xswu/HPSv2", is_file=True),
    "pickscore_model": _hub("PickScore_v1", "yuvalkirstain/PickScore_v1"),
    "imagereward_model": _hub("ImageReward.pt", "THUDM/ImageReward", is_file=True),
    "bert_tokenizer": _hub("bert-base-uncased", "google-bert/bert-base-uncased"),
    "aesthetic_model": Checkpoint(
        "sac+logos+ava1-l14-linearMSE.pth", None, True,
        "download sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/improved-aesthetic-predictor"),
    "aesthetic_clip_model": _hub("clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
    "maniqa_model": Checkpoint("ckpt_koniq10k.pt", None, True,
                               "download ckpt_koniq10k.pt from the release Koniq10k of github.com/IIGROUP/MANIQA"),
    "lpips_model": Checkpoint("lpips_vgg.pth", None, True,
                              "download lpips/weights/v0.1/vgg.pth from github.com/richzhang/PerceptualSimilarity "
                              "as lpips_vgg.pth"),
    "vgg16_model": Checkpoint("vgg16-397923af.pth", None, True,
                              "download https://download.pytorch.org/models/vgg16-397923af.pth"),
    "inception_model": Checkpoint(
        "pt_inception-2015-12-05-6726825d.pth", None, True,
        "download pt_inception-2015-12-05-6726825d.pth from release fid_weights of github.com/mseitzer/pytorch-fid"),
    "qwenvl_model": _hub("Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    "geneval_model": Checkpoint(
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth", None, False,
        "download https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_"
        "coco/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"),
    "geneval_clip_model": _hub("clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
}


def locate(flag: str, settings: RewardSettings) -> Path:
    """The local file or folder of CHECKPOINTS[flag]; ValueError says what to fetch and where to put it."""
    given = getattr(settings, flag)
    if given and Path(given).exists():
        return _file_in(Path(given), flag)
    if given and not HUB_ID.fullmatch(given):
        raise ValueError(f"no such file or folder: --{flag} {given}; {_mend(flag, CHECKPOINTS[flag])}")
    row = _row(flag, given)
    if settings.reward_models and (path := Path(settings.reward_models) / row.local).exists():
        return _file_in(path, flag)
    lacking = f"no weights for --{flag}: " + (str(Path(settings.reward_models) / row.local) if settings.reward_models
                                              else "neither --reward_models nor REWARD_MODELS is set")
    if row.repo is None:
        raise ValueError(f"{lacking}; {_mend(flag, row)}")
    return _download(flag, row, lacking)


def _row(flag: str, given: str | None) -> Checkpoint:
    """The table's row, or that of another repository."""
    row = CHECKPOINTS[flag]
    if given in (None, "", row.repo):
        return row
    return _hub(row.local if row.is_file else given.split("/")[1], given, row.is_file)


def _file_in(path: Path, flag: str) -> Path:
    """`path`, or the file in a copy of its repository."""
    row = CHECKPOINTS[flag]
    if not row.is_file or not path.is_dir():
        return path
    if not (path / row.local).is_file():
        raise ValueError(f"--{flag}: no {row.local} in the folder {path}; {_mend(flag, row)}")
    return path / row.local


def _mend(flag: str, row: Checkpoint) -> str:
    return f"fetch: {row.fetch}; then put it at REWARD_MODELS/{row.local}, or give its path as --{flag}"


def _download(flag: str, row: Checkpoint, lacking: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # not hf_hub_download for a file: without a network it takes half a minute to say so. Weights come twice in old
        # repositories; code is never fetched.
        folder = snapshot_download(row.repo, allow_patterns=[row.local] if row.is_file else None,
                                   ignore_patterns=["*.msgpack", "*.h5", "*.ot", "*.py", "*.onnx", "*.gguf"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)
        raise ValueError(f"{lacking}, and {row.repo} could not be fetched from the hub ({reason}); "
                         f"{_mend(flag, row)}") from error
    return _file_in(Path(folder), flag)


def load_state(path: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a .pt/.pth/.safetensors file, on the CPU, a "state_dict" or "model" entry unwrapped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, it is damaged or holds more than tensors (nothing in it was run); wanted: "
                         f"{what}") from error
    except (SafetensorError, *DAMAGE) as error:
        raise ValueError(f"{path}: cannot be read as {what} ({' '.join(str(error).split())[:200]})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: no state dict of tensors inside; wanted: {what}")
    return state


def fill(module: nn.Module, state: dict[str, torch.Tensor], path: Path, what: str) -> nn.Module:
    """Strict load_state_dict with a one-line complaint; the module in eval mode and without gradients."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of {what} ({' '.join(str(error).split())[:300]})") from error
    return module.eval().requires_grad_(False)
