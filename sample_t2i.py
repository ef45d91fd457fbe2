"""Sample a text-to-image model into GenEval's folders; several processes share the work.

    bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [flags of this script]
    python sample_t2i.py --model t2i_shapes --step latest --cfg_scale 2
    python sample_t2i.py --model pretrained_models/t2i_XL_stage1_256.pt --step base --config t2i_llamagen_xl_256 \\
        --cfg_scale 7.5 --top_k 2000 --prompt_files evaluation_metadata.jsonl

Writes OUT/00000/metadata.jsonl (the prompt's record), OUT/00000/samples/00000.png ... and OUT/00000/grid.png. The same
command again keeps every whole PNG. Shapes prompts are scored by the exact detector at the end (OUT/results.json);
benchmark/geneval/eval.sh scores GenEval's, whose file `python -m benchmark.geneval.prompts` makes.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.evaluation_report import write_report
from benchmark.prompt_scores import (
    ImageScores,
    by_category,
    mean_and_error,
    mean_over_categories,
    prompt_means,
    score_images,
    write_scores,
)
from benchmark.sampling import SCORES, TRAINING_KEYS, Job, Sample, announcement, parse_job, sample_prompts
from dataset import Condition, shapes
from dataset.prompts import load_prompts
from img_gen_grpo_rewards import RewardSet
from reward_utils.settings import RewardSettings
from utils import distributed
from utils.atomic import atomic_write_text
from utils.config import flag, key_names, one_line_errors


@dataclass(frozen=True)
class PromptSampleConfig:
    prompt_files: list[str] | None = field(default=None, metadata={
        "help": "GenEval's evaluation_metadata.jsonl, other prompt files, or shapes; none: shapes for shapes models"})
    prompts_per_task: int = field(default=20, metadata={"help": "of the shapes world's six tasks"})
    num_images_per_prompt: int = flag(4, "images of each prompt")

    def __post_init__(self):
        for name in ("prompts_per_task", "num_images_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def shapes_prompts(per_task: int) -> list[Condition]:
    """Held-out prompts, equally many of each task, spread over those it has (a small task's prompts repeat)."""
    records = []
    for task in shapes.TASKS:
        own = [record for record in shapes.split_prompts("test") if record["tag"] == task]
        records += [own[i * len(own) // per_task] for i in range(per_task)]
    return [shapes.prompt_condition(record) for record in records]


def shapes_scores(folder: Path, groups: list[list[Sample]]) -> list[ImageScores]:
    return score_images(RewardSet(SCORES), folder, [(sample.path, sample.condition) for g in groups for sample in g])


def task_table(rows: list[ImageScores]) -> dict[str, dict[str, list[float | None]]]:
    """{task: {score: [mean over its prompts, standard error]}}, and the mean over tasks as "overall".

    Images of one prompt are not independent, so the error is that of the prompts' means; None: of one prompt.
    """
    table = {task: {name: list(mean_and_error(list(prompt_means(group, name).values()))) for name in SCORES}
             for task, group in by_category(rows).items()}
    return table | {"overall": {name: list(mean_over_categories(rows, name)) for name in SCORES}}


def format_scores(table: dict) -> str:
    lines = [f"{'task':<14}" + "".join(f"{name:>22}" for name in SCORES)]
    for task, row in table.items():
        lines.append(f"{task:<14}" + "".join(f"{mean:>12.3f} +- " + (f"{'-':<6}" if error is None else f"{error:.3f} ")
                                             for mean, error in row.values()))
    return "\n".join(lines)


def score(job: Job, groups: list[list[Sample]]) -> str:
    """Scores of shapes prompts, also as results.json; for others the next command."""
    if not of_the_shapes_world(job):
        return "scores: GenEval's evaluator gives them"
    rows = shapes_scores(job.folder, groups)
    table, about = task_table(rows), {"model": job.policy.gpt_ckpt, "protocol": job.protocol()}
    write_scores(job.folder, rows, about)
    results = {**about, "num_prompts": len(groups), "num_images_per_prompt": len(groups[0]),
               "scores_mean_and_standard_error": table}
    atomic_write_text(job.folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    return format_scores(table)


def of_the_shapes_world(job: Job) -> bool:
    return job.own.prompt_files in (None, ["shapes"]) and job.size == shapes.IMAGE_SIZE


def load_conditions(job: Job) -> list[Condition]:
    if job.own.prompt_files is None and not job.is_shapes:
        raise ValueError("no prompts: give --prompt_files, e.g. GenEval's evaluation_metadata.jsonl")
    if job.own.prompt_files in (None, ["shapes"]):
        return shapes_prompts(job.own.prompts_per_task)
    return load_prompts(job.own.prompt_files, job.config.seed)


def main(argv: list[str] | None = None) -> None:
    job = parse_job(argv, "t2i", PromptSampleConfig, TRAINING_KEYS | key_names(RewardSettings), __doc__)
    prompts = load_conditions(job)
    device = distributed.setup()
    if distributed.is_main():
        print(announcement(job, prompts, device))
    groups = sample_prompts(job, prompts, device)
    if distributed.is_main():
        print(score(job, groups))
        print(f"wrote {len(prompts)} x {job.own.num_images_per_prompt} images to {job.folder}, seen in "
              f"{write_report(job.folder)}; {job.protocol()}")
        detector = " --detector shapes" if of_the_shapes_world(job) else ""
        print(f"next: bash benchmark/geneval/eval.sh {job.folder} 0{detector}")
    distributed.shutdown()


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
