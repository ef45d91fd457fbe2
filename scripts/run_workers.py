"""torchrun, so that a run ends with its failing process's own error as last line and its own exit code.

    python scripts/run_workers.py --standalone --nproc_per_node 2 train_c2i.py --config c2i_shapes

Arguments are torchrun's; scripts/launch.sh puts them together. Three things differ from torchrun:
- SIGTERM and SIGUSR1 go to the processes and nothing else happens: they save and end in their own time, and are not
  started again. torchrun would kill them after 30 seconds, or die of SIGUSR1 itself. That nobody gets a second chance
  holds on this machine; another machine's torchrun waits for this one until its rendezvous times out.
- Each process leaves its error in a file ($ARGRPO_STATUS_DIR, utils/config.py). The earliest one that is not a mere
  consequence of another is printed last; torchrun's own traceback is not.
- The exit code is that process's: 143 or 138 stopped by SIGTERM or SIGUSR1, 137 killed, 130 Ctrl-C, else 1 or 2.
"""
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main as torchrun

STATUS_VARIABLE = "ARGRPO_STATUS_DIR"
LAUNCHER_VARIABLE = "ARGRPO_LAUNCHER_PID"  # a process whose parent is another one has been orphaned
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HUNG = "hung until torchrun killed it"
STOP_CODES = tuple(128 + signum for signum in STOPS)
SIGNALS = {int(signum): signum.name for signum in signal.Signals}
CLOSING_SEC = 20  # torchrun kills processes that ignore its SIGTERM for 30 seconds


@dataclass(frozen=True)
class Failure:
    """How one process ended. code: as a shell shows it, 128 + signal; message: its own, empty if it left none."""

    rank: int
    time_sec: float
    code: int
    message: str = ""
    consequence: bool = False  # of another process's end

    def __str__(self) -> str:
        process = f"rank {self.rank} (host {socket.gethostname()})"
        return process + (f": {self.message}" if self.message else self.guess())

    def guess(self) -> str:
        """From the exit code alone."""
        signum = self.code - 128
        if signum == signal.SIGKILL:
            return " was killed (signal 9: out of memory, or by hand)"
        if signum == signal.SIGABRT:
            return (" aborted (signal 6: NCCL's watchdog after --comm_timeout without an answer, or a crash in native "
                    "code; its output above says which)")
        if signum in SIGNALS:
            return f" was ended by {SIGNALS[signum]} (signal {signum})"
        return f" ended with exit code {self.code}; its output above says why"


class Stopped(SystemExit):
    """The processes have ended after a signal; no subclass of Exception, which torchrun would log and pass over."""


class Forwarder:
    """Passes SIGTERM, SIGUSR1 and Ctrl-C on to the processes, and leaves torchrun once they have ended."""

    def __init__(self):
        self.signum: int | None = None  # the first one that came
        self.told: set[int] = set()
        sys.addaudithook(self.listen)

    def listen(self, event: str, details: tuple) -> None:
        """Before the first process starts. Earlier, while torchrun looks for the other machines, a signal just ends it:
        handlers would not run then, since it waits outside of Python."""
        if event == "subprocess.Popen" and details[0] == sys.executable and signal.getsignal(STOPS[0]) != self.forward:
            # Python handlers, not SIG_IGN: the processes start with the default action, and one without a handler ends.
            for signum in STOPS:
                signal.signal(signum, self.forward)
            signal.signal(signal.SIGALRM, self.leave)

    def forward(self, signum, frame) -> None:
        self.signum = self.signum or signum
        for pid in children():
            os.kill(pid, signum)  # cannot be gone: only torchrun reaps it, in this very thread
            self.told.add(pid)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)

    def leave(self, signum, frame) -> None:
        if not self.told & children():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(128 + self.signum)

    def finish(self) -> None:
        """From here on, this process decides its end itself."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum in STOPS:
            signal.signal(signum, signal.SIG_IGN)


def children() -> set[int]:
    """Processes that this one has started and not yet reaped."""
    if not Path("/proc/self/stat").exists():  # macOS
        found = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True)
        return set(map(int, found.stdout.split()))
    pids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2]  # a name may hold spaces and parentheses
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name.split()[1]) == os.getpid():
            pids.add(int(folder.name))
    return pids


def reported_failures(folder: Path, pids: Collection[int]) -> dict[int, Failure]:
    """What the processes left in the folder, by rank; pids: of the last attempt, where torchrun has restarted them."""
    records = {int(path.name.removeprefix("rank_")): json.loads(path.read_text()) for path in folder.glob("rank_*")
               if not path.suffix}
    return {rank: Failure(rank, record["time_sec"], record["code"], record["message"], record["consequence"])
            for rank, record in records.items() if record["pid"] in pids}


def seen_by_torchrun(failures: dict[int, ProcessFailure]) -> dict[int, Failure]:
    """By rank, from the exit codes alone."""
    first = min(failure.timestamp for failure in failures.values())
    found = {}
    for rank, failure in failures.items():
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        hung = failure.exitcode == -signal.SIGKILL and failure.timestamp - first >= CLOSING_SEC
        ended_by_others = hung or failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT)
        found[rank] = Failure(rank, failure.timestamp, code, HUNG if hung else "", ended_by_others)
    return found


def cause(failures: list[Failure]) -> Failure:
    """The earliest failure by itself; else a stop after a signal, which ends the others; else the first consequence."""
    def weight(failure: Failure) -> tuple:
        return failure.consequence, failure.code in STOP_CODES, failure.time_sec
    return min(failures, key=weight)


def outcome(failures: list[Failure], signum: int | None) -> tuple[int, str]:
    """-> (exit code, last line of stderr); signum: the signal that this process has passed on."""
    if signum is not None:  # whoever had no handler yet has died of it
        failures = [*failures, Failure(0, math.inf, 128 + signum)]
    first = cause(failures)
    if first.code in STOP_CODES and not first.consequence:
        return first.code, f"stopped by {SIGNALS[first.code - 128]}; the same command continues"
    hung = [str(failure.rank) for failure in failures if failure.message == HUNG and failure != first]
    return first.code, f"error: {first}" + (f"; rank {', '.join(hung)} hung" if hung else "")


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="argrpo_status_") as folder:
        os.environ[STATUS_VARIABLE] = folder
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
        forwarder, failures = Forwarder(), {}
        try:
            torchrun(["--signals_to_handle", "SIGHUP,SIGQUIT", *words])
            return 0
        except ChildFailedError as error:
            forwarder.finish()
            pids = [failure.pid for failure in error.failures.values()]
            failures = seen_by_torchrun(error.failures) | reported_failures(Path(folder), pids)
        except Stopped:
            forwarder.finish()
            failures = reported_failures(Path(folder), forwarder.told)
        except (SignalException, KeyboardInterrupt) as error:  # the latter before torchrun listens
            signum = getattr(error, "sigval", signal.SIGINT)
            sys.stderr.write(f"stopped by {SIGNALS[signum]}\n")
            return 128 + signum
        except (RendezvousError, DistError) as error:
            sys.stderr.write(f"error: the machines did not meet at {meeting_point(words)} (MASTER_ADDR, MASTER_PORT): "
                             f"{' '.join(str(error).split()) or type(error).__name__}\n")
            return 1
        finally:  # a timer that outlives the handlers would end even a finished run by SIGALRM
            forwarder.finish()
    code, line = outcome([*failures.values()], forwarder.signum)
    sys.stderr.write(line + "\n")
    return code


def meeting_point(words: list[str]) -> str:
    """HOST:PORT among torchrun's arguments."""
    given = dict(zip(words, words[1:]))
    return given.get("--rdzv_endpoint") or f"{given.get('--master_addr', 'localhost')}:{given.get('--master_port', 0)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
