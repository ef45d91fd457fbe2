"""Injects faults into runs of the tiny world and prints what came of them, as a table for benchmark/RESULTS.md.

    python -m tests.faults.run --trials 50 --seed 0 [--kinds kill kill2 damage] [--json out.json] [--keep FOLDER]
    python -m tests.faults.run --kinds kill2 --flags --sharding full --async_save  # the rest goes to train_c2i.py

CPU only. --trials counts kills and signals; there are four damaged files to each, and the other kinds have fixed lists
of cases. The exit code is 1 if any trial was not recovered from. Left out: files that were damaged together with their
checksums (malice, not accident), and machines that lose what fsync promised.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.faults import config, damage, disk, kill, server, signals
from tests.faults.job import Lab, Trial

KINDS = {  # name -> (what the table says, trials(lab, count, rng))
    "kill": ("kill -9, 1 process", kill.trials),
    "kill2": ("kill -9, torchrun with 2 processes", partial(kill.trials, processes=2)),
    "sigterm": ("SIGTERM, SIGUSR1, 1 process", signals.trials),
    "sigterm2": ("SIGTERM, SIGUSR1, 2 processes", partial(signals.trials, processes=2)),
    "damage": ("damaged checkpoint file", lambda lab, count, rng: damage.trials(lab, 4 * count, rng)),
    "restart": ("restart on damaged checkpoints", damage.restarts),
    "disk": ("disk full", disk.trials),
    "server": ("reward server", server.trials),
    "config": ("config.json, preset", config.trials),
}


def row(title: str, trials: list[Trial]) -> str:
    """kind | trials | recovered | notes"""
    counts = Counter(trial.case for trial in trials)
    facts: dict[str, float] = {}
    for trial in trials:
        for name, value in trial.facts.items():
            facts[name] = max(value, facts.get(name, value))
    notes = [", ".join(f"{case} {count}" if count > 1 else case for case, count in sorted(counts.items()))]
    notes += [f"at most: {', '.join(f'{name} {value:.3g}' for name, value in facts.items())}"] if facts else []
    problems = Counter(problem for trial in trials for problem in trial.problems)
    notes += [f"NOT: {problem} ({count})" for problem, count in problems.most_common(3)]
    good = sum(not trial.problems for trial in trials)
    return f"| {title} | {len(trials)} | {good} | {'; '.join(notes)} |"


def run_kind(name: str, lab: Lab, count: int, seed: int) -> list[Trial]:
    trials = []
    for trial in KINDS[name][1](lab, count, random.Random(f"{seed} {name}")):
        trials.append(trial)
        sys.stderr.write(f"{name} {len(trials)}: {trial.case}: {'; '.join(trial.problems) or 'recovered'}\n")
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="every trial")
    parser.add_argument("--keep", type=Path, help="leave runs and logs there; default: a temporary folder")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of train_c2i.py, for every run; last")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab((options.keep or Path(temporary)).resolve(), tuple(options.flags))
        for name in options.kinds:
            started = time.monotonic()
            results[name] = run_kind(name, lab, options.trials, options.seed)
            sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    print("| kind | trials | recovered | notes |\n|---|---|---|---|")
    for name, trials in results.items():
        print(row(KINDS[name][0], trials))
    if options.json:
        options.json.write_text(json.dumps({name: list(map(asdict, trials)) for name, trials in results.items()},
                                           indent=1) + "\n")
    return int(any(trial.problems for trials in results.values() for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
