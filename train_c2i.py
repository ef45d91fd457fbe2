"""GRPO for class-to-image generators: flags -> policy, rewards, classes -> trainer.

    bash run_c2i_train.sh                                        # sets up, then the shapes world
    python train_c2i.py --config c2i_shapes --run_name try --beta 0.02
    torchrun --nproc_per_node 4 train_c2i.py --config c2i_llamagen_xl_384

Running the same command again resumes. The objective is in grpo_trainer.py, sampling and scoring in models/; this file
only puts them together, for train_t2i.py as well.
"""
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dataset import Condition
from dataset.labels import class_conditions, load_class_names
from grpo_trainer import GRPOConfig, GRPOTrainer
from img_gen_grpo_rewards import RewardSet
from models.build import PolicyConfig, load_policy, save_policy
from models.checkpoint import require_checkpoint
from models.generate import SamplingConfig
from models.lora import LoRAConfig, add_adapters
from reward_utils.settings import RewardSettings
from trainer_utils.run_folder import RunFolder
from utils import distributed
from utils.config import one_line_errors, parse_args, resolved


@dataclass(frozen=True)
class RunConfig:
    run_name: str = field(metadata={"help": "the run is written to output_dir/run_name"})
    reward_funcs: list[str] = field(metadata={"help": "names of img_gen_grpo_rewards.REWARDS"})
    reward_weights: list[float] | None = None  # None: 1 each
    eval_reward_funcs: list[str] | None = field(default=None, metadata={"help": "none: reward_funcs"})
    eval_num_prompts: int = field(default=32, metadata={"help": "held-out prompts (or classes) of an evaluation"})
    image_statistics: str = field(default="none", metadata={"help": "shapes: FID and diversity in evaluations"})
    output_dir: str = "checkpoints"
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    gradient_checkpointing: bool = field(default=False, metadata={
        "help": "keep one activation per layer and compute the others again: less memory, a third more time"})
    offload: bool = field(default=False, metadata={
        "help": "text encoder and reward models are on the GPU only while they are in use"})
    dry_run: bool = field(default=False, metadata={
        "help": "build everything, make one tiny step, print the plan, write nothing"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's choice"})
    comm_timeout: float = field(default=1800.0, metadata={
        "help": "seconds without an answer after which the processes give another one up, and the run ends; more than "
                "rank 0 takes to write and hash a checkpoint, unless --async_save"})

    def __post_init__(self):
        if self.image_statistics not in ("none", "shapes"):
            raise ValueError(f"image_statistics must be none or shapes, got {self.image_statistics!r}")
        for name, least in (("eval_num_prompts", 1), ("num_threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.comm_timeout < math.inf:
            raise ValueError(f"comm_timeout must be a positive number of seconds, got {self.comm_timeout}")


CONFIGS = (RunConfig, PolicyConfig, SamplingConfig, GRPOConfig, RewardSettings, LoRAConfig)


def train(configs: tuple, train_conditions: list[Condition], eval_conditions: list[Condition]) -> None:
    """configs: CONFIGS and what a script adds; every process gets all conditions."""
    run_config, policy_config, sampling, grpo, rewards, adapters = configs[:6]
    device = distributed.setup(run_config.comm_timeout)
    if run_config.num_threads:
        torch.set_num_threads(run_config.num_threads)
    logging.basicConfig(level=logging.INFO if distributed.is_main() else logging.ERROR, format="%(message)s")
    logging.getLogger(__name__).info(grpo.arithmetic(distributed.world_size()))
    for path in (policy_config.vq_ckpt, policy_config.gpt_ckpt):  # told before minutes of loading rewards and T5
        require_checkpoint(path)
    if run_config.offload:
        rewards = replace(rewards, offload_rewards=True)
    models: dict = {}  # the evaluation shares the reward models
    reward_set = RewardSet(run_config.reward_funcs, run_config.reward_weights, rewards, device, models)
    eval_rewards = RewardSet(run_config.eval_reward_funcs or run_config.reward_funcs, None, rewards, device, models)
    policy = load_policy(policy_config, sampling, device)
    policy.gpt.gradient_checkpointing = run_config.gradient_checkpointing
    add_adapters(policy.gpt, adapters)
    if policy.text_encoder is not None:
        policy.text_encoder.offload = run_config.offload
    run = None
    if distributed.is_main() and not run_config.dry_run:
        settings = resolved(*configs) | {"num_processes": distributed.world_size(),
                                         "images_per_update": grpo.images_per_update * distributed.world_size()}
        run = RunFolder(Path(run_config.output_dir) / run_config.run_name, settings, run_config.report_to)
    try:
        GRPOTrainer(tiny(grpo) if run_config.dry_run else grpo, policy, (train_conditions, reward_set),
                    (eval_conditions, eval_rewards), run,
                    lambda folder, weights: save_policy(folder, policy, policy_config, weights),
                    image_metrics(run_config, policy_config)).train()
    except SystemExit:  # preempted: every process is here
        distributed.shutdown()
        raise
    finally:
        if run:
            run.close()
    if run_config.dry_run and distributed.is_main():
        print("\n".join(plan_lines(configs, policy)))
        print("dry run: one tiny step passed, nothing was written")
    distributed.shutdown()


def tiny(config: GRPOConfig) -> GRPOConfig:
    """One step of two images a process, through the same code."""
    return replace(config, num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                   num_minibatches=1, num_iterations=1, rollout_batch_size=0, exit_step=1, eval_steps=0)


def plan_lines(configs: tuple, policy) -> list[str]:
    """What the real steps will need, from this machine's measured ceilings."""
    from benchmark.speed import planner  # it imports the trainer

    machine = planner.measured_machine(policy.device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    job = planner.job_of(configs[: len(CONFIGS)], policy.gpt.config, policy.vq.config, machine.kind,
                         distributed.world_size(), local)
    return planner.as_lines(planner.plan(job, machine))


def image_metrics(run_config: RunConfig, policy_config: PolicyConfig) -> Callable | None:
    if run_config.image_statistics == "none" or not distributed.is_main():
        return None
    from benchmark.shapes.statistics import shapes_statistics  # renders its reference: only where it is asked for
    return shapes_statistics(policy_config.gpt_type)


def spread_out(items: list, count: int) -> list:
    """`count` items evenly over the list, or all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def main() -> None:
    configs = parse_args(CONFIGS, description=__doc__)
    run_config, policy_config = configs[:2]
    classes = class_conditions(load_class_names(policy_config.class_names))
    if len(classes) != policy_config.num_classes:
        raise ValueError(f"--class_names {policy_config.class_names} holds {len(classes)} names, but --num_classes is "
                         f"{policy_config.num_classes}")
    train(configs, classes, spread_out(classes, run_config.eval_num_prompts))


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
