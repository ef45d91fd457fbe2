"""Flags -> policy, rewards, run folder -> trainer: what train_c2i.py and train_t2i.py share.

What stands above this room (the trainer, the benchmarks) is handed in by the scripts.
"""
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dataset import Condition, shapes
from dataset.prompts import load_prompts
from img_gen_grpo_rewards import RewardSet
from models.build import PolicyConfig, load_policy, save_policy
from models.checkpoint import require_checkpoint
from models.generate import SamplingConfig
from models.lora import LoRAConfig, add_adapters
from models.policy import Policy
from reward_utils.settings import RewardSettings
from trainer_utils.grpo_config import GRPOConfig
from trainer_utils.run_folder import RunFolder
from utils import distributed
from utils.config import changeable, check_flags, defaults_of, flag, resolved
from utils.lock import only_one


@dataclass(frozen=True)
class RunConfig:
    """The run: what is rewarded, where it is written, how it runs."""

    run_name: str = flag(help="the run is written to output_dir/run_name", resume=True)
    reward_funcs: list[str] = flag(help="names of img_gen_grpo_rewards.REWARDS")
    reward_weights: list[float] | None = flag(None, "one for each of reward_funcs; none: 1 each")
    eval_reward_funcs: list[str] | None = flag(None, "rewards of evaluations; none: reward_funcs")
    eval_num_prompts: int = flag(32, "held-out prompts (or classes) of an evaluation", least=1)
    image_statistics: Literal["none", "shapes"] = flag("none", "shapes: FID and diversity in evaluations")
    output_dir: str = flag("checkpoints", "folder of runs", resume=True)
    report_to: list[str] = flag(lambda: ["tensorboard"], "tensorboard or none, beside metrics.jsonl", resume=True)
    gradient_checkpointing: bool = flag(
        False, "keep one activation per layer and compute the others again: less memory, a third more time",
        resume=True)
    offload: bool = flag(False, "text encoder and reward models are on the GPU only while they are in use", resume=True)
    dry_run: bool = flag(False, "build everything, make one tiny step, print the plan, write nothing", resume=True)
    num_threads: int = flag(0, "CPU threads; 0: torch's choice", least=0, resume=True)
    comm_timeout: float = flag(
        1800.0, "seconds without an answer after which the processes give another one up, and the run ends; more than "
        "rank 0 takes to write and hash a checkpoint, unless --async_save", above=0, resume=True)

    def __post_init__(self):
        check_flags(self)


@dataclass(frozen=True)
class PromptConfig:
    """Prompts of text-to-image runs."""

    prompt_files: list[str] = flag(help="shapes, or prompt files (.json .jsonl .txt .yaml)")
    eval_prompt_files: list[str] = flag(help="held-out prompts, likewise")


CONFIGS = (RunConfig, PolicyConfig, SamplingConfig, GRPOConfig, RewardSettings, LoRAConfig)


def train(trainer: Callable, configs: tuple, train_conditions: list[Condition], eval_conditions: list[Condition],
          plan_lines: Callable[[tuple, Policy], list[str]], shapes_statistics: Callable) -> list[str]:
    """A whole run; returns the lines that a dry run tells.

    configs: instances of CONFIGS and what a script adds. Every process gets all conditions.
    trainer: grpo_trainer.GRPOTrainer. plan_lines(configs, policy): what the real steps will need.
    shapes_statistics(kind) -> what --image_statistics shapes adds to evaluations.
    """
    run_config, policy_config, sampling, grpo, rewards, adapters = configs[:6]
    device = distributed.setup(run_config.comm_timeout)
    if run_config.num_threads:
        torch.set_num_threads(run_config.num_threads)
    logging.basicConfig(level=logging.INFO if distributed.is_main() else logging.ERROR, format="%(message)s")
    logging.getLogger(__name__).info(grpo.arithmetic(distributed.world_size()))
    for path in (policy_config.vq_ckpt, policy_config.gpt_ckpt):  # before minutes of loading rewards and T5
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
    wants_statistics = run_config.image_statistics == "shapes" and distributed.is_main()
    try:
        with run_folder(run_config, configs) as run:
            trainer(tiny(grpo) if run_config.dry_run else grpo, policy, (train_conditions, reward_set),
                    (eval_conditions, eval_rewards), run,
                    lambda folder, weights: save_policy(folder, policy, policy_config, weights),
                    shapes_statistics(policy_config.gpt_type) if wants_statistics else None).train()
    except SystemExit:  # preempted: every process is here
        distributed.shutdown()
        raise
    lines = []
    if run_config.dry_run and distributed.is_main():
        lines = [*plan_lines(configs[: len(CONFIGS)], policy), "dry run: one tiny step passed, nothing was written"]
    distributed.shutdown()
    return lines


@contextmanager
def run_folder(run_config: RunConfig, configs: tuple) -> Iterator[RunFolder | None]:
    """The run's folder, for this process alone; None in a dry run and in processes other than the first."""
    if run_config.dry_run or not distributed.is_main():
        yield None
        return
    grpo, kinds = next(config for config in configs if isinstance(config, GRPOConfig)), [type(one) for one in configs]
    settings = resolved(*configs) | {"num_processes": distributed.world_size(),
                                     "images_per_update": grpo.images_per_update * distributed.world_size()}
    path = Path(run_config.output_dir) / run_config.run_name
    with only_one(path, f"the run {path}", "wait for its end, or give another --run_name",
                  "choose another --output_dir"):
        run = RunFolder(path, settings, run_config.report_to, changeable(*kinds) | {"num_processes"},
                        defaults_of(*kinds))
        try:
            yield run
        finally:
            run.close()


def tiny(config: GRPOConfig) -> GRPOConfig:
    """One step of two images a process, through the same code."""
    return replace(config, num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                   num_minibatches=1, num_iterations=1, rollout_batch_size=0, exit_step=1, eval_steps=0)


def load_conditions(files: list[str], split: str, count: int, seed: int) -> list[Condition]:
    """files: ["shapes"] draws `count` captions of the split, task by task; else prompt files, read whole."""
    if files != ["shapes"]:
        return load_prompts(files, seed)
    rng = np.random.default_rng((seed, ("train", "test").index(split)))
    return [shapes.prompt_condition(shapes.sample_record(rng, split)) for _ in range(count)]
