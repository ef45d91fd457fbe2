"""The one place that talks to torch.distributed; the rest of the code reads as a single process.

Works plainly without torchrun (world size 1, no process group). Parameters are replicated (DDP) or sharded (FSDP2, the
ZeRO of arXiv 1910.02054), training states go to the disk in shards that any other number of processes reads back.
"""
import ctypes
import inspect
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

_timeout = timedelta(seconds=1800)  # of every group, as `setup` was told


def setup(timeout_sec: float = 1800.0) -> torch.device:
    """Joins torchrun's process group when there is one; returns this process's device."""
    device = torch.device("cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":  # orphans of a killed torchrun would train on
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.environ.get("ARGRPO_LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):  # gone before that line
            raise ConnectionError("the launcher that started this process is gone")
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine has no GPU, {count} are visible: start at most {count} "
                             "processes (GPUS, or --nproc_per_node), or hide all GPUs with CUDA_VISIBLE_DEVICES=")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        global _timeout
        _timeout = timedelta(seconds=timeout_sec)
        on_gpu = device.type == "cuda"  # gloo is there too: objects, and checkpoints written in the background
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_timeout,
                                device_id=device if on_gpu else None)  # else nccl guesses it at the first barrier
    return device


def shutdown() -> None:
    if dist.is_initialized():
        device_mesh.cache_clear()
        background_group.cache_clear()
        dist.destroy_process_group()


class PeerLost(ConnectionError):
    """Another process has ended or does not answer: this one can only end, too."""

    consequence = True  # the other's error is the one to show (utils/config.py)


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
    """sum, max, min or mean of a number over ranks."""
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor, {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM))
    return tensor.item() / (world_size() if op == "mean" else 1)


def replicate(module: nn.Module) -> nn.Module:
    """Same weights on every rank, gradients averaged over ranks in backward."""
    if not dist.is_initialized():
        return module
    device_ids = [torch.cuda.current_device()] if next(module.parameters()).is_cuda else None
    # torch 2.14 has renamed the option: buffers (rope, the null caption) never change.
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **buffers)  # one copy


def no_sync(module: nn.Module, skip: bool):
    """Context in which backward leaves gradients local (`skip`): all but the last micro-batch of an update.

    Sharded gradients are always reduced to this rank's slice, since whole ones would take the memory that sharding
    saves; between machines ("hybrid") the slices are summed up once.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(not skip)
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()


# ---------------------------------------------------------------------------------------------------- sharding


@lru_cache
def device_mesh(sharding: str, kind: str) -> DeviceMesh:
    """full: every rank holds a slice; hybrid: the ranks of a machine do, and machines hold copies."""
    if sharding == "full":
        return init_device_mesh(kind, (world_size(),))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if not local or world_size() % local:
        raise ValueError(f"--sharding hybrid needs as many processes on every machine: {world_size()} in all, "
                         f"LOCAL_WORLD_SIZE (torchrun sets it) says {local or 'nothing'}")
    ranks = torch.arange(world_size()).view(-1, local)  # a machine's in a row
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=_timeout)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def shard(module: nn.Module, parts: Iterable[list[nn.Module]], sharding: str, dtype: torch.dtype | None = None,
          offload: bool = False) -> None:
    """Replaces the parameters of `module` by this rank's slices (FSDP2), in float32; nothing without a process group.

    parts: modules whose parameters are gathered together, in `dtype`, for their forward and backward pass and freed
    after each. The rest of `module` is gathered in float32 from its forward to its backward pass. offload: the slices
    wait in the CPU's memory.
    """
    if not dist.is_initialized():
        return
    options = dict(mesh=device_mesh(sharding, next(module.parameters()).device.type))
    if offload and options["mesh"].device_type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    for part in parts:  # residual streams stay as they are: inputs are not cast
        fully_shard(part, **options, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    fully_shard(module, **options, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


@contextmanager
def gathered(module: nn.Module):
    """Whole parameters inside, as plain tensors, each in the dtype of its passes; slices again outside."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def release(module: nn.Module) -> None:
    """Frees what a forward pass without backward left gathered."""
    if isinstance(module, FSDPModule):
        module.reshard()


def local_bytes(tensor: Tensor) -> int:
    """Of this rank's slice."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def whole(tensor: Tensor) -> Tensor:
    """A slice's tensor from all ranks, on all ranks; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copies `value`, which every rank has, into a tensor or into this rank's slice of it."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


# ------------------------------------------------------------------------------------------------- checkpoints


@lru_cache
def background_group():
    """Ranks of its own for the thread that writes checkpoints: its messages must not mix with training's."""
    return dist.new_group(backend="gloo", timeout=_timeout) if dist.is_initialized() else None


def hush_single_process_warnings() -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is what was meant


def save_shards(tensors: dict[str, Tensor], folder: Path) -> Callable[[], None]:
    """Copies `tensors` (by the same names on all ranks) and begins to write them into `folder`, each rank its slices,
    as safetensors. Returns a function that waits for the end; an OSError there says what went wrong, on all ranks."""
    hush_single_process_warnings()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    group = background_group()
    writing = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)

    def wait() -> None:
        try:
            writing.result()
        except dcp.api.CheckpointException as error:
            where, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, OSError):
                raise OSError(cause.errno, f"process {where}: {cause.strerror or cause}") from None
            raise

    return wait


def load_shards(folder: Path, like: Callable[[str, torch.Size], Tensor | None]) -> dict[str, Tensor]:
    """What `save_shards` wrote, on any number of processes: by name, as like(name, shape) is sharded (None: not)."""
    hush_single_process_warnings()
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        pattern = like(name, stored.size)
        dtype = stored.properties.dtype
        tensors[name] = torch.empty(stored.size, dtype=dtype) if pattern is None else \
            torch.empty_like(pattern, dtype=dtype, requires_grad=False)
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


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
