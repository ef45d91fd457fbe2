"""The short version of `python -m tests.faults.run`: one run through several faults, a few cases of the other kinds.

Where a fault strikes varies a little from run to run; what must hold does not.
"""
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tests.faults import config, damage, disk, kill, server, signals
from tests.faults.job import Lab, Trial, check_finished, check_resumption
from tests.faults.run import row


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"), steps=14)


def assert_recovered(*trials):
    assert trials
    assert not [(trial.case, trial.problems) for trial in trials if trial.problems]


@pytest.fixture(scope="module")
def chain(lab):
    """{fault: its Trial}: one run, killed while it saves, preempted in a step, then its newest checkpoint damaged."""
    reference, output, made = lab.reference(), lab.new_output("chain"), {}
    with lab.start(output) as job:
        assert kill.reach(job, reference, kill.Aim("save", 2, 0.5), lab.steps), job.log()
        made["kill"] = kill.kill(job, 0.0, lab)
    with lab.start(output) as job:
        assert kill.reach(job, reference, kill.Aim("step", 3, 0.5), lab.steps), job.log()
        made["signal"] = signals.send(job, random.Random(0), lab.steps)
    check_resumption(made["kill"], job)
    spoilt = damage.spoil(output / "run", 1, random.Random(0))
    last = lab.finish(output)
    made["damage"] = Trial("damaged")
    damage.check_named(made["damage"], last, spoilt)
    check_resumption(made["damage"], last)
    made["end"] = Trial("finished")
    check_finished(made["end"], last, reference.run, lab.steps)
    return made


@pytest.mark.parametrize("fault", ("kill", "signal", "damage"))
def test_one_run_through_several_faults(chain, fault):
    assert_recovered(chain[fault])


def test_it_ends_as_the_uninterrupted_run_bit_for_bit(chain):
    assert_recovered(chain["end"])
    assert chain["end"].facts["weights' difference"] == 0


def test_a_dead_rank_ends_the_job_which_then_resumes(lab):
    output = lab.new_output("two")
    with lab.start(output, processes=2) as job:
        assert kill.reach(job, lab.reference(), kill.Aim("step", 3, 0.5), lab.steps), job.log()
        trial = kill.kill(job, 0.99, lab)
    assert trial.case.endswith("rank 1")
    last = lab.finish(output, processes=2)
    check_resumption(trial, last)
    check_finished(trial, last, None, lab.steps)
    assert_recovered(trial)


def test_every_damage_to_every_file_is_refused_by_name(lab):
    trials = list(damage.trials(lab, 42, random.Random(0)))
    assert len({trial.case for trial in trials}) == len(damage.DAMAGES)
    assert_recovered(*trials)


def test_a_full_disk_is_survived_when_it_is_freed(lab):
    output = lab.new_output("disk")
    with disk.small_disk(output / "run") as small:
        trial = Trial(small.kind)
        disk.freed_in_time(trial, lab, output, small)
    assert_recovered(trial)


def test_missing_scores_are_counted_and_never_numbers(lab):
    trial = Trial("scores")
    server.some_scores_missing(trial, lab, lab.reference().run, random.Random(0))
    assert_recovered(trial)


def test_a_broken_configuration_changes_nothing(lab):
    assert_recovered(*config.restarts(lab, ("truncated",), ("preset: not text",)))
    trials = list(config.flips(lab, 40, random.Random(0)))
    assert Counter(trial.case for trial in trials)["bits flipped"] > 30
    assert_recovered(*trials)


def test_the_harness_sees_what_is_wrong(lab):
    """A run that lost a step's line, kept a temporary folder and has other weights is not passed off as recovered."""
    run = lab.new_output("wrong") / "run"
    shutil.copytree(lab.reference().run, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-3] + lines[-2:]))
    (run / ".tmp-checkpoint-9").mkdir()
    weights = run / f"checkpoint-{lab.steps}" / "model.safetensors"
    save_file({name: tensor + 1e-4 for name, tensor in load_file(weights).items()}, weights)
    trial, job = Trial("wrong"), SimpleNamespace(run=run, process=SimpleNamespace(returncode=0))
    check_finished(trial, job, lab.reference().run, lab.steps)
    assert [problem.split()[0] for problem in trial.problems] == ["metrics.jsonl", "left", "logged", "weights"]
    assert row("kind", [trial, Trial("right")]).startswith("| kind | 2 | 1 | ")
    assert "NOT: left behind: .tmp-checkpoint-9 (1)" in row("kind", [trial])
