"""Sample a class-to-image model into PNG files and an .npz, and measure FID and the like; processes share the work.

    bash test.sh MODEL_NAME GPU_RANK STEP CFG [flags of this script]
    python sample_c2i.py --model c2i_shapes --step latest --cfg_scale 1.5
    python sample_c2i.py --model c2i_shapes --step latest --cfg_sweep 1 1.5 2             # one table and one plot
    python sample_c2i.py --model pretrained_models/c2i_XL_384.pt --step base --config c2i_llamagen_xl_384 \\
        --cfg_scale 2 --eval_image_size 256 --ref VIRTUAL_imagenet256_labeled.npz         # LlamaGen's protocol

The same command again keeps every whole PNG. The numbers go into RESULTS_DIR/MODEL_STEP_CFG.json, a sweep's into
MODEL_STEP_cfg_sweep.json and .png. Shapes models are compared with rendered images; others need --ref, without which
the fid_evaluation.py command is printed.
"""
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

import fid_evaluation
from benchmark.cfg_sweep import format_sweep, plot_sweep
from benchmark.evaluation_report import write_report
from benchmark.sampling import IMAGE, LABEL, Job, Sample, claim_folder, parse_job, read_png, write_npz, write_samples
from benchmark.shapes.statistics import REFERENCE_SEED
from dataset import Condition
from dataset.images import ShapesImages
from dataset.sampler import row_seed
from dataset.shapes import IMAGE_SIZE
from models.build import load_policy
from models.lora import LoRAConfig
from models.policy import Policy
from reward_utils.settings import RewardSettings
from trainer_utils.composition import RunConfig
from trainer_utils.grpo_config import GRPOConfig
from utils import distributed
from utils.atomic import atomic_write_text
from utils.config import key_names, one_line_errors

NUM_IMAGES = {"shapes": 2048, "others": 50_000}
NUM_REFERENCE = 5000


@dataclass(frozen=True)
class ClassSampleConfig:
    num_images: int | None = field(default=None, metadata={"help": f"none: {NUM_IMAGES}"})
    labels: Literal["random", "balanced"] = field(default="random", metadata={
        "help": "random: seeded, as LlamaGen's protocol; balanced: the classes in turn"})

    cfg_sweep: list[str] = field(default_factory=list, metadata={
        "help": "guidance scales, one after another, in place of cfg_scale"})
    ref: str | None = field(default=None, metadata={
        "help": "reference of fid_evaluation.py, e.g. VIRTUAL_imagenet256_labeled.npz; none: rendered shapes"})
    features: Literal["inception", "shapes"] | None = field(default=None, metadata={
        "help": "feature network; none: shapes for the rendered reference, inception otherwise"})
    weights: str | None = field(default=None, metadata={"help": "of the feature network; none: as fid_evaluation.py"})
    bootstrap: int = field(default=0, metadata={"help": "resamples for 95 % intervals"})

    def __post_init__(self):
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {self.num_images}")
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap must be at least 0, got {self.bootstrap}")


def class_samples(folder: Path, num_images: int, num_classes: int, labels: str, seed: int) -> list[Sample]:
    """folder/000000.png ...: the label and the seed of image i depend on (seed, i) alone."""
    def class_id(i: int) -> int:
        return i % num_classes if labels == "balanced" else row_seed(seed, LABEL, i, 0) % num_classes

    return [Sample(folder / f"{i:06d}.png", Condition("", class_id(i)), row_seed(seed, IMAGE, i, 0))
            for i in range(num_images)]


def shapes_reference(folder: Path, num_images: int) -> Path:
    """Rendered images that nothing was trained on; made again when the renderer has changed since."""
    path, images = folder / "reference_shapes_c2i.npz", ShapesImages("c2i", REFERENCE_SEED, split="test")

    def rendered() -> Iterator[np.ndarray]:
        return (images.item(i)[0] for i in range(num_images))

    if path.is_file():
        stored = next(fid_evaluation.read_batches(path, 16)).images
        if fid_evaluation.count_images(path) == num_images and np.array_equal(stored, images.batch(range(16))[0]):
            return path
    folder.mkdir(parents=True, exist_ok=True)  # nothing was evaluated yet
    write_npz(path, rendered(), (num_images, IMAGE_SIZE, IMAGE_SIZE, 3))
    return path


def swept(job: Job) -> list[Job]:
    """The job at each guidance scale; labels keep the user's spelling."""
    try:
        return [replace(job, config=replace(job.config, cfg_label=word),
                        sampling=replace(job.sampling, cfg_scale=float(word)))
                for word in dict.fromkeys(job.own.cfg_sweep)] or [job]
    except ValueError as error:
        raise ValueError(f"--cfg_sweep {' '.join(job.own.cfg_sweep)}: {error}") from None


def load_evaluation(job: Job, npz: Path) -> fid_evaluation.Evaluation | None:
    """Network and reference, or None where a model has no reference. All processes call this."""
    own, ref = job.own, job.own.ref
    rendered = ref is None and job.is_shapes and job.size == IMAGE_SIZE
    if ref is None and not rendered:
        return None
    if rendered:
        ref = distributed.broadcast_object(
            str(shapes_reference(Path(job.config.results_dir), NUM_REFERENCE)) if distributed.is_main() else None)
    words = [ref, str(npz), "--features", own.features or ("shapes" if rendered else "inception"),
             "--bootstrap", str(own.bootstrap), *(["--weights", own.weights] if own.weights else [])]
    return fid_evaluation.Evaluation(fid_evaluation.parse_args(words))


def sample(job: Job, policy: Policy) -> Path:
    """-> the .npz of the job's images, made by all processes, whole when this returns."""
    policy, labels, num_classes = replace(policy, sampling=job.sampling), job.own.labels, policy.gpt.config.num_classes
    num_images = job.own.num_images or NUM_IMAGES["shapes" if job.is_shapes else "others"]
    samples = class_samples(job.folder, num_images, num_classes, labels, job.config.seed)
    if distributed.is_main():
        claim_folder(job, policy, f"{labels} labels of {num_classes} classes")
        print(f"{num_images} images of {job.policy.gpt_ckpt} at guidance {job.sampling.cfg_scale:g} on "
              f"{distributed.world_size()} x {policy.device.type}")
    write_samples(policy, samples, job.config)
    npz = npz_path(job)
    if distributed.is_main():
        write_npz(npz, (read_png(sample.path) for sample in samples), (num_images, job.size, job.size, 3))
    distributed.barrier()
    return npz


def npz_path(job: Job) -> Path:
    return job.folder.with_name(job.folder.name + ".npz")


def tell(job: Job, npz: Path, results: dict | None) -> None:
    """Numbers, where they are, and how they came about; without numbers the command that gives them."""
    if results is not None:
        write_json(job.folder, results)
        print(fid_evaluation.format_table(results))
    else:
        print("compare with a reference batch (ImageNet 256: VIRTUAL_imagenet256_labeled.npz of ADM's evaluations; "
              f"--ref does it here):\n  python fid_evaluation.py REFERENCE.npz {npz}")
    print(f"wrote the images to {job.folder} and {npz}, seen in {write_report(job.folder)}; {job.own.labels} labels; "
          f"{job.protocol()}")


def write_json(stem: Path, numbers: dict) -> None:
    atomic_write_text(stem.with_name(stem.name + ".json"), json.dumps(numbers, indent=2, allow_nan=False) + "\n")


def tell_sweep(job: Job, rows: dict[str, dict]) -> None:
    stem = Path(job.config.results_dir) / f"{job.model.name}_{job.model.step}_cfg_sweep"
    write_json(stem, rows)
    picture = stem.with_name(stem.name + ".png")
    picture.write_bytes(plot_sweep(rows, f"{job.model.name}, step {job.model.step}"))
    print(f"{format_sweep(rows)}\nplotted in {picture}")


def main(argv: list[str] | None = None) -> None:
    training_keys = key_names(RunConfig, GRPOConfig, RewardSettings, LoRAConfig)
    job = parse_job(argv, "c2i", ClassSampleConfig, training_keys, __doc__)
    jobs = swept(job)
    policy = load_policy(job.policy, job.sampling, distributed.setup())
    evaluation = load_evaluation(job, npz_path(jobs[0]))  # before sampling: a missing file shows at once
    rows = {}
    for job in jobs:
        npz = sample(job, policy)
        results = evaluation and evaluation(npz)
        if distributed.is_main():
            tell(job, npz, results)
            rows |= {job.config.cfg_label: results} if results else {}
    if len(rows) > 1:
        tell_sweep(job, rows)
    distributed.shutdown()


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
