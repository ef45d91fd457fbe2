"""The disk fills up while a checkpoint is written: the old one stays good, nothing half-written stays, the error is
clear, training goes on or stops as --on_save_failure says, and with space again the same command resumes.

The run's folder lies on a small tmpfs of its own; where that may not be mounted, RLIMIT_FSIZE of the running process
takes its place (files cannot grow beyond a size: "File too large"). The process is stopped while its disk is filled or
freed, so that a case does the same thing each time.
"""
import contextlib
import os
import random
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.job import Job, Lab, Trial, check_finished, check_one_line, check_tidy, newest_complete, step_lines

DISK_BYTES = 16 << 20
ROOM_BYTES = 64 << 10  # left when it is filled: for lines of metrics.jsonl, not for a checkpoint
TOLD = r"(?i)disk|no space left|file too large|errno 2[78]"


class SmallDisk:
    """A tmpfs, in a context."""

    kind = "tmpfs"

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"

    def __enter__(self):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", self.folder], check=True,
                       capture_output=True)
        return self

    def fill(self, job: Job, room: int) -> None:
        free = os.statvfs(self.folder)
        with contextlib.suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))

    def free(self, job: Job) -> None:
        self.ballast.unlink(missing_ok=True)

    def __exit__(self, *_):
        subprocess.run(["umount", "--lazy", self.folder], check=True)


class LimitedFiles:
    """The same by a limit on the size of files, for processes that may not mount."""

    kind = "RLIMIT_FSIZE"

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        return self

    def fill(self, job: Job, room: int) -> None:
        if not job.ended():
            resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def free(self, job: Job) -> None:
        if not job.ended():
            resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def __exit__(self, *_):
        pass


@contextlib.contextmanager
def small_disk(folder: Path):
    """Whichever of the two is allowed."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(SmallDisk(folder))
        except (OSError, subprocess.CalledProcessError):
            disk = stack.enter_context(LimitedFiles(folder))
        yield disk


@contextlib.contextmanager
def stopped(job: Job):
    job.process.send_signal(signal.SIGSTOP)
    yield
    job.process.send_signal(signal.SIGCONT)


def trials(lab: Lab, count: int, rng: random.Random) -> Iterator[Trial]:
    for case in CASES:
        output = lab.new_output("disk")
        with small_disk(output / "run") as disk:
            if case is not_a_byte_left and isinstance(disk, LimitedFiles):
                continue  # it would hold for the log as well
            trial = Trial(f"{case.__name__.replace('_', ' ')} ({disk.kind})")
            case(trial, lab, output, disk)
            check_resumes(trial, lab, output)
        yield trial


def freed_in_time(trial: Trial, lab: Lab, output: Path, disk) -> None:
    """Goes on past saves that fail, and ends well because a later one succeeds."""
    with full_disk(trial, lab, output, disk, ROOM_BYTES) as job:
        job.wait_until(lambda: re.search(TOLD, job.log()) is not None)
        with stopped(job):
            trial.require(not job.ended(), f"it ended at the first failure: {job.last_line()[-200:]}")
            disk.free(job)
    trial.require(job.process.returncode == 0, f"exit code {job.process.returncode}: {job.last_line()[-200:]}")
    check_finished(trial, job, lab.reference().run, lab.steps)


def full_to_the_end(trial: Trial, lab: Lab, output: Path, disk) -> None:
    """Goes on to the last step, and ends with an error because the last save failed."""
    with full_disk(trial, lab, output, disk, ROOM_BYTES) as job:
        pass
    trial.require(job.process.returncode == 1, f"exit code {job.process.returncode}, not 1")
    check_one_line(trial, job, TOLD)
    steps = [line["step"] for line in step_lines(job.run)]
    trial.require(steps == list(range(1, lab.steps + 1)), f"it ended after step {job.new_step()}, not {lab.steps}")
    disk.free(job)


def stopped_by_flag(trial: Trial, lab: Lab, output: Path, disk) -> None:
    with full_disk(trial, lab, output, disk, ROOM_BYTES, "--on_save_failure", "stop") as job:
        pass
    trial.require(job.process.returncode == 1, f"exit code {job.process.returncode}, not 1")
    check_one_line(trial, job, TOLD)
    trial.require(job.new_step() < lab.steps, "it ran to the last step")
    disk.free(job)


def not_a_byte_left(trial: Trial, lab: Lab, output: Path, disk) -> None:
    """Not even a line can be logged: it may go on or end, but only with a clear error."""
    with full_disk(trial, lab, output, disk, 0) as job:
        pass
    trial.require(job.process.returncode == 1, f"exit code {job.process.returncode}, not 1")
    check_one_line(trial, job, TOLD)
    disk.free(job)


CASES: tuple[Callable[..., None], ...] = (freed_in_time, full_to_the_end, stopped_by_flag, not_a_byte_left)


@contextlib.contextmanager
def full_disk(trial: Trial, lab: Lab, output: Path, disk, room: int, *flags):
    """A run whose disk is filled after its first checkpoint; past the context's body the run has ended, and what must
    hold of its folder in any case was checked."""
    with lab.start(output, *flags) as job:
        trial.require(job.wait_until(lambda: newest_complete(job.run) > 0),
                      f"no checkpoint before the end: {job.last_line()[-200:]}")
        with stopped(job):
            before = newest_complete(job.run)
            disk.fill(job, room)
        yield job
        trial.require(job.wait() is not None, "the run did not end")
    trial.require(newest_complete(job.run) >= before > 0, f"checkpoint-{before} was lost")
    check_tidy(trial, job.run)


def check_resumes(trial: Trial, lab: Lab, output: Path) -> None:
    """With space again, the same command ends as the uninterrupted run."""
    job = lab.finish(output)
    trial.require(job.told_resumption() == job.resumed_from or not job.resumed_from,
                  f"resumed after {job.told_resumption()}, not {job.resumed_from}")
    check_finished(trial, job, lab.reference().run, lab.steps)
