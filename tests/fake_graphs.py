"""A stand-in for CUDA graphs on a CPU: records the operations of a capture, and replays them into the same storages.

Like a GPU's capture it changes no buffer of others, and refuses what no capture can hold: reading a number on the host,
shapes that depend on numbers, data that comes from the host, and results that somebody still holds after the step.
"""
import gc
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

REFUSED = {  # names of operations -> what a capture says
    "_local_scalar_dense": "reads a number on the host", "nonzero": "has a shape that depends on numbers",
    "unique_dim": "has a shape that depends on numbers", "_unique2": "has a shape that depends on numbers",
    "masked_select": "has a shape that depends on numbers", "lift_fresh": "brings data from the host",
    "lift_fresh_copy": "brings data from the host", "is_pinned": "brings data from the host",
    "_pin_memory": "brings data from the host", "equal": "reads a number on the host"}


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps: list[tuple] = []  # (operation, arguments, keywords, results to be filled again or None)
        self.made: dict[int, Tensor] = {}  # storages that the capture made
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storages of others: as they were
        self.watched: list[tuple[str, weakref.ref]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} {REFUSED[name]}")
        if name.startswith("index") and any(leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
                                            if isinstance(leaf, Tensor)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} has a shape that depends on "
                               "numbers")
        mutable = func._schema.is_mutable
        known = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if mutable:
            self.remember(func, args, kwargs)
        # aliases: the step's own tensors must be free to die
        kept_args, kept_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        out = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if mutable:
            self.steps.append((func, kept_args, kept_kwargs, None))
        elif any(storage_of(leaf) not in known for leaf in leaves):
            self.steps.append((func, kept_args, kept_kwargs, [leaf.detach() for leaf in leaves]))
        for leaf in leaves:
            if storage_of(leaf) not in known:
                self.made[storage_of(leaf)] = leaf.detach()
                self.watched.append((name, weakref.ref(leaf)))
        return out

    def remember(self, func, args, kwargs) -> None:
        """What this writes to, if the capture has not made it."""
        for argument, value in zip(func._schema.arguments, args):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value) if written else ():
                key = storage_of(tensor)
                if key not in self.made and key not in self.before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before[key] = whole, whole.clone()

    def finish(self) -> None:
        for whole, value in self.before.values():
            whole.copy_(value)
        gc.collect()
        if held := [name for name, ref in self.watched if ref() is not None]:
            raise RuntimeError(f"the result of {held[0]} outlives the captured step: its memory will be written again")


class FakeGraph:
    recorder: Recorder

    def replay(self) -> None:
        for func, args, kwargs, results in self.recorder.steps:
            out = func(*args, **kwargs)
            if results is not None:
                for result, value in zip(results, (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))):
                    result.copy_(value)

    def pool(self):
        return "pool"


@contextmanager
def fake_graph(graph: FakeGraph, pool=None, capture_error_mode="global"):
    graph.recorder = Recorder()
    with torch.no_grad():
        try:
            with graph.recorder:
                yield
        finally:
            graph.recorder.finish()


def use_fake_graphs(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_graph)
