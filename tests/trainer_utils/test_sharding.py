"""FSDP2 on gloo processes against DDP and one process, and checkpoints that move between them.

With ARGRPO_TEST_GPU=1 (conftest.py) and as many GPUs as processes the same tests run with nccl.
"""
import json
import os
import shutil
import socket
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from benchmark.speed import scaling
from grpo_trainer import GRPOConfig
from models.lora import LoRAConfig, add_adapters
from tests import tiny_world
from tests.tiny_world import make_trainer, weights
from utils import distributed

OPTIONS = dict(num_generations=4, num_minibatches=2, beta=0.05, learning_rate=1e-4, sampling=dict(cfg_scale=2.0),
               save_steps=2, gradient_accumulation_steps=2, exit_step=5)
IMAGES = 16  # of an update, over all processes


@pytest.fixture(scope="module", autouse=True)
def one_kind_of_device():
    """One process and several must train on the same: to 1e-5, AdamW tells CPUs and GPUs apart."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() < 2:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def train(world: Path, run: Path, checkpointing: bool = True, **changes) -> dict[str, torch.Tensor]:
    """The weights of a run, whole; it resumes where `run` stands."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    options = OPTIONS | dict(per_device_train_batch_size=IMAGES // 2 // distributed.world_size()) | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_trainer.write_report", lambda folder: None)
        patch.setattr("trainer_utils.run_folder.RunFolder._refuse_changes", lambda *_: None)  # sizes change on purpose
        trainer = make_trainer(world, run if distributed.is_main() else None, device=distributed.setup(), **options)
        trainer.scorer.gpt.gradient_checkpointing = checkpointing
        trainer.train()
    return {name: distributed.whole(tensor).cpu().clone() for name, tensor in weights(trainer).items()}


def start(rank: int, size: int, port: int, local_size: int, job, output: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(local_size))
    if torch.cuda.device_count() < size:
        torch.cuda.is_available = lambda: False
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
def alone(world, tmp_path_factory):
    """(weights after five steps, run folder with checkpoints 4 and 5) of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return train(world, run), run


def assert_near(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5, msg=name)


def on_two(world: Path, folder: Path) -> dict[str, dict]:
    """All that the tests below want of two processes, in one start of them."""
    def run(name: str, **changes):
        return train(world, folder / name, **changes)

    results = {"full": run("full", sharding="full"), "ddp": run("ddp")}
    run("to_one", sharding="full", exit_step=2)
    run("to_ddp", sharding="full", exit_step=2)
    results["to_ddp"] = run("to_ddp")
    run("from_one", sharding="full", reference="bf16", async_save=True, exit_step=6)
    with policies(in_bfloat16):
        for kind in ("none", "full"):
            results[f"bf16 {kind}"] = run(f"bf16 {kind}", sharding=kind, max_logp_gap=1.0)
    for kind in ("none", "full"):
        results[f"fp16 {kind}"] = run(f"fp16 {kind}", sharding=kind, dtype="float16", rollout_dtype="float16",
                                     exit_step=2)
    results["dtypes"] = gathered_dtypes(world)
    results["held"] = held_by_a_process(world)
    results["sent"] = {kind: sent_in_a_step(world, kind) for kind in ("none", "full")}
    adapted(world, folder / "adapted", sharding="full")
    return results


def held_by_a_process(world: Path) -> dict[str, int]:
    """Numbers of one matrix that a process holds between rollouts, in one and after it, and of the reference's."""
    options = OPTIONS | dict(per_device_train_batch_size=4, sharding="full")
    trainer = make_trainer(world, None, device=distributed.setup(), **options)
    matrix = trainer.scorer.gpt.layers[0].attention.wqkv
    reference = trainer.reference.scorer.gpt.layers[0].attention.wqkv
    held = {"between": matrix.weight.to_local().numel(), "reference": reference.weight.to_local().numel()}
    with distributed.gathered(trainer.model):
        held["within"] = matrix.weight.data.untyped_storage().nbytes() // 4
        assert type(matrix.weight.data) is torch.Tensor  # what the decoder prepares its weights from
    return held | {"after": matrix.weight.to_local().numel()}


def sent_in_a_step(world: Path, sharding: str) -> tuple[int, int]:
    """(counted, predicted) bytes that a process hands to collectives."""
    trainer = make_trainer(world, None, device=distributed.setup(), sharding=sharding, per_device_train_batch_size=8)
    with scaling.Sent() as sent:
        scaling.one_step(trainer, 0)
    return sum(sent.nbytes.values()), scaling.predicted_bytes(trainer, sharding)


@contextmanager
def policies(change):
    """Inside, change(policy) is made to each loaded policy before there is a trainer."""
    def load_changed(*inputs):
        policy = load(*inputs)
        change(policy)
        return policy

    load = tiny_world.load_policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_world, "load_policy", load_changed)
        yield


def add_rank_2(policy) -> None:
    add_adapters(policy.gpt, LoRAConfig(lora_rank=2))


def in_bfloat16(policy) -> None:
    policy.autocast_dtype = policy.rollout_dtype = torch.bfloat16


def adapted(world: Path, run: Path, **changes) -> None:
    with policies(add_rank_2):
        train(world, run, **changes)


def gathered_dtypes(world: Path) -> list[str]:
    """Of a block's matrix and of the head, in a bf16 run, without adapters and with."""
    dtypes = []
    for change in (in_bfloat16, lambda policy: (in_bfloat16(policy), add_rank_2(policy))):
        with policies(change):
            trainer = make_trainer(world, None, device=distributed.setup(), sharding="full")
        with distributed.gathered(trainer.model):
            gpt = trainer.scorer.gpt
            dtypes += [str(gpt.layers[0].attention.wqkv.weight.dtype), str(gpt.output.weight.dtype)]
    return dtypes


@pytest.fixture(scope="module")
def two(world, alone, tmp_path_factory):
    """(results of `on_two`, its folder)."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(alone[1], folder / "from_one")
    shutil.rmtree(folder / "from_one" / "checkpoint-5")
    return on_processes(2, partial(on_two, world, folder), folder), folder


def test_full_sharding_equals_ddp_and_one_process(world, alone, two):
    assert_near(two[0]["full"], alone[0])
    assert_near(two[0]["full"], two[0]["ddp"])
    begin = weights(make_trainer(world, None))
    assert max((two[0]["full"][name] - begin[name]).abs().max() for name in begin) > 3e-4  # far beyond the tolerance


def first_images(world: Path) -> torch.Tensor:
    """Tokens of the first rollout, of all processes in the order of its prompts."""
    size = IMAGES // 2 // distributed.world_size()
    trainer = make_trainer(world, None, device=distributed.setup(), **OPTIONS | dict(per_device_train_batch_size=size))
    rollout = trainer.rollout(0, distributed.Metrics(trainer.device))
    return distributed.gather_groups(rollout.tokens, OPTIONS["num_generations"]).cpu()


def on_four(world: Path, folder: Path) -> tuple[torch.Tensor, dict]:
    return first_images(world), train(world, folder / "run", sharding="hybrid", micro_batch_size="auto")


def test_two_machines_of_two_processes_draw_and_learn_the_same(world, alone, tmp_path):
    images, hybrid = on_processes(4, partial(on_four, world, tmp_path), tmp_path, local_size=2)
    assert torch.equal(images, first_images(world))
    assert_near(hybrid, alone[0])


def test_a_sharded_checkpoint_goes_on_elsewhere(world, alone, two):
    """Two steps sharded over two processes; the rest on one, or replicated on two: the same run."""
    run = two[1] / "to_one"
    shards = sorted(path.name for path in (run / "checkpoint-2" / "optimizer").iterdir())
    assert [name.split("-")[1] for name in shards] == ["00001", "00002"]  # each process wrote its own
    assert_near(train(world, run), alone[0])
    assert_near(two[0]["to_ddp"], alone[0])


def test_a_checkpoint_of_one_process_goes_on_sharded(two):
    run = two[1] / "from_one"
    assert len(list((run / "checkpoint-6" / "optimizer").iterdir())) == 2
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 7))


def test_each_process_holds_its_slice(two):
    held = two[0]["held"]
    assert held["between"] == held["after"] == held["reference"] == held["within"] // 2


def test_a_step_sends_what_the_parameters_predict(two):
    for counted, predicted in two[0]["sent"].values():
        assert counted == pytest.approx(predicted, rel=0.1)


def test_adapters_are_sharded_too(world, two, tmp_path):
    adapted(world, tmp_path / "run")
    ours, whole = (load_file(run / "checkpoint-5" / "model.safetensors")
                   for run in (two[1] / "adapted", tmp_path / "run"))
    assert_near(ours, whole)


def test_in_float16_sharding_trains_as_ddp_does(two):
    """Gathered in float16, reduced in float32, from the same scaled loss."""
    assert_near(two[0]["fp16 full"], two[0]["fp16 none"])


def test_in_bfloat16_sharding_trains_as_ddp_does(two):
    assert_near(two[0]["bf16 full"], two[0]["bf16 none"])
    matrix, head, adapted_matrix, _ = two[0]["dtypes"]
    assert (matrix, head) == ("torch.bfloat16", "torch.float32")
    assert adapted_matrix == "torch.float32"  # small adapters would vanish in bf16's rounding of the base


def test_eight_bit_moments_and_shards_exclude_each_other():
    with pytest.raises(ValueError, match="adamw_8bit does not go with sharding full"):
        GRPOConfig(optimizer="adamw_8bit", sharding="full")
