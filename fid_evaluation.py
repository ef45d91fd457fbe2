"""Compare two sets of images as ADM's evaluator does: FID, sFID, Inception Score, precision, recall; and KID.

    python fid_evaluation.py VIRTUAL_imagenet256_labeled.npz SAMPLES --image_size 256 --json OUT.json
    python fid_evaluation.py REF SAMPLES --features shapes --bootstrap 1000
    torchrun --nproc_per_node 8 fid_evaluation.py REF SAMPLES      # the processes share the feature pass
    python fid_evaluation.py IMAGES --save_stats STATS.npz         # a reference file of one's own

REF and SAMPLES are .npz files (`arr_0`, uint8 [N, H, W, 3]) or folders of PNG, JPEG or WebP files. REF may bring
statistics (`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID): they stand, and its images, if it has any, serve precision,
recall and KID. Images are read batch by batch; only their features stay in memory. The order of the images changes
nothing, unless --keep_order asks for the original's Inception Score.

Inception's weights are looked for in REWARD_MODELS and torch.hub's cache, else downloaded once; --weights names a file.

Legend: N images, D feature width, S width of the spatial features, K classes.
"""
import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from reward_utils.fid_math import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    Moments,
    bootstrap_interval,
    frechet_distance,
    inception_score,
    inside,
    kernel_distance,
    moments,
    precision_recall,
)
from reward_utils.inception import FEATURES, extract_all, load_features
from utils import distributed
from utils.config import Parser, one_line_errors
from utils.image_files import Batch, Share, count_images, read_batches
from utils.npz import npz_keys, open_npz, peek, read_array, read_text

__all__ = ["frechet_distance", "inception_score", "precision_recall", "kernel_distance", "measure", "compare",
           "Evaluation", "parse_args", "format_table", "count_images", "read_batches"]

JOINED = 8192  # rows that lie in one array: the allocator gives back large arrays alone, and a merge needs the room
SHUFFLE_KEY = b"fid_evaluation"  # seed of the order in which the Inception Score cuts its splits
METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "precision": "precision",
           "recall": "recall", "kid": "KID"}


# ---- the feature pass ------------------------------------------------------------------------------------------------

class Measured(NamedTuple):
    """What a set of images leaves behind. A statistics file has mu and sigma, perhaps mu_s and sigma_s, alone."""

    mu: np.ndarray  # float64 [D]
    sigma: np.ndarray  # float64 [D, D]
    mu_s: np.ndarray | None = None  # float64 [S], of the spatial features
    sigma_s: np.ndarray | None = None  # float64 [S, S]
    features: np.ndarray | None = None  # float32 [N, D]
    probs: np.ndarray | None = None  # float32 [N, K]
    spatial: np.ndarray | None = None  # float32 [N, S], kept for bootstrap intervals alone
    size: tuple[int, int] | None = None  # (height, width) of the images
    skipped: tuple[str, ...] = ()  # why files were left out
    is_stored: bool = False  # mu and sigma come from a file, perhaps of other images than the features


@dataclass
class Part:
    """What one process found in its share of the images."""

    pool: Moments = field(default_factory=Moments)
    spatial: Moments = field(default_factory=Moments)
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)  # pieces of JOINED rows
    waiting: dict[str, list[np.ndarray]] = field(default_factory=dict)  # a piece of each batch since then
    size: tuple[int, int] | None = None
    skipped: list[str] = field(default_factory=list)


def measure(batches: Iterable[np.ndarray], net: torch.nn.Module) -> Measured:
    """Run uint8 [n, H, W, 3] batches through a feature network; see `merge` for the order."""
    part, start = Part(), 0
    for images in batches:
        add_batch(part, Batch(np.arange(start, start + len(images)), images), net)
        start += len(images)
    return merge([part])


def add_batch(part: Part, batch: Batch, net: torch.nn.Module, image_size: int | None = None,
              keep_spatial: bool = False) -> None:
    images = torch.from_numpy(np.array(batch.images)).permute(0, 3, 1, 2)  # [n, 3, H, W], a copy that torch may write
    if image_size is not None:
        images = shrink(images, image_size)
    features, probs, spatial = extract_all(net, images, len(images))
    part.size = batch.images.shape[1:3]
    part.pool.update(features.numpy())
    if spatial is not None:
        spatial = spatial.numpy()
        part.spatial.update(spatial)
    hashes = [int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8, key=SHUFFLE_KEY).digest(), "big")
              for image in batch.images]
    pieces = {"indices": batch.indices, "hashes": np.array(hashes, dtype=np.uint64), "features": features.numpy(),
              "probs": probs.numpy(), **({"spatial": spatial} if keep_spatial and spatial is not None else {})}
    for name, piece in pieces.items():
        part.waiting.setdefault(name, []).append(piece)
    if sum(map(len, part.waiting["indices"])) >= JOINED:
        join(part)


def join(part: Part) -> None:
    while part.waiting:
        name, pieces = part.waiting.popitem()
        part.columns.setdefault(name, []).append(np.concatenate(pieces))


def shrink(images: torch.Tensor, size: int) -> torch.Tensor:
    """LlamaGen's resize for evaluation: bicubic without antialiasing on [-1, 1], then rounded. uint8 [N, 3, H, W]."""
    height, width = images.shape[2:]
    if height != width or height < size:
        raise ValueError(f"images of {width}x{height} pixels cannot be made smaller to {size}x{size} (--image_size)")
    if height == size:
        return images

    def resized(part: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(part / 127.5 - 1, size=(size, size), mode="bicubic")
        return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)

    return torch.cat([resized(part) for part in images.split(16)])  # floats of a few images at a time


def merge(parts: list[Part], keep_order: bool = False) -> Measured:
    """One set from the parts of all processes, which are used up: hundreds of megabytes don't lie about twice.

    Rows are ordered by a keyed hash of the pixels, a shuffle that does not know the order of the files; keep_order:
    by their place in the set.
    """
    sizes = {part.size for part in parts if part.size}
    if len(sizes) > 1:
        raise ValueError("images of several sizes: " + ", ".join(f"{width}x{height}" for height, width in sizes))
    skipped = tuple(reason for part in parts for reason in part.skipped)
    if not sizes:
        raise ValueError(f"none of the images can be read ({skipped[0]})")
    pool, spatial = Moments(), Moments()
    for part in parts:
        join(part)
        pool.merge(part.pool)
        spatial.merge(part.spatial)
    indices, hashes = (np.concatenate(_take(parts, name)) for name in ("indices", "hashes"))
    order = np.argsort(indices) if keep_order else np.lexsort((indices, hashes))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    columns = {name: _placed(_take(parts, name), place) for name in ("features", "probs", "spatial")}
    return Measured(*pool.result(), *(spatial.result() if spatial.count else (None, None)), **columns, size=sizes.pop(),
                    skipped=skipped)


def _take(parts: list[Part], name: str) -> list[np.ndarray]:
    return [piece for part in parts for piece in part.columns.pop(name, [])]


def _placed(pieces: list[np.ndarray], place: np.ndarray) -> np.ndarray | None:
    """Row i of all pieces in line goes to row place[i]."""
    if not pieces:
        return None
    result, start = np.empty((len(place), *pieces[0].shape[1:]), dtype=pieces[0].dtype), 0
    for piece in pieces:
        result[place[start:start + len(piece)]] = piece
        start += len(piece)
    return result


def measure_path(path: Path, net: torch.nn.Module, args: argparse.Namespace) -> Measured | None:
    """`measure` of an .npz file or a folder by all processes; None but on rank 0. A complaint names the path."""
    world, part = distributed.world_size(), Part()
    share = Share(distributed.rank(), world)
    try:
        with tqdm(total=count_images(path), desc=path.name, unit="img", disable=not distributed.is_main()) as bar:
            for batch in read_batches(path, args.batch_size, share, part.skipped if args.skip_bad else None):
                add_batch(part, batch, net, args.image_size, keep_spatial=args.bootstrap > 0)
                bar.update(min(len(batch.images) * world, bar.total - bar.n))
        parts = distributed.gather_to_main(part)
        return None if parts is None else merge(parts, args.keep_order)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


# ---- reference statistics --------------------------------------------------------------------------------------------

def save_statistics(path: Path, measured: Measured, features_name: str) -> None:
    """The name of the network goes into the file, so that another network's statistics are refused later."""
    names = ("mu", "sigma", "mu_s", "sigma_s")
    arrays = {name: getattr(measured, name) for name in names if getattr(measured, name) is not None}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, features=np.array(features_name))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_statistics(path: Path, net: torch.nn.Module, features_name: str) -> dict[str, np.ndarray] | None:
    """mu, sigma, mu_s and sigma_s, as far as an .npz file has them (ADM's reference batches do); None: no mu."""
    if path.is_dir():
        return None
    dims = {"mu": net.feature_dim, "sigma": net.feature_dim, "mu_s": net.spatial_dim, "sigma_s": net.spatial_dim}
    shapes = {name: (dim,) * (2 if name.startswith("sigma") else 1) for name, dim in dims.items()}
    with open_npz(path) as archive:
        keys = npz_keys(archive)
        if "mu" not in keys and "sigma" not in keys:
            return None
        if "features" in keys and (name := read_text(archive, "features")) != features_name:
            raise ValueError(f"{path}: statistics of the {name[:80]} features, not of {features_name}")
        if "mu" not in keys or "sigma" not in keys:
            raise ValueError(f"{path}: a statistics file needs both mu and sigma; keys: {', '.join(keys)}")
        found = {}
        for name in (name for name in shapes if name in keys):
            shape = peek(archive, name).shape
            if shape == shapes[name]:  # read only then: a file may claim any size
                found[name] = read_array(archive, name)
            if name not in found or not np.isfinite(found[name]).all():
                raise ValueError(f"{path}: {name} must be {list(shapes[name])} finite numbers for the {features_name} "
                                 f"features, not {list(shape)}: both sides must come from the same feature network")
    return found


def measure_reference(path: Path, net: torch.nn.Module, args: argparse.Namespace) -> Measured | None:
    """Like `measure_path`; where the file brings statistics, they stand, and its images serve precision and recall."""
    statistics = load_statistics(path, net, args.features)
    if statistics is None:
        return measure_path(path, net, args)
    with open_npz(path) as archive:
        has_images = "arr_0" in npz_keys(archive)
    if not has_images:
        return Measured(**statistics, is_stored=True)
    measured = measure_path(path, net, args)
    return measured and measured._replace(**{"mu_s": None, "sigma_s": None, **statistics}, is_stored=True)


# ---- comparing -------------------------------------------------------------------------------------------------------

def compare(ref: Measured, samples: Measured, half_distances: bool = False, num_kid_subsets: int = 0,
            num_resamples: int = 0, on_stage: Callable[[str], None] = lambda stage: None) -> dict:
    """METRICS, None where the reference has no images or the network no spatial features; and "bootstrap" intervals.

    KID and the intervals are left out unless their numbers are given. on_stage is told what is computed.
    """
    found = dict.fromkeys(METRICS)
    on_stage("Frechet distances, Inception Score")
    found["fid"] = frechet_distance(ref.mu, ref.sigma, samples.mu, samples.sigma)
    if ref.mu_s is not None and samples.mu_s is not None:
        found["sfid"] = frechet_distance(ref.mu_s, ref.sigma_s, samples.mu_s, samples.sigma_s)
    found["inception_score"] = inception_score(samples.probs)
    flags = {}
    if ref.features is not None:
        on_stage("precision, recall")
        flags["precision"], flags["recall"] = inside(ref.features, samples.features, 3, half_distances)
        found |= {name: float(flag.mean()) for name, flag in flags.items()}
        if num_kid_subsets:
            on_stage("KID")
            found["kid"], found["kid_std"] = kernel_distance(ref.features, samples.features, num_kid_subsets)
    if num_resamples:
        on_stage(f"intervals from {num_resamples} resamples")
        found["bootstrap"] = intervals(found, ref, samples, flags, num_resamples)
    return found


def intervals(found: dict, ref: Measured, samples: Measured, flags: dict[str, np.ndarray],
              num_resamples: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals, see `bootstrap_interval`. Sample images are resampled; for recall, a share of the
    reference images, those. KID has its own spread over subsets, kid_std."""
    statistics = {
        "fid": (lambda rows: frechet_distance(ref.mu, ref.sigma, *moments(samples.features, rows)), {}),
        "sfid": (lambda rows: frechet_distance(ref.mu_s, ref.sigma_s, *moments(samples.spatial, rows)), {}),
        "inception_score": (lambda rows: inception_score(samples.probs[rows]), {"lowest": 1.0}),
        "precision": (lambda rows: float(flags["precision"][rows].mean()), {"highest": 1.0}),
        "recall": (lambda rows: float(flags["recall"][rows].mean()), {"highest": 1.0}),
    }
    return {name: bootstrap_interval(found[name], statistic, len(flags.get(name, samples.features)), num_resamples,
                                     **limits)
            for name, (statistic, limits) in statistics.items() if found[name] is not None}


def remarks(ref: Measured, samples: Measured) -> list[str]:
    """What a reader of the numbers must know about the two sets."""
    lines = []
    for name, measured in (("reference", ref), ("sample", samples)):
        if not measured.is_stored and len(measured.features) <= measured.mu.size:
            lines.append(f"{len(measured.features)} {name} images are too few for a covariance of {measured.mu.size} "
                         "features (it is rank deficient): FID is too high, and compares at this number of images only")
        if measured.skipped:
            lines.append(f"{len(measured.skipped)} {name} files could not be read and were left out, the first: "
                         f"{measured.skipped[0]}")
    return lines


def protocol(ref: Measured, samples: Measured, args: argparse.Namespace) -> str:
    """How the numbers came about, on one line: two lines that differ are not comparable."""
    def size(measured: Measured) -> str:
        if measured.size is None:
            return "statistics alone"
        text = "{1}x{0} px".format(*measured.size)
        if args.image_size and measured.size[0] != args.image_size:
            text += f", stored levels made {args.image_size}x{args.image_size} (bicubic, not antialiased, as LlamaGen)"
        return text

    order = "the order of the set" if args.keep_order else "an order drawn from the pixels"
    parts = [f"features: {FEATURES[args.features].title}", f"reference: {size(ref)}", f"samples: {size(samples)}",
             f"Inception Score: splits of 5000 in {order}",
             f"distances: {'float16, as ADM' if args.fp16_distances else 'float64'}",
             f"KID: {KID_SUBSETS} subsets of {KID_SUBSET_SIZE} at most"]
    if args.bootstrap:
        parts.append(f"intervals: 95 % of {args.bootstrap} resamples of the samples (recall: of the reference), about "
                     "the value")
    return "; ".join(parts)


# ---- the command -----------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("ref", type=Path, help=".npz (images or statistics) or folder of images")
    parser.add_argument("samples", type=Path, nargs="?", help=".npz (images) or folder; none: only --save_stats")
    parser.add_argument("--features", choices=FEATURES, default="inception", help="feature network")
    parser.add_argument("--weights", type=Path, help="weights of the feature network")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, metavar="PIXELS",
                        help="larger images are made this small first (LlamaGen evaluates at 256)")
    parser.add_argument("--fp16_distances", action="store_true",
                        help="precision and recall from distances in float16, rounded as ADM's")
    parser.add_argument("--keep_order", action="store_true",
                        help="cut the Inception Score's splits in the order of the set, as the original does")
    parser.add_argument("--skip_bad", action="store_true", help="leave out files that cannot be read, and count them")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N",
                        help="95 %% intervals from N resamples (Inception: some seconds per resample)")
    parser.add_argument("--save_stats", type=Path, metavar="OUT.npz", help="write the reference's statistics")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the numbers as JSON")
    args = parser.parse_args(argv)
    if args.samples is None and args.save_stats is None:
        parser.error("give SAMPLES to compare with the reference, or --save_stats")
    if args.save_stats and args.save_stats.suffix != ".npz":
        parser.error(f"--save_stats {args.save_stats}: the name must end in .npz, to be a reference later")
    for name, least in (("batch_size", 1), ("image_size", 1), ("bootstrap", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return args


class Evaluation:
    """A feature network and a measured reference, for any number of sets of samples. All processes call it alike."""

    def __init__(self, args: argparse.Namespace):
        for out in filter(None, (args.save_stats, args.json)):
            out.parent.mkdir(parents=True, exist_ok=True)  # an unwritable place shows before the work
        self.args, device = args, distributed.setup()
        if distributed.is_main():
            self.net = load_features(args.features, args.weights)
        distributed.barrier()  # one process downloads
        if not distributed.is_main():
            self.net = load_features(args.features, args.weights)
        self.net.to(device)
        self.ref = measure_reference(args.ref, self.net, args)
        if args.save_stats and distributed.is_main():
            save_statistics(args.save_stats, self.ref, args.features)

    def __call__(self, path: Path) -> dict | None:
        """The numbers of an .npz file or folder on rank 0, None elsewhere."""
        samples = measure_path(path, self.net, self.args)
        if samples is None:
            return None
        with tqdm(bar_format="{desc} {elapsed}", leave=False) as bar:  # minutes at 50,000 images on few cores
            found = compare(self.ref, samples, self.args.fp16_distances, KID_SUBSETS, self.args.bootstrap,
                            bar.set_description_str)
        return {"ref": str(self.args.ref), "samples": str(path), "features": self.args.features, **found,
                "num_ref_images": None if self.ref.features is None else len(self.ref.features),
                "num_sample_images": len(samples.features),
                "num_skipped": len(self.ref.skipped) + len(samples.skipped),
                "protocol": protocol(self.ref, samples, self.args), "warnings": remarks(self.ref, samples)}


def format_table(results: dict) -> str:
    lines = []
    for name, title in METRICS.items():
        value, limits = results[name], results.get("bootstrap", {}).get(name)
        text = "-" if value is None else f"{value:.4f}"
        if limits:
            text += "   [{:.4f}, {:.4f}]".format(*limits)
        if name == "kid" and value is not None:
            text += f"   (standard deviation over subsets {results['kid_std']:.4f})"
        lines.append(f"{title:<16} {text}")
    lines += [f"{results['num_sample_images']} images of {results['samples']} against "
              f"{results['num_ref_images'] or 'the statistics'} of {results['ref']}", results["protocol"]]
    return "\n".join(lines + [f"warning: {line}" for line in results["warnings"]])


def evaluate(args: argparse.Namespace) -> dict | None:
    """From the command's arguments to the numbers (on rank 0); writes the files that were asked for."""
    if args.samples:
        count_images(args.samples)  # a mistaken path shows before minutes of reference images
    evaluation = Evaluation(args)
    results = evaluation(args.samples) if args.samples else None
    if args.json and results:
        args.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = evaluate(args)
    if results:
        print(format_table(results))
    distributed.shutdown()


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
