"""One whole GRPO step on random weights: seconds and peak memory by phase, images per second, share of the roofline.

    python -m benchmark.speed.end_to_end --gpt_model GPT-B --image_size 256 --batch_size 8 --baseline
    python -m benchmark.speed.end_to_end --gpt_model GPT-XL --image_size 384 --batch_size 32 --dtype bfloat16 \\
        --gradient_checkpointing --micro_batch_size 8 --reference bf16 --baseline

Ours is the trainer's own code: GRPOTrainer.rollout (sampling, decoding to images, a reward that costs nothing, the
reference) and GRPOTrainer.update. --baseline does the same work plainly in the same process: benchmark/speed/
reference.py's decoder, one image at a time through tokenizer and reward, and train_step.py's plain step. The roofline
counts what decoding, the tokenizer and training must move and multiply at least, without what is computed twice.
Left out: reward models, text encoder, evaluation, checkpoints, other processes.
"""
import copy
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmark.speed import reference
from benchmark.speed.on_paper import Job, decode_cost
from benchmark.speed.roofline import decode_work, forward_flops, measure_ceilings, synchronize
from benchmark.speed.setup import machine_name, random_condition, random_gpt, random_vq, vq_config
from benchmark.speed.train_step import TrainStepConfig, plain_step, random_minibatch
from dataset import Condition
from grpo_trainer import GRPOTrainer
from img_gen_grpo_rewards import RewardResult, RewardSet, Scoring
from models.generate import SamplingConfig
from models.gpt import GPTConfig
from models.lora import LoRAConfig
from models.policy import Policy, default_rollout_dtype
from trainer_utils.memory import Meter
from utils.config import flag, one_line_errors, parse_args
from utils.distributed import Metrics

PHASES = ("encode", "sample", "decode", "score", "reference", "update")


@dataclass(frozen=True)
class EndToEndConfig(TrainStepConfig):
    rollout_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "of the sampler's matrix products")
    vq_model: str = flag("VQ-16", "row of VQ_SIZES")
    vq_dtype: Literal["float32", "bfloat16"] = flag("float32", "of the decoding to images")
    decode_batch_size: int = field(default=64, metadata={"help": "images decoded at a time"})
    rounds: int = field(default=1, metadata={"help": "timed steps of each, in turns; the fastest counts"})
    baseline: bool = field(default=False, metadata={"help": "also a plain step, and the ratio"})

    def __post_init__(self):
        super().__post_init__()
        vq_config(self.vq_model)

    @property
    def gpt(self) -> GPTConfig:
        vq = vq_config(self.vq_model)
        return replace(super().gpt, block_size=(self.image_size // vq.downsample) ** 2, vocab_size=vq.codebook_size)

    @property
    def job(self) -> Job:
        dtype = default_rollout_dtype(self.autocast_dtype, torch.device(self.device))
        dtype = dtype if self.rollout_dtype == "auto" else getattr(torch, self.rollout_dtype)
        return Job(self.gpt, vq_config(self.vq_model), replace(self.grpo, max_logp_gap=1e9),
                   SamplingConfig(cfg_scale=self.cfg_scale), LoRAConfig(lora_rank=self.lora_rank),
                   self.gradient_checkpointing, self.autocast_dtype, dtype, getattr(torch, self.vq_dtype),
                   self.decode_batch_size)


class Brightness:
    """A RewardSet's interface around one that costs nothing."""

    names, weights, collect = ["brightness"], [1.0], staticmethod(RewardSet.collect)

    def start(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Scoring:
        scores = images.float().mean((1, 2, 3)).cpu()
        return Scoring(self.names, len(images), [RewardResult({"brightness": scores}, {"brightness": {}})])


class RandomCaptions:
    """A text encoder's interface: 20 real slots of each caption."""

    def __init__(self, gpt):
        self.gpt = gpt

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        embeddings = random_condition(self.gpt, len(prompts), torch.device("cpu"))
        slots = torch.arange(self.gpt.cls_token_num)
        return embeddings, (slots >= self.gpt.cls_token_num - 20).expand(len(prompts), -1)


class WatchedMetrics(Metrics):
    """Peaks by phase beside the seconds; meter: what counts on CPUs, None on GPUs and where only time counts."""

    def __init__(self, device: torch.device, meter: Meter | None = None):
        super().__init__(device)
        self.meter, self.peaks = meter, {}

    @contextmanager
    def timed(self, name: str):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.meter:
            self.meter.peak = self.meter.live
        with super().timed(name):
            yield
        peak = (torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda"
                else self.meter.peak if self.meter else 0)
        self.peaks[name] = max(peak, self.peaks.get(name, 0))


class StepCosts(NamedTuple):
    """By phase."""

    seconds: dict[str, float]
    peaks: dict[str, int]  # bytes, all that stands included
    logp_gap: float  # largest |sampler - trainer|, nats

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def trainer_of(job: Job, device: torch.device) -> GRPOTrainer:
    gpt = random_gpt(job.gpt, device, job.gradient_checkpointing, job.lora)
    encoder = RandomCaptions(job.gpt) if job.gpt.model_type == "t2i" else None
    policy = Policy(gpt, random_vq(job.vq, device), job.sampling, encoder, job.autocast_dtype, job.decode_batch_size,
                    job.rollout_dtype, job.vq_dtype)
    conditions = [Condition(f"prompt {i}", i % job.gpt.num_classes, {}) for i in range(job.grpo.prompts_per_step)]
    return GRPOTrainer(job.grpo, policy, (conditions, Brightness()), None, None, lambda folder, weights: None)


def step(trainer: GRPOTrainer, number: int, metrics: Metrics) -> None:
    rollout = trainer.rollout(number, metrics)
    for _ in range(trainer.config.num_iterations):
        for minibatch in rollout.split(trainer.config.images_per_update):
            trainer.update(minibatch, number, metrics)


def watched(job: Job, device: torch.device) -> tuple[GRPOTrainer, dict[str, int]]:
    """(the trainer after two steps, peak bytes of the second by phase): the first makes the optimizer's state."""
    with Meter() if device.type == "cpu" else nullcontext() as meter:
        trainer = trainer_of(job, device)
        step(trainer, 0, Metrics(device))
        metrics = WatchedMetrics(device, meter)
        step(trainer, 1, metrics)
    return trainer, by_phase(metrics.peaks)


def measure(job: Job, device: torch.device, rounds: int, between: Callable[[], object] = lambda: None) -> StepCosts:
    """A step is watched for its memory, then `rounds` are timed; `between` is called before each."""
    trainer, peaks = watched(job, device)
    timed = []
    for i in range(rounds):
        between()
        timed.append(Metrics(device))
        step(trainer, 2 + i, timed[-1])
    fastest = min(timed, key=lambda metrics: sum(metrics.seconds.values()))
    return StepCosts(by_phase(fastest.seconds), peaks, fastest.maxima["logp_gap_max"].item())


def by_phase(numbers: dict) -> dict:
    return {name: numbers.get(f"seconds/{name}", 0) for name in PHASES}


def plain_whole_step(config: EndToEndConfig) -> Callable[[Metrics], None]:
    """The same step without what makes ours fast; the trained copy and the sampled one are two."""
    job, device = config.job, torch.device(config.device)
    gpt = random_gpt(job.gpt, device).requires_grad_(False)
    vq = copy.deepcopy(random_vq(job.vq, device)).to(memory_format=torch.contiguous_format)
    policy, reward = Policy(gpt, vq, job.sampling, decode_batch_size=1), Brightness()
    train, minibatch = plain_step(config), random_minibatch(config)
    condition = minibatch.condition
    train(minibatch, Metrics(device))  # makes the optimizer's state

    def whole(metrics: Metrics) -> None:
        autocast = torch.autocast(device.type, dtype=job.autocast_dtype,
                                  enabled=job.autocast_dtype is not None and device.type == "cuda")
        with metrics.timed("seconds/sample"), autocast:
            tokens = reference.decode(gpt, condition, config.cfg_scale)
        with metrics.timed("seconds/decode"):
            images = policy.decode(tokens)
        with metrics.timed("seconds/score"):
            for image in images:
                reward.start(image[None], [""], [{}]).result()
        train(replace(minibatch, tokens=tokens), metrics)

    return whole


def least_seconds(job: Job, device: torch.device) -> float:
    """What this machine's ceilings allow for a step."""
    sampling = measure_ceilings(device, job.rollout_dtype)
    training = measure_ceilings(device, job.autocast_dtype or torch.float32)
    decoding = measure_ceilings(device, job.vq_dtype)
    guided = job.sampling.num_guided(job.gpt.block_size)
    rollout = decode_work(job.gpt, job.num_images, guided, job.rollout_dtype).seconds(sampling)
    passes = 3 * job.grpo.num_iterations + (job.grpo.beta > 0)
    flops = passes * sum(forward_flops(job.gpt, job.scored_halves * job.num_images, job.num_images))
    return (rollout + flops / training.flops_per_second
            + job.num_images * decode_cost(job, 1)[2] / decoding.flops_per_second)


def as_line(label: str, costs: StepCosts, job: Job) -> str:
    phases = " + ".join(f"{name} {costs.seconds[name]:.2f}" for name in PHASES if costs.seconds[name] >= 0.005)
    rate = job.num_images / costs.total
    return (f"{label:<12} {rate:.4f} images/s, {rate * job.gpt.block_size:.1f} tokens/s\n"
            f"{'seconds':<12} {costs.total:.2f} = {phases}")


def main(argv: list[str] | None = None) -> tuple[StepCosts, float | None]:
    [config] = parse_args((EndToEndConfig,), argv, __doc__)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    job, device, plain = config.job, torch.device(config.device), []
    print(f"{machine_name(device)}; torch {torch.__version__}; {config}", flush=True)

    def baseline() -> None:
        if config.baseline:
            plain.append(Metrics(device))
            whole(plain[-1])
            synchronize(device)

    whole = plain_whole_step(config) if config.baseline else None
    costs, ratio = measure(job, device, config.rounds, baseline), None
    print(as_line("ours", costs, job))
    print(f"{'memory':<12} {max(costs.peaks.values()) / 1e9:.2f} GB at the peak: "
          + ", ".join(f"{name} {costs.peaks[name] / 1e9:.2f}" for name in PHASES if costs.peaks[name]))
    print(f"{'parity':<12} |sampler - trainer| at most {costs.logp_gap:.2e} nats")
    share = least_seconds(job, device) / costs.total
    print(f"{'roofline':<12} {100 * share:.0f} % of what this machine's ceilings allow")
    if config.baseline:
        fastest = min(plain, key=lambda metrics: sum(metrics.seconds.values()))
        other = StepCosts(by_phase(fastest.seconds), {}, 0.0)
        ratio = other.total / costs.total
        print(as_line("baseline", other, job))
        print(f"{'ratio':<12} {ratio:.2f}; " + ", ".join(
            f"{name} {other.seconds[name] / costs.seconds[name]:.2f}" for name in PHASES
            if other.seconds[name] >= 0.005 and costs.seconds[name]))
    return costs, ratio


if __name__ == "__main__":
    with one_line_errors():
        main()
