"""Flags of the rewards: which checkpoints, on which device, in which batches, and where the remote judges listen."""
import os
from dataclasses import dataclass, field


def _checkpoint(what: str):
    return field(default=None, metadata={"help": f"{what}: a hub id or a local path; none: as README's table says"})


def _url(what: str, variable: str):
    return field(default_factory=lambda: os.environ.get(variable),
                 metadata={"help": f"address of {what}; environment: {variable}"})


@dataclass(frozen=True)
class RewardSettings:
    reward_models: str | None = field(default_factory=lambda: os.environ.get("REWARD_MODELS"), metadata={
        "help": "folder of downloaded reward checkpoints; environment: REWARD_MODELS"})
    reward_batch_size: int = field(default=64, metadata={
        "help": "images of one forward pass of a reward model; left at its default, 4 on a CPU"})
    preprocess: str = field(default="exact", metadata={
        "help": "exact: the original's PIL resize; fast: resized on the device (README states the difference)"})
    reward_dtype: str = field(default="float32", metadata={
        "help": "float32 or bfloat16, for the models that bear it (README's table); Qwen is bfloat16 on GPUs anyway"})
    reward_device: str | None = field(default=None, metadata={"help": "e.g. cuda:1; none: the training device"})
    offload_rewards: bool = field(default=False, metadata={
        "help": "a reward model is on its device only while it scores"})

    clip_model: str | None = _checkpoint("CLIP of clip_*, in transformers' format")
    hpsv2_model: str | None = _checkpoint("HPS v2.1, HPS_v2.1_compressed.pt")
    pickscore_model: str | None = _checkpoint("PickScore, in transformers' format")
    imagereward_model: str | None = _checkpoint("ImageReward, ImageReward.pt")
    bert_tokenizer: str | None = _checkpoint("bert-base-uncased's tokenizer, for imagereward")
    aesthetic_model: str | None = _checkpoint("linear head of the LAION aesthetic predictor")
    aesthetic_clip_model: str | None = _checkpoint("CLIP ViT-L/14 of aesthetic")
    maniqa_model: str | None = _checkpoint("MANIQA, ckpt_koniq10k.pt")
    maniqa_crops: int = field(default=20, metadata={"help": "random 224 px crops of an image that maniqa averages"})
    lpips_model: str | None = _checkpoint("linear heads of LPIPS (VGG)")
    vgg16_model: str | None = _checkpoint("torchvision's VGG16, for lpips")
    inception_model: str | None = _checkpoint("Inception of 2015-12-05, for fid")
    fid_stats: str | None = field(default=None, metadata={"help": "npz with mu and sigma of the reference, for fid"})
    fid_reward: str = field(default="leave_one_out", metadata={
        "help": "leave_one_out: what an image adds to the FID of the batch's moments; group: AR-GRPO's step map"})
    qwenvl_model: str | None = _checkpoint("Qwen2.5-VL-3B-Instruct, for qwenvl_*")
    qwenvl_expected_score: bool = field(default=False, metadata={
        "help": "qwenvl_*: the expectation over the score token's logits, in place of the number that is written"})
    geneval_model: str | None = _checkpoint("Mask2Former of geneval: mmdet's .pth, or a hub folder")
    geneval_clip_model: str | None = _checkpoint("CLIP ViT-L/14 of geneval's colours")
    geneval_graded: bool = field(default=False, metadata={"help": "geneval: share of requirements met, not 0 or 1"})

    deqa_url: str | None = _url("the DeQA server", "DEQA_URL")
    unireward_url: str | None = _url("the OpenAI-compatible server of UnifiedReward", "UNIREWARD_URL")
    unireward_model: str = field(default="UnifiedReward-7b-v1.5", metadata={
        "help": "the model's name on that server; chooses the prompt and the scale"})
    qwenvl_url: str | None = _url("an OpenAI-compatible server of Qwen2.5-VL, in place of a local model", "QWENVL_URL")
    qwenvl_name: str = field(default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={
        "help": "the model's name on that server"})
    geneval_url: str | None = _url("a GenEval server, in place of a local detector", "GENEVAL_URL")
    reward_servers: list[str] = field(default_factory=list, metadata={
        "help": "NAME=http://HOST:PORT: rewards that `python -m scripts.reward_server` scores elsewhere"})
    # read from the environment where it is sent, so that neither --help nor a run's config.json shows it
    reward_api_key: str | None = field(default=None, repr=False, metadata={
        "help": "bearer token for these servers; environment: REWARD_API_KEY, or for one of them DEQA_API_KEY, "
                "UNIREWARD_API_KEY, QWENVL_API_KEY, GENEVAL_API_KEY, REWARD_SERVER_API_KEY", "secret": True})
    legacy_pickle_servers: bool = field(default=False, metadata={
        "help": "deqa_url and geneval_url are reward-server's pickle servers (answers go through a restricted reader)"})
    reward_deadline: float = field(default=120.0, metadata={
        "help": "seconds that the remote scores of a batch may take, with all repeated attempts"})
    reward_retries: int = field(default=3, metadata={"help": "further attempts of a failed request"})
    reward_concurrency: int = field(default=16, metadata={"help": "requests to one server at a time"})

    def __post_init__(self):
        for name, choices in (("preprocess", ("exact", "fast")), ("reward_dtype", ("float32", "bfloat16")),
                              ("fid_reward", ("leave_one_out", "group"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in (("reward_batch_size", 1), ("maniqa_crops", 1), ("reward_retries", 0),
                            ("reward_concurrency", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.reward_deadline > 0:
            raise ValueError(f"reward_deadline must be above 0 seconds, got {self.reward_deadline}")
