"""Write sampled images: what sample_c2i.py, sample_t2i.py and test_t2i_rewards.py share.

Image i depends on its condition and its own seed alone. Processes take whole batches whose composition doesn't depend
on how many processes there are, so their number changes no bit. Another batch size uses the same random numbers and
decodes alike; its matrix products may round differently, which changes an image only where a draw falls within that
rounding of the edge between two tokens: seldom in float32, more often in bf16.

Left out: the order of work between processes (there is none), and detecting damage in the middle of a PNG.

Shapes: N images, L tokens, H W pixels.
"""
import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmark.evaluation_report import SETTINGS_FILE
from benchmark.lookup import Model, find_model
from dataset import Condition
from dataset.sampler import row_seed
from models.build import PolicyConfig, load_policy
from models.generate import SamplingConfig
from models.lora import LoRAConfig
from models.policy import Policy
from trainer_utils.composition import PromptConfig, RunConfig
from trainer_utils.grpo_config import GRPOConfig
from utils import distributed
from utils.atomic import atomic_write_text
from utils.config import flag, key_names, parse_args
from utils.files import read_object
from utils.image_files import read_image

SCORES = ["shapes_strict", "shapes_graded", "shapes_quality"]
TRAINING_KEYS = key_names(RunConfig, GRPOConfig, PromptConfig, LoRAConfig)  # what a training preset may hold besides
IMAGE, LABEL = 0, 1  # what a random number is for: the `step` of dataset.sampler.row_seed
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
NUM_WRITERS = 8  # threads that compress PNGs; zlib works outside the interpreter's lock


@dataclass(frozen=True)
class SampleConfig:
    model: str = field(metadata={"help": "a run, a run's or checkpoint's folder, or a file; replaces gpt_ckpt"})
    step: str = field(default="latest", metadata={
        "help": "of a run: a number, latest, or base (what it started from); of anything else a label"})
    runs_dir: str = flag("checkpoints", "folder of runs")
    results_dir: str = flag("test_results", "folder of samples and their results")
    cfg_label: str | None = field(default=None, metadata={"help": "cfg_scale as the results' folder spells it"})
    seed: int = flag(0, "keys labels and images")
    batch_size: int = flag(64, "images sampled at a time")
    eval_image_size: int | None = field(default=None, metadata={
        "help": "resize decoded images (bicubic, before rounding): LlamaGen evaluates its 384 models at 256"})

    def __post_init__(self):
        for name in ("batch_size", "eval_image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Job:
    """One call of a sampling script, resolved."""

    config: SampleConfig
    own: object  # the script's own dataclass
    policy: PolicyConfig
    sampling: SamplingConfig
    model: Model
    more: tuple = ()  # dataclasses that parse_job was asked for besides
    suffix: str = ""  # of the folder's name: what tells apart the prompt sets of one model

    @property
    def folder(self) -> Path:
        label = self.config.cfg_label or f"{self.sampling.cfg_scale:g}"
        return Path(self.config.results_dir) / f"{self.model.name}_{self.model.step}_{label}{self.suffix}"

    @property
    def is_shapes(self) -> bool:
        return self.policy.class_names == "shapes"

    @property
    def size(self) -> int:
        return self.config.eval_image_size or self.policy.image_size

    def protocol(self) -> str:
        """How the images came about, on one line."""
        size = f"{self.policy.image_size} px as decoded"
        if self.size != self.policy.image_size:
            size = f"decoded at {self.policy.image_size} px, bicubic to {self.size} px before rounding"
        settings = " ".join(f"{key} {value}" for key, value in asdict(self.sampling).items())
        precision = str(self.policy.autocast_dtype or torch.float32).removeprefix("torch.")
        return f"{size}, rounded to uint8; {settings}; seed {self.config.seed}; {precision}"


@dataclass(frozen=True)
class Sample:
    path: Path
    condition: Condition
    seed: int


def parse_job(argv: list[str] | None, kind: str, own: type, training_keys: Collection[str], description: str,
              more: tuple[type, ...] = ()) -> Job:
    """Flags over --config (whose training settings are passed over) over what the checkpoint stores."""
    def defaults(given: dict) -> dict:
        if "model" not in given:
            return {}
        model = find_model(given["model"], given.get("step", SampleConfig.step),
                           given.get("runs_dir", SampleConfig.runs_dir))
        cls_token_num = {"c2i": 1, "t2i": 120}[kind]
        return {"gpt_type": kind, "cls_token_num": cls_token_num, **model.settings, "gpt_ckpt": model.gpt_ckpt,
                "decode_batch_size": 1}  # convolutions round differently in other batches: a pixel in 20,000, by 1

    types = (SampleConfig, own, PolicyConfig, SamplingConfig, *more)
    config, own_config, policy, sampling, *others = parse_args(types, argv, description, defaults, training_keys)
    model = find_model(config.model, config.step, config.runs_dir)
    if policy.gpt_type != kind:
        other = "test.sh or sample_c2i.py" if kind == "t2i" else "test_t2i.sh or sample_t2i.py"
        raise ValueError(f"{model.gpt_ckpt} is a {policy.gpt_type} model: sample it with {other}")
    return Job(config, own_config, replace(policy, gpt_ckpt=model.gpt_ckpt), sampling, model, tuple(others))


def claim_folder(job: Job, policy: Policy, conditions: str) -> None:
    """Makes the folder and records what its images depend on; a folder of other images is refused.

    conditions: what stands for the labels or prompts. How many images there are, and the batch size, is left open.
    """
    settings = {"weights": fingerprint(policy), "conditions": conditions, "seed": job.config.seed,
                "eval_image_size": job.config.eval_image_size, "dtype": str(policy.autocast_dtype),
                "rollout_dtype": str(policy.rollout_dtype), "vq_dtype": str(policy.vq_dtype), **asdict(job.sampling)}
    file = job.folder / SETTINGS_FILE
    if file.is_file():
        stored = read_object(file)
        changes = [f"{key}: {stored.get(key)} -> {settings.get(key)}" for key in {**stored, **settings}
                   if stored.get(key) != settings.get(key)]
        if changes:
            raise ValueError(f"{job.folder} holds images of other settings ({'; '.join(changes)}): delete it, or give "
                             "another --results_dir")
        return
    if job.folder.is_dir() and any(job.folder.iterdir()):
        raise ValueError(f"{job.folder} holds files but no {SETTINGS_FILE}: delete it, or give another --results_dir")
    job.folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(settings, indent=2) + "\n")


def fingerprint(policy: Policy) -> str:
    """Tells weights apart by the first values of each tensor: an update moves nearly all of them."""
    digest = hashlib.blake2b(digest_size=8)
    for module in (policy.gpt, policy.vq):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.flatten()[:64].cpu().numpy().tobytes())
    return digest.hexdigest()


def write_samples(policy: Policy, samples: Sequence[Sample], config: SampleConfig) -> None:
    """Every sample's PNG that is missing or cut short, shared by all processes; returns when all of them are there."""
    batches = [samples[i: i + config.batch_size] for i in range(0, len(samples), config.batch_size)]
    size = image_size(policy, config.eval_image_size)
    # One process looks, before any of them writes: the shares must not overlap.
    todo = distributed.broadcast_object(pending(batches, size) if distributed.is_main() else None)
    write_batches(policy, [batches[i] for i in todo[distributed.rank()::distributed.world_size()]], size)
    distributed.barrier()


def pending(batches: Sequence[Sequence[Sample]], size: tuple[int, int]) -> list[int]:
    """Indices of the batches that lack an image."""
    return [i for i, batch in enumerate(batches) if not all(is_complete(sample.path, size) for sample in batch)]


def write_batches(policy: Policy, batches: Sequence[Sequence[Sample]], size: tuple[int, int]) -> None:
    """Samples whole batches, so that each has the composition it always had, and writes what is missing of them."""
    bar = tqdm(total=sum(map(len, batches)), desc="sampling", unit="img", disable=not distributed.is_main())
    with bar, ThreadPoolExecutor(NUM_WRITERS) as pool:
        for batch in batches:
            missing = [(sample.path, image) for sample, image in zip(batch, sample_images(policy, batch, size))
                       if not is_complete(sample.path, size)]
            list(pool.map(write_png, *zip(*missing)))
            bar.update(len(batch))


def sample_images(policy: Policy, batch: Sequence[Sample], size: tuple[int, int]) -> np.ndarray:
    """-> uint8 [N, H, W, 3]."""
    condition, mask = policy.encode([sample.condition for sample in batch])
    tokens = policy.sample(condition, mask, [sample.seed for sample in batch]).tokens  # [N, L]
    images = policy.decode(tokens, None if size == image_size(policy) else size)  # [N, 3, H, W]
    return images.permute(0, 2, 3, 1).cpu().numpy()


def image_size(policy: Policy, eval_image_size: int | None = None) -> tuple[int, int]:
    """(H, W) of the files."""
    if eval_image_size is not None:
        return eval_image_size, eval_image_size
    height, width = policy.gpt.config.grid
    return height * policy.vq.config.downsample, width * policy.vq.config.downsample


def is_complete(path: Path, size: tuple[int, int]) -> bool:
    """A PNG of this height and width with its last chunk: looks at 36 bytes, so that 50,000 files take seconds."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            file.seek(-len(PNG_END), os.SEEK_END)
            end = file.read()
    except OSError:  # no such file, or one too short to seek in
        return False
    return start[:8] == PNG_START and end == PNG_END and struct.unpack(">II", start[16:24]) == size[::-1]


def write_png(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, 3]; the name appears when the file is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_png(path: Path) -> np.ndarray:
    return read_image(path, path)


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int, int]) -> None:
    """`arr_0`, uint8 [N, H, W, 3], one image in memory at a time; the name appears when the file is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            count = 0
            for image in images:
                assert image.shape == shape[1:] and image.dtype == np.uint8, f"{image.dtype} {image.shape} in {shape}"
                member.write(np.ascontiguousarray(image).data)
                count += 1
        assert count == shape[0], f"{count} images, {shape[0]} announced"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- prompts ---------------------------------------------------------------------------------------------------------

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


def announcement(job: Job, prompts: list[Condition], device: torch.device) -> str:
    return (f"{len(prompts)} prompts x {job.own.num_images_per_prompt} images of {job.policy.gpt_ckpt} on "
            f"{distributed.world_size()} x {device.type}")


def sample_prompts(job: Job, prompts: list[Condition], device: torch.device) -> list[list[Sample]]:
    """Every prompt's images in GenEval's folders, made by all processes; returns when this one's share is there."""
    policy = load_policy(job.policy, job.sampling, device)
    groups = prompt_samples(job.folder, prompts, job.own.num_images_per_prompt, job.config.seed)
    if distributed.is_main():
        digest = hashlib.blake2b("\n".join(map(geneval_record, prompts)).encode(), digest_size=8).hexdigest()
        claim_folder(job, policy, f"prompts {digest} through {job.policy.t5_path}")
        write_records(groups)
    write_samples(policy, [sample for group in groups for sample in group], job.config)
    for group in groups[distributed.rank()::distributed.world_size()]:
        write_grid(group)
    return groups
