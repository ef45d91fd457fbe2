"""Score a text-to-image model with many rewards: sample 4 images per prompt, or take a folder of images from elsewhere.

    bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG [flags of this script]
    python test_t2i_rewards.py --model t2i_shapes --step latest --cfg_scale 2          # shapes: nothing to download
    python test_t2i_rewards.py --model pretrained_models/t2i_XL_stage1_256.pt --step base \\
        --config t2i_llamagen_xl_256 --cfg_scale 7.5 --prompt_files drawbench.json --without deqa unireward
    python test_t2i_rewards.py --images DIR --rewards clip_text imagereward --output scores_of_dir

DIR has GenEval's layout: 00000/metadata.jsonl with the prompt, 00000/samples/00000.png ... Sampling is sample_t2i.py's,
into test_results/NAME_STEP_CFG_drawbench. Written there (or to --output): rewards.csv (a line per prompt),
rewards.jsonl (a line per image), rewards.json (means and failures) and report.html. Cosines of CLIP and HPS are raw,
without the training rewards' factor 5. Several processes share sampling and scoring.

Left out: prompts themselves (benchmark.drawbench.prepare converts DrawBench's CSV), and scores that are already there:
a second call scores again.
"""
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmark.evaluation_report import write_report
from benchmark.prompt_scores import SUMMARY_FILE, format_summary, read_prompt_folders, score_images, write_scores
from benchmark.sampling import SCORES, TRAINING_KEYS, Job, announcement, parse_job, sample_prompts
from dataset import Condition
from dataset.prompts import load_prompts
from img_gen_grpo_rewards import RewardSet, check_names
from reward_utils.settings import RewardSettings
from utils import distributed
from utils.config import changeable, flag, one_line_errors, parse_args, resolved
from utils.lists import evenly

REWARDS = ["clip_text", "hpsv2_text", "pickscore", "imagereward", "deqa", "aesthetic", "unireward"]  # as AR-GRPO
SHAPES_PROMPTS = Path(__file__).resolve().parent / "benchmark" / "drawbench" / "shapes.json"


@dataclass(frozen=True)
class RewardChoice:
    rewards: list[str] | None = field(default=None, metadata={
        "help": f"names of REWARDS; none: {' '.join(REWARDS)}, for shapes models {' '.join(SCORES)}"})
    without: list[str] = field(default_factory=list, metadata={"help": "rewards of these to leave out"})

    def names(self, is_shapes: bool) -> list[str]:
        names = self.rewards or (SCORES if is_shapes else REWARDS)
        if strangers := [name for name in self.without if name not in names]:
            raise ValueError(f"--without {' '.join(strangers)}: not among the rewards ({' '.join(names)})")
        kept = [name for name in names if name not in self.without]
        if not kept:
            raise ValueError(f"--without leaves none of the rewards {' '.join(names)}")
        check_names(kept)
        return kept


@dataclass(frozen=True)
class PromptChoice:
    prompt_files: list[str] | None = field(default=None, metadata={
        "help": "prompt files (.json .jsonl .txt .yaml); none: the embedded set, for shapes models"})
    num_prompts: int | None = field(default=None, metadata={"help": "that many, evenly over the list; none: all"})
    unique_prompts: bool = field(default=False, metadata={
        "help": "every text once: AR-GRPO's file of 1000 records holds 200 prompts five times"})
    num_images_per_prompt: int = flag(4, "images of each prompt")

    def __post_init__(self):
        for name in ("num_prompts", "num_images_per_prompt"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def load(self, is_shapes: bool, seed: int) -> list[Condition]:
        if not self.prompt_files and not is_shapes:
            raise ValueError("no prompts: give --prompt_files drawbench.json, made by `python -m "
                             "benchmark.drawbench.prepare DrawBench.csv drawbench.json`, or another prompt file")
        prompts = load_prompts(self.prompt_files or SHAPES_PROMPTS, seed)
        if self.unique_prompts:
            prompts = list({prompt.prompt: prompt for prompt in reversed(prompts)}.values())[::-1]
        return evenly(prompts, self.num_prompts or len(prompts))


@dataclass(frozen=True)
class FolderConfig:
    images: str = field(metadata={"help": "a folder in GenEval's layout, scored as it is"})
    output: str | None = field(default=None, metadata={"help": "where the scores go; none: into that folder"})


def load_rewards(names: Sequence[str], settings: RewardSettings, device: torch.device) -> RewardSet:
    """All models, before anything is sampled: what is missing is told at once."""
    models: dict = {}
    for name in names:
        try:
            RewardSet([name], None, settings, device, models)
        except ValueError as error:
            raise ValueError(f"{error}; or leave it out: --without {name}") from None
    return RewardSet(names, None, settings, device, models)


def evaluate(root: Path, output: Path, images: Sequence[tuple[Path, Condition]], reward_set: RewardSet,
             about: dict) -> None:
    """Scores shared by all processes, written and printed by the first."""
    rank, count = distributed.rank(), distributed.world_size()
    share = images[rank * len(images) // count: (rank + 1) * len(images) // count]
    rows = [row for part in distributed.gather_objects(score_images(reward_set, root, share)) for row in part]
    if not distributed.is_main():
        return
    may_change = changeable(RewardSettings)
    settings = {key: value for key, value in resolved(reward_set.settings).items() if key not in may_change}
    summary = write_scores(output, rows, {**about, "images": str(root), "reward_settings": settings})
    print(format_summary(summary))
    print(f"{summary['num_images']} images of {summary['num_prompts']} prompts; scores in {output / SUMMARY_FILE}, "
          f"seen in {write_report(output, root)}; {about['protocol']}")
    for name, cell in summary["rewards"].items():
        if cell["mean"] is None:
            raise ValueError(f"{name} could not score any image: {next(iter(cell['failures']))}")


def score_model(job: Job) -> None:
    choice, settings = job.more
    names, device = choice.names(job.is_shapes), distributed.setup()
    prompts = job.own.load(job.is_shapes, job.config.seed)
    reward_set = load_rewards(names, settings, device)
    if distributed.is_main():
        print(announcement(job, prompts, device))
    groups = sample_prompts(job, prompts, device)
    distributed.barrier()  # the grids of all
    images = [(sample.path, sample.condition) for group in groups for sample in group]
    evaluate(job.folder, job.folder, images, reward_set, {"model": job.policy.gpt_ckpt, "protocol": job.protocol()})


def score_folder(config: FolderConfig, choice: RewardChoice, settings: RewardSettings) -> None:
    root, output = Path(config.images), Path(config.output or config.images)
    names, device = choice.names(is_shapes=False), distributed.setup()
    images = [(file, folder.condition) for folder in read_prompt_folders(root) for file in folder.files]
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):  # told before an hour of scoring
        raise ValueError(f"{output} cannot be written to: give another --output")
    evaluate(root, output, images, load_rewards(names, settings, device),
             {"model": None, "protocol": f"images as found in {root}"})


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--images" for word in words):
        score_folder(*parse_args((FolderConfig, RewardChoice, RewardSettings), words, __doc__))
    else:
        job = parse_job(words, "t2i", PromptChoice, TRAINING_KEYS, __doc__, (RewardChoice, RewardSettings))
        score_model(replace(job, suffix="_drawbench"))
    distributed.shutdown()


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
