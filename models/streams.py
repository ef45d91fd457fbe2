"""Decoding and scoring beside the next rollout batch: a thread with a CUDA stream of its own.

The thread launches kernels while rollouts replay graphs on the caller's stream; events order what one needs of the
other, so neither waits on the host. Without a GPU the same class runs jobs at once, or, for tests, in a thread without
a stream.
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor


class SideStream:
    """enabled: jobs run in the thread, in the order of `run`; else at once, in the caller's."""

    def __init__(self, device: torch.device, enabled: bool):
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="side_stream") if enabled else None
        self.stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None

    def run(self, job: Callable[[Tensor], tuple], tensor: Tensor) -> Callable[[], tuple]:
        """Begins job(tensor) -> a tuple whose tensors the caller's stream may use once the returned function has given
        it. An error of the job is raised there."""
        if self.thread is None:
            result = job(tensor)
            return lambda: result
        ready = None
        if self.stream is not None:
            ready = torch.cuda.current_stream(tensor.device).record_event()
            tensor.record_stream(self.stream)  # or its memory could be given away while the job still reads

        def work() -> tuple[tuple, torch.cuda.Event | None]:
            with torch.no_grad(), torch.cuda.stream(self.stream) if self.stream else nullcontext():
                if self.stream is None:
                    return job(tensor), None
                self.stream.wait_event(ready)
                return job(tensor), self.stream.record_event()

        future = self.thread.submit(work)

        def wait() -> tuple:
            result, done = future.result()
            if done is not None:
                here = torch.cuda.current_stream(tensor.device)
                here.wait_event(done)
                for part in result:
                    if isinstance(part, Tensor) and part.is_cuda:
                        part.record_stream(here)
            return result

        return wait
