"""Damaged checkpoint files: each must be refused by name, and the checkpoint before it used.

Most cases ask the run folder's code in this process, on a copy of a good run; a few go through real restarts. Left out:
a file whose entry in checksums.json was changed to match, which no checksum can see.
"""
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults.job import Job, Lab, Trial, check_finished, check_resumption, checkpoints, contents
from trainer_utils.run_folder import CHECKSUMS, RunFolder, checkpoint_damage


def truncated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    return content[:rng.randrange(len(content))]


def flipped(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to eight random bits."""
    changed = bytearray(content)
    for position in rng.sample(range(8 * len(content)), rng.randint(1, 8)):
        changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def zeroed(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """From a random place on, at its old length: a block that never reached the disk."""
    start = rng.randrange(len(content))
    return content[:start] + bytes(len(content) - start)


def extended(content: bytes, other: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 1000))


def emptied(content: bytes, other: bytes, rng: random.Random) -> bytes:
    return b""


def deleted(content: bytes, other: bytes, rng: random.Random) -> None:
    return None


def swapped(content: bytes, other: bytes, rng: random.Random) -> bytes:
    return other


DAMAGES = (truncated, flipped, zeroed, extended, emptied, deleted, swapped)


class Messages(logging.Handler):
    """What was logged, while it is attached to the root logger as a context."""

    def __enter__(self):
        self.lines: list[str] = []
        logging.getLogger().addHandler(self)
        return self

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self)


def trials(lab: Lab, count: int, rng: random.Random) -> Iterator[Trial]:
    """Every file of the newest checkpoint in turn, every damage in turn."""
    run = lab.new_output("damage") / "run"
    shutil.copytree(lab.reference().run, run)
    *_, before, newest = sorted(checkpoints(run))
    files = sorted(contents(run / f"checkpoint-{newest}"))
    cases = [(name, damage) for damage in DAMAGES for name in files]
    for number in range(count):
        yield one_case(run, (before, newest), *cases[number % len(cases)], rng)


def one_case(run: Path, steps: tuple[int, int], name: str, damage, rng: random.Random) -> Trial:
    """Damages one file, asks, and puts it back. steps: of the checkpoint before, and of the damaged one."""
    folder = run / f"checkpoint-{steps[1]}"
    trial, content = Trial(damage.__name__), (folder / name).read_bytes()
    others = [other for file, other in contents(folder).items() if file != name]
    others += [path.read_bytes() for path in [run / f"checkpoint-{steps[0]}" / name] if path.exists()]
    changed = content
    while changed == content:
        changed = damage(content, rng.choice([other for other in others if other != content]), rng)
    if changed is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(changed)
    reason = checkpoint_damage(folder) or ""
    with Messages() as messages:
        found = RunFolder(run, {}, "none", may_change=AnyChange()).latest_checkpoint()
    (folder / name).write_bytes(content)
    case = f"{name} {damage.__name__}"
    # checksums.json is read first: if it still reads, the file that it no longer fits is what can be named
    trial.require(name in reason or name == CHECKSUMS and bool(reason), f"{case}: the reason was {reason!r}")
    told = any(str(folder) in line and reason in line for line in messages.lines)
    trial.require(told, f"{case}: the log named neither folder nor file")
    trial.require(found == (run / f"checkpoint-{steps[0]}", steps[0]), f"{case}: {found} was used")
    trial.require(checkpoint_damage(folder) is None, f"{case}: the restored checkpoint is refused")
    return trial


class AnyChange:
    """Names of settings that may differ from config.json's: all, for this is about checkpoints."""

    def __contains__(self, name):
        return True


def restarts(lab: Lab, count: int, rng: random.Random) -> Iterator[Trial]:
    """The same command on a run whose newest checkpoints are damaged: named, passed over, and equal in the end."""
    kept = len(checkpoints(lab.reference().run))
    for damaged in range(1, min(kept, count) + 1):
        output = lab.new_output("restart")
        shutil.copytree(lab.reference().run, output / "run")
        trial, damage = Trial(f"{damaged} of {kept} damaged"), spoil(output / "run", damaged, rng)
        job = lab.finish(output)
        check_named(trial, job, damage)
        check_resumption(trial, job)
        check_finished(trial, job, lab.reference().run, lab.steps)
        yield trial


def spoil(run: Path, count: int, rng: random.Random) -> dict[int, str]:
    """Flips bits in one file of each of the newest checkpoints. -> {step: name of the file}"""
    damage = {}
    for step, folder in sorted(checkpoints(run).items(), reverse=True)[:count]:
        damage[step] = rng.choice([name for name in sorted(contents(folder)) if name != CHECKSUMS])
        (folder / damage[step]).write_bytes(flipped((folder / damage[step]).read_bytes(), b"", rng))
    return damage


def check_named(trial: Trial, job: Job, damage: dict[int, str]) -> None:
    for step, name in damage.items():
        told = any(f"checkpoint-{step} " in line and name in line for line in job.log().splitlines())
        trial.require(told, f"checkpoint-{step} and {name} are not named together")
