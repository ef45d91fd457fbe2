"""What a training run needs, found before it: the trainer's own code runs on tensors without data, watched by a Meter.

Fake tensors have shapes and dtypes alone, so a GPT-7B step takes seconds and no memory. They stand on the CPU:
attention and autocast there keep what they keep on a GPU, except that a GPU's head multiplies rounded operands.

Shapes: n images of a pass.
"""
import functools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from grpo_trainer import GRPOConfig, grpo_loss
from models.generate import SamplingConfig
from models.gpt import GPT, GPTConfig
from models.lora import LoRAConfig, add_adapters
from models.policy import Policy, Scorer
from models.vq import VQConfig, VQModel
from trainer_utils.memory import Meter
from trainer_utils.optimizer import build_optimizer

F32 = torch.float32


@dataclass(frozen=True)
class Job:
    """A run, as far as memory and time depend on it."""

    gpt: GPTConfig
    vq: VQConfig
    grpo: GRPOConfig
    sampling: SamplingConfig = SamplingConfig()
    lora: LoRAConfig = field(default=LoRAConfig(), hash=False)  # it holds a list
    gradient_checkpointing: bool = False
    autocast_dtype: torch.dtype | None = None
    rollout_dtype: torch.dtype = torch.float32
    vq_dtype: torch.dtype = torch.float32
    decode_batch_size: int = 64
    world_size: int = 1
    gpus_per_node: int = 8

    def __post_init__(self):
        if self.world_size > self.gpus_per_node and self.world_size % self.gpus_per_node:
            raise ValueError(f"gpus {self.world_size} must be a multiple of gpus_per_node {self.gpus_per_node}")

    @property
    def shard_group(self) -> int:
        """Processes that share one copy of the weights; 1: each has its own."""
        return {"none": 1, "full": self.world_size,
                "hybrid": min(self.world_size, self.gpus_per_node)}[self.grpo.sharding]

    @property
    def num_images(self) -> int:
        """Of a step and process."""
        return self.grpo.prompts_per_step * self.grpo.num_generations

    @property
    def halves(self) -> int:
        """Rows of an image: two with guidance."""
        return 2 if self.sampling.num_guided(self.gpt.block_size) else 1

    @property
    def scored_halves(self) -> int:
        return 1 if self.grpo.guidance_logprob == "conditional" else self.halves


class Cost(NamedTuple):
    peak: int  # bytes beyond what stood before
    stays: int  # bytes left afterwards
    made: int  # bytes of all results, which a device has to write at least


class Weights(NamedTuple):
    """Numbers of parameters."""

    matrices: int  # of all blocks
    outside: int  # embeddings, head, norms
    trained: int
    largest_trained: int

    @property
    def all(self) -> int:
        return self.matrices + self.outside


@functools.cache
def weights_of(job: Job) -> Weights:
    with FakeTensorMode():
        parameters = list(fake_gpt(job).named_parameters())
    blocks = sum(p.numel() for name, p in parameters if name.startswith("layers."))
    trained = [p.numel() for _, p in parameters if p.requires_grad]
    return Weights(blocks, sum(p.numel() for _, p in parameters) - blocks, sum(trained), max(trained))


@functools.cache
def update_cost(job: Job, num_images: int, micro_batches: int) -> Cost:
    """Forward and backward passes of `micro_batches` of num_images each, one after the other, gradients included; with
    sharding, gradients leave a process as they are made."""
    with FakeTensorMode():
        scorer = fake_scorer(job)
        if job.shard_group > 1:
            for p in scorer.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        inputs, (logps, advantages) = scorer_inputs(job, num_images), torch.zeros(2, num_images, job.gpt.block_size)
        with Meter() as meter:
            for _ in range(micro_batches):
                with autocast(job.autocast_dtype):
                    new_logps, _ = scorer(*inputs)
                loss, _ = grpo_loss(new_logps, logps, logps if job.grpo.beta else None, advantages[:, 0],
                                    beta=job.grpo.beta)
                loss.backward()
                del loss, new_logps, _
    return Cost(meter.peak, meter.live, meter.made)


@functools.cache
def optimizer_cost(job: Job) -> Cost:
    """A later step, whose moments exist; `stays` are the moments."""
    grpo = job.grpo
    with FakeTensorMode():
        parameters = [p for p in fake_gpt(job, F32).parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = build_optimizer(grpo.optimizer, parameters, grpo.learning_rate, grpo.adam_beta2, grpo.weight_decay)
        with Meter() as meter:
            optimizer.step()
            state, made, meter.peak = meter.live, meter.made, meter.live
            nn.utils.clip_grad_norm_(parameters, grpo.max_grad_norm)
            optimizer.step()
    return Cost(meter.peak - state, state, meter.made - made)


@functools.cache
def reference_cost(job: Job, num_images: int) -> tuple[int, Cost]:
    """(bytes of the reference's own weights, a pass of num_images)."""
    kind, grpo = reference_kind(job), job.grpo
    if not grpo.beta:
        return 0, Cost(0, 0, 0)
    with FakeTensorMode():
        plain = replace(job, lora=LoRAConfig())  # what an adapted model is with its adapters off
        size = 0 if kind == "lora_base" else size_of(fake_gpt(plain, torch.bfloat16 if kind == "bf16" else F32))
        gpt = fake_gpt(plain, torch.bfloat16 if kind == "bf16" else None)
        dtype = torch.bfloat16 if kind == "bf16" else job.autocast_dtype
        policy = Policy(gpt, None, job.sampling, autocast_dtype=dtype)
        scorer = policy.scorer(grpo.guidance_logprob, grpo.head_chunk_tokens).requires_grad_(False)
        condition, tokens, mask = scorer_inputs(job, num_images)
        with Meter() as meter:
            policy.score(scorer, condition, tokens, mask, num_images)
    return size, Cost(meter.peak, meter.live, meter.made)


def reference_kind(job: Job) -> str:
    """As trainer_utils.reference chooses."""
    return job.grpo.reference if job.grpo.reference != "auto" else "lora_base" if job.lora.lora_rank else "float32"


@functools.cache
def decode_cost(job: Job, num_images: int) -> tuple[int, Cost, float]:
    """(bytes of the tokenizer, decoding num_images at once, its FLOPs)."""
    with FakeTensorMode():
        vq = VQModel(job.vq).eval().requires_grad_(False)
        gpt = GPT(replace(job.gpt, n_layer=1))  # tells the grid
        policy = Policy(gpt, vq, job.sampling, decode_batch_size=num_images, vq_dtype=job.vq_dtype)
        tokens = torch.zeros(num_images, job.gpt.block_size, dtype=torch.long)
        with Meter() as meter, FlopCounterMode(display=False) as counter:
            policy.decode(tokens)
    return size_of(vq), Cost(meter.peak, meter.live, meter.made), counter.get_total_flops()


def size_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def fake_gpt(job: Job, matrices: torch.dtype | None = None) -> GPT:
    """matrices: dtype of the blocks' matrices; None: float32, or of the products where sharded ones are gathered."""
    gpt = GPT(job.gpt).eval()
    gpt.gradient_checkpointing = job.gradient_checkpointing
    add_adapters(gpt, job.lora)
    gathered = job.autocast_dtype if job.shard_group > 1 else None
    for module in gpt.layers.modules() if matrices or gathered else ():
        if isinstance(module, nn.Linear):  # Module.to swaps tensors, which fake ones don't allow
            module.weight = nn.Parameter(module.weight.detach().to(matrices or gathered))
    return gpt


def fake_scorer(job: Job) -> Scorer:
    return Scorer(fake_gpt(job), job.sampling, job.grpo.guidance_logprob, job.grpo.head_chunk_tokens).eval()


def scorer_inputs(job: Job, num_images: int) -> tuple:
    gpt, mask = job.gpt, None
    condition = torch.zeros(num_images, dtype=torch.long)
    if gpt.model_type == "t2i":
        condition = torch.zeros(num_images, gpt.cls_token_num, gpt.caption_dim)
        mask = torch.ones(num_images, gpt.cls_token_num, dtype=torch.bool)
    return condition, torch.zeros(num_images, gpt.block_size, dtype=torch.long), mask


def autocast(dtype: torch.dtype | None):
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
