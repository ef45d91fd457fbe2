"""Decoding and scoring in a thread beside the rollout: the same results, in order, and errors are not lost.

On CPUs the thread has no stream; with ARGRPO_TEST_GPU=1 (conftest.py) it has one.
"""
import threading

import pytest
import torch

from models.streams import SideStream
from tests.tiny_world import CONDITIONS, make_trainer, make_world
from trainer_utils import rollout as rollout_module
from trainer_utils.rollout import sample_and_score

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_jobs_run_in_order_and_errors_are_raised_at_the_end(device):
    stream, seen = SideStream(torch.device(device), enabled=True), []

    def job(tensor):
        seen.append(threading.current_thread().name)
        if tensor.item() == 2:
            raise ValueError("job 2")
        return tensor * 10, "kept"

    waits = [stream.run(job, torch.tensor(float(i), device=device)) for i in range(4)]
    assert [waits[i]()[0].item() for i in (0, 1, 3)] == [0, 10, 30] and waits[0]()[1] == "kept"
    with pytest.raises(ValueError, match="job 2"):
        waits[2]()
    assert set(seen) == {"side_stream_0"}


def test_rollouts_scored_beside_the_next_are_the_same(tmp_path, monkeypatch):
    make_world(tmp_path)
    trainer, names = make_trainer(tmp_path, None), []

    class Threaded(SideStream):
        def __init__(self, device, enabled):
            super().__init__(device, enabled=not enabled)
            names.append(self.thread._thread_name_prefix)

    def samples():
        return sample_and_score(trainer.policy, CONDITIONS[:4], list(range(16)), 4, trainer.reward_set, batch_size=4)

    plain = samples()
    monkeypatch.setattr(rollout_module, "SideStream", Threaded)
    threaded = samples()
    assert names == ["side_stream"] and len(threaded.pending) == 4
    assert torch.equal(plain.images, threaded.images) and torch.equal(plain.tokens, threaded.tokens)
    scores = [trainer.reward_set.collect(result.pending).table for result in (plain, threaded)]
    assert torch.equal(*scores) and not threaded.images.requires_grad
