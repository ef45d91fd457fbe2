"""A reward server that drops connections, delays, fails, dies and comes back: a score is the right number or none at
all, failures are counted and told, and the run goes on or stops as --max_reward_failures says, in bounded time.

Scores travel exactly, so a run whose every image was scored in the end equals the one with local rewards, bit for bit.
"""
import math
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from img_gen_grpo_rewards import RewardSet
from scripts.reward_server import as_json, read_request
from tests.fake_server import FakeServer, close
from tests.faults.disk import stopped
from tests.faults.job import (
    END_SEC,
    ROOT,
    Lab,
    Trial,
    check_finished,
    check_one_line,
    check_resumption,
    check_tidy,
    newest_complete,
    step_lines,
    wait_until,
)

REWARD = "shapes_quality"
IMAGES = 32  # of a step
DEADLINE_SEC, SLACK_SEC = 2, 5
QUICK = ("--eval_steps", 0, "--reward_retries", 1, "--reward_deadline", DEADLINE_SEC)
BAD_SCORES = (None, math.nan, math.inf, "0.5", 1e39, True)


def flags(url: str, *more) -> tuple:
    return ("--reward_servers", f"{REWARD}={url}", *QUICK, *more)


class Judge:
    """A scripted server in this process; a step's images are one request, which may be repeated.

    fault(handler, step, attempt) -> whether it dealt with the request; change(answer, step) -> what is answered.
    """

    def __init__(self, fault: Callable[..., bool], change=lambda answer, step: answer):
        self.fault, self.change, self.rewards = fault, change, RewardSet([REWARD])
        self.attempts: dict[bytes, int] = {}  # by request, in the order of steps
        self.lock = threading.Lock()

    def __enter__(self) -> FakeServer:
        self.server = FakeServer(self.answer)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self.server

    def answer(self, handler, body, number):
        if handler.path == "/health":
            return handler.answer({"status": "ok", "rewards": [REWARD]})
        with self.lock:
            attempt = self.attempts[body] = self.attempts.get(body, 0) + 1
            step = list(self.attempts).index(body) + 1
        if self.fault(handler, step, attempt):
            return None
        with self.lock:
            scores = as_json(self.rewards.start(*read_request(body)).result())
        return handler.answer(self.change(scores, step))

    def __exit__(self, *_):
        self.server.released.set()
        self.server.shutdown()
        self.server.server_close()


class RealServer:
    """`python -m scripts.reward_server`, in a context; it can be killed and started again at its address."""

    def __init__(self, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log, self.process, self.url = log, None, f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "scripts.reward_server", "--reward", REWARD, "--port", str(self.port)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        serving = wait_until(lambda: "serving" in self.log.read_text(), lambda: self.process.poll() is None, END_SEC)
        assert serving, f"the reward server did not start: {self.log.read_text()[-500:]}"
        return self

    __enter__ = start

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_):
        self.kill()


def trials(lab: Lab, count: int, rng: random.Random) -> Iterator[Trial]:
    for case in CASES:
        trial = Trial(case.__name__.replace("_", " "))
        case(trial, lab, lab.reference().run, rng)
        yield trial


def check_counts(trial: Trial, run: Path, expected: dict[int, int]) -> None:
    """expected: {step: failed images} where any failed. A step without a score has no reward either."""
    lines = step_lines(run)
    counted = {line["step"]: int(line[f"failures/{REWARD}"]) for line in lines if line[f"failures/{REWARD}"]}
    trial.require(counted == expected, f"failures counted in steps {counted}, expected {expected}")
    numbers = [line["step"] for line in lines if line[f"failures/{REWARD}"] == IMAGES
               and not (line["reward"] is None and line[f"rewards/{REWARD}"] is None)]
    trial.require(not numbers, f"a reward was logged for steps without scores: {numbers}")


def drops_connections(trial: Trial, lab: Lab, reference: Path, rng: random.Random) -> None:
    """Each request's first attempt finds a closed connection or a 500; the second one is answered."""
    def fault(handler, step, attempt):
        if attempt == 1:
            close(handler, b"", step) if step % 2 else handler.answer({"error": "busy"}, 500)
        return attempt == 1
    with Judge(fault) as server:
        job = lab.finish(lab.new_output("server"), *flags(server.url))
    check_finished(trial, job, reference, lab.steps)
    check_counts(trial, job.run, {})


def some_scores_missing(trial: Trial, lab: Lab, reference: Path, rng: random.Random) -> None:
    """null, NaN, infinity, text and a number beyond float32 in random places; the run goes on."""
    bad = {step: rng.sample(range(IMAGES), rng.randint(1, IMAGES // 2)) for step in range(2, lab.steps + 1, 3)}

    def change(answer, step):
        for index in bad.get(step, ()):
            answer["scores"][REWARD][index] = BAD_SCORES[(step + index) % len(BAD_SCORES)]
        return answer
    with Judge(lambda *_: False, change) as server:
        job = lab.finish(lab.new_output("server"), *flags(server.url))
    trial.require(job.process.returncode == 0, f"exit code {job.process.returncode}: {job.last_line()[-200:]}")
    check_counts(trial, job.run, {step: len(indices) for step, indices in bad.items()})
    trial.require(job.log().count(f"{REWARD} failed on") == len(bad), "not every failure was told in the log")


def hangs(trial: Trial, lab: Lab, reference: Path, rng: random.Random) -> None:
    """Two steps get no answer: they take the deadline and not more."""
    slow = (3, 6)

    def fault(handler, step, attempt):
        if step in slow:
            handler.server.released.wait(60)
        return step in slow
    with Judge(fault) as server:
        job = lab.finish(lab.new_output("server"), *flags(server.url, "--max_reward_failures", 1))
    trial.require(job.process.returncode == 0, f"exit code {job.process.returncode}: {job.last_line()[-200:]}")
    check_counts(trial, job.run, dict.fromkeys(slow, IMAGES))
    slowest = max(line["seconds/step"] for line in step_lines(job.run))
    trial.facts["seconds of a step"] = slowest
    trial.require(slowest < DEADLINE_SEC + SLACK_SEC, f"a step took {slowest:.0f} s")


def dies_and_comes_back(trial: Trial, lab: Lab, reference: Path, rng: random.Random) -> None:
    """kill -9; some steps without any score; then it is there again, and so are the scores."""
    output = lab.new_output("server")
    with RealServer(output / "server.txt") as server:
        with lab.start(output, *flags(server.url, "--max_reward_failures", 1)) as job:
            job.wait_until(lambda: job.new_step() >= 5)
            server.kill()
            killed_at = job.new_step()
            job.wait_until(lambda: job.new_step() >= killed_at + 4)
            with stopped(job):
                server.start()
            job.wait()
    trial.require(job.process.returncode == 0, f"exit code {job.process.returncode}: {job.last_line()[-200:]}")
    failed = [line["step"] for line in step_lines(job.run) if line[f"failures/{REWARD}"]]
    trial.require(len(failed) > 1 and failed == list(range(failed[0], failed[-1] + 1)) and failed[-1] < lab.steps,
                  f"steps without scores: {failed}")
    check_counts(trial, job.run, dict.fromkeys(failed, IMAGES))


def dies_and_stops_the_run(trial: Trial, lab: Lab, reference: Path, rng: random.Random) -> None:
    """By --max_reward_failures' default: saved, told; with the server back the same command ends as if nothing was."""
    output = lab.new_output("server")
    with RealServer(output / "server.txt") as server:
        with lab.start(output, *flags(server.url)) as job:
            job.wait_until(lambda: job.new_step() >= 5)
            server.kill()
            killed = time.monotonic()
            trial.require(job.wait() == 1, f"exit code {job.process.returncode}, not 1")
            trial.facts["seconds to the stop"] = time.monotonic() - killed
        check_one_line(trial, job, "max_reward_failures", "(?i)refused|reset|closed")
        trial.require(newest_complete(job.run) == job.new_step(), "it stopped without a checkpoint of its last step")
        check_tidy(trial, job.run)
        with server:
            last = lab.finish(output, *flags(server.url))
    check_resumption(trial, last)
    check_finished(trial, last, reference, lab.steps)


def absent_from_the_start(trial: Trial, lab: Lab, reference: Path, rng: random.Random) -> None:
    with socket.socket() as bound:  # and not listening: nobody else gets this port
        bound.bind(("127.0.0.1", 0))
        output = lab.new_output("server")
        job = lab.finish(output, *flags(f"http://127.0.0.1:{bound.getsockname()[1]}"))
    trial.require(job.process.returncode == 1, f"exit code {job.process.returncode}, not 1")
    check_one_line(trial, job, "^error: ", "(?i)refused")
    trial.require(job.new_step() == 0, "it trained without scores")


CASES: tuple[Callable[..., None], ...] = (drops_connections, some_scores_missing, hangs, dies_and_comes_back,
                                          dies_and_stops_the_run, absent_from_the_start)
