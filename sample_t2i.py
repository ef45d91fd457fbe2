"""Sample a text-to-image model into GenEval's folders; several processes share the work.

    bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [flags of this script]
    python sample_t2i.py --model t2i_shapes --step latest --cfg_scale 2
    python sample_t2i.py --model pretrained_models/t2i_XL_stage1_256.pt --step base --config t2i_llamagen_xl_256 \\
        --cfg_scale 7.5 --top_k 2000 --prompt_files evaluation_metadata.jsonl

Writes OUT/00000/metadata.jsonl (the prompt's record), OUT/00000/samples/00000.png ... and OUT/00000/grid.png. The same
command again keeps every whole PNG. Shapes prompts are scored by the exact detector at the end (OUT/results.json);
scoring real images is GenEval's own evaluator's job.
"""
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmark.sampling import IMAGE, Job, Sample, claim_folder, is_complete, parse_job, read_png, write_png, \
    write_samples
from dataset import Condition, shapes
from dataset.prompts import load_prompts
from dataset.sampler import row_seed
from grpo_trainer import GRPOConfig
from img_gen_grpo_rewards import RewardSet
from models import distributed
from models.build import load_policy
from models.config import key_names, one_line_errors
from models.run_folder import atomic_write_text
from train_c2i import RunConfig
from train_t2i import PromptConfig

SCORES = ["shapes_strict", "shapes_graded", "shapes_quality"]


@dataclass(frozen=True)
class PromptSampleConfig:
    prompt_files: list[str] | None = field(default=None, metadata={
        "help": "GenEval's evaluation_metadata.jsonl, other prompt files, or shapes; none: shapes for shapes models"})
    prompts_per_task: int = field(default=20, metadata={"help": "of the shapes world's six tasks"})
    num_images_per_prompt: int = 4

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


def prompt_samples(folder: Path, prompts: list[Condition], num_images: int, seed: int) -> list[list[Sample]]:
    """One list per prompt: the seed of an image depends on (seed, prompt's position, member) alone."""
    return [[Sample(folder / f"{p:05d}" / "samples" / f"{m:05d}.png", prompt, row_seed(seed, IMAGE, p, m))
             for m in range(num_images)] for p, prompt in enumerate(prompts)]


def geneval_record(prompt: Condition) -> str:
    return json.dumps({**prompt.metadata, "prompt": prompt.prompt})


def write_records(groups: list[list[Sample]]) -> None:
    for group in groups:
        group[0].path.parent.mkdir(parents=True, exist_ok=True)
        (group[0].path.parents[1] / "metadata.jsonl").write_text(geneval_record(group[0].condition) + "\n",
                                                                 encoding="utf-8")


def write_grid(group: list[Sample]) -> None:
    """grid.png beside the samples, unless it is there and younger than they are."""
    path, files = group[0].path.parents[1] / "grid.png", [sample.path for sample in group]
    columns = math.ceil(math.sqrt(len(files)))
    first = read_png(files[0])
    height, width = first.shape[:2]
    size = (math.ceil(len(files) / columns) * height, columns * width)
    if is_complete(path, size) and path.stat().st_mtime >= max(file.stat().st_mtime for file in files):
        return
    sheet = Image.new("RGB", size[::-1], "white")
    for i, file in enumerate(files):
        sheet.paste(Image.fromarray(read_png(file)), (i % columns * width, i // columns * height))
    write_png(path, np.asarray(sheet))


def shapes_scores(groups: list[list[Sample]]) -> dict[str, dict[str, list[float]]]:
    """{task: {score: [mean over its tasks' prompts, standard error]}}, and the mean over tasks as "overall".

    Images of one prompt are not independent, so the error is that of the prompts' means.
    """
    reward_set, means = RewardSet(SCORES), {}
    for group in groups:
        images = torch.from_numpy(np.stack([read_png(sample.path) for sample in group])).permute(0, 3, 1, 2)
        conditions = [sample.condition for sample in group]
        _, scores = reward_set(images, [c.prompt for c in conditions], [c.metadata for c in conditions])
        means.setdefault(conditions[0].metadata["tag"], []).append([scores[name].mean().item() for name in SCORES])
    table = {}
    for task, rows in means.items():
        rows = np.array(rows)  # [prompts, scores]
        errors = rows.std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else [math.nan] * len(SCORES)
        table[task] = {name: [float(mean), float(error)] for name, mean, error in zip(SCORES, rows.mean(0), errors)}
    cells = {name: np.array([row[name] for row in table.values()]) for name in SCORES}  # [tasks, 2]
    table["overall"] = {name: [float(cell[:, 0].mean()), float(np.sqrt((cell[:, 1] ** 2).sum()) / len(cell))]
                        for name, cell in cells.items()}
    return table


def format_scores(table: dict) -> str:
    lines = [f"{'task':<14}" + "".join(f"{name:>22}" for name in SCORES)]
    for task, row in table.items():
        lines.append(f"{task:<14}" + "".join(f"{mean:>12.3f} +- {error:.3f} " for mean, error in row.values()))
    return "\n".join(lines)


def score(job: Job, groups: list[list[Sample]]) -> str:
    """Scores of shapes prompts, also as results.json; for others the next command."""
    if job.own.prompt_files not in (None, ["shapes"]) or job.size != shapes.IMAGE_SIZE:
        return f"score {job.folder} with GenEval's evaluator (evaluation/evaluate_images.py), or by benchmark/geneval"
    table = shapes_scores(groups)
    # JSON has no NaN: a task with one prompt has no standard error
    plain = {task: {name: [None if math.isnan(x) else x for x in cell] for name, cell in row.items()}
             for task, row in table.items()}
    results = {"model": job.policy.gpt_ckpt, "protocol": job.protocol(), "num_prompts": len(groups),
               "num_images_per_prompt": len(groups[0]), "scores_mean_and_standard_error": plain}
    atomic_write_text(job.folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    return format_scores(table)


def load_conditions(job: Job) -> list[Condition]:
    if job.own.prompt_files is None and not job.is_shapes:
        raise ValueError("no prompts: give --prompt_files, e.g. GenEval's evaluation_metadata.jsonl")
    if job.own.prompt_files in (None, ["shapes"]):
        return shapes_prompts(job.own.prompts_per_task)
    return load_prompts(job.own.prompt_files, job.config.seed)


def main(argv: list[str] | None = None) -> None:
    job = parse_job(argv, "t2i", PromptSampleConfig, key_names(RunConfig, GRPOConfig, PromptConfig), __doc__)
    prompts = load_conditions(job)
    policy = load_policy(job.policy, job.sampling, distributed.setup())
    groups = prompt_samples(job.folder, prompts, job.own.num_images_per_prompt, job.config.seed)
    if distributed.is_main():
        digest = hashlib.blake2b("\n".join(map(geneval_record, prompts)).encode(), digest_size=8).hexdigest()
        claim_folder(job, policy, f"prompts {digest} through {job.policy.t5_path}")
        write_records(groups)
        print(f"{len(prompts)} prompts x {job.own.num_images_per_prompt} images of {job.policy.gpt_ckpt} on "
              f"{distributed.world_size()} x {policy.device.type}")
    write_samples(policy, [sample for group in groups for sample in group], job.config)
    for group in groups[distributed.rank()::distributed.world_size()]:
        write_grid(group)
    if distributed.is_main():
        print(score(job, groups))
        print(f"wrote {len(prompts)} x {job.own.num_images_per_prompt} images to {job.folder}; {job.protocol()}")
    distributed.shutdown()


if __name__ == "__main__":
    with one_line_errors():
        main()
