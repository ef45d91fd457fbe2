"""The mathematics of the objective: pure functions of tensors.

Shapes: P prompts, G generations of each, K rewards, N = P G images, L tokens of an image.
"""
import math

import torch
import torch.nn.functional as F
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
              kl_form: str = "k3", kl_ratio_weight: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective with a KL penalty (arXiv 2402.03300 eq. 3), a scalar to minimise.

    logps, old_logps, ref_logps: float [N, L], log-probabilities of the sampled tokens under the trained, the sampling
    and the reference policy (ref_logps may be None when beta is 0). advantages: float [N]; a NaN takes its sample out.
    kl_form: see `kl_penalty`. kl_ratio_weight: the penalty times the probability ratio of its token, which keeps it
    unbiased after the first update of a rollout (DeepSeek-V3.2; TRL's use_bias_correction_kl). Mean over tokens, then
    over the remaining samples. Metrics are detached scalars over the same samples; "kl" is k3 whatever the form.
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
        metrics["kl"] = kl_penalty(logps, ref_logps, "k3")
    if beta:
        assert ref_logps is not None, "beta > 0 needs ref_logps"
        penalty = metrics["kl"] if kl_form == "k3" else kl_penalty(logps, ref_logps, kl_form)
        loss = loss + beta * (penalty * (logps - old_logps).exp() if kl_ratio_weight else penalty)
    return masked_mean(loss, valid), {name: masked_mean(value.detach(), valid) for name, value in metrics.items()}


def kl_penalty(logps: Tensor, ref_logps: Tensor, form: str) -> Tensor:
    """A penalty for each sampled token, float [N, L], of d = ref - logp, never negative (J. Schulman, "Approximating KL
    divergence", 2020).

    k3: e^d - d - 1, an unbiased estimate of the KL to the reference; its gradient is that of KL(ref | policy). k2:
    d^2 / 2; its gradient is that of KL(policy | ref). js: the sampled token's share of the Jensen-Shannon
    divergence, (ln 2 - ln(1 + w) + w (ln 2 - ln(1 + 1/w))) / 2 with w = e^d (BPD-GRPO, arXiv 2606.21498); near w = 1 it
    pulls a quarter as hard as k3, so equal beta is not equal strength.
    """
    delta = ref_logps - logps
    if form == "k2":
        return delta.square() / 2
    if form == "js":
        return 0.5 * (math.log(2) - F.softplus(delta) + delta.exp() * (math.log(2) - F.softplus(-delta)))
    return delta.exp() - delta - 1


def token_distances(tokens: Tensor, codebook: Tensor) -> Tensor:
    """tokens int64 [P, G, L], codebook float [V, E] -> [P, G, G]: mean over cells of 1 - cosine of the two codes."""
    codes = F.normalize(codebook, dim=-1)[tokens].flatten(2)  # [P, G, L E], each cell of length 1
    return 1 - codes @ codes.transpose(1, 2) / tokens.shape[2]


def diversity_shaped(advantages: Tensor, distances: Tensor, power: float = 1.0) -> Tensor:
    """Positive advantages [P, G] times (d_i / mean d)^power, d_i an image's distance to its nearest other member of the
    group; negative ones stay (GARDO, arXiv 2512.24138). distances [P, G, G]. Images without a reward (NaN) stay out."""
    valid = ~advantages.isnan()  # [P, G]
    pairs = valid[:, :, None] & valid[:, None] & ~torch.eye(advantages.shape[1], dtype=torch.bool, device=valid.device)
    nearest = distances.masked_fill(~pairs, torch.inf).amin(dim=2)  # [P, G]
    nearest = nearest.where(nearest.isfinite(), 0.0).clamp(min=0)
    mean = (nearest.sum(1) / valid.sum(1).clamp(min=1))[:, None]  # [P, 1]
    share = torch.where(mean > 0, nearest / mean.clamp(min=1e-12), 1.0)  # all alike: nobody is preferred
    return torch.where(advantages > 0, advantages * share ** power, advantages)
