"""Memory of a piece of work: its peak, its largest tensor, and how many rows of it fit.

GPUs count their own peak. On CPUs `Meter` watches every operation, so that numbers there are exact and repeatable (a
process's resident size is neither); what a kernel needs for itself alone is not seen.
"""
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.gpu import free_bytes

SHARE = 0.9  # of the free memory that may be planned for: fragments, and what the probe did not meet


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors made inside: `live` now, `peak` at most, the largest single one, all ever `made`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = self.made = 0
        self.seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {key_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and key_of(leaf) not in known:
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        key, owner = key_of(tensor), owner_of(tensor)
        if key in self.seen:  # a view of something counted
            return
        size = tensor.numel() * tensor.element_size() if owner is tensor else owner.nbytes()
        self.seen[key] = weakref.finalize(owner, self.forget, key, size)
        self.live += size
        self.made += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def forget(self, key: int, size: int) -> None:
        del self.seen[key]
        self.live -= size


def owner_of(tensor: Tensor) -> Tensor | torch.UntypedStorage:
    """What holds the memory: a storage, but weights packed for oneDNN have none."""
    return tensor if tensor.is_mkldnn else tensor.untyped_storage()


def key_of(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that `work` needs beyond what was there before."""
    if device.type != "cuda":
        with Meter() as meter:
            work()
        return meter.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rows_that_fit(free: int, one: int, two: int, most: int) -> int:
    """How many rows of work fit, 1 to `most`, when one row needs `one` bytes and two rows `two`."""
    per_row = max(1, two - one)
    return max(1, min(most, int((SHARE * free - (one - per_row)) // per_row)))


def measured_rows(work: Callable[[int], object], most: int, device: torch.device, reserve: int = 0) -> int:
    """How many rows of work(rows) fit, 1 to `most` (at least 2), leaving `reserve` bytes for others."""
    work(1)  # what stays, such as gradients, is there from now on
    one, two = (peak_bytes(lambda: work(rows), device) for rows in (1, 2))
    return rows_that_fit(free_bytes(device) - reserve, one, two, most)
