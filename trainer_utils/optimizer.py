"""Optimizers by name, and the learning rate of each step.

`AdamW8bit` keeps both moments in 8 bits, block by block (as arXiv 2110.02861 does), so that a parameter's state takes
2.03 bytes in place of 8. Levels are spaced evenly on a logarithmic scale, and values are rounded up or down at random
in proportion: to the nearest level, a moment that changes by a per cent a step would never leave its level.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_utils.grpo_config import GRPOConfig

BLOCK = 256  # values that share a scale
NAMES = ("adamw", "adamw_fused", "adamw_8bit")


def build_optimizer(name: str, parameters: list[Tensor], lr: float, beta2: float,
                    weight_decay: float) -> torch.optim.Optimizer:
    options = dict(lr=lr, betas=(0.9, beta2), weight_decay=weight_decay)
    if name == "adamw_8bit":
        return AdamW8bit(parameters, **options)
    if name not in NAMES:
        raise ValueError(f"optimizer must be one of {', '.join(NAMES)}, got {name!r}")
    return torch.optim.AdamW(parameters, **options, **({"fused": True} if name == "adamw_fused" else {}))


def learning_rate(config: GRPOConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0 at `exit_step`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.exit_step - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def signed_levels() -> Tensor:
    """255 ascending values: 0, and 127 magnitudes from 2^-16 to 1 of either sign."""
    magnitudes = torch.logspace(-16, 0, 127, base=2)
    return torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])


def positive_levels() -> Tensor:
    """256 ascending values from 2^-30 to 1. No 0: a second moment that vanished would make its update explode."""
    return torch.logspace(-30, 0, 256, base=2)


def quantize(values: Tensor, levels: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """float [n, BLOCK] -> (uint8 [n, BLOCK], scales float32 [n, 1]); the mean over roundings is the value itself."""
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    relative = values / scale
    above = torch.searchsorted(levels, relative).clamp(1, len(levels) - 1)  # the first level that is not below
    low, high = levels[above - 1], levels[above]
    share = (relative - low) / (high - low)  # below 0 under the lowest level: down to it
    draws = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(draws < share, above, above - 1).to(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    return levels[codes.int()] * scale


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on float32 parameters. An update uses the exact new moments; only what is kept from
    one update to the next is rounded. The rounding's randomness is keyed by (step, parameter): processes that hold the
    same gradients stay alike, and a resumed run continues bit for bit."""

    def __init__(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float = 0.0,
                 eps: float = 1e-8):
        super().__init__(parameters, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        device = self.param_groups[0]["params"][0].device
        self.levels = {"mean": signed_levels().to(device), "square": positive_levels().to(device)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.update(p, group, i)

    def update(self, p: Tensor, group: dict, index: int) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        state["step"] = step = state.get("step", 0) + 1
        grad = F.pad(p.grad.flatten().float(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
        mean, square = (dequantize(state[name], state[f"{name}_scale"], levels) if name in state
                        else torch.zeros_like(grad) for name, levels in self.levels.items())
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        change = (mean / (1 - beta1 ** step)) / ((square / (1 - beta2 ** step)).sqrt_() + group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(change.flatten()[: p.numel()].view_as(p), alpha=group["lr"])
        generator = torch.Generator(p.device).manual_seed(step * 2 ** 20 + index)
        for name, moment in (("mean", mean), ("square", square)):
            state[name], state[f"{name}_scale"] = quantize(moment, self.levels[name], generator)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch casts a state to its parameter's dtype
            state.update({name: state[name].to(torch.uint8) for name in ("mean", "square") if name in state})
