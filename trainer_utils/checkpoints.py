"""A run's checkpoints, written and read by all its processes together.

checkpoint-STEP/ holds the exported model (model.safetensors, model.json), `optimizer/` (the moments, and with
--lora_rank the adapters, each process its shards) and trainer.pt (counters, position, random state). Shards fit any
number of processes and any sharding. Rank 0 owns the folder: it opens a temporary one, all write into it, and it is
checked and renamed when the last has finished, in a thread that training need not wait for (--async_save).
"""
import io
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models import lora
from trainer_utils.grpo_config import GRPOConfig
from trainer_utils.guards import TrainingStopped
from trainer_utils.run_folder import RunFolder
from utils import distributed
from utils.files import one_line

logger = logging.getLogger(__name__)

SHARDS, SMALL = "optimizer", "trainer.pt"
VALUE = "value"  # stands where a moment's name does, for an adapter itself


class Checkpoints:
    """Saves, resumes and goes back; all processes call together. run: the RunFolder on rank 0, None elsewhere (on all:
    nothing is saved). save_policy(folder, weights) writes the exported model. The optimizer must be over the scorer's
    trainable parameters, in their order."""

    def __init__(self, run: RunFolder | None, scorer: nn.Module, optimizer: torch.optim.Optimizer,
                 scaler: torch.amp.GradScaler, save_policy: Callable[[Path, dict], None], config: GRPOConfig):
        self.run, self.scorer, self.optimizer, self.scaler = run, scorer, optimizer, scaler
        self.save_policy, self.config = save_policy, config
        self.enabled = distributed.broadcast_object(run is not None)
        self.position = self.attempt = 0  # prompts used, times gone back
        self.bad_updates = 0  # skipped in a row
        self.saved = 0  # step of the newest checkpoint that is written or being written; 0: none is needed yet
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None

    def resume(self) -> int:
        """Loads the newest good checkpoint, if there is one; returns the number of finished steps."""
        found, step = self.latest(), 0
        if found is not None:
            folder, step = found
            self.load(folder)
            # A rollback to here was perhaps not saved since: the same images would diverge again.
            self.attempt = max(self.attempt, distributed.broadcast_object(self.run and self.run.attempt_from(step)))
        if self.run:
            self.run.truncate(step or -1)  # step 0 is evaluated again
        self.saved = step
        return step

    def save(self, step: int, last: bool = False) -> None:
        """Writes checkpoint-STEP, or only begins to (--async_save); last: nothing comes after it."""
        self.finish()
        self.start(step)
        self.saved = step
        if last or not self.config.async_save:
            self.finish(last)

    def finish(self, last: bool = False) -> None:
        """Waits for the checkpoint that is being written; the failure of a run's last one is never passed over."""
        if not (problem := self.wait()):
            return
        self.saved = -1
        stop = last or self.config.on_save_failure == "stop"
        message = f"a checkpoint could not be written ({problem}); those before it stand"
        logger.warning(message)
        self.event("checkpoint_failed", reason=problem, action="stop" if stop else "continue")
        if stop:
            raise TrainingStopped(f"{message}. Make room on the disk; the same command resumes")

    def go_back(self, step: int, reason: str) -> int:
        """Answers a diverged step: the run stops, or returns to a checkpoint, whose step is returned, to draw other
        images from there. Not to that of the step before, whose weights are what diverged."""
        self.finish()
        rollback, attempt = self.config.on_divergence == "rollback", self.attempt + 1
        found = self.latest(before=step - 1) if rollback and attempt <= self.config.max_rollbacks else None
        if found is None:
            why = f" (gone back {self.attempt} times; no earlier checkpoint, or --max_rollbacks)" if rollback else ""
            self.stop("diverged", step, f"step {step}: {reason}{why}")
        folder, back = found
        self.load(folder)
        self.attempt, self.saved = attempt, back
        self.event("diverged", step=step, reason=reason, action="rollback", to=back, attempt=attempt)  # before a kill
        if self.run:
            self.run.discard_after(back)
            self.run.truncate(back)
        logger.warning("step %d: %s; back to %s with new seeds (%d of %d)", step, reason, folder.name, attempt,
                       self.config.max_rollbacks)
        return back

    def interrupt(self, step: int, number: int) -> NoReturn:
        """Ends the run for now, saved: the signal's own exit code."""
        self.finish()
        if self.saved != step:
            self.save(step, last=True)
        self.event("interrupted", step=step, signal=number)
        logger.warning("signal %d: stopped after step %d, the same command resumes", number, step)
        raise SystemExit(128 + number)

    def stop(self, event: str, step: int, reason: str) -> NoReturn:
        """Ends the run for a reason that is written down, once the checkpoint under way is safe."""
        self.finish()
        self.event(event, step=step, reason=reason, action="stop")
        raise TrainingStopped(reason)

    def event(self, event: str, step: int | None = None, **details) -> None:
        if self.run:
            self.run.event(event, step=step, **details)

    def load(self, folder: Path) -> None:
        small = self.restore(folder)
        self.position, self.attempt, self.bad_updates = (small[name] for name in ("position", "attempt", "bad_updates"))
        torch.set_rng_state(small["rng"])
        if small.get("loss_scale"):  # empty but in float16
            self.scaler.load_state_dict(small["loss_scale"])

    def start(self, step: int) -> None:
        """Copies the state and begins to write it."""
        assert self.pending is None, "wait for the checkpoint before this one"
        if not self.enabled:
            return
        folder, problem = distributed.broadcast_object(self.open(step))
        if problem:  # the same everywhere: nobody goes on to write
            self.pending = Future()
            self.pending.set_exception(OSError(problem))
            return
        weights = exported(self.scorer.gpt, keep=self.run is not None)
        tensors, counters = optimizer_state(self.scorer, self.optimizer)
        small = {"step": step, "position": self.position, "attempt": self.attempt, "bad_updates": self.bad_updates,
                 "rng": torch.get_rng_state(), "counters": counters, "loss_scale": self.scaler.state_dict()}
        wait_for_shards = distributed.save_shards(tensors, folder / SHARDS)

        def write() -> None:
            wait_for_shards()
            if self.run:
                self.save_policy(folder, weights)
                content = io.BytesIO()
                torch.save(small, content)
                (folder / SMALL).write_bytes(content.getvalue())
                self.run.commit_checkpoint(step, self.config.save_total_limit)

        self.pending = self.thread.submit(write)

    def open(self, step: int) -> tuple[Path | None, str]:
        try:
            return (self.run.open_checkpoint(step) if self.run else None), ""
        except OSError as error:
            return None, str(error)

    def wait(self) -> str:
        """Waits for what `start` began, on all processes. Why it failed, empty if it did not; then no part of it is
        left and the checkpoints before it stand. A ValueError (weights that are not finite) is raised as it is."""
        pending, self.pending, problem = self.pending, None, None
        if pending is None:
            return ""
        try:
            pending.result()
        except (OSError, ValueError) as error:
            problem = (isinstance(error, ValueError), str(error))
        problems = [one for one in distributed.gather_objects(problem) if one]
        if problems and self.run:
            self.run.abandon_checkpoint()
        if any(final for final, _ in problems):
            raise ValueError(next(text for final, text in problems if final))
        return problems[0][1] if problems else ""

    def latest(self, before: int | None = None) -> tuple[Path, int] | None:
        """Folder and step of the newest good checkpoint, of a step below `before`."""
        return distributed.broadcast_object(self.run.latest_checkpoint(before) if self.run else None)

    def restore(self, folder: Path) -> dict:
        """Weights, adapters and moments of a checkpoint, into the model and the optimizer; returns trainer.pt."""
        small = read_small(folder / SMALL)
        if "counters" not in small:
            raise ValueError(f"{folder} was written by an earlier version, whose runs cannot be continued: choose "
                             f"another --run_name (--gpt_ckpt {folder} starts it from these weights)")
        parameters = dict(trainable(self.scorer))

        def like(name: str, shape: torch.Size) -> Tensor | None:
            parameter = parameters.get(name.rpartition(".")[0])
            if parameter is None:
                raise ValueError(f"{folder} holds the state of another model ({name}): choose another --run_name")
            return parameter if parameter.shape == shape else None

        tensors = distributed.load_shards(folder / SHARDS, like)
        adapters = {name.removesuffix(f".{VALUE}").removeprefix("gpt."): tensors.pop(name)
                    for name in [name for name in tensors if name.endswith(f".{VALUE}")]}
        restore_weights(self.scorer.gpt, folder, adapters)
        states = {name: {} for name in parameters}
        for name, value in {**tensors, **small.pop("counters")}.items():
            owner, _, key = name.rpartition(".")
            states[owner][key] = value
        self.optimizer.load_state_dict({
            "state": {i: state for i, state in enumerate(states.values()) if state},
            "param_groups": self.optimizer.state_dict()["param_groups"]})
        return small


def trainable(scorer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in scorer.named_parameters() if parameter.requires_grad]


def optimizer_state(scorer: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors (moments, and adapters where there are any) and step counters, by "PARAMETER.WHAT"."""
    tensors, counters = {}, {}
    for name, parameter in trainable(scorer):
        if ".lora_" in name:
            tensors[f"{name}.{VALUE}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                tensors[f"{name}.{key}"] = value
            else:
                counters[f"{name}.{key}"] = int(value)
    return tensors, counters


def exported(gpt: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU of the model's weights, adapters merged, from all processes; only where `keep`."""
    weights = {}
    for name, tensor in lora.merged_items(gpt, distributed.whole):
        if keep:
            weights[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return weights


def restore_weights(gpt: nn.Module, folder: Path, adapters: dict[str, Tensor]) -> None:
    """Adapters onto the base that is loaded already, or else model.safetensors."""
    own = gpt.state_dict()
    for name, value in adapters.items():
        with torch.no_grad():
            own[name].copy_(value)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        if not adapters:
            for name, tensor in own.items():
                distributed.assign(tensor, file.get_tensor(name))
            return
        for name, tensor in lora.merged_items(gpt, distributed.whole):
            if not torch.allclose(tensor.cpu(), file.get_tensor(name), rtol=1e-4, atol=1e-6):
                raise ValueError(f"{folder} holds adapters for other base weights than --gpt_ckpt gives now ({name} "
                                 "differs): give the checkpoint that the run began with")


def read_small(file: Path) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} was refused and nothing in it was run: it holds more than tensors. Delete "
                         f"{file.parent} to resume from the checkpoint before it") from None
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ValueError(f"{file} is damaged ({reason}). Delete {file.parent} to resume from the checkpoint before it"
                         ) from None
