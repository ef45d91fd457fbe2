"""FSDP2 on gloo processes against DDP and one process, and checkpoints that move between them."""
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from models import distributed
from models.lora import LoRAConfig, add_adapters
from tests.tiny_world import make_trainer, make_world, weights

OPTIONS = dict(num_generations=4, num_minibatches=2, beta=0.05, learning_rate=1e-4, sampling=dict(cfg_scale=2.0),
               save_steps=2, gradient_accumulation_steps=2, exit_step=5)
IMAGES = 16  # of an update, over all processes
GPU = torch.cuda.is_available() and torch.cuda.device_count() > 1


def train(world: Path, run: Path, checkpointing: bool = True, **changes) -> dict[str, torch.Tensor]:
    """The weights of a run, whole; it resumes where `run` stands."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    options = OPTIONS | dict(per_device_train_batch_size=IMAGES // 2 // distributed.world_size()) | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_trainer.write_report", lambda folder: None)
        patch.setattr("models.run_folder.RunFolder._refuse_changes", lambda *_: None)  # sizes change on purpose
        trainer = make_trainer(world, run if distributed.is_main() else None, **options)
        trainer.scorer.gpt.gradient_checkpointing = checkpointing
        trainer.train()
    return {name: distributed.whole(tensor).clone() for name, tensor in weights(trainer).items()}


def start(rank: int, size: int, port: int, local_size: int, job, output: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(local_size))
    distributed.setup(timeout_sec=60)
    result = job()
    if rank == 0:
        torch.save(result, output)
    distributed.shutdown()


def on_processes(size: int, job, folder: Path, local_size: int = 0):
    """job() on `size` processes; returns rank 0's result."""
    output = folder / "result.pt"
    for attempt in range(2):  # another process may take the port meanwhile
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            multiprocessing.spawn(start, (size, port, local_size or size, job, output), nprocs=size)
            break
        except multiprocessing.ProcessRaisedException as error:
            if attempt or "EADDRINUSE" not in str(error):
                raise
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """(weights after five steps, run folder with checkpoints 4 and 5) of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return train(world, run), run


def assert_near(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name].cpu(), second[name].cpu(), rtol=0, atol=1e-5, msg=name)


def test_full_sharding_equals_ddp_and_one_process(world, alone, tmp_path):
    sharded = on_processes(2, partial(train, world, tmp_path / "full", sharding="full"), tmp_path)
    replicated = on_processes(2, partial(train, world, tmp_path / "ddp"), tmp_path)
    assert_near(sharded, alone[0])
    assert_near(sharded, replicated)
    begin = weights(make_trainer(world, None))
    assert max((sharded[name] - begin[name]).abs().max() for name in begin) > 3e-4  # far beyond the tolerance


def test_hybrid_sharding_on_two_machines_of_two(world, alone, tmp_path):
    hybrid = on_processes(4, partial(train, world, tmp_path / "run", sharding="hybrid"), tmp_path, local_size=2)
    assert_near(hybrid, alone[0])


def resumed_at(world: Path, run: Path, **changes) -> dict[str, torch.Tensor]:
    return train(world, run, **changes)


@pytest.mark.parametrize("then", ("one", "ddp"))
def test_a_sharded_checkpoint_goes_on_elsewhere(world, alone, tmp_path, then):
    """Two steps sharded over two processes, the rest on one, or replicated on two: the same run."""
    run = tmp_path / "run"
    on_processes(2, partial(train, world, run, sharding="full", exit_step=2), tmp_path)
    shards = sorted(path.name for path in (run / "checkpoint-2" / "optimizer").iterdir())
    assert [name.split("-")[1] for name in shards] == ["00001", "00002"]  # each process wrote its own
    job = partial(train, world, run)
    assert_near(job() if then == "one" else on_processes(2, job, tmp_path), alone[0])


def test_a_checkpoint_of_one_process_goes_on_sharded(world, alone, tmp_path):
    shutil.copytree(alone[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    job = partial(train, world, tmp_path / "run", sharding="full", reference="bf16", async_save=True, exit_step=6)
    on_processes(2, job, tmp_path)
    assert (tmp_path / "run" / "checkpoint-6" / "optimizer").is_dir()


def sharded_details(world: Path) -> dict:
    """What a process holds between steps, in a rollout, and after it; with adapters."""
    trainer = make_trainer(world, None, sharding="full", **{**OPTIONS, "per_device_train_batch_size": 4})
    matrix = trainer.scorer.gpt.layers[0].attention.wqkv
    held = {"slice": matrix.weight.to_local().numel(), "whole": matrix.weight.numel()}
    with distributed.gathered(trainer.model):
        held["gathered"] = matrix.weight.numel() - 0 * matrix.weight.sum().item()
        held["plain"] = type(matrix.weight.data) is torch.Tensor
    held["after"] = matrix.weight.to_local().numel()
    held["reference"] = trainer.reference.scorer.gpt.layers[0].attention.wqkv.weight.to_local().numel()
    return held


def test_each_process_holds_its_slice(world, tmp_path):
    held = on_processes(2, partial(sharded_details, world), tmp_path)
    assert held["plain"] and held["gathered"] == held["whole"]
    assert held["slice"] == held["after"] == held["reference"] == held["whole"] // 2


def adapted(world: Path, run: Path, **changes) -> dict[str, torch.Tensor]:
    """A run with adapters, whose checkpoint's exported weights are returned."""
    from safetensors.torch import load_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.tiny_world.load_policy", partial(with_adapters, make_trainer.__globals__["load_policy"]))
        train(world, run, **changes)
    return load_file(run / "checkpoint-5" / "model.safetensors")


def with_adapters(load, *inputs):
    policy = load(*inputs)
    add_adapters(policy.gpt, LoRAConfig(lora_rank=2))
    return policy


def test_adapters_are_sharded_too(world, tmp_path):
    whole = adapted(world, tmp_path / "alone")
    on_processes(2, partial(adapted, world, tmp_path / "run", sharding="full", exit_step=2 + 3), tmp_path)
    from safetensors.torch import load_file

    assert_near(load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors"), whole)


def test_eight_bit_moments_and_shards_exclude_each_other():
    with pytest.raises(ValueError, match="adamw_8bit does not go with sharding full"):
        make_trainer(Path("nowhere"), None, optimizer="adamw_8bit", sharding="full")
