"""Rewards: the base class, the table of names, and the weighted sum that a trainer or an evaluation calls.

To add one: a batched scorer in reward_utils/, a `Reward` here whose `score` returns a tensor per name, and a row in
REWARDS for each name. Rewards see prompts and metadata, so label and caption names share a class; a quantised name is
a step map over the same score. One class scores all of its names in one pass.

A score that could not be computed is NaN with a reason, never a number; the total of such a sample is NaN as well.

    python -m img_gen_grpo_rewards --reward_funcs clip_text hpsv2_text --images DIR --prompts captions.txt
"""
import difflib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from reward_utils.aesthetic import AestheticScorer
from reward_utils.clip import ClipScorer
from reward_utils.deqa_client import DeQAClient
from reward_utils.fid_reward import FidScorer
from reward_utils.geneval import GenevalScorer, ShapesScorer
from reward_utils.geneval_client import GenEvalClient
from reward_utils.hps import HPSScorer
from reward_utils.imagereward import ImageRewardScorer
from reward_utils.lpips import LpipsScorer
from reward_utils.maniqa import ManiqaScorer
from reward_utils.pickscore import PickScorer
from reward_utils.quantize import scaled_or_quantized
from reward_utils.qwen import QwenScorer
from reward_utils.qwen_client import QwenClient
from reward_utils.reference_image import MseScorer
from reward_utils.remote_reward import RemoteScorer, server_urls
from reward_utils.score_folder import ScoreConfig, as_csv, as_table, read_folder, score_files
from reward_utils.settings import RewardSettings
from reward_utils.shapes import SHAPES_SCORES, score_shapes
from reward_utils.unireward_client import UniRewardClient
from utils.atomic import atomic_write_text
from utils.config import one_line_errors, parse_args

# names that never read the prompt, so that a folder can be scored without one
PROMPT_FREE = ("maniqa", "aesthetic", "deqa", "fid", "qwenvl_fake", "qwenvl_weird")
CPU_BATCH = 4  # default images of a forward pass on a CPU: 64 leave its caches, and take longer than one by one
NUM_THREADS = 32  # calls of remote rewards at a time; each has its own deadline


@dataclass
class RewardResult:
    """Scores of N images by name, and why a sample has none."""

    scores: dict[str, Tensor]  # name -> float32 [N], NaN where the image could not be scored
    failures: dict[str, dict[int, str]] = field(default_factory=dict)  # name -> {sample: reason}

    @property
    def table(self) -> Tensor:
        """float32 [N, K], a column per name."""
        return torch.stack(list(self.scores.values()), dim=1)


class Reward:
    """One scoring model behind one or several names: `score` gets the names asked for, once per batch."""

    remote = False  # waits for a server: scored in a thread, beside the local rewards and the next rollout
    shared = True  # the same object may serve training and evaluation
    scorer = None  # where this is a torch module, it can be offloaded

    def __init__(self, settings: RewardSettings = RewardSettings(), device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    def score(self, names: list[str], images: Tensor, prompts: list[str],
              metadata: list[dict]) -> dict[str, Tensor] | RewardResult:
        """images uint8 [N, 3, H, W] -> {name: float [N]}, NaN where an image could not be scored; or with reasons."""
        raise TypeError(f"{type(self).__name__} does not define score")


class ShapesReward(Reward):
    """The exact detector of the shapes world: correctness (graded, strict) and well-formedness (quality)."""

    def score(self, names, images, prompts, metadata):
        return {name: torch.from_numpy(scores) for name, scores in
                score_shapes([name.removeprefix("shapes_") for name in names], images, prompts, metadata).items()}


class ScorerReward(Reward):
    """scale x the raw score of a local model, or its step map for a quantised name."""

    scorer_class: type
    scale = 1.0

    def __init__(self, settings=RewardSettings(), device="cpu"):
        self.scorer = self.scorer_class(settings, torch.device(device))

    def score(self, names, images, prompts, metadata):
        return scaled_or_quantized(names, self.scorer(images, prompts), self.scale)


class ClipReward(ScorerReward):
    scorer_class, scale = ClipScorer, 5.0


class HPSReward(ScorerReward):
    scorer_class, scale = HPSScorer, 5.0


class PickScoreReward(ScorerReward):
    scorer_class = PickScorer


class ImageRewardReward(ScorerReward):
    scorer_class = ImageRewardScorer


class ManiqaReward(ScorerReward):
    scorer_class, scale = ManiqaScorer, 2.0


class AestheticReward(ScorerReward):
    scorer_class = AestheticScorer


class QwenReward(Reward):
    """A quarter of the judge's score: its rubric (0 to 5), or whether nothing looks fake or weird (0 or 1)."""

    questions = {"qwenvl_3b": "rubric", "qwenvl_3b_text": "rubric", "qwenvl_fake": "fake", "qwenvl_weird": "weird"}

    def __init__(self, settings=RewardSettings(), device="cpu"):
        self.remote = settings.qwenvl_url is not None
        self.scorer = QwenClient(settings) if self.remote else QwenScorer(settings, torch.device(device))

    def score(self, names, images, prompts, metadata):
        asked = {name: self.questions[name] for name in names}
        scores, failures = self.scorer(images, prompts, list(dict.fromkeys(asked.values())))  # one pass for all
        return RewardResult({name: scores[question] / 4 for name, question in asked.items()},
                            {name: failures[question] for name, question in asked.items()})


class GenevalReward(Reward):
    """GenEval's rules on detected objects: right or wrong, or (geneval_graded) the share of requirements met.

    A server (geneval_url), the exact detector of the shapes world (geneval_model shapes), or Mask2Former.
    """

    def __init__(self, settings=RewardSettings(), device="cpu"):
        self.remote, self.value = settings.geneval_url is not None, "graded" if settings.geneval_graded else "correct"
        if self.remote:
            self.scorer = GenEvalClient(settings)
        elif settings.geneval_model == "shapes":
            self.scorer = ShapesScorer()
        else:
            self.scorer = GenevalScorer(settings, torch.device(device))

    def score(self, names, images, prompts, metadata):
        if self.remote:
            scores, failures = self.scorer(images, prompts, metadata)
        else:
            verdicts = self.scorer(images, metadata)
            scores = torch.tensor([math.nan if one["correct"] is None else float(one[self.value])
                                   for one in verdicts])
            failures = {i: one["reason"] for i, one in enumerate(verdicts) if one["correct"] is None}
        return RewardResult(dict.fromkeys(names, scores), dict.fromkeys(names, failures))


class ReasonedReward(Reward):
    """scale x the score of a model that tells why a sample has none."""

    scorer_class: type
    scale = 1.0

    def __init__(self, settings=RewardSettings(), device="cpu"):
        self.scorer = self.scorer_class(settings) if self.remote else self.scorer_class(settings, torch.device(device))

    def score(self, names, images, prompts, metadata):
        scores, failures = self.scorer(images, prompts, metadata)
        return RewardResult(dict.fromkeys(names, self.scale * scores), dict.fromkeys(names, failures))


class MseReward(ReasonedReward):
    scorer_class, scale = MseScorer, 2.0


class LpipsReward(ReasonedReward):
    scorer_class = LpipsScorer


class FidReward(ReasonedReward):
    scorer_class = FidScorer
    shared = False  # it remembers the images that it has seen


class DeQAReward(ReasonedReward):
    scorer_class, remote = DeQAClient, True


class UniReward(ReasonedReward):
    scorer_class, remote = UniRewardClient, True


class ServedReward(Reward):
    """Any rewards that `python -m scripts.reward_server` scores on another GPU or host."""

    remote = True

    def __init__(self, url: str, settings: RewardSettings):
        self.client = RemoteScorer(url, settings)

    def score(self, names, images, prompts, metadata):
        return RewardResult(*self.client(names, images, prompts, metadata))


REWARDS: dict[str, type[Reward]] = {
    **{f"shapes_{name}": ShapesReward for name in SHAPES_SCORES},
    **dict.fromkeys(("clip_distance", "clip_quantize", "clip_text", "clip_text_quantize"), ClipReward),
    **dict.fromkeys(("hpsv2", "hpsv2_quantize", "hpsv2_text", "hpsv2_text_quantize"), HPSReward),
    **dict.fromkeys(QwenReward.questions, QwenReward),
    "geneval": GenevalReward, "pickscore": PickScoreReward, "aesthetic": AestheticReward, "maniqa": ManiqaReward,
    "imagereward": ImageRewardReward, "mse": MseReward, "lpips": LpipsReward, "fid": FidReward, "deqa": DeQAReward,
    "unireward": UniReward,
}


class Scoring:
    """Scores under way: `result()` waits for what is still missing."""

    def __init__(self, names: list[str], num_images: int, results: list):
        self.names, self.num_images = names, num_images
        self.results = results  # RewardResults, and futures of them

    def result(self) -> RewardResult:
        merged = RewardResult({})
        for result in self.results:
            result = result if isinstance(result, RewardResult) else result.result()
            merged.scores.update(result.scores)
            merged.failures.update(result.failures)
        return RewardResult({name: merged.scores[name] for name in self.names}, merged.failures)


class RewardSet:
    """Weighted rewards: `reward_set(images, prompts, metadata)` -> (total float32 [N], {name: float32 [N]}).

    instances: Rewards by class, filled here and to be given to another set that shall share the models.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float] | None = None,
                 settings: RewardSettings = RewardSettings(), device: str | torch.device = "cpu",
                 instances: dict | None = None):
        self.names, self.settings = list(names), settings
        self.weights = [1.0] * len(self.names) if not weights else [float(weight) for weight in weights]
        check_names(self.names)
        if len(self.weights) != len(self.names):
            raise ValueError(f"reward_weights has {len(self.weights)} values for {len(self.names)} reward_funcs "
                             f"({' '.join(self.names)})")
        self.device = torch.device(settings.reward_device or device)
        if self.device.type == "cpu" and settings.reward_batch_size == RewardSettings.reward_batch_size:
            settings = replace(settings, reward_batch_size=CPU_BATCH)
        instances = {} if instances is None else instances
        self.rewards = {}  # class, or address of a server -> Reward
        urls = server_urls(settings)
        check_names(list(urls), "reward_servers")
        self.keys = {name: urls.get(name, REWARDS[name]) for name in self.names}
        for name, key in self.keys.items():
            if key in self.rewards:
                continue
            if key not in instances or not instances[key].shared:
                on_device = "cpu" if settings.offload_rewards else self.device
                instances[key] = ServedReward(key, settings) if name in urls else key(settings, on_device)
            self.rewards[key] = instances[key]
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="reward")

    def __call__(self, images: Tensor, prompts: Sequence[str],
                 metadata: Sequence[dict] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.start(images, prompts, metadata).result().scores
        return self.total(scores).to(images.device), {name: one.to(images.device) for name, one in scores.items()}

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """Weighted sum [N]; a reward of weight 0 is only watched, so its failures don't count."""
        return sum(weight * scores[name] if weight else torch.zeros_like(scores[name])
                   for name, weight in zip(self.names, self.weights))

    def start(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Scoring:
        """images uint8 [N, 3, H, W]: scores with the local rewards; remote ones go on in threads until `.result()`."""
        prompts = list(prompts)
        metadata = list(metadata) if metadata is not None else [{}] * len(prompts)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata records")
        jobs = [(self.rewards[key], [name for name in self.names if self.keys[name] == key])
                for key in dict.fromkeys(self.keys.values())]
        jobs.sort(key=lambda job: not job[0].remote)  # remote ones set off first
        results = []
        for reward, names in jobs:
            if reward.remote:
                results.append(self.threads.submit(self.score, reward, names, images.cpu(), prompts, metadata))
            else:
                results.append(self.score(reward, names, images, prompts, metadata))
        return Scoring(self.names, len(images), results)

    def score(self, reward: Reward, names: list[str], images: Tensor, prompts: list[str],
              metadata: list[dict]) -> RewardResult:
        """One reward's scores, checked: as many as images, finite or NaN with a reason."""
        if not len(images):
            return RewardResult({name: torch.zeros(0) for name in names}, {name: {} for name in names})
        offload = self.settings.offload_rewards and isinstance(reward.scorer, torch.nn.Module)
        if offload:
            reward.scorer.to(self.device)
        result = reward.score(names, images, prompts, metadata)
        if offload:
            reward.scorer.to("cpu")
        result = result if isinstance(result, RewardResult) else RewardResult(result)
        scores, failures = {}, {}
        for name in names:
            scores[name], failures[name] = checked(name, result, type(reward).__name__, len(images))
        return RewardResult(scores, failures)

    @staticmethod
    def collect(pending: Sequence[Scoring]) -> RewardResult:
        """The results of consecutive parts of a batch, as one."""
        parts, offset = [scoring.result() for scoring in pending], 0
        failures = {name: {} for name in parts[0].scores}
        for scoring, part in zip(pending, parts):
            for name, reasons in part.failures.items():
                failures[name].update({offset + i: reason for i, reason in reasons.items()})
            offset += scoring.num_images
        return RewardResult({name: torch.cat([part.scores[name] for part in parts]) for name in failures}, failures)


def checked(name: str, result: RewardResult, owner: str, num_images: int) -> tuple[Tensor, dict[int, str]]:
    """A reward's scores float32 [N] on the CPU and the reasons of its NaNs; infinities become failures."""
    scores = result.scores.get(name)
    if scores is None or tuple(scores.shape) != (num_images,):
        got = "nothing" if scores is None else f"shape {list(scores.shape)}"
        raise ValueError(f"{owner}.score returned {got} for {name!r}, wanted [{num_images}]")
    scores = scores.detach().to("cpu", torch.float32)
    given, reasons = result.failures.get(name, {}), {}
    for i in (~scores.isfinite()).nonzero().flatten().tolist():
        reasons[i] = given.get(i, "no score" if scores[i].isnan() else f"the score is {scores[i].item()}")
    return scores.where(scores.isfinite(), math.nan), reasons


def check_names(names: list[str], flag: str = "reward_funcs") -> None:
    if not names and flag == "reward_funcs":
        raise ValueError("reward_funcs is empty: name at least one of " + ", ".join(REWARDS))
    for name in names:
        if name not in REWARDS:
            close = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(REWARDS)}"
            raise ValueError(f"unknown reward {name!r} in {flag}: {hint}")
    if len(set(names)) < len(names):
        raise ValueError(f"a reward is named twice in {flag}: {' '.join(names)}")


# ------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    config, settings = parse_args((ScoreConfig, RewardSettings), argv, __doc__)
    check_names(config.reward_funcs)
    reading = [name for name in config.reward_funcs if name not in PROMPT_FREE]
    if reading and not config.prompts:
        raise ValueError(f"{' '.join(reading)}: these rewards read prompts, or images that a prompt file names; give "
                         "--prompts FILE")
    files, prompts = read_folder(config)
    output = Path(config.output or Path(config.images) / "rewards.csv")
    result = score_files(RewardSet(config.reward_funcs, None, settings, config.device), files, prompts)
    atomic_write_text(output, as_csv(files, prompts, result))
    print(f"{as_table(result)}\n{len(files)} images; scores of each in {output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
