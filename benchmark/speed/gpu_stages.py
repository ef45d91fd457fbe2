"""What one GPU can tell about this project, in stages: generators from a Setting to dictionaries of figures.

`python -m benchmark.speed.gpu_check` runs them, each in a process of its own; `STAGES` is their table. A stage yields
each figure as soon as it has it, so that a time limit costs only those that were still to come. Models have
random weights, as values don't change speed; heads are scaled so that a token's entropy is about LlamaGen's (5 to 6
nats), as flat distributions would hide rounding. Only `shapes` trains real models.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmark.speed import end_to_end, reference, rewards, train_step
from benchmark.speed.roofline import decode_work, measure_ceilings, seconds_of, synchronize
from benchmark.speed.setup import machine_name, random_condition, random_gpt, random_vq, vq_config
from models.generate import Rollout, SamplingConfig, row_uniforms
from models.gpt import GPT, GPT_SIZES, GPTConfig
from models.policy import Policy, Scorer
from models.streams import SideStream
from trainer_utils.memory import Meter
from utils.distributed import Metrics

ROOT = Path(__file__).resolve().parents[2]
DEVICE_TESTS = ["test_kernels.py", "test_gpu.py", "test_streams.py", "test_decoder.py", "test_sharding.py",
                "test_lora.py", "test_checkpoint.py", "test_grpo_trainer.py", "test_train_step.py"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENTROPY_SCALE = 2.8  # standard deviation of random logits; ln V - s^2 / 2 = 5.8 nats
TINY = dict(n_layer=2, n_head=4, dim=64)


class Setting(NamedTuple):
    device: torch.device
    output: Path  # for logs, profiles and what a stage leaves
    tiny: bool  # every stage at sizes for a laptop, to try the script itself

    def gpt(self, size: str, image_size: int) -> GPTConfig:
        if self.tiny:
            return GPTConfig(**TINY, vocab_size=64, block_size=16)
        return GPTConfig(**GPT_SIZES[size], block_size=(image_size // 16) ** 2)


def scaled_gpt(config: GPTConfig, device: torch.device) -> GPT:
    gpt = random_gpt(config, device).requires_grad_(False)
    gpt.output.weight.normal_(std=ENTROPY_SCALE / config.dim ** 0.5)
    return gpt


def in_process(command: list[str], log: Path, **environment: str) -> str:
    """Its output, which `log` keeps; a failure is raised with the last line."""
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                              env=os.environ | environment)
    text = log.read_text()
    if done.returncode:
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}: {last} (see {log.name})")
    return text


# ------------------------------------------------------------------------------------------------------- stages


def machine(setting: Setting) -> Iterator[dict]:
    """Card, versions, ceilings."""
    import transformers

    yield {"card": machine_name(setting.device), "torch": torch.__version__, "transformers": transformers.__version__}
    if setting.device.type == "cuda":
        import triton
        yield {"triton": triton.__version__, "cuda": torch.version.cuda,
               "memory_gb": torch.cuda.get_device_properties(setting.device).total_memory / 1e9}
    for name, dtype in list(DTYPES.items())[: 1 if setting.tiny else None]:
        copy, flops = measure_ceilings(setting.device, dtype, rounds=3)
        yield {"copy_gb_per_sec": copy / 1e9, f"{name}_tflops": flops / 1e12}


def tests(setting: Setting) -> Iterator[dict]:
    """The device tests, several processes side by side."""
    names = [str(path.relative_to(ROOT)) for name in DEVICE_TESTS[: 1 if setting.tiny else None]
             for path in (ROOT / "tests").rglob(name)]
    workers = [] if setting.tiny else ["-n", "6"]
    log = setting.output / "tests.log"
    try:
        in_process(["-m", "pytest", "-q", *workers, "--show-capture=no", "--durations=8", *names], log,
                   ARGRPO_TEST_GPU=str(int(setting.device.type == "cuda")), OMP_NUM_THREADS="1")
    except RuntimeError:
        pass  # the counts say it
    text = log.read_text()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    if "passed" not in counts:
        raise RuntimeError(f"no test ran: {(text.strip().splitlines() or ['no output'])[-1]}")
    yield counts | {"failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)[:20]}


def kernels(setting: Setting) -> Iterator[dict]:
    """The decode step's kernels at several tiles: [tile, microseconds a launch, share of the copy bandwidth], the best
    of each, then all."""
    if setting.device.type != "cuda":
        raise RuntimeError("Triton's kernels are timed on GPUs alone")
    from benchmark.speed.kernels import KernelSpeedConfig, measure

    timings = measure(KernelSpeedConfig(rows=[16, 64, 256]))
    rows = [[one.kernel, one.rows, [*one.tile], round(one.microseconds, 2), round(one.share, 3)] for one in timings]
    yield {f"{kernel}/{count}": numbers for kernel, count, *numbers in sorted(rows, key=lambda row: -row[3])}
    yield {"all": rows}


def exactness(setting: Setting) -> Iterator[dict]:
    """Replayed graphs against the same kernels launched one by one (equal tokens), kernels against plain operations,
    and sampler against scorer in three precisions."""
    yield from shapes_gaps(setting)
    for size in ("GPT-B", "GPT-XL"):
        gpt = scaled_gpt(setting.gpt(size, 256), setting.device)
        condition, sampling = random_condition(gpt.config, 4, setting.device), SamplingConfig(cfg_scale=2.0)
        if size == "GPT-B":
            yield kernel_differences(gpt, condition, sampling)
        for name, dtype in DTYPES.items():
            policy = Policy(gpt, None, sampling, autocast_dtype=None if dtype == torch.float32 else dtype)
            yield {f"{size}_{name}": gaps(policy, condition, 2)}
        del gpt, policy


def gaps(policy: Policy, condition: Tensor, group: int) -> dict:
    """|sampler's - scorer's log-probability| of the sampled tokens, nats."""
    generation = policy.sample(condition, None, range(len(condition) * group), group)
    with policy.autocast(), torch.no_grad():
        logps, _ = Scorer(policy.gpt, policy.sampling)(condition.repeat_interleave(group, dim=0), generation.tokens)
    gap = (logps - generation.logps).abs()
    return {"gap_mean": gap.mean().item(), "gap_max": gap.max().item(), "entropy": generation.entropies.mean().item()}


def kernel_differences(gpt: GPT, condition: Tensor, sampling: SamplingConfig) -> dict:
    """In float32. With 16,384 codes a rounding of 1e-6 moves a draw across an edge now and then, after which the rest
    of its image differs: kernels and plain operations are compared up to there."""
    uniforms = row_uniforms(range(8), gpt.config.block_size).to(condition.device)

    def rollout_of(fused: bool | None, graphs: bool) -> Rollout:
        made = Rollout(gpt, sampling, 8, torch.float32, fused=fused, bucket=0 if fused is None else 64)
        made.graphs.enabled = graphs
        with torch.no_grad():
            made.begin(condition, None, uniforms, 2)
            made.run()
        return made

    on_gpu = condition.is_cuda
    replayed, launched, plain = rollout_of(None, on_gpu), rollout_of(None, False), rollout_of(False, False)
    same = (replayed.tokens == plain.tokens).cumprod(dim=1).bool()  # up to each image's first difference
    gap = (replayed.logps - plain.logps).abs()[same]
    return {"graph_tokens_differing": int((replayed.tokens != launched.tokens).sum()),
            "plain_images_equal": int(same.all(dim=1).sum()), "plain_gap_max": gap.max().item()}


def shapes_gaps(setting: Setting) -> Iterator[dict]:
    """Sampler against scorer on a shipped, trained model."""
    from models.checkpoint import load_gpt

    gpt = load_gpt(ROOT / "models/pretrained/shapes/gpt_c2i").to(setting.device).eval()
    for name, dtype in DTYPES.items():
        policy = Policy(gpt, None, SamplingConfig(cfg_scale=2.0), rollout_dtype=dtype,
                        autocast_dtype=None if dtype == torch.float32 else dtype)
        yield {f"shapes_c2i_{name}": gaps(policy, torch.arange(32, device=setting.device), 4)}


def decoding(setting: Setting) -> Iterator[dict]:
    """Milliseconds of a decode step of XL 384 against the plain decoder; a profile; XL 256 by batch size."""
    config, dtype = setting.gpt("GPT-XL", 384), torch.bfloat16
    gpt = scaled_gpt(config, setting.device)
    ours = batch_speed(gpt, 8, dtype, setting.device)
    copy = measure_ceilings(setting.device, dtype, rounds=3).bytes_per_second
    yield {"xl_384_batch_8": ours | {"bandwidth_share": 1e9 * ours["gb_per_sec"] / copy}}
    yield {"profile": profile(setting, gpt)}
    condition = random_condition(config, 8, setting.device)
    with torch.autocast(setting.device.type, dtype=dtype):
        plain = seconds_of(lambda: reference.decode(gpt, condition, 2.0, top_k=2000), setting.device)
    yield {"xl_384_plain_ms_a_step": 1000 * plain / config.block_size,
           "xl_384_ratio": 1000 * plain / config.block_size / ours["ms_a_step"]}
    gpt = scaled_gpt(setting.gpt("GPT-XL", 256), setting.device)
    for images in (2, 4) if setting.tiny else (8, 32, 64, 128, 256):
        yield {f"xl_256_batch_{images}": batch_speed(gpt, images, dtype, setting.device)}


def begun(gpt: GPT, images: int, dtype: torch.dtype, device: torch.device) -> Rollout:
    sampling = SamplingConfig(cfg_scale=2.0)
    made = Rollout(gpt, sampling, images, dtype)
    uniforms = row_uniforms(range(images), gpt.config.block_size).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        made.begin(random_condition(gpt.config, images, device), None, uniforms, 1)
    return made


def batch_speed(gpt: GPT, images: int, dtype: torch.dtype, device: torch.device) -> dict:
    made = begun(gpt, images, dtype, device)

    def decode():
        made.index.zero_()
        with torch.no_grad():
            made.run()

    decode()
    seconds = seconds_of(decode, device)
    work = decode_work(gpt.config, images, made.num_guided, dtype)
    return {"images_per_sec": images / seconds, "ms_a_step": 1000 * seconds / gpt.config.block_size,
            "gb_per_sec": work.bytes / seconds / 1e9}


def profile(setting: Setting, gpt: GPT) -> list:
    """Kernels of one step in the middle of an image: [name, launches, microseconds], the table saved too."""
    from torch.profiler import ProfilerActivity

    made, middle = begun(gpt, 8, torch.bfloat16, setting.device), gpt.config.block_size // 2
    made.index.fill_(middle)
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    length = made.decoder.read_length(gpt.config.cls_token_num + middle)
    with torch.no_grad():
        made.plain_step(length, True, True)
        synchronize(setting.device)
        with torch.profiler.profile(activities=activities) as profiler:
            made.plain_step(length, True, True)
            synchronize(setting.device)
    events = profiler.key_averages()
    spent = (lambda event: event.self_device_time_total) if on_gpu else (lambda event: event.self_cpu_time_total)
    (setting.output / "decode_step_profile.txt").write_text(
        events.table(sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=60,
                     max_name_column_width=80))
    rows = sorted(([event.key[:60], event.count, round(spent(event), 1)] for event in events), key=lambda row: -row[2])
    return rows[:16]


def training(setting: Setting) -> Iterator[dict]:
    """A training step of XL 384, 8 images, guided, KL: seconds and peak memory against the plain step."""
    config = train_step.TrainStepConfig(
        gpt_model="GPT-B" if setting.tiny else "GPT-XL", image_size=32 if setting.tiny else 384, dtype="bfloat16",
        gradient_checkpointing=True, micro_batch_size=4, reference="bf16", device=str(setting.device),
        batch_size=2 if setting.tiny else 8, rounds=1 if setting.tiny else 2)
    speeds = []
    for label, make in (("ours", train_step.lean_step), ("plain", train_step.plain_step)):
        speeds.append(train_step.measure(make, config))
        yield {f"{label}_seconds": speeds[-1].total, f"{label}_peak_gb": speeds[-1].peak_bytes / 1e9}
    ours, plain = speeds
    yield {"memory_ratio": ours.peak_bytes / plain.peak_bytes, "time_ratio": plain.total / ours.total}
    if not setting.tiny:  # on a CPU the 8-bit moments take minutes
        lean = train_step.measure(train_step.lean_step, replace(config, optimizer="adamw_8bit"))
        yield {"ours_8bit_peak_gb": lean.peak_bytes / 1e9, "ours_8bit_seconds": lean.total}
    yield {"largest_tensor_gb": largest_tensor(config)}


def largest_tensor(config: train_step.TrainStepConfig) -> float:
    """Of our step, as the operations make them."""
    step, minibatch = train_step.lean_step(config), train_step.random_minibatch(config)
    metrics = Metrics(torch.device(config.device))
    step(minibatch, metrics)
    with Meter() as meter:
        step(minibatch, metrics)
    return meter.largest / 1e9


def whole_job(setting: Setting) -> Iterator[dict]:
    """Images per second of whole steps with rewards of CLIP's and HPS's size, decode and score beside the next batch
    on and off."""
    names = ["clip_text", "hpsv2_text"]
    if missing := missing_package("open_clip"):
        names = ["clip_text", "pickscore"]
        yield {"without": missing}
    size = rewards.SIZES["tiny" if setting.tiny else "full"]
    with tempfile.TemporaryDirectory() as folder, rewards.random_rewards(
            names, size, Path(folder), setting.device, preprocess="fast", reward_dtype="bfloat16") as reward_set:
        for label, image_size, images, batch in (("xl_256", 256, 64, 32), ("xl_384", 384, 32, 16)):
            config = end_to_end.EndToEndConfig(
                gpt_model="GPT-B" if setting.tiny else "GPT-XL", image_size=32 if setting.tiny else image_size,
                batch_size=4 if setting.tiny else images, dtype="bfloat16", micro_batch_size="auto", reference="bf16",
                vq_dtype="bfloat16", device=str(setting.device))
            for beside in (True, False):
                job = with_rollout_batches(config, 0 if setting.tiny else batch)
                yield {f"{label}{'' if beside else '_not_beside'}": job_speed(job, reward_set, beside, setting)}


def with_rollout_batches(config: end_to_end.EndToEndConfig, images: int) -> end_to_end.Job:
    """Groups of 8 and updates of 16 images, where the batch allows."""
    group = min(8, config.batch_size)
    update = min(2 * group, config.batch_size)
    grpo = replace(config.job.grpo, num_generations=group, per_device_train_batch_size=update,
                   num_minibatches=config.batch_size // update, rollout_batch_size=images)
    return replace(config.job, grpo=grpo)


def job_speed(job: end_to_end.Job, reward_set, beside: bool, setting: Setting) -> dict:
    trainer = end_to_end.trainer_of(job, setting.device)
    trainer.reward_set = reward_set
    trainer.policy.side_stream = SideStream(setting.device, enabled=beside and setting.device.type == "cuda")
    for number in range(2):
        end_to_end.step(trainer, number, Metrics(setting.device))
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    seconds, phases = [], {}
    for number in range(2, 4):
        metrics = Metrics(setting.device)
        seconds.append(seconds_of(lambda: end_to_end.step(trainer, number, metrics), setting.device))
        phases = end_to_end.by_phase(metrics.seconds)
    peak = torch.cuda.max_memory_allocated(setting.device) / 1e9 if setting.device.type == "cuda" else 0.0
    return {"images_per_sec": job.num_images / min(seconds), "seconds": min(seconds), "peak_gb": peak,
            "micro_batch": trainer.micro_batch_size,
            **{name: round(value, 3) for name, value in phases.items() if value}}


def shapes(setting: Setting) -> Iterator[dict]:
    """Both default runs side by side, to their end: final figures, and seconds."""
    steps = ["--exit_step", "2", "--eval_num_prompts", "4", "--eval_generations", "2"] if setting.tiny else []
    started, jobs = time.perf_counter(), {}
    for kind in ("c2i", "t2i"):
        with open(setting.output / f"{kind}_shapes.log", "w") as log:
            jobs[kind] = subprocess.Popen(
                [sys.executable, f"train_{kind}.py", "--config", f"{kind}_shapes", "--output_dir",
                 str(setting.output / "runs"), "--report_to", "none", *steps], stdout=log, stderr=subprocess.STDOUT,
                cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "4"})
    for kind, job in jobs.items():
        job.wait()
        figures = run_figures(setting.output / "runs" / f"{kind}_shapes" / "metrics.jsonl", job.returncode)
        yield {kind: figures | {"seconds": time.perf_counter() - started}}


def run_figures(path: Path, code: int) -> dict:
    if code or not path.is_file():
        return {"exit_code": code}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    evaluated = [line for line in lines if "eval/fid" in line]
    wanted = re.compile(r"eval/.*(strict|graded|fid|precision|recall|entropy|hamming|spread)")
    figures = {}
    for label, line in zip(("start", "end"), (evaluated[0], evaluated[-1])) if evaluated else ():
        figures[label] = {key: value for key, value in line.items() if wanted.match(key)}
    steps = [line["seconds/step"] for line in lines if "seconds/step" in line]
    gaps = [line["logp_gap_max"] for line in lines if "logp_gap_max" in line]
    return figures | {"steps": len(steps), "median_step_seconds": sorted(steps)[len(steps) // 2],
                      "logp_gap_max": max(gaps, default=0.0)}


def scoring(setting: Setting) -> Iterator[dict]:
    """FID features, 2,048 images from tokens to features, and rewards at batch 64 against single images."""
    yield from features_speed(setting)
    names = ["clip_text", "aesthetic", "imagereward", "maniqa", "lpips"]
    if missing := missing_package("open_clip"):
        yield {"without": missing}
    else:
        names.insert(1, "hpsv2_text")
    config = rewards.SpeedConfig(rewards=names, device=str(setting.device), rounds=1,
                                 seconds=0.0 if setting.tiny else 0.5, batch_size=4 if setting.tiny else 64,
                                 size="tiny" if setting.tiny else "full", preprocess="fast", reward_dtype="float32",
                                 image_size=64 if setting.tiny else 256)
    for name in config.rewards:
        try:
            speed = rewards.measure(name, config)
            yield {name: {"batch": speed.batch, "single": speed.single, "ratio": speed.batch / speed.single}}
        except (RuntimeError, ValueError) as error:  # one judge's failure tells nothing of the others
            yield {name: {"failed": str(error).splitlines()[0]}}


def features_speed(setting: Setting) -> Iterator[dict]:
    from reward_utils.inception import extract
    from reward_utils.inception_v3 import InceptionFeatures

    torch.manual_seed(0)
    net = InceptionFeatures().to(setting.device).eval()
    side, count = (75, 4) if setting.tiny else (256, 512)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=setting.device)
    extract(net, images[: 64])
    yield {"fid_features_images_per_sec": count / seconds_of(lambda: extract(net, images), setting.device)}
    gpt = scaled_gpt(setting.gpt("GPT-XL", 256), setting.device)
    vq = vq_config("VQ-16")
    if setting.tiny:
        gpt = scaled_gpt(replace(gpt.config, vocab_size=vq.codebook_size), setting.device)
    policy = Policy(gpt, random_vq(vq, setting.device), SamplingConfig(cfg_scale=2.0), vq_dtype=torch.bfloat16,
                    autocast_dtype=torch.bfloat16)
    total, batch = (4, 2) if setting.tiny else (2048, 256)

    def from_tokens_to_features() -> None:
        for start in range(0, total, batch):
            generation = policy.sample(random_condition(gpt.config, batch, setting.device), None,
                                       range(start, start + batch))
            pixels = policy.decode(generation.tokens)
            extract(net, pixels if min(pixels.shape[2:]) >= 75 else images[:batch])  # Inception's least size

    seconds = seconds_of(from_tokens_to_features, setting.device)
    yield {"sampled_decoded_measured_images": total, "sampled_decoded_measured_seconds": seconds}


def planner(setting: Setting) -> Iterator[dict]:
    """Predicted memory and time against measured ones, of one process: relative errors by phase."""
    flags = ["--gpt_model", "GPT-B", "--image_size", "32"] if setting.tiny else [
        "--gpt_model", "GPT-XL", "--image_size", "256", "--dtype", "bfloat16", "--gradient_checkpointing",
        "--num_minibatches", "4"]
    text = in_process(["-m", "benchmark.speed.plan", *flags, "--cfg_scale", "2", "--beta", "0.1", "--device",
                       str(setting.device), "--check"], setting.output / "planner.log")
    rows = re.findall(r"^(\w+) +([\d.]+) +([\d.]+) +(-?[\d.]+)% +([\d.]+) +([\d.]+) +(-?[\d.]+)%$", text, re.M)
    for name, *numbers in rows:
        yield {name: dict(zip(("gb", "gb_measured", "gb_error_percent", "seconds", "seconds_measured",
                               "seconds_error_percent"), map(float, numbers)))}


def missing_package(name: str) -> str | None:
    from importlib.util import find_spec

    return None if find_spec(name) else f"{name} is not installed: carry its wheel"


class Stage(NamedTuple):
    run: Callable[[Setting], Iterator[dict]]
    seconds: int  # its limit


STAGES = {
    "machine": Stage(machine, 40), "tests": Stage(tests, 110), "kernels": Stage(kernels, 80),
    "exactness": Stage(exactness, 60), "decoding": Stage(decoding, 90), "training": Stage(training, 60),
    "whole_job": Stage(whole_job, 120), "shapes": Stage(shapes, 180), "scoring": Stage(scoring, 80),
    "planner": Stage(planner, 60),
}
