"""The one place that talks to torch.distributed; the rest of the code reads as a single process.

Works plainly without torchrun (world size 1, no process group). Sharding is left out: parameters are replicated (DDP).
"""
import os
import re
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def setup(timeout_sec: float = 1800.0) -> torch.device:
    """Joins torchrun's process group when there is one; returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine has no GPU, {count} are visible: start at most {count} "
                             "processes (GPUS, or --nproc_per_node), or hide all GPUs with CUDA_VISIBLE_DEVICES=")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_sec),
                                device_id=device if on_gpu else None)  # else nccl guesses it at the first barrier
    return device


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class PeerLost(ConnectionError):
    """Another process has ended or does not answer: this one can only end, too."""

    consequence = True  # the other's error is the one to show (models/config.py)


@contextmanager
def translated_errors():
    """Around a script's main: a collective that failed becomes PeerLost, one line instead of a traceback."""
    try:
        yield
    except RuntimeError as error:  # gloo raises it plainly, nccl a subclass
        message = str(error)
        if not isinstance(error, dist.DistError) and "gloo/transport" not in message:
            raise
        waited = re.search(r"(?:Timed out waiting |timeout after |Timeout\(ms\)=)(\d+)", message)
        if waited:
            seconds = int(waited[1]) / 1000
            raise PeerLost(f"another process has not answered for {seconds:g} s (--comm_timeout)") from error
        detail = re.sub(r"\[\S*\.cc:\d+\] ", "", message).split(". ")[0].splitlines()[0]
        raise PeerLost(f"the connection to another process broke, whose error is the cause ({detail})") from error


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value):
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value) -> list:
    """Every rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def gather_to_main(value) -> list | None:
    """Every rank's value, in the order of ranks, on rank 0; None elsewhere: large values cost no memory there."""
    if not dist.is_initialized():
        return [value]
    parts = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, parts)
    return parts


def failure_report(scores: dict[str, Tensor], failures: dict[str, dict[int, str]]) -> str:
    """What failed and why; empty if nothing did. scores: of all ranks, by reward; failures: this one's."""
    if not any(one.isnan().any() for one in scores.values()):  # the same on all ranks
        return ""
    own = {name: next(iter(reasons.values())) for name, reasons in failures.items() if reasons}
    parts = [own]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    reasons = {name: reason for part in reversed(parts) for name, reason in part.items()}
    return "; ".join(f"{name} failed on {one.isnan().sum()} of {one.numel()} images ({reasons.get(name, '?')})"
                     for name, one in scores.items() if one.isnan().any())


def gather(tensor: Tensor) -> Tensor:
    """Equal-shaped tensors of all ranks -> [W, ...], rank-major, on every rank."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def gather_groups(rows: Tensor, group: int) -> Tensor:
    """Rows of all ranks in the order of the prompts: rank r holds prompts r, r + W, ... with `group` rows each."""
    parts = gather(rows.unflatten(0, (-1, group)))  # [W, P, G, ...]
    return parts.transpose(0, 1).flatten(0, 2)  # [P W G, ...]


def reduce(value: float | Tensor, op: str, device: torch.device) -> float:
    """sum, max or mean of a number over ranks."""
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return tensor.item() / (world_size() if op == "mean" else 1)


def replicate(module: nn.Module) -> nn.Module:
    """Same weights on every rank, gradients averaged over ranks in backward."""
    if not dist.is_initialized():
        return module
    device_ids = [torch.cuda.current_device()] if next(module.parameters()).is_cuda else None
    return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)  # else each gradient exists twice


def no_sync(module: nn.Module, skip: bool):
    """Context in which backward leaves gradients local (`skip`): all but the last micro-batch of an update."""
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()


class Metrics:
    """Running numbers of one step by name: weighted means and maxima over batches and processes, and seconds.

    Every process must add the same names in the same order. Values stay on the device until `means`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}  # name -> [weighted sum, weight]
        self.maxima: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    def add(self, values: dict, weight: float | Tensor = 1.0) -> None:
        weight = torch.as_tensor(weight, dtype=torch.float64, device=self.device)
        for name, value in values.items():
            entry = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) * weight, weight])
            self.sums[name] = self.sums[name] + entry if name in self.sums else entry

    def add_max(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    @contextmanager
    def timed(self, name: str):
        """Adds the seconds spent inside to `name`, the device's queue included."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def means(self) -> dict[str, float]:
        """Means and maxima over processes; seconds are this process's own."""
        numbers = dict(self.seconds)
        if self.sums:
            totals, weights = gather(torch.stack(list(self.sums.values()))).sum(0).T  # each [number of names]
            numbers.update(zip(self.sums, (totals / weights.clamp(min=1e-12)).tolist()))
        if self.maxima:
            numbers.update(zip(self.maxima, gather(torch.stack(list(self.maxima.values()))).amax(0).tolist()))
        return numbers
