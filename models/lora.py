"""Low-rank adapters on a GPT's matrices (LoRA, arXiv 2106.09685): W + (alpha / rank) B A with a frozen W.

The forward pass multiplies by the merged matrix, rounded as the sampler rounds it, so that the scored policy is the
sampled one; in bf16 x W + x A B would be another. The gradients stay low-rank: no gradient of W is ever made. `weight`
of an adapted matrix is the merged one: whatever reads weights, the decoder or an export, gets what is in effect.
Left out: adapters on embeddings and the head, dropout.

Shapes: n rows of an input, r rank.
"""
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gpt import GPT
from models.head import float32_product
from utils.config import check_flags, flag

TARGETS = ("wqkv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters."""

    lora_rank: int = flag(0, "train adapters of this rank alone; 0: all weights", least=0)
    lora_alpha: float = flag(32.0, "adapters are scaled by lora_alpha / lora_rank")
    lora_targets: list[str] = flag(lambda: list(TARGETS), "matrices with adapters: " + " ".join(TARGETS))

    def __post_init__(self):
        check_flags(self)
        unknown = [name for name in self.lora_targets if name not in TARGETS]
        if unknown or not self.lora_targets:
            raise ValueError(f"lora_targets must be some of {', '.join(TARGETS)}, got {' '.join(unknown) or 'none'}")


class MergedProduct(torch.autograd.Function):
    """x [..., in] times (base + scale b a)^T -> [..., out], in `dtype`; base [out, in], a [r, in], b [out, r]."""

    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.scale, ctx.dtype, ctx.x_dtype = scale, dtype, x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, base, a, b)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, merged(base, a, b, scale).to(dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, base, a, b = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        to_x = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_x = (grad @ merged(base, a, b, scale).to(dtype)).to(ctx.x_dtype)
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)  # [n, in], [n, out]
            to_a = scale * float32_product((grad @ b.to(dtype)).T, x)  # [r, in]
            to_b = scale * float32_product(grad.T, x @ a.to(dtype).T)  # [out, r]
        return to_x, None, to_a, to_b, None, None


def merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    with torch.autocast(base.device.type, enabled=False):
        return torch.addmm(base, b, a, alpha=scale)


class LoRALinear(nn.Module):
    """Stands where `linear` stood; its frozen weight is the parameter `base`. Starts as exactly `linear`."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig, generator: torch.Generator):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.base = nn.Parameter(linear.weight.detach(), requires_grad=False)
        start = torch.rand(config.lora_rank, in_features, generator=generator) * 2 - 1
        self.lora_a = nn.Parameter((start * math.sqrt(3 / in_features)).to(self.base))  # unit rows, as nn.Linear's
        self.lora_b = nn.Parameter(self.base.new_zeros(out_features, config.lora_rank))
        self.scale, self.enabled = config.lora_alpha / config.lora_rank, True

    @property
    def weight(self) -> Tensor:
        """The matrix in effect [out, in]."""
        return merged(self.base, self.lora_a, self.lora_b, self.scale) if self.enabled else self.base

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.base)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base.dtype
        return MergedProduct.apply(x, self.base, self.lora_a, self.lora_b, self.scale, dtype)


def add_adapters(gpt: GPT, config: LoRAConfig) -> None:
    """Freezes everything and puts an adapter beside each target matrix; nothing when the rank is 0."""
    if not config.lora_rank:
        return
    gpt.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)  # the same start in every process and run
    for block in gpt.layers:
        for part in (block.attention, block.feed_forward):
            for name in config.lora_targets:
                if hasattr(part, name):
                    setattr(part, name, LoRALinear(getattr(part, name), config, generator))


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


@contextmanager
def base_alone(model: nn.Module):
    """Adapters off inside: the model that training began with."""
    modules = [module for _, module in adapted(model)]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


@torch.no_grad()
def merged_items(model: nn.Module, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
                 ) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the state dict with plain keys, adapters merged; whole: what makes a tensor of a sharded one.
    One by one, since all whole tensors of a sharded model may not fit."""
    adapters = dict(adapted(model))
    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        if owner not in adapters:
            yield name, whole(tensor)
        elif part == "base":
            module = adapters[owner]
            yield f"{owner}.weight", merged(*map(whole, (module.base, module.lora_a, module.lora_b)), module.scale)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    return dict(merged_items(model))
