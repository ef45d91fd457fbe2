"""Means and spreads that leave failed samples (NaN, or masked) out, and the diversity of token sequences."""
import torch
from torch import Tensor


def centred(rewards: Tensor) -> Tensor:
    """Minus the mean over the last dimension without NaNs; exactly 0 where all are equal (their mean is rounded)."""
    shifted = rewards - rewards.nan_to_num(torch.inf).amin(dim=-1, keepdim=True)
    return shifted - shifted.nanmean(dim=-1, keepdim=True)


def nan_std(rewards: Tensor) -> Tensor:
    """Unbiased standard deviation over the last dimension without NaNs; 0 where fewer than two values are left."""
    valid = ~rewards.isnan()
    squares = centred(rewards).square().nansum(dim=-1, keepdim=True)
    return (squares / (valid.sum(dim=-1, keepdim=True) - 1).clamp(min=1)).sqrt()  # [..., 1]


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """values [N, l], valid bool [N] -> mean over the valid samples (0 when none is left, still differentiable)."""
    return torch.where(valid, values.mean(dim=1), 0.0).sum() / valid.sum().clamp(min=1)


def token_hamming(tokens: Tensor, group: int) -> Tensor:
    """Mean share of positions at which two images of the same prompt differ; tokens [P G, L]. 0: all alike."""
    groups = tokens.unflatten(0, (-1, group))  # [P, G, L]
    differ = (groups[:, :, None] != groups[:, None]).float().mean(dim=(0, 3))  # [G, G]
    return differ.sum() / max(1, group * (group - 1))


def without_spread(rewards: Tensor) -> Tensor:
    """rewards float [P, G] -> bool [P]: groups whose rewards are all the same, to rounding; failed ones (NaN) aside."""
    low, high = rewards.nan_to_num(torch.inf).amin(dim=1), rewards.nan_to_num(-torch.inf).amax(dim=1)
    return high - low <= 1e-6 * torch.maximum(low.abs(), high.abs()).clamp(min=1.0, max=1e30)
