"""Memory and time of a training run, before it runs: takes the trainers' own flags, loads nothing.

    python -m benchmark.speed.plan --gpt_model GPT-3B --image_size 384 --gpus 8 --sharding full --bf16 --hardware H100
    python -m benchmark.speed.plan --config c2i_llamagen_xl_384 --gpus 4 --hardware H100
    python -m benchmark.speed.plan --gpt_model GPT-B --image_size 256 --cfg_scale 2 --check

Time is for --hardware's published ceilings, or for those of --device, measured now. Where the formulas stand and what
they leave out: benchmark/speed/planner.py. --check runs one process's step on random weights on --device and prints
what it took beside what was predicted.
"""
from dataclasses import dataclass, field

import torch

from benchmark.speed import end_to_end, planner
from benchmark.speed.setup import vq_config
from models.build import PolicyConfig
from models.checkpoint import read_manifest
from models.gpt import GPT_SIZES, GPTConfig
from models.vq import VQConfig
from trainer_utils.composition import CONFIGS, PromptConfig
from utils.config import flag, key_names, one_line_errors, parse_args

NOWHERE = "none"  # stands for a file that a plan doesn't read


@dataclass(frozen=True)
class PlanConfig:
    gpus: int = field(default=1, metadata={"help": "processes, one for each GPU"})
    gpus_per_node: int = field(default=8, metadata={"help": "of a machine; links within it are faster"})
    hardware: str | None = field(default=None, metadata={
        "help": f"published ceilings of {', '.join(planner.HARDWARE)}; none: those of --device, measured now"})
    device: str = flag(lambda: "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    check: bool = field(default=False, metadata={"help": "also run a step of one process on --device"})
    rounds: int = field(default=1, metadata={"help": "timed steps of --check; the fastest counts"})

    def __post_init__(self):
        for name in ("gpus", "gpus_per_node", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hardware is not None and self.hardware not in planner.HARDWARE:
            raise ValueError(f"hardware must be one of {', '.join(planner.HARDWARE)}, or left out for the ceilings of "
                             f"--device, got {self.hardware!r}")
        if self.check and (self.hardware is not None or self.gpus > 1):
            raise ValueError("check measures one process on --device: leave out --hardware and --gpus")


def placeholders(given: dict) -> dict:
    """What a trainer must be told and a plan need not."""
    named = {} if "gpt_ckpt" in given else {"gpt_model": "GPT-B"}  # a folder of ours names its size itself
    return {"run_name": "plan", "reward_funcs": ["none"], "gpt_ckpt": NOWHERE, "vq_ckpt": NOWHERE, **named}


def model_configs(policy: PolicyConfig) -> tuple[GPTConfig, VQConfig]:
    """From the flags, or from the model.json of folders of ours."""
    stored, stored_vq = (None if path == NOWHERE else read_manifest(path) for path in (policy.gpt_ckpt, policy.vq_ckpt))
    vq = VQConfig(**stored_vq["config"]) if stored_vq else vq_config(policy.vq_model or "VQ-16")
    if stored:
        return GPTConfig(**stored["config"]), vq
    if policy.gpt_model not in GPT_SIZES:
        raise ValueError(f"gpt_model must be one of {', '.join(GPT_SIZES)}, got {policy.gpt_model!r}")
    if policy.image_size % vq.downsample:
        raise ValueError(f"image_size must be a multiple of {vq.downsample}, got {policy.image_size}")
    size = dict(vocab_size=vq.codebook_size, block_size=(policy.image_size // vq.downsample) ** 2,
                num_classes=policy.num_classes, caption_dim=policy.caption_dim, model_type=policy.gpt_type,
                cls_token_num=policy.cls_token_num)
    return GPTConfig(**GPT_SIZES[policy.gpt_model], **size), vq


def check_lines(plan: planner.Plan, costs: end_to_end.StepCosts) -> list[str]:
    """Prediction beside measurement."""
    lines = [f"{'':<12}{'GB':>10}{'measured':>10}{'error':>8}{'seconds':>10}{'measured':>10}{'error':>8}"]
    rows = [(name, plan.peaks[name], costs.peaks[name], plan.seconds[name], costs.seconds[name])
            for name in plan.peaks if name in plan.seconds]
    rows.append(("step", plan.peak, max(costs.peaks.values()), sum(plan.seconds.values()), costs.total))
    for name, memory, measured, seconds, taken in rows:
        lines.append(f"{name:<12}{memory / 1e9:>10.3f}{measured / 1e9:>10.3f}{memory / measured - 1:>8.1%}"
                     f"{seconds:>10.2f}{taken:>10.2f}{seconds / taken - 1:>8.1%}")
    return lines


def main(argv: list[str] | None = None) -> planner.Plan:
    *configs, config = parse_args((*CONFIGS, PlanConfig), argv, __doc__, placeholders, key_names(PromptConfig))
    if configs[0].num_threads:
        torch.set_num_threads(configs[0].num_threads)
    device = torch.device(config.device)
    gpt, vq = model_configs(configs[1])
    machine = planner.HARDWARE[config.hardware] if config.hardware else planner.measured_machine(device)
    job = planner.job_of(tuple(configs), gpt, vq, machine.kind, config.gpus, config.gpus_per_node)
    plan = planner.plan(job, machine)
    print("\n".join(planner.as_lines(plan)), flush=True)
    if config.check:
        print("\n".join(check_lines(plan, end_to_end.measure(job, device, config.rounds))))
    return plan


if __name__ == "__main__":
    with one_line_errors():
        main()
