"""Weak scaling of GRPO steps over processes, what they send, and the share of time that it takes; the shapes model.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 1 -m benchmark.speed.scaling
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m benchmark.speed.scaling --sharding full

(`python -m benchmark.speed.scaling` is the first.) Each process has the same work. Bytes are those of the tensors that
a process hands to collective operations, counted by torch's dispatcher; beside them stands what the parameters predict.
Seconds in communication are a process's time inside gloo's or nccl's operations, by the profiler, in a step of its own;
waiting for a slower process counts.
"""
import collections
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset.labels import class_conditions, load_class_names
from grpo_trainer import GRPOConfig, GRPOTrainer
from img_gen_grpo_rewards import RewardSet
from models.build import PolicyConfig, load_policy
from models.generate import SamplingConfig
from utils import distributed
from utils.config import flag, one_line_errors, parse_args

SHAPES = "models/pretrained/shapes"


@dataclass(frozen=True)
class ScalingConfig:
    sharding: Literal["none", "full", "hybrid"] = flag("none", "as in training")
    images: int = flag(32, "of an update and process")
    steps: int = flag(6, "timed, after two that are not")


class Sent(TorchDispatchMode):
    """Bytes of the tensors given to collective operations inside, by operation."""

    def __init__(self):
        super().__init__()
        self.nbytes: dict[str, int] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            inputs = args[1] if name in ("allgather_base", "reduce_scatter_base") else args[0]  # after the output
            self.nbytes[name] += sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def make_trainer(config: ScalingConfig, device: torch.device) -> GRPOTrainer:
    policy = load_policy(PolicyConfig(f"{SHAPES}/gpt_c2i", f"{SHAPES}/vq", image_size=64, num_classes=32,
                                      class_names="shapes"), SamplingConfig(), device)
    grpo = GRPOConfig(num_generations=8, per_device_train_batch_size=config.images, sharding=config.sharding,
                      exit_step=config.steps + 3, max_logp_gap=1.0)
    rewards = RewardSet(["shapes_graded"], device=device)
    return GRPOTrainer(grpo, policy, (class_conditions(load_class_names("shapes")), rewards), None, None,
                       lambda folder, weights: None)


def one_step(trainer: GRPOTrainer, step: int) -> None:
    metrics = distributed.Metrics(trainer.device)
    trainer.update(trainer.rollout(step, metrics), step, metrics)
    metrics.means()


def predicted_bytes(trainer: GRPOTrainer, sharding: str) -> int:
    """What one update hands over: all gradients to an all-reduce; or, sharded, a slice of the blocks' matrices for each
    of two passes (the reference's besides), all of them once for the rollout, of the rest for the passes, and whole
    gradients to the reduce-scatter."""
    if distributed.world_size() == 1:
        return 0
    gpt = trainer.scorer.gpt
    total = 4 * sum(p.numel() for p in gpt.parameters())
    if sharding == "none":
        return total
    blocks = 4 * sum(p.numel() for layer in gpt.layers for part in (layer.attention, layer.feed_forward)
                     for p in part.parameters())
    passes = 4 * blocks + 3 * (total - blocks)  # rollout, reference, forward, backward; the rest stays for backward
    return total + passes // distributed.world_size()


def communication_seconds(trainer: GRPOTrainer, step: int) -> tuple[float, float]:
    """(inside collectives, of the whole step) under the profiler, which slows both."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        started = time.perf_counter()
        one_step(trainer, step)
        seconds = time.perf_counter() - started
    inside = sum(event.time_range.elapsed_us() for event in watched.events()
                 if event.name.startswith(("gloo:", "nccl:")))
    return inside / 1e6, seconds


def main(argv: list[str] | None = None) -> dict[str, float]:
    [config] = parse_args((ScalingConfig,), argv, __doc__)
    trainer = make_trainer(config, distributed.setup())
    for step in range(2):
        one_step(trainer, step)
    distributed.barrier()
    started = time.perf_counter()
    for step in range(2, config.steps + 2):
        one_step(trainer, step)
    distributed.barrier()
    seconds = (time.perf_counter() - started) / config.steps
    with Sent() as sent:
        one_step(trainer, config.steps + 2)
    inside, watched = communication_seconds(trainer, config.steps + 3)
    world = distributed.world_size()
    result = {"processes": world, "seconds": seconds, "images_per_sec": config.images * world / seconds,
              "communication_share": inside / watched, "bytes": sum(sent.nbytes.values()),
              "predicted_bytes": predicted_bytes(trainer, config.sharding)}
    if distributed.is_main():
        print(f"{world} processes, sharding {config.sharding}, {torch.get_num_threads()} threads each, {config.images} "
              f"images a process: {seconds:.3f} s a step, {result['images_per_sec']:.1f} images/s; "
              f"{100 * inside / watched:.1f} % of a step in communication")
        print(f"handed to collectives a step and process: {result['bytes'] / 1e6:.2f} MB, predicted "
              f"{result['predicted_bytes'] / 1e6:.2f} MB; "
              + ", ".join(f"{name} {count / 1e6:.2f}" for name, count in sent.nbytes.items()))
    distributed.shutdown()
    return result


if __name__ == "__main__":
    with one_line_errors():
        main()
