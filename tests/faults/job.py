"""A training run as a user sees it: a command, its processes and exit code, its log, and what lies in its folder.

Nothing of the trainer is imported. A checkpoint is an opaque folder that run_folder.checkpoint_damage judges;
that this judge sees damage is shown by damage.py.
"""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny_world import command_line, make_world
from trainer_utils.run_folder import checkpoint_damage

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "train_c2i.py"
END_SEC = 300.0  # a life of a tiny run must have ended by then, on a busy machine too
POLL_SEC = 0.001
# Cosine, warm-up, several updates a step, a reference and evaluations: all that has to continue where it stood.
FLAGS = ("--eval_steps", 10, "--lr_scheduler", "cosine", "--warmup_steps", 2, "--num_minibatches", 2, "--beta", 0.05,
         "--cfg_scale", 2, "--save_total_limit", 2)
COMPARED = ("reward", "loss", "kl", "grad_norm", "learning_rate")  # of each step; clocks differ


@dataclass
class Trial:
    """One injected fault. It was recovered from if `problems` is empty."""

    case: str  # what was done, and when
    problems: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)  # measured; the table shows the largest of each

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)


@dataclass(frozen=True)
class Lab:
    """The tiny world and a place for runs. flags: more of train_c2i.py's, for every run."""

    folder: Path
    flags: tuple[str, ...] = ()
    steps: int = 40
    save_steps: int = 3

    def __post_init__(self):
        make_world(self.folder / "world")

    def new_output(self, name: str) -> Path:
        """An empty folder; the run will be in its `run`."""
        path = self.folder / f"{name}-{sum(1 for _ in self.folder.iterdir())}"
        path.mkdir()
        return path

    def start(self, output: Path, *flags, processes: int = 1) -> "Job":
        words = command_line(self.folder / "world", output, *FLAGS, "--exit_step", self.steps, "--save_steps",
                             self.save_steps, *self.flags, *flags)
        launcher = [] if processes == 1 else [str(ROOT / "scripts" / "run_workers.py"), "--standalone",
                                              "--nproc_per_node", str(processes)]
        return Job([sys.executable, *launcher, str(ROOT / SCRIPT), *words], output, processes)

    def finish(self, output: Path, *flags, processes: int = 1) -> "Job":
        """Runs the command to its end, whatever that is."""
        with self.start(output, *flags, processes=processes) as job:
            job.wait()
        return job

    def reference(self, processes: int = 1) -> "Reference":
        return _reference(self, processes)


class Job:
    """One life of a run; as a context, none of its processes outlives it. The log is outside of the run's folder."""

    def __init__(self, command: list[str], output: Path, processes: int):
        self.run, self.processes = output / "run", processes
        self.resumed_from = newest_complete(self.run)  # where this life has to go on
        self.log_path = output / f"log-{len(list(output.glob('log-*')))}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.started = time.time()
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=output,
                                            env=environment)
        self.known = {Process(self.process.pid)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pids()
        for process in self.known:
            with contextlib.suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> list[int]:
        """The launcher, if there is one, and the processes that train, in the order of their ranks."""
        if self.processes == 1:
            return [self.process.pid]
        workers = sorted(children(self.process.pid), key=lambda pid: environment_of(pid).get("RANK", ""))
        workers = [pid for pid in workers if "RANK" in environment_of(pid)]
        self.known.update(map(Process, workers))
        return [self.process.pid, *workers]

    def wait(self, bound: float = END_SEC) -> int | None:
        """The exit code once all processes are gone, orphans too; None: some were still there after `bound` seconds."""
        self.pids()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(bound)
            if wait_until(lambda: not any(process.is_alive() for process in self.known), lambda: True, bound):
                return code
        return None

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_until(self, condition: Callable[[], bool], pause: float = POLL_SEC) -> bool:
        """Whether the condition came about before the job ended or the time was over."""
        return wait_until(condition, lambda: not self.ended(), END_SEC, pause)

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        lines = [line for line in re.split(r"[\r\n]+", self.log()) if line.strip()]
        return lines[-1] if lines else ""

    def told_resumption(self) -> int | None:
        found = re.search(r"resuming after step (\d+)", self.log())
        return int(found[1]) if found else None

    def new_step(self) -> int:
        """The last step that this life has logged; 0: none yet (lines that an earlier life left do not count)."""
        path = self.run / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            step = last_step(path)
            return step if path.stat().st_mtime > self.started and step > self.resumed_from else 0
        return 0


@dataclass(frozen=True)
class Reference:
    """A run that nothing interrupted, and how long its parts took."""

    run: Path
    start_sec: float  # to the first step's line
    save_sec: float
    step_sec: float
    end_sec: float  # from the last step's line to the exit


@cache
def _reference(lab: Lab, processes: int) -> Reference:
    output = lab.new_output(f"reference{processes}")
    with lab.start(output, processes=processes) as job:
        job.wait_until(lambda: job.new_step() > 0)
        started = time.time()
        job.wait_until(lambda: is_saving(job.run))
        saving = time.time()
        job.wait_until(lambda: not is_saving(job.run))
        saved = time.time()
        job.wait_until(lambda: job.new_step() >= lab.steps)
        stepped = time.time()
        code = job.wait()
        assert code == 0, f"the uninterrupted run ended with {code}: {job.log()[-2000:]}"
    return Reference(job.run, started - job.started, saved - saving, (stepped - started) / lab.steps,
                     time.time() - stepped)


# ---- a run's folder --------------------------------------------------------------------------------------------------

def checkpoints(run: Path) -> dict[int, Path]:
    """{step: folder}, complete or not."""
    found = {re.fullmatch(r"checkpoint-(\d+)", path.name): path for path in run.glob("checkpoint-*")}
    return {int(match[1]): path for match, path in sorted(found.items(), key=lambda one: str(one[1])) if match}


def newest_complete(run: Path) -> int:
    return max((step for step, path in checkpoints(run).items() if checkpoint_damage(path) is None), default=0)


def is_saving(run: Path) -> bool:
    return any(name.startswith(".tmp-checkpoint-") for name in os.listdir(run))


def step_lines(run: Path) -> list[dict]:
    """Of metrics.jsonl, those of training steps; a half-written last one is left out."""
    lines, path = [], run / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if "reward" in line]


def last_step(metrics: Path) -> int:
    found = re.findall(r'^\{"step": (\d+),.*"reward".*\}$', metrics.read_text(encoding="utf-8", errors="replace"), re.M)
    return int(found[-1]) if found else 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def largest_difference(run: Path, reference: Path, step: int) -> float:
    """Between the weights of two runs' checkpoints; 0: their files are equal byte for byte."""
    files = [folder / f"checkpoint-{step}" / "model.safetensors" for folder in (run, reference)]
    if files[0].read_bytes() == files[1].read_bytes():
        return 0.0
    first, second = map(load_file, files)
    return max(float((first[name] - second[name]).abs().max()) for name in second) or torch.finfo().tiny


def check_finished(trial: Trial, job: Job, reference: Path | None, steps: int, tolerance: float = 0.0) -> None:
    """The last life ended well, and the run is the one that nothing interrupted (None: not compared)."""
    code, run = job.process.returncode, job.run
    if code != 0 or not (run / f"checkpoint-{steps}").is_dir():
        trial.problems.append(f"the last restart ended with {code}: {job.last_line()}")
        return
    lines = step_lines(run)
    trial.require([line["step"] for line in lines] == list(range(1, steps + 1)),
                  f"metrics.jsonl has the steps {[line['step'] for line in lines]}")
    check_tidy(trial, run)
    if reference is None:
        return
    differences = {name for one, other in zip(lines, step_lines(reference)) for name in COMPARED if name in other
                   and not abs((one.get(name) or 0) - (other[name] or 0)) <= tolerance}
    trial.require(not differences, f"logged numbers differ: {', '.join(sorted(differences))}")
    difference = largest_difference(run, reference, steps)
    trial.facts["weights' difference"] = difference
    trial.require(difference <= tolerance, f"weights differ by {difference:.1e}")


def check_tidy(trial: Trial, run: Path) -> None:
    left = [path.name for path in [*run.rglob(".tmp-*"), *run.rglob("*.replaced")]]
    trial.require(not left, f"left behind: {', '.join(left)}")


def check_resumption(trial: Trial, job: Job) -> None:
    """This life went on from the newest complete checkpoint, unless it was killed before it could tell."""
    told = job.told_resumption()
    if told is not None or (job.resumed_from and job.new_step()):
        trial.require((told or 0) == job.resumed_from, f"resumed after step {told}, not after {job.resumed_from}")


def check_one_line(trial: Trial, job: Job, *words: str) -> None:
    """A mistake was told on the last line of stderr, with these words in it, and not by a traceback."""
    line = job.last_line()
    missing = [word for word in words if not re.search(word, line)]
    trial.require(not missing, f"{', '.join(missing)} not in the last line: {line[-300:]}")
    trial.require("Traceback" not in job.log(), f"a traceback, at its end: {line[-300:]}")


# ---- processes -------------------------------------------------------------------------------------------------------

def wait_until(condition: Callable[[], bool], while_: Callable[[], bool], bound: float, pause=POLL_SEC) -> bool:
    deadline = time.monotonic() + bound
    while not condition():
        if time.monotonic() > deadline or not while_():
            return condition()
        time.sleep(pause)
    return True


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, ...; empty: no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


class Process:
    """A process by its number and the moment of its start, for numbers are given again."""

    def __init__(self, pid: int):
        self.pid, self.start = pid, _stat(pid)[19:20]

    def __eq__(self, other):
        return (self.pid, self.start) == (other.pid, other.start)

    def __hash__(self):
        return self.pid

    def is_alive(self) -> bool:
        """Zombies are dead: an orphan's may stay for as long as nobody collects it."""
        fields = _stat(self.pid)
        return bool(fields) and fields[19:20] == self.start and fields[0] not in "ZX"


def children(pid: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*"):
        if _stat(int(path.name))[1:2] == [str(pid)]:
            yield int(path.name)


def environment_of(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}
