"""What ends a step badly, and signals that ask a run to stop. What follows each is a flag: docs/distributed.md."""
import logging
import math
import signal
import threading
import time

from trainer_utils.grpo_config import GRPOConfig

logger = logging.getLogger(__name__)


class TrainingStopped(ValueError):
    """A guard ended the run; the message says which, why, and what to try."""

    exit_code = 1  # utils/config.py: no mistake in a flag


def divergence(numbers: dict[str, float], bad_updates: int, config: GRPOConfig) -> str:
    """Why the policy of this step must not be kept; empty if it may."""
    if bad_updates >= config.max_bad_updates:
        return (f"{bad_updates} updates in a row had a non-finite gradient (--max_bad_updates): lower --learning_rate, "
                "or look for NaNs in the weights")
    for name, limit, flag, mend, sign in (
            ("kl", config.max_kl, "above --max_kl", "raise --beta or lower --learning_rate", 1),
            ("entropy", config.min_entropy, "below --min_entropy", "lower --learning_rate or raise --beta", -1)):
        value = numbers.get(name, math.nan)
        if limit is not None and not sign * value <= sign * limit:  # a NaN is no good number either
            return f"{name} is {value:.4g} nats a token, {flag} {limit:g}: {mend}"
    return ""


class Interruption:
    """Context in which SIGTERM, SIGUSR1 (a scheduler's preemption) and Ctrl-C are only noted, so that a step can be
    finished and saved. 128 + the signal's number is the exit code that shells and schedulers know. A second Ctrl-C ends
    the process at once; a terminal and a launcher may both pass on one and the same."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    SAME_SEC = 1.0  # signals closer together are one

    def __init__(self):
        self.received = 0  # the signal's number
        self.since = 0.0

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.before = {number: signal.signal(number, self.note) for number in self.SIGNALS}
        return self

    def note(self, number: int, frame) -> None:
        now, first = time.monotonic(), self.received != number
        if number == signal.SIGINT and not first and now - self.since > self.SAME_SEC:
            raise KeyboardInterrupt
        if first:
            self.received, self.since = number, now
            if number == signal.SIGINT:
                logger.warning("Ctrl-C: this step is finished and saved first; once more ends at once")

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
