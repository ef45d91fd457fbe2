"""kill -9 at random moments, of one process or of a random one among torchrun and its two workers, then the same
command again, until the run is finished.

A life is aimed at start-up, at a step, or at a checkpoint that is being written; the delay behind that is uniform over
the length of such a phase in an uninterrupted run. What was really hit is read from the folder afterwards; whether a
step was in its rollout or in its update is an estimate, from the seconds of the step before.
"""
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.faults.job import (
    POLL_SEC,
    Job,
    Lab,
    Reference,
    Trial,
    check_finished,
    check_resumption,
    is_saving,
    newest_complete,
    step_lines,
)

WEIGHTS = {"start": 3, "step": 5, "save": 3}  # of aims
MOST_STEPS_AHEAD = 9  # of a life: a run of 40 steps takes some ten of them
ROLLOUT = ("encode", "sample", "decode", "score", "reference")
TOLERANCE = {1: 0.0, 2: 1e-6}  # of the final weights, by the number of processes
ENDED_SEC = 90.0  # after one of its processes was killed, a job must have ended by itself


class Aim(NamedTuple):
    """A moment of a life: `share` of a phase's length after the beginning of that phase, `ahead` steps on."""

    phase: str
    ahead: int
    share: float  # in [0, 1)


def draw(rng: random.Random) -> Aim:
    return Aim(rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0], rng.randrange(MOST_STEPS_AHEAD), rng.random())


def trials(lab: Lab, count: int, rng: random.Random, processes: int = 1) -> Iterator[Trial]:
    return struck_runs(lab, count, rng, processes, lambda job: kill(job, rng.random(), lab))


def struck_runs(lab: Lab, count: int, rng: random.Random, processes: int,
                strike: Callable[[Job], Trial]) -> Iterator[Trial]:
    """Runs from beginning to end, each of whose lives but the last is ended by a strike, until there were `count`."""
    while count > 0:
        made = struck_run(lab, count, rng, processes, strike)
        count -= len(made)
        yield from made


def struck_run(lab: Lab, most: int, rng: random.Random, processes: int,
               strike: Callable[[Job], Trial]) -> list[Trial]:
    """One run with at most that many strikes."""
    reference, made = lab.reference(processes), []
    output = lab.new_output("run")
    while len(made) < most:
        with lab.start(output, processes=processes) as job:
            if not reach(job, reference, draw(rng), lab.steps):
                break  # the run was finished before
            trial = strike(job)
        if made:
            check_resumption(made[-1], job)
        made.append(trial)
    last = lab.finish(output, processes=processes)
    if made:
        check_resumption(made[-1], last)
    for trial in made:
        check_finished(trial, last, reference.run, lab.steps, TOLERANCE[processes])
    return made


def reach(job: Job, reference: Reference, aim: Aim, steps: int) -> bool:
    """Waits for the moment to strike; False: the job ended before it."""
    seconds = {"start": reference.start_sec, "save": reference.save_sec, "step": 2 * reference.step_sec}[aim.phase]
    if aim.phase != "start":
        target = min(job.resumed_from + 1 + aim.ahead, steps)
        if not job.wait_until(lambda: job.new_step() >= target):
            return False
        if target == steps:
            seconds = reference.end_sec
        elif aim.phase == "save":
            job.wait_until(lambda: is_saving(job.run), pause=0)  # a save takes some 10 ms, and a sleep may as well
    until = time.monotonic() + seconds * aim.share
    job.wait_until(lambda: time.monotonic() > until, pause=0 if aim.phase == "save" else POLL_SEC)
    return not job.ended()


def kill(job: Job, choice: float, lab: Lab) -> Trial:
    """SIGKILL to one process (choice: in [0, 1), which); the rest must end by itself."""
    pids = job.pids()
    index = int(choice * len(pids))
    victim = "" if job.processes == 1 else f" {('torchrun', 'rank 0', 'rank 1')[index]}"
    struck, before = time.time(), phase(job, time.time(), lab.steps)
    os.kill(pids[index], signal.SIGKILL)
    code = job.wait(ENDED_SEC)
    # workers without their torchrun go on for a while, and so does what can be seen of them
    trial = Trial((before if "torchrun" in victim else phase(job, struck, lab.steps)) + victim)
    trial.require(code not in (None, 0), f"{'no end' if code is None else 'exit code 0'} after the kill")
    if job.processes > 1:
        trial.facts["seconds to the end of the job"] = time.time() - struck
    newest = newest_complete(job.run)
    lost = max(0, job.new_step() - newest)
    trial.facts["steps lost"] = lost
    allowed = lab.save_steps * (2 if "--async_save" in lab.flags else 1)
    trial.require(lost <= allowed, f"{lost} steps lost, with a checkpoint every {lab.save_steps}")
    trial.require(newest >= job.resumed_from, f"checkpoint-{job.resumed_from} was lost")
    return trial


def phase(job: Job, struck: float, steps: int) -> str:
    """What the run was doing; exact but for rollout and update."""
    if job.run.exists() and is_saving(job.run):
        return "save"
    step = job.new_step()
    if step in (0, steps):
        return "end" if step else "start"
    last, since = step_lines(job.run)[-1], struck - (job.run / "metrics.jsonl").stat().st_mtime
    return "rollout" if since < sum(last.get(f"seconds/{part}", 0.0) for part in ROLLOUT) else "update"


