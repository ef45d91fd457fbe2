"""Seconds and peak memory of a training step, on random weights: reference log-probabilities, gradients, update.

    python -m benchmark.speed.train_step --gpt_model GPT-B --image_size 256 --batch_size 8 --baseline
    python -m benchmark.speed.train_step --gpt_model GPT-XL --image_size 384 --dtype bfloat16 \\
        --gradient_checkpointing --micro_batch_size auto --reference bf16 --optimizer adamw_8bit --baseline

Ours is the trainer's own code (GRPOTrainer.update). --baseline also measures a plain step: logits [N, L, V] in two
passes, all rows at once, a float32 copy as the reference, AdamW. Memory is all that a step needs, weights, gradients
and optimizer included: a GPU's own count, on CPUs trainer_utils.memory.Meter's. FLOP/s are those that the mathematics
needs, without what checkpointing computes twice. Left out: rollouts, processes beside this one.
"""
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmark.speed.roofline import forward_flops, measure_ceilings, synchronize
from benchmark.speed.setup import ModelFlags, machine_name, random_gpt
from grpo_trainer import GRPOConfig, GRPOTrainer, Rollout, grpo_loss
from models.generate import SamplingConfig
from models.gpt import GPT
from models.lora import LoRAConfig
from models.policy import Policy
from trainer_utils.memory import Meter
from utils.config import flag, one_line_errors, parse_args
from utils.distributed import Metrics

PHASES = ("seconds/reference", "seconds/update")


@dataclass(frozen=True)
class TrainStepConfig(ModelFlags):
    guidance_logprob: str = flag("guided", "what is scored, as in training")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "of matrix products, by autocast")
    gradient_checkpointing: bool = flag(False, "compute activations again")
    micro_batch_size: Literal["auto"] | int | None = flag(None, "images of a pass; auto: as many as fit")
    head_chunk_tokens: int = flag(1024, "tokens whose logits are held at a time")
    reference: str = flag("auto", "form of the reference model")
    optimizer: str = flag("adamw", "as in training")
    lora_rank: int = flag(0, "adapters of this rank alone; 0: all weights")
    baseline: bool = field(default=False, metadata={"help": "also measure the plain step, and print the ratios"})

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (advantages are relative), got {self.batch_size}")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.dtype == "float32" else getattr(torch, self.dtype)

    @property
    def grpo(self) -> GRPOConfig:
        return GRPOConfig(num_generations=self.batch_size, per_device_train_batch_size=self.batch_size, beta=0.1,
                          micro_batch_size=self.micro_batch_size, head_chunk_tokens=self.head_chunk_tokens,
                          guidance_logprob=self.guidance_logprob, reference=self.reference, optimizer=self.optimizer)


class StepSpeed(NamedTuple):
    seconds: dict[str, float]  # of PHASES
    peak_bytes: int
    largest_bytes: int | None  # of one tensor; None on GPUs

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def random_minibatch(config: TrainStepConfig) -> Rollout:
    """Tokens of `batch_size` images, advantages, and old log-probabilities of a uniform distribution."""
    gpt, rows = config.gpt, config.batch_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(gpt.vocab_size, (rows, gpt.block_size), generator=generator)
    condition, mask = torch.arange(rows) % gpt.num_classes, None
    if config.gpt_type == "t2i":
        condition = torch.randn(rows, gpt.cls_token_num, gpt.caption_dim, generator=generator)
        mask = torch.arange(gpt.cls_token_num).expand(rows, -1) >= gpt.cls_token_num - 20
    old_logps = torch.full(tokens.shape, -torch.tensor(gpt.vocab_size).log().item())
    parts = (condition, mask, tokens, old_logps, None, torch.randn(rows, generator=generator))
    return Rollout(*(part if part is None else part.to(config.device) for part in parts))


def lean_step(config: TrainStepConfig) -> Callable[[Rollout, Metrics], None]:
    gpt = random_gpt(config.gpt, config.device, config.gradient_checkpointing,
                     LoRAConfig(lora_rank=config.lora_rank))
    policy = Policy(gpt, None, SamplingConfig(cfg_scale=config.cfg_scale),
                    autocast_dtype=config.autocast_dtype)
    # No sampler to agree with here.
    grpo = replace(config.grpo, max_logp_gap=1e9)
    trainer = GRPOTrainer(grpo, policy, ([None], None), None, None, lambda folder, weights: None)

    def step(minibatch: Rollout, metrics: Metrics) -> None:
        size = trainer.micro_batch_size if trainer.micro_batch_size != "auto" else config.batch_size
        with metrics.timed(PHASES[0]):
            ref_logps = trainer.reference.score(policy, minibatch.condition, minibatch.tokens,
                                                minibatch.condition_mask, size)
        trainer.update(replace(minibatch, ref_logps=ref_logps), 0, metrics)

    return step


def plain_logps(gpt: GPT, minibatch: Rollout, config: TrainStepConfig) -> Tensor:
    """[N, L] through logits [N, L, V] of both halves."""
    tokens, mask = minibatch.tokens, minibatch.condition_mask
    logits = gpt(minibatch.condition, tokens[:, :-1], mask)
    if config.cfg_scale != 1 and config.guidance_logprob != "conditional":
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.guidance_logprob == "guided"):
            hidden = gpt.hidden(gpt.null_condition(len(tokens)), tokens[:, :-1], mask)
        uncond = gpt.output(hidden).float()
        logits = uncond + config.cfg_scale * (logits - uncond)
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def plain_step(config: TrainStepConfig) -> Callable[[Rollout, Metrics], None]:
    gpt = random_gpt(config.gpt, config.device)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    grpo = config.grpo
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=grpo.learning_rate, betas=(0.9, grpo.adam_beta2))
    autocast = torch.autocast(config.device.split(":")[0], dtype=config.autocast_dtype,
                              enabled=config.autocast_dtype is not None)

    def step(minibatch: Rollout, metrics: Metrics) -> None:
        with metrics.timed(PHASES[0]), torch.no_grad(), autocast:
            ref_logps = plain_logps(reference, minibatch, config)
        with metrics.timed(PHASES[1]):
            with autocast:
                logps = plain_logps(gpt, minibatch, config)
            loss, _ = grpo_loss(logps, minibatch.old_logps, ref_logps, minibatch.advantages, beta=grpo.beta)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), grpo.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(make_step: Callable, config: TrainStepConfig) -> StepSpeed:
    """Two steps are watched, as the first makes the optimizer's state; then `rounds` are timed."""
    device, minibatch = torch.device(config.device), random_minibatch(config)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step = twice(make_step(config), minibatch, device)
        peak, largest = torch.cuda.max_memory_allocated(device) - before, None
    else:
        with Meter() as meter:
            step = twice(make_step(config), minibatch, device)
        peak, largest = meter.peak, meter.largest
    timed = []
    for _ in range(config.rounds):
        timed.append(Metrics(device))
        step(minibatch, timed[-1])
    fastest = min(timed, key=lambda metrics: sum(metrics.seconds.values()))
    return StepSpeed({name: fastest.seconds[name] for name in PHASES}, peak, largest)


def twice(step: Callable, minibatch: Rollout, device: torch.device) -> Callable:
    for _ in range(2):
        step(minibatch, Metrics(device))
    return step


def step_flops(config: TrainStepConfig) -> float:
    """Forward and backward of the policy, forward of the reference."""
    halves = 2 if config.cfg_scale != 1 and config.guidance_logprob != "conditional" else 1
    return (3 + 1) * sum(forward_flops(config.gpt, halves * config.batch_size, config.batch_size))


def main(argv: list[str] | None = None) -> dict[str, StepSpeed]:
    [config] = parse_args((TrainStepConfig,), argv, __doc__)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = torch.device(config.device)
    print(f"{machine_name(device)}; torch {torch.__version__}; {config}", flush=True)
    ceiling = measure_ceilings(device, getattr(torch, config.dtype)).flops_per_second
    speeds = {}
    print(f"{'':<10}{'seconds':>9}{'reference':>11}{'update':>9}{'tokens/s':>10}{'peak GB':>9}{'largest MB':>12}"
          f"{'TFLOP/s':>9}{'of ceiling':>12}")
    for label, make_step in (("ours", lean_step), ("baseline", plain_step))[: 1 + config.baseline]:
        speeds[label] = speed = measure(make_step, config)
        rate = step_flops(config) / speed.total
        largest = "-" if speed.largest_bytes is None else f"{speed.largest_bytes / 1e6:.0f}"
        print(f"{label:<10}{speed.total:>9.3f}{speed.seconds[PHASES[0]]:>11.3f}{speed.seconds[PHASES[1]]:>9.3f}"
              f"{config.batch_size * config.gpt.block_size / speed.total:>10.0f}{speed.peak_bytes / 1e9:>9.2f}"
              f"{largest:>12}{rate / 1e12:>9.3f}{rate / ceiling:>12.1%}", flush=True)
    if config.baseline:
        ours, plain = speeds["ours"], speeds["baseline"]
        print(f"baseline / ours: time {plain.total / ours.total:.2f}, memory {plain.peak_bytes / ours.peak_bytes:.2f}")
    return speeds


if __name__ == "__main__":
    with one_line_errors():
        main()
