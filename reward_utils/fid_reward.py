"""FID as a reward: the Frechet distance of sampled images' features to a reference's, credited to single images.

leave_one_out  FID without the image minus FID with it, over the batch and the fading moments of earlier batches; above
               0 where the image brings the samples closer to the reference. Exact, for one eigendecomposition a batch.
group          AR-GRPO's: the batch in two halves (an odd image makes a third part), the FID of each on a step map; all
               images of a part get the same. The covariance of a few images is degenerate: kept for comparison.

Features are those of reward_utils.inception, so the statistics must be, too: ADM's reference batches, or an .npz that
`fid_evaluation.py --save_stats` wrote (pytorch-fid resizes differently). Each process counts its own images.

Legend: N images, D feature width, W weight of all images counted, earlier ones faded.
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reward_utils.inception import extract, load_features
from reward_utils.quantize import FID_BOUNDS, FID_REWARDS, quantize
from reward_utils.settings import RewardSettings
from reward_utils.weights import locate
from utils.files import one_line
from utils.npz import npz_keys, open_npz, peek, read_array, read_text

DECAY = 0.9  # of earlier images' weight, per batch: they weigh at most 9 batches
NUM_PARTS = 2  # of a batch, in the group form


class Reference(nn.Module):
    """Moments of the reference: mean [D], factor [D, D] with factor @ factor.T = covariance, trace of that; float64."""

    def __init__(self, mu: np.ndarray, sigma: np.ndarray):
        super().__init__()
        values, vectors = torch.linalg.eigh(torch.as_tensor(sigma, dtype=torch.float64))
        self.register_buffer("mean", torch.as_tensor(mu, dtype=torch.float64))
        self.register_buffer("factor", vectors * values.clamp(min=0).sqrt())
        self.register_buffer("trace", values.sum())


class FadingMoments(nn.Module):
    """Weight W, mean [D] and scatter [D, D] about it of feature rows; `state_dict()` is all there is to keep."""

    def __init__(self, dim: int):
        super().__init__()
        for name, shape in (("weight", ()), ("mean", (dim,)), ("scatter", (dim, dim))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Counts rows float64 [N, D], after DECAY on all earlier ones; merged about the means, to lose no digits."""
        weight, mean = DECAY * self.weight, rows.mean(dim=0)
        total, shift, centred = weight + len(rows), mean - self.mean, rows - mean
        self.scatter = (DECAY * self.scatter + centred.T @ centred
                        + torch.outer(shift, shift) * (weight * len(rows) / total))
        self.mean, self.weight = self.mean + shift * (len(rows) / total), total


def frechet_of_few(rows: Tensor, reference: Reference) -> Tensor:
    """Frechet distance of rows float64 [N, D], N >= 2, to the reference; the roots are those of an [N, N] matrix."""
    mean = rows.mean(dim=0)
    centred = (rows - mean) / math.sqrt(len(rows) - 1)
    mixed = centred @ reference.factor
    root_trace = torch.linalg.eigvalsh(mixed @ mixed.T).clamp(min=0).sqrt().sum()
    distance = ((mean - reference.mean) ** 2).sum() + centred.square().sum() + reference.trace - 2 * root_trace
    return distance.clamp(min=0)  # rounding alone goes below


def leave_one_out(rows: Tensor, counted: FadingMoments, reference: Reference) -> Tensor:
    """FID without row i minus FID with all, [N]; rows float64 [N, D] are among `counted`, whose weight is above 2.

    Without a row d off the mean, the mean moves by -d / (W - 1) and the covariance is that of all, minus
    c d d^T with c = W / (W - 1)^2, times (W - 1) / (W - 2).
    """
    weight, off = counted.weight, rows - counted.mean
    lengths, grown = off.square().sum(dim=1), (weight - 1) / (weight - 2)
    toward = off @ (counted.mean - reference.mean)
    mean_change = lengths / (weight - 1) ** 2 - 2 * toward / (weight - 1)

    spread = counted.scatter.trace() / (weight - 1)
    removed = weight / (weight - 1) ** 2  # c
    trace_change = grown * (spread - removed * lengths) - spread

    product = reference.factor.T @ counted.scatter @ reference.factor / (weight - 1)
    values, vectors = torch.linalg.eigh(product)
    parts = (off @ reference.factor @ vectors).square() * removed  # [N, D]
    root_trace = values.clamp(min=0).sqrt().sum()
    root_change = grown.sqrt() * (root_trace - root_trace_lost(values, parts)) - root_trace
    return mean_change + trace_change - 2 * root_change


def root_trace_lost(values: Tensor, parts: Tensor) -> Tensor:
    """tr A^(1/2) - tr (A - y y^T)^(1/2), [N], for eigenvalues [D] of A and the squares [N, D] of y's parts along them.

    det(A + t^2 - y y^T) / det(A + t^2) = 1 - sum_j parts_j / (values_j + t^2) =: g(t), and the difference of the root
    traces is -1/pi times the integral of log g over t > 0. In log t the integrand is analytic within pi/2 of the real
    axis, so that the trapezoidal rule is exact to 1e-14; the ends, 1e-9 of the scale away, weigh as little.
    """
    values, step = values.clamp(min=0), 0.3
    scale = values.max().clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    nodes = scale * torch.arange(-21, 21, step, dtype=values.dtype, device=values.device).exp()  # t, [K]
    ratios = 1 - parts @ (1 / (values[:, None] + nodes ** 2))  # g, [N, K]
    return -(ratios.clamp(min=1e-20).log() @ nodes) * (step / math.pi)


class FidScorer(nn.Module):
    """scorer(images uint8 [N, 3, H, W], prompts, metadata) -> (score float32 [N] on the CPU, {sample: reason}).

    `counted` holds the moments that a checkpoint would keep; without them the first batches after a resume count
    themselves alone. inception_model "shapes" reads the shapes world's features.
    """

    def __init__(self, settings: RewardSettings, device: torch.device):
        super().__init__()
        name = "shapes" if settings.inception_model == "shapes" else "inception"
        net = load_features(name, None if name == "shapes" else locate("inception_model", settings))
        if settings.fid_stats is None:
            raise ValueError("fid needs --fid_stats FILE.npz, the moments of the reference images: "
                             f"fid_evaluation.py REF SAMPLES --features {name} --save_stats FILE.npz writes them")
        self.reference = Reference(*load_moments(Path(settings.fid_stats), name, net.feature_dim))
        self.net, self.counted = net, FadingMoments(net.feature_dim)
        self.form, self.batch_size = settings.fid_reward, settings.reward_batch_size
        self.to(device)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        features, _ = extract(self.net, images, self.batch_size)
        rows = features.to(self.reference.mean)
        scores, reason = self.by_part(rows) if self.form == "group" else self.by_image(rows)
        scores = scores.float().cpu()
        return scores, {i: reason for i in scores.isnan().nonzero().flatten().tolist()}

    def by_image(self, rows: Tensor) -> tuple[Tensor, str]:
        self.counted.update(rows)
        if self.counted.weight <= 2:
            return rows.new_full((len(rows),), math.nan), "leave_one_out needs at least 3 images in the first batch"
        return leave_one_out(rows, self.counted, self.reference), ""

    def by_part(self, rows: Tensor) -> tuple[Tensor, str]:
        distances = rows.new_full((len(rows),), math.nan)
        size = max(1, len(rows) // NUM_PARTS)
        for start in range(0, len(rows), size):
            part = rows[start: start + size]
            if len(part) > 1:
                distances[start: start + size] = frechet_of_few(part, self.reference)
        return quantize(distances, FID_BOUNDS, FID_REWARDS), "a part of one image has no covariance"


def load_moments(path: Path, features_name: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """mu [D] and sigma [D, D] of an .npz; ValueError where they are not there, not finite or another network's."""
    try:
        with open_npz(path) as archive:
            shapes = [peek(archive, key).shape for key in ("mu", "sigma")]
            fits = shapes == [(dim,), (dim, dim)]
            mu, sigma = (read_array(archive, key) for key in ("mu", "sigma")) if fits else (None, None)
            name = read_text(archive, "features") if "features" in npz_keys(archive) else features_name
    except (OSError, ValueError) as error:
        raise ValueError(f"--fid_stats {path}: no .npz with mu and sigma ({one_line(error)})") from error
    if name != features_name:
        raise ValueError(f"--fid_stats {path}: statistics of the {name[:80]} features, not of {features_name}")
    if not fits or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError(f"--fid_stats {path}: mu {list(shapes[0])} and sigma {list(shapes[1])} must be [{dim}] and "
                         f"[{dim}, {dim}], finite: both sides must come from the same feature network")
    return mu, sigma
