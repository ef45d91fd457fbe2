"""Memory and time of a run before it runs: what a process holds in each phase, how long a step takes, what it sends.

`plan(job, machine)` is pure: memory comes from benchmark/speed/on_paper.py, time from counted work over a machine's
ceilings, at shares of them that were measured on a CPU and on one H200 (SHARES). Left out: reward models, the text
encoder, evaluation, saving; overlap of communication with work.
"""
import os
from typing import NamedTuple

import torch

from benchmark.speed import on_paper
from benchmark.speed.on_paper import Job
from benchmark.speed.roofline import Ceilings, decode_work, forward_flops, measure_ceilings
from benchmark.speed.setup import machine_name
from models.decoder import rows_that_fit
from models.gpt import GPTConfig
from models.policy import Policy, default_rollout_dtype
from models.vq import VQConfig
from trainer_utils.memory import SHARE
from trainer_utils.memory import rows_that_fit as images_that_fit
from utils import distributed
from utils.gpu import free_bytes

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PREFETCHED = 2  # blocks whose weights a sharded pass holds at a time: this one, and the next on its way


class Machine(NamedTuple):
    """Ceilings of one process. Bytes and FLOPs per second; links are what a process can send."""

    name: str
    kind: str  # cpu or cuda: whose code runs
    memory: float  # bytes that a process may use
    copy: float  # read and written
    flops: dict[torch.dtype, float]
    link: float = 0.0  # within a machine
    network: float = 0.0  # between machines

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        return Ceilings(self.copy, self.flops[dtype])


class Shares(NamedTuple):
    """Of a ceiling that our code reaches."""

    decoding: float  # of the roofline of decode_work
    products: float  # of a large matrix product, in training
    convolutions: float  # of the same
    making: float  # of the copy's speed, for results of elementwise work
    optimizer: dict[str, float]  # bytes per parameter that a copy would have moved meanwhile


SHARES = {"cpu": Shares(0.43, 0.8, 0.88, 0.5, {"adamw": 80.0, "adamw_fused": 40.0, "adamw_8bit": 1500.0}),
          # of one H200, benchmark/RESULTS.md; convolutions in float32 run on tensor cores as TF32, above the ceiling
          "cuda": Shares(0.3, 0.6, 1.9, 0.2, {"adamw": 50.0, "adamw_fused": 28.0, "adamw_8bit": 200.0})}

# The makers' data sheets: dense bf16, float32 without TF32, memory of the SXM card. Between machines: 400 Gbit/s a GPU.
HARDWARE = {
    "H100": Machine("H100 80 GB", "cuda", 80e9, 3.35e12, {F32: 67e12, BF16: 989e12, F16: 989e12}, 450e9, 50e9),
    "H200": Machine("H200 141 GB", "cuda", 141e9, 4.8e12, {F32: 67e12, BF16: 989e12, F16: 989e12}, 450e9, 50e9),
    "A100": Machine("A100 80 GB", "cuda", 80e9, 2.04e12, {F32: 19.5e12, BF16: 312e12, F16: 312e12}, 300e9, 25e9),
}


class Plan(NamedTuple):
    job: Job
    machine: Machine
    standing: dict[str, float]  # bytes that a process holds all the time, by part
    phases: dict[str, dict[str, float]]  # what a phase adds, by part
    seconds: dict[str, float]  # of a step, by phase
    sent: dict[str, float]  # bytes that a process sends a step, by reason
    at_once: int  # images of a micro-batch
    fit: int  # that would fit

    @property
    def peaks(self) -> dict[str, float]:
        return {name: sum(self.standing.values()) + sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def measured_machine(device: torch.device) -> Machine:
    """The ceilings of the device at hand, now."""
    flops = {dtype: measure_ceilings(device, dtype) for dtype in (F32, BF16, *([F16] if device.type == "cuda" else []))}
    links = (HARDWARE["H100"].link, HARDWARE["H100"].network) if device.type == "cuda" else (1e9, 1e9)
    return Machine(machine_name(device), device.type, free_bytes(device), flops[F32].bytes_per_second,
                   {dtype: one.flops_per_second for dtype, one in flops.items()}, *links)


def job_of(configs: tuple, gpt: GPTConfig, vq: VQConfig, kind: str, world_size: int, gpus_per_node: int = 8) -> Job:
    """configs: instances of trainer_utils.composition.CONFIGS, in that order; kind: cpu or cuda."""
    run, policy, sampling, grpo, _, adapters = configs[:6]
    autocast = policy.autocast_dtype
    rollout = (default_rollout_dtype(autocast, torch.device(kind)) if policy.rollout_dtype == "auto"
               else getattr(torch, policy.rollout_dtype))
    return Job(gpt, vq, grpo, sampling, adapters, run.gradient_checkpointing, autocast, rollout,
               getattr(torch, policy.vq_dtype), policy.decode_batch_size, world_size, gpus_per_node)


def plan(job: Job, machine: Machine) -> Plan:
    weights, group = on_paper.weights_of(job), job.shard_group
    at_once = job.grpo.per_device_train_batch_size if job.grpo.micro_batch_size in (None, "auto") else (
        job.grpo.micro_batch_size)
    optimizer, (reference, _) = on_paper.optimizer_cost(job), on_paper.reference_cost(job, 1)
    tokenizer, _, _ = on_paper.decode_cost(job, 1)
    away = on_paper.reference_kind(job) == "cpu" and machine.kind == "cuda"
    standing = {"parameters": 4 * weights.all / group, "optimizer": optimizer.stays / group,
                "reference": 0 if away else reference / group, "tokenizer": tokenizer}
    if job.world_size > 1 and group == 1:
        standing["gradient buckets"] = 4 * weights.trained  # DDP keeps them
    rollout, num_sampled = rollout_parts(job, machine, weights, sum(standing.values()) - standing["optimizer"])
    if machine.kind == "cuda" and group == 1:  # captured graphs hold their addresses
        standing["rollout buffers"] = rollout.pop("prepared weights") + rollout.pop("cache")
    if away:
        moved = {"reference": reference}
    gathered = gathered_parts(job, weights)
    one, two = (on_paper.update_cost(job, n, 2) for n in (1, 2))
    room = SHARE * machine.memory - sum(standing.values()) - sum(gathered.values())
    fit = images_that_fit(int(room / SHARE), one.peak, two.peak, job.grpo.images_per_update)
    if job.grpo.micro_batch_size == "auto":
        at_once = fit
    shown = 3 * job.num_images * image_side(job) ** 2
    _, reference_pass = on_paper.reference_cost(job, min(at_once, job.num_images))
    decoded = min(job.decode_batch_size, num_sampled)
    phases = {"sample": {**rollout, "images": shown},
              "decode": {"activations": on_paper.decode_cost(job, decoded)[1].peak, "images": shown},
              "reference": {"activations": reference_pass.peak, "images": shown, **(moved if away else {}),
                            **{name: value for name, value in gathered.items() if name != "gathered gradients"}},
              "update": update_parts(job, machine, weights, optimizer.peak, at_once) | gathered}
    return Plan(job, machine, standing, phases, seconds_of_step(job, machine, weights, at_once),
                bytes_sent(job, weights, at_once), at_once, fit)


def image_side(job: Job) -> int:
    return job.gpt.grid[0] * job.vq.downsample


def rollout_parts(job: Job, machine: Machine, weights: on_paper.Weights, standing: float) -> tuple[dict, int]:
    """(bytes by part, images sampled at a time); standing: bytes held at the first rollout."""
    gpt, on_gpu, itemsize = job.gpt, machine.kind == "cuda", job.rollout_dtype.itemsize
    num_images = min(job.num_images, job.grpo.rollout_batch_size or job.num_images)
    if on_gpu:  # models.generate.Engine.limit
        free = int(max(machine.memory - standing, 0)) // 2
        num_images = min(num_images, max(1, rows_that_fit(gpt, job.rollout_dtype, free) // job.halves))
    head = gpt.vocab_size * gpt.dim
    length = gpt.cls_token_num + gpt.block_size - 1
    row = 2 * gpt.n_layer * gpt.kv_heads * (gpt.dim // gpt.n_head) * length * (itemsize if on_gpu else 4)
    parts = {"prepared weights": weights.matrices * itemsize + head * (itemsize + 4 if on_gpu else 4),
             "cache": job.halves * num_images * row,
             "logits": num_images * gpt.vocab_size * (48 if on_gpu else 20)}
    if job.lora.lora_rank:
        parts["merged block"] = 4 * weights.matrices / gpt.n_layer
    if job.shard_group > 1:  # utils.distributed.gathered: all of them, from the rollout's begin to its end
        parts["gathered weights"] = (job.autocast_dtype or F32).itemsize * weights.matrices + 4 * weights.outside
    return parts, num_images


def gathered_parts(job: Job, weights: on_paper.Weights) -> dict[str, float]:
    """What a sharded pass holds beside its shards: whole blocks, one after the other, and what lies outside of them."""
    if job.shard_group == 1:
        return {}
    itemsize, block = (job.autocast_dtype or F32).itemsize, weights.matrices / job.gpt.n_layer
    trained = weights.trained / weights.all
    return {"gathered weights": PREFETCHED * itemsize * block + 4 * weights.outside,
            "gathered gradients": 4 * trained * max(PREFETCHED * block, weights.outside)}


def update_parts(job: Job, machine: Machine, weights: on_paper.Weights, optimizing: int, at_once: int) -> dict:
    """Gradients, and the larger of a pass and the optimizer's step."""
    micro_batches = -(-job.grpo.images_per_update // at_once)
    cost = on_paper.update_cost(job, min(at_once, job.grpo.images_per_update), min(2, micro_batches))
    gradients = 4 * weights.trained
    if machine.kind == "cuda" and job.grpo.optimizer == "adamw":
        optimizing = gradients  # square roots of all second moments at once
    in_buckets = job.world_size > 1 and job.shard_group == 1
    if job.shard_group > 1:
        gradients, work = gradients / job.shard_group, max(cost.peak, optimizing / job.shard_group)
    else:
        work = max(cost.peak - gradients, optimizing)
    return {"gradients": 0 if in_buckets else gradients, "activations": work}


def seconds_of_step(job: Job, machine: Machine, weights: on_paper.Weights, at_once: int) -> dict[str, float]:
    shares, gpt, grpo = SHARES[machine.kind], job.gpt, job.grpo
    guided = job.sampling.num_guided(gpt.block_size)
    rollout = decode_work(gpt, job.num_images, guided, job.rollout_dtype).seconds(machine.ceilings(job.rollout_dtype))
    _, pixels, vq_flops = on_paper.decode_cost(job, 1)
    making = shares.making * machine.copy
    prepared = 3 * job.rollout_dtype.itemsize * weights.all  # cast, packed, moved
    sample = prepared / making + rollout / shares.decoding
    decode = job.num_images * (vq_flops / (shares.convolutions * machine.flops[job.vq_dtype])
                               + pixels.made / making)
    seconds = {"sample": sample, "decode": decode}
    at_once = min(at_once, grpo.images_per_update)
    if grpo.beta:
        dtype = BF16 if on_paper.reference_kind(job) == "bf16" else job.autocast_dtype
        made = on_paper.reference_cost(job, at_once)[1].made * job.num_images / at_once
        seconds["reference"] = product_seconds(job, machine, dtype, 1.0, 1.0) + made / making
    trained = 2.0 if job.lora.lora_rank else 3.0  # passes: forward, gradient of the input, of the weight
    made = on_paper.update_cost(job, at_once, 1).made * job.num_images / at_once
    passes = product_seconds(job, machine, job.autocast_dtype, trained + job.gradient_checkpointing,
                             trained + (1 if job.lora.lora_rank else 0) + 1) + made / making
    updates = grpo.num_iterations * grpo.num_minibatches
    optimizing = shares.optimizer[grpo.optimizer] * weights.trained / job.shard_group / machine.copy
    seconds["update"] = grpo.num_iterations * passes + updates * optimizing
    sent = bytes_sent(job, weights, at_once)
    if sent:
        seconds["communication"] = sum(sent.values()) / bandwidth(job, machine)
    return seconds


def product_seconds(job: Job, machine: Machine, dtype: torch.dtype | None, layer_passes: float,
                    head_passes: float) -> float:
    """Matrix products of a step's images; the head's operands are rounded on GPUs alone."""
    dtype = dtype or F32
    layers, head = forward_flops(job.gpt, job.scored_halves * job.num_images, job.num_images)
    head_dtype = dtype if machine.kind == "cuda" else F32
    share = SHARES[machine.kind].products
    return (layer_passes * layers / machine.flops[dtype] + head_passes * head / machine.flops[head_dtype]) / share


def bytes_sent(job: Job, weights: on_paper.Weights, at_once: int) -> dict[str, float]:
    """By a process in a step, with rings: (n - 1) / n of all that is gathered or reduced.

    A sharded pass gathers weights forward and backward, and reduces gradients, for each micro-batch."""
    world, group, grpo = job.world_size, job.shard_group, job.grpo
    if world == 1:
        return {}
    updates = grpo.num_iterations * grpo.num_minibatches
    if group == 1:
        return {"gradients, all-reduce": updates * 4 * weights.trained * 2 * (world - 1) / world}
    ring, itemsize = (group - 1) / group, (job.autocast_dtype or F32).itemsize
    one_copy = itemsize * weights.matrices + 4 * weights.outside
    micro_batches = updates * -(-grpo.images_per_update // min(at_once, grpo.images_per_update))
    sent = {"weights for a rollout": ring * job.rollout_dtype.itemsize * weights.all,
            "weights, forward and backward": 2 * micro_batches * ring * one_copy,
            "gradients, reduce-scatter": micro_batches * ring * 4 * weights.trained}
    if grpo.beta and on_paper.reference_kind(job) != "cpu":
        passes = -(-job.num_images // at_once)
        sent["weights for the reference"] = passes * ring * one_copy
    replicas = world // group
    if replicas > 1:
        shard = 4 * weights.trained / group
        sent["gradients, between machines"] = micro_batches * shard * 2 * (replicas - 1) / replicas
    return sent


def bandwidth(job: Job, machine: Machine) -> float:
    """Of the slowest link that a ring crosses; hybrid sharding keeps the large rings within a machine."""
    within = job.world_size <= job.gpus_per_node or job.grpo.sharding == "hybrid"
    return machine.link if within else machine.network


def as_lines(plan: Plan) -> list[str]:
    """The table for people. Bytes are 10^9 per GB."""
    job, machine, giga = plan.job, plan.machine, 1e9
    lines = [f"machine      {machine.name}; {job.world_size} processes, sharding {job.grpo.sharding} over "
             f"{job.shard_group}", f"batch        {job.grpo.arithmetic(job.world_size)}",
             f"micro-batch  {plan.at_once} images at a time; {plan.fit} would fit into {machine.memory / giga:.1f} GB"]
    lines += [f"{'standing':<12} {sum(plan.standing.values()) / giga:8.2f} GB = " + parts_text(plan.standing)]
    lines += [f"{name:<12} {plan.peaks[name] / giga:8.2f} GB = standing + " + parts_text(parts)
              for name, parts in plan.phases.items()]
    over = " MORE THAN THERE IS" if plan.peak > machine.memory else ""
    lines += [f"{'peak':<12} {plan.peak / giga:8.2f} GB of {machine.memory / giga:.1f}{over}"]
    total = sum(plan.seconds.values())
    lines += [f"{'seconds':<12} {total:8.2f} a step = "
              + " + ".join(f"{name} {value:.2f}" for name, value in plan.seconds.items())
              + f"; {job.num_images * job.world_size / total:.2f} images/s"]
    if plan.sent:
        lines += [f"{'sent':<12} {sum(plan.sent.values()) / giga:8.2f} GB a step and process = "
                  + parts_text(plan.sent)]
    return lines


def parts_text(parts: dict[str, float]) -> str:
    return " + ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value >= 5e6)


def plan_lines(configs: tuple, policy: Policy) -> list[str]:
    """What the steps of a run will need, from this machine's measured ceilings; configs: as for `job_of`."""
    machine = measured_machine(policy.device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    job = job_of(configs, policy.gpt.config, policy.vq.config, machine.kind, distributed.world_size(), local)
    return as_lines(plan(job, machine))
