"""The reference policy of the KL penalty: what training began with, in the form that costs the least memory.

`--reference`:
- float32: a second copy of all weights;
- bf16: the blocks' matrices as bf16, the rest in float32. In a bf16 run the same log-probabilities bit for bit, since
  autocast would round these matrices to the same numbers; in a float32 run the KL carries bf16's rounding
  (benchmark/RESULTS.md says how much);
- cpu: the float32 copy waits in the CPU's memory and moves in for its pass;
- lora_base: no copy, the trained model with its adapters off; the only choice with --lora_rank;
- auto: lora_base with --lora_rank, else float32.
With --sharding each process holds its slice of the copy.
"""
import copy
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.lora import adapted, base_alone
from models.policy import Policy, Scorer
from utils import distributed

KINDS = ("auto", "float32", "bf16", "cpu", "lora_base")


class Reference:
    def __init__(self, scorer: Scorer, kind: str = "auto", sharding: str = "none"):
        """Made before the first update and before sharding; `scorer` is copied, or borrowed with its adapters off."""
        if kind not in KINDS:
            raise ValueError(f"reference must be one of {', '.join(KINDS)}, got {kind!r}")
        has_adapters = any(adapted(scorer))
        self.kind = ("lora_base" if has_adapters else "float32") if kind == "auto" else kind
        if has_adapters != (self.kind == "lora_base"):
            raise ValueError(f"--reference {kind} does not go {'with' if has_adapters else 'without'} --lora_rank: "
                             "leave --reference out")
        self.device = scorer.gpt.output.weight.device
        self.scorer = scorer
        if self.kind != "lora_base":
            self.scorer = copy.deepcopy(scorer).requires_grad_(False)
        if self.kind == "bf16":
            for module in self.scorer.gpt.layers.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.sharding = sharding if distributed.world_size() > 1 else "none"
        if self.kind == "cpu" and self.sharding == "none":
            self.scorer.cpu()
            for tensor in tensors_of(self.scorer) if self.device.type == "cuda" else ():
                tensor.data = tensor.data.pin_memory()  # twice as fast to copy

    def score(self, policy: Policy, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None,
              batch_size: int) -> Tensor:
        """log-probabilities float32 [N, L] of `tokens`, without gradient, in batches."""
        with self.ready():
            return self.rounding(policy).score(self.scorer, condition, tokens, condition_mask, batch_size)

    def rounding(self, policy: Policy) -> Policy:
        return replace(policy, autocast_dtype=torch.bfloat16) if self.kind == "bf16" else policy

    def shard(self, policy: Policy) -> None:
        """Leaves each process its slice; what is borrowed is its owner's to shard."""
        if self.kind != "lora_base" and self.sharding != "none":
            shard_scorer(self.rounding(policy), self.scorer, self.sharding, offload=self.kind == "cpu")

    @contextmanager
    def ready(self):
        if self.kind == "lora_base":
            with base_alone(self.scorer):
                yield
        elif self.kind == "cpu" and self.sharding == "none":
            waiting = [tensor.data for tensor in tensors_of(self.scorer)]
            self.scorer.to(self.device)
            try:
                yield
            finally:  # it has not changed: nothing is copied back
                for tensor, data in zip(tensors_of(self.scorer), waiting):
                    tensor.data = data
        else:
            yield
        distributed.release(self.scorer)


def distribute(policy: Policy, scorer: Scorer, sharding: str) -> nn.Module:
    """The module to call in training: replicated (DDP), or the scorer itself with its parameters sharded in place."""
    if sharding == "none":
        return distributed.replicate(scorer)
    shard_scorer(policy, scorer, sharding)
    return scorer


def shard_scorer(policy: Policy, scorer: Scorer, sharding: str, offload: bool = False) -> None:
    """A block's matrices are gathered for its passes, in the dtype of the matrix products; its norms, the embeddings
    and the head, which work in float32, with the whole. So do adapters: in bf16 their small share would be lost."""
    parts = [[block.attention, block.feed_forward] for block in scorer.gpt.layers]
    dtype = None if any(adapted(scorer)) else policy.autocast_dtype
    distributed.shard(scorer, parts, sharding, dtype, offload)
    null = scorer.gpt.null_condition(1)
    # FSDP takes the module that runs first for the whole: it must be the scorer, not a block in a rollout.
    policy.score(scorer, null, torch.zeros(1, 2, dtype=torch.long, device=null.device), None, 1)
    distributed.release(scorer)


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
