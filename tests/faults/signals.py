"""SIGTERM and SIGUSR1 (preemption) at random moments, then the same command again, until the run is finished.

A process that had begun its first step must finish the step, save, and exit with 128 + the signal's number; before
that it may just die. With two processes the signal goes to the launcher (SIGTERM only), to both workers, or to one: the
other must join in.
"""
import os
import random
import signal
import time
from collections.abc import Iterator

from tests.faults.job import Job, Lab, Trial, check_tidy, newest_complete
from tests.faults.kill import phase, struck_runs

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def trials(lab: Lab, count: int, rng: random.Random, processes: int = 1) -> Iterator[Trial]:
    return struck_runs(lab, count, rng, processes, lambda job: send(job, rng, lab.steps))


def send(job: Job, rng: random.Random, steps: int) -> Trial:
    """One signal to a random choice of the processes that it makes sense for."""
    number, workers = rng.choice(SIGNALS), job.pids()
    targets = {"": workers}
    if job.processes > 1:
        launcher, *workers = workers
        targets = {" to torchrun": [launcher]} if number == signal.SIGTERM or not workers else {}
        if workers:
            targets |= {" to both": workers, " to one": [rng.choice(workers)]}
        number = number if workers else signal.SIGTERM
    target = rng.choice(sorted(targets))
    began, struck = job.new_step(), time.time()
    trial = Trial(f"{number.name}{target}, {phase(job, struck, steps)}")
    for pid in targets[target]:
        os.kill(pid, number)
    code = job.wait()
    trial.facts["seconds to the exit"] = time.time() - struck
    logged, saved = job.new_step(), newest_complete(job.run)
    good = code == 128 + number or (code == 0 and logged == steps) or (code == -number and not began)
    trial.require(good, f"exit code {code}, not {128 + number}")
    trial.require(saved >= logged or (code == -number and not began),
                  f"step {logged} was the last, but checkpoint-{saved} the newest")
    trial.facts["steps lost"] = max(0, logged - saved)
    if began:
        check_tidy(trial, job.run)
    return trial
