"""The mathematics of the objective: pure functions of tensors.

Shapes: P prompts, G generations of each, K rewards, N = P G images, L tokens of an image.
"""
import torch
from torch import Tensor

from trainer_utils.statistics import centred, masked_mean, nan_std


def group_advantages(rewards: Tensor, scale_rewards: str = "group", eps: float = 1e-4) -> Tensor:
    """rewards float [P, G] -> advantages [P, G]: (r - mean of its group) / (spread + eps), arXiv 2402.03300, sec. 4.1.

    The spread is the unbiased standard deviation of the group ("group") or of all rewards ("batch"), or is left out
    ("none"). A reward that failed (NaN) leaves the statistics of its group and gets a NaN advantage.
    """
    if scale_rewards == "none":
        return centred(rewards)
    if scale_rewards == "batch":
        return centred(rewards) / (nan_std(rewards.reshape(1, -1)) + eps)
    return centred(rewards) / (nan_std(rewards) + eps)


def aggregate_advantages(scores: Tensor, weights: list[float], aggregation: str, scale_rewards: str) -> Tensor:
    """scores [K, P, G] of K rewards -> advantages [P, G]; "sum" mixes rewards first, "normalise" mixes advantages."""
    if aggregation == "sum":
        return group_advantages(weighted_sum(scores, weights), scale_rewards)
    return weighted_sum(torch.stack([group_advantages(one, scale_rewards) for one in scores]), weights)


def weighted_sum(scores: Tensor, weights: list[float]) -> Tensor:
    """scores [K, P, G] -> [P, G]; a weight of 0 also takes that reward's NaNs out."""
    weight = torch.tensor(weights, dtype=scores.dtype, device=scores.device)[:, None, None]
    return torch.where(weight == 0, 0.0, weight * scores).sum(0)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, *, epsilon: float = 0.2,
              epsilon_high: float | None = None, beta: float = 0.0, importance_sampling_level: str = "token",
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective with a KL penalty (arXiv 2402.03300 eq. 3; k3 estimator of eq. 4), a scalar to minimise.

    logps, old_logps, ref_logps: float [N, L], log-probabilities of the sampled tokens under the trained, the sampling
    and the reference policy (ref_logps may be None when beta is 0). advantages: float [N]; a NaN takes its sample out.
    Mean over tokens, then over the remaining samples. Metrics are detached scalars over the same samples.
    """
    valid = ~advantages.isnan()  # [N]
    advantage = advantages.nan_to_num(0.0)[:, None]  # [N, 1]
    log_ratio = logps - old_logps
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.mean(dim=1, keepdim=True)  # [N, 1]
    ratio = log_ratio.exp()
    high = epsilon if epsilon_high is None else epsilon_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)  # [N, L or 1]
    metrics = {"clip_low": ((ratio < 1 - epsilon) & (advantage < 0)).float(),
               "clip_high": ((ratio > 1 + high) & (advantage > 0)).float(), "ratio": ratio}
    if ref_logps is not None:
        delta = ref_logps - logps
        metrics["kl"] = delta.exp() - delta - 1  # k3: unbiased and never negative
    if beta:
        assert ref_logps is not None, "beta > 0 needs ref_logps"
        loss = loss + beta * metrics["kl"]
    return masked_mean(loss, valid), {name: masked_mean(value.detach(), valid) for name, value in metrics.items()}
