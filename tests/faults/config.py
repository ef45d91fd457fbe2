"""config.json or a preset that is damaged or says something else: one clear line, and the folder stays as it is."""
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.damage import flipped
from tests.faults.job import Lab, Trial, check_one_line, contents
from trainer_utils.composition import CONFIGS
from trainer_utils.run_folder import RunFolder
from utils.config import changeable

FLIPS = 100
CASES: dict[str, tuple[Callable[[bytes], bytes], str]] = {  # name -> (damage, what the error must name beside the file)
    "truncated": (lambda content: content[:len(content) // 2], "damaged"),
    "empty": (lambda content: b"", "damaged"),
    "not text": (lambda content: b"\xff\xfe\0" + content[3:], "damaged"),
    "no mapping": (lambda content: b"[1, 2]\n", "damaged"),
    "another value": (lambda content: content.replace(b'"beta": 0.05', b'"beta": 0.06'), "beta: 0.06 -> 0.05"),
    "a value less": (lambda content: content.replace(b'  "beta": 0.05,\n', b""), r"beta: \(absent\) -> 0.05"),
}
PRESETS = {
    "preset: no YAML": b"beta: [1,\n",
    "preset: not text": b"\xff\xfe\0beta: 1\n",
    "preset: unknown key": b"betta: 0.1\n",
    "preset: a Python object": b"beta: !!python/object/apply:os.getcwd []\n",
}


def trials(lab: Lab, count: int, rng: random.Random) -> Iterator[Trial]:
    """Each case by a real restart, and random bit flips of config.json in this process."""
    yield from restarts(lab, CASES, PRESETS)
    yield from flips(lab, FLIPS, rng)


def restarts(lab: Lab, cases, presets) -> Iterator[Trial]:
    output = lab.new_output("config")
    shutil.copytree(lab.reference().run, output / "run")
    path = output / "run" / "config.json"
    content = path.read_bytes()
    for name in cases:
        damage, word = CASES[name]
        path.write_bytes(damage(content))
        assert path.read_bytes() != content, name
        yield refused(Trial(name), lab, output, (), ("config.json|holds a run", word))
    path.write_bytes(content)
    for name in presets:
        preset = output / "preset.yaml"
        preset.write_bytes(PRESETS[name])
        yield refused(Trial(name), lab, output, ("--config", preset), ("preset.yaml",))


def refused(trial: Trial, lab: Lab, output: Path, flags, words) -> Trial:
    before = contents(output / "run")
    job = lab.finish(output, *flags)
    trial.require(job.process.returncode in (1, 2), f"exit code {job.process.returncode}")
    check_one_line(trial, job, "^error: ", *words)
    trial.require(contents(output / "run") == before, "files of the run were changed")
    return trial


def flips(lab: Lab, count: int, rng: random.Random) -> Iterator[Trial]:
    """Refused, or without consequence: the same settings, but for those that a resumed run may change."""
    run = lab.new_output("flips") / "run"
    shutil.copytree(lab.reference().run, run)
    path = run / "config.json"
    content = path.read_bytes()
    expected = json.loads(content)
    for _ in range(count):
        path.write_bytes(changed := flipped(content, b"", rng))
        before, trial = contents(run), Trial("bits flipped")
        try:
            RunFolder(run, expected, "none", changeable(*CONFIGS))
        except ValueError as error:
            trial.require(str(run) in str(error) and "\n" not in str(error), f"the error was {error}")
            trial.require(contents(run) == before, "files of the run were changed")
        else:
            trial.case = "bits flipped, harmless"
            trial.require(settings(changed) == settings(content), "another configuration was accepted")
        yield trial


def settings(content: bytes) -> dict:
    """What must be equal; null under whatever name is what an absent setting is."""
    return {key: value for key, value in json.loads(content).items()
            if key not in changeable(*CONFIGS) and value is not None}
