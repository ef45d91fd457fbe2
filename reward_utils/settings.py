"""Flags of the rewards: which checkpoints, on which device, in which batches, and where the remote judges listen."""
import os
from dataclasses import dataclass
from typing import Literal

from utils.config import check_flags, flag


def _checkpoint(what: str):
    return flag(None, f"{what}: a hub id or a local path; none: as docs/rewards.md's table says")


def _url(what: str, variable: str):
    return flag(lambda: os.environ.get(variable), f"address of {what}; environment: {variable}", resume=True)


@dataclass(frozen=True)
class RewardSettings:
    """Reward models and judges."""

    reward_models: str | None = flag(lambda: os.environ.get("REWARD_MODELS"),
                                     "folder of downloaded reward checkpoints; environment: REWARD_MODELS", resume=True)
    reward_batch_size: int = flag(64, "images of one forward pass of a reward model; left at its default, 4 on a CPU",
                                  least=1, resume=True)
    preprocess: Literal["exact", "fast"] = flag(
        "exact", "exact: the original's PIL resize; fast: resized on the device (docs/rewards.md: the difference)")
    reward_dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "of the models that bear it (docs/rewards.md); Qwen is bfloat16 on GPUs anyway")
    reward_device: str | None = flag(None, "e.g. cuda:1; none: the training device", resume=True)
    offload_rewards: bool = flag(False, "a reward model is on its device only while it scores", resume=True)

    clip_model: str | None = _checkpoint("CLIP of clip_*, in transformers' format")
    hpsv2_model: str | None = _checkpoint("HPS v2.1, HPS_v2.1_compressed.pt")
    pickscore_model: str | None = _checkpoint("PickScore, in transformers' format")
    imagereward_model: str | None = _checkpoint("ImageReward, ImageReward.pt")
    bert_tokenizer: str | None = _checkpoint("bert-base-uncased's tokenizer, for imagereward")
    aesthetic_model: str | None = _checkpoint("linear head of the LAION aesthetic predictor")
    aesthetic_clip_model: str | None = _checkpoint("CLIP ViT-L/14 of aesthetic")
    maniqa_model: str | None = _checkpoint("MANIQA, ckpt_koniq10k.pt")
    maniqa_crops: int = flag(20, "random 224 px crops of an image that maniqa averages", least=1)
    lpips_model: str | None = _checkpoint("linear heads of LPIPS (VGG)")
    vgg16_model: str | None = _checkpoint("torchvision's VGG16, for lpips")
    inception_model: str | None = _checkpoint("Inception of 2015-12-05, for fid")
    fid_stats: str | None = flag(None, "npz with mu and sigma of the reference, for fid")
    fid_reward: Literal["leave_one_out", "group"] = flag(
        "leave_one_out", "leave_one_out: what an image adds to the FID of the batch's moments; group: AR-GRPO's map")
    qwenvl_model: str | None = _checkpoint("Qwen2.5-VL-3B-Instruct, for qwenvl_*")
    qwenvl_expected_score: bool = flag(
        False, "qwenvl_*: the expectation over the score token's logits, in place of the number that is written")
    geneval_model: str | None = _checkpoint("Mask2Former of geneval: mmdet's .pth, or a hub folder")
    geneval_clip_model: str | None = _checkpoint("CLIP ViT-L/14 of geneval's colours")
    geneval_graded: bool = flag(False, "geneval: share of requirements met, not 0 or 1")

    deqa_url: str | None = _url("the DeQA server", "DEQA_URL")
    unireward_url: str | None = _url("the OpenAI-compatible server of UnifiedReward", "UNIREWARD_URL")
    unireward_model: str = flag("UnifiedReward-7b-v1.5",
                                "the model's name on that server; chooses the prompt and the scale")
    qwenvl_url: str | None = _url("an OpenAI-compatible server of Qwen2.5-VL, in place of a local model", "QWENVL_URL")
    qwenvl_name: str = flag("Qwen/Qwen2.5-VL-3B-Instruct", "the model's name on that server")
    geneval_url: str | None = _url("a GenEval server, in place of a local detector", "GENEVAL_URL")
    reward_servers: list[str] = flag(
        list, "NAME=http://HOST:PORT: rewards that `python -m scripts.reward_server` scores elsewhere", resume=True)
    # read from the environment where it is sent, so that neither --help nor a run's config.json shows it
    reward_api_key: str | None = flag(
        None, "bearer token for these servers; environment: REWARD_API_KEY, or for one of them DEQA_API_KEY, "
        "UNIREWARD_API_KEY, QWENVL_API_KEY, GENEVAL_API_KEY, REWARD_SERVER_API_KEY", secret=True)
    legacy_pickle_servers: bool = flag(
        False, "deqa_url and geneval_url are reward-server's pickle servers (answers go through a restricted reader)")
    reward_deadline: float = flag(
        120.0, "seconds that the remote scores of a batch may take, with all repeated attempts", above=0, resume=True)
    reward_retries: int = flag(3, "further attempts of a failed request", least=0, resume=True)
    reward_concurrency: int = flag(16, "requests to one server at a time", least=1, resume=True)

    def __post_init__(self):
        check_flags(self)
