"""Two gloo processes against one with the same global batch: the same images, the same weights."""
import socket

import pytest
import torch
from torch import multiprocessing

from grpo_trainer import GRPOConfig
from tests.tiny_world import Brightness, make_trainer, make_world, weights
from utils import distributed

PROMPTS = 8  # a step's, over all processes


class Patchy(Brightness):
    """Fails on some images, whichever process has them: means must be over all valid ones."""

    def score(self, names, images, prompts, metadata):
        scores = super().score(names, images, prompts, metadata)
        return {name: values.where((values * 1e5).long() % 5 > 0, torch.nan) for name, values in scores.items()}


def options(world_size, **changes):
    """Two minibatches of 16 images in two micro-batches each, whatever the number of processes."""
    return dict(num_generations=4, per_device_train_batch_size=8 // world_size, gradient_accumulation_steps=2,
                num_minibatches=2, num_iterations=2, beta=0.05, scale_rewards="batch", learning_rate=1e-4,
                sampling=dict(cfg_scale=2.0), exit_step=3, eval_steps=3, eval_generations=2, save_steps=2, **changes)


def train(world, run, world_size):
    """-> (weights, the rollouts' tokens with the positions of their prompts, logged numbers of the first step)."""
    torch.set_num_threads(1)
    trainer = make_trainer(world, run if distributed.is_main() else None, **options(world_size))
    trainer.reward_set.rewards = {Brightness: Patchy()}
    rollout, tokens, logged = trainer.rollout, [], []

    def recorded(step, metrics):
        result = rollout(step, metrics)
        tokens.append(result.tokens)
        logged.append(metrics)
        return result

    trainer.rollout = recorded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_trainer.write_report", lambda folder: None)
        trainer.train()
    numbers = logged[0].means()
    return weights(trainer), torch.stack(tokens), {k: v for k, v in numbers.items() if not k.startswith("seconds")}


def worker(rank, port, world, output):
    patch = pytest.MonkeyPatch()
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", port)):
        patch.setenv(name, str(value))
    distributed.setup(timeout_sec=60)
    torch.save(train(world, output / "run", 2), output / f"rank{rank}.pt")
    distributed.shutdown()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_world(folder)
    alone = train(folder, folder / "alone", 1)
    try:
        multiprocessing.spawn(worker, (free_port(), folder, folder), nprocs=2)
    except multiprocessing.ProcessRaisedException:  # another process took the port meanwhile: once more
        multiprocessing.spawn(worker, (free_port(), folder, folder), nprocs=2)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return folder, alone, ranks


def test_both_processes_end_with_identical_weights(results):
    _, _, ((first, *_), (second, *_)) = results
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_equal_those_of_one_process(results):
    folder, (alone, *_), ((first, *_), _) = results
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-5, msg=name)
    start = make_trainer(folder, None).scorer.gpt.state_dict()
    assert max((alone[name] - start[name]).abs().max() for name in alone) > 5e-4  # far beyond the tolerance


def test_each_image_is_the_same(results):
    _, (_, alone, _), ((_, first, _), (_, second, _)) = results
    by_rank = torch.stack([first, second]).unflatten(2, (-1, 4))  # [W, steps, P, G, L]
    merged = by_rank.permute(1, 2, 0, 3, 4).flatten(1, 3)  # prompt p of the batch is the (p // W)-th of rank p % W
    assert torch.equal(merged[0], alone[0])
    assert (merged == alone).float().mean() > 0.99  # later weights differ in their last bits, and a draw may flip
    assert len(alone[0].unique(dim=0)) == PROMPTS * 4


def test_logged_numbers_are_global(results):
    _, (*_, alone), ((*_, first), (*_, second)) = results
    assert first == second
    assert 0 < alone["reward_failures"] < 0.5
    assert first.keys() == alone.keys() and {"reward", "kl", "grad_norm", "logp_gap_max"} <= first.keys()
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_evaluations_and_checkpoints_equal_those_of_one_process(results):
    folder = results[0]
    for name in ("samples/step_000000.png", "checkpoint-2/trainer.pt", "checkpoint-3/trainer.pt",
                 "checkpoint-3/optimizer"):
        assert (folder / "run" / name).exists()
    grids = [(folder / run / "samples" / "step_000000.png").read_bytes() for run in ("run", "alone")]
    assert grids[0] == grids[1]  # three prompts on two processes: the surplus one is dropped


def test_the_global_batch_is_the_same():
    one, two = (GRPOConfig(**{name: value for name, value in options(size).items() if name != "sampling"})
                for size in (1, 2))
    assert one.prompts_per_step == 2 * two.prompts_per_step == PROMPTS
