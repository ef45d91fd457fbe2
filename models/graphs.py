"""CUDA graphs around functions with static shapes, with the plain path wherever a capture does not work.

Run on an H200 (benchmark/RESULTS.md).
"""
import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)


class StepGraphs:
    """Replays step(*key) as one CUDA graph per key, all from one memory pool.

    `step` reads and writes static buffers alone, so that a replay is a call. The first call of a key runs it, which
    warms up what a capture may not start (cuBLAS, lazy kernels); capturing runs nothing. It is not kept: the owner of
    the buffers would be part of a cycle, and they would wait for Python's garbage collector.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool = None

    def __call__(self, step: Callable[..., None], *key: Hashable) -> None:
        if key in self.graphs:
            self.graphs[key].replay()
            return
        step(*key)
        if self.enabled:
            self.capture(step, key)

    def capture(self, step: Callable[..., None], key: tuple) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that decodes and scores may allocate meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step(*key)
        except RuntimeError as error:
            logger.warning("decoding without CUDA graphs: the capture of step %s failed (%s)", key, error)
            self.enabled = False
            return
        self.graphs[key] = graph
        self.pool = graph.pool()

