"""benchmark.speed.plan: predicted memory is what a Meter counts, shards divide it, bytes are right. Not timed."""
import re

import pytest
import torch

from benchmark.speed import end_to_end, on_paper, plan, planner, roofline
from benchmark.speed.on_paper import Job
from grpo_trainer import GRPOConfig
from models.generate import SamplingConfig
from models.gpt import GPT, GPT_SIZES, GPTConfig
from models.lora import LoRAConfig
from models.vq import VQConfig

CPU, BF16 = torch.device("cpu"), torch.bfloat16
H100 = planner.HARDWARE["H100"]
MACHINE = planner.Machine("made up", "cpu", 2e10, 2e10, {torch.float32: 1e11, BF16: 2e11}, 1e9, 1e8)
VQ = VQConfig(codebook_size=4096, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), ch=32, z_channels=32,
              num_res_blocks=1)


def job(sampling=SamplingConfig(cfg_scale=2.0), gpt=None, **options):
    """Wide enough that its matrices are packed, as those of real sizes are."""
    names = GRPOConfig.__dataclass_fields__
    grpo = GRPOConfig(**{"num_generations": 4, "per_device_train_batch_size": 4, "beta": 0.1, "max_logp_gap": 1e9,
                         **{name: options.pop(name) for name in list(options) if name in names}})
    config = GPTConfig(**{"dim": 512, "n_layer": 1, "n_head": 8, "vocab_size": 4096, "block_size": 16,
                          "num_classes": 9, **(gpt or {})})
    return Job(config, VQ, grpo, sampling, **options)


@pytest.mark.parametrize("options", (
    {"sampling": SamplingConfig(), "beta": 0.0},
    {"gradient_checkpointing": True, "micro_batch_size": 2, "reference": "bf16", "optimizer": "adamw_8bit"},
    {"autocast_dtype": BF16, "rollout_dtype": BF16, "gradient_checkpointing": True, "head_chunk_tokens": 16},
    {"lora": LoRAConfig(lora_rank=4), "micro_batch_size": 1},
    {"gpt": {"model_type": "t2i", "cls_token_num": 20, "caption_dim": 64}}),
    ids=("unguided", "lean", "bf16", "lora", "t2i"))
def test_memory_is_what_a_step_takes(options):
    asked = job(**options)
    _, measured = end_to_end.watched(asked, CPU)
    for phase, predicted in planner.plan(asked, MACHINE).peaks.items():
        if measured[phase]:
            assert predicted == pytest.approx(measured[phase], rel=0.15), phase


def test_a_gpt_7b_is_planned_without_its_weights():
    weights = on_paper.weights_of(job(gpt=dict(**GPT_SIZES["GPT-7B"], vocab_size=16384, block_size=576)))
    assert weights.matrices == 32 * roofline.block_parameters(GPTConfig(**GPT_SIZES["GPT-7B"])) + 2 * 32 * 4096
    assert 6.4e9 < weights.all < 7e9 and weights.trained == weights.all


def test_sharding_divides_what_stands():
    alone, full, hybrid = (planner.plan(job(sharding=kind, world_size=8, gpus_per_node=4), H100)
                           for kind in ("none", "full", "hybrid"))
    for part in ("parameters", "optimizer", "reference"):
        assert full.standing[part] == pytest.approx(alone.standing[part] / 8)
        assert hybrid.standing[part] == pytest.approx(alone.standing[part] / 4)
    assert full.standing["tokenizer"] == alone.standing["tokenizer"]
    assert alone.phases["update"]["gradients"] == 0 < alone.standing["gradient buckets"]
    assert full.phases["update"]["gradients"] == alone.standing["gradient buckets"] / 8
    assert "gathered weights" in full.phases["update"] and "gathered weights" not in alone.phases["update"]
    assert "rollout buffers" in alone.standing and full.phases["sample"]["prepared weights"] > 0


def test_bytes_of_rings():
    def sent(**options):
        return planner.bytes_sent(job(**options), weights, options.get("micro_batch_size", 4))

    weights = on_paper.weights_of(job())
    assert sent(world_size=4) == {"gradients, all-reduce": pytest.approx(4 * weights.all * 1.5)}
    full = sent(sharding="full", world_size=4, micro_batch_size=2)
    assert full["gradients, reduce-scatter"] == pytest.approx(2 * 4 * weights.all * 0.75)
    assert full["weights, forward and backward"] == pytest.approx(2 * 2 * 4 * weights.all * 0.75)
    assert full["weights for a rollout"] == pytest.approx(4 * weights.all * 0.75)
    assert "gradients, between machines" not in full
    hybrid = sent(sharding="hybrid", world_size=4, gpus_per_node=2)
    assert hybrid["gradients, between machines"] == pytest.approx(4 * weights.all / 2)
    assert sent() == {}


def test_time_follows_the_work():
    def seconds(machine=MACHINE, **options):
        return planner.seconds_of_step(job(**options), machine, weights, 4)

    weights = on_paper.weights_of(job())
    one, faster = seconds(), seconds(MACHINE._replace(copy=4e10, flops={torch.float32: 2e11, BF16: 4e11}))
    for phase in one:
        assert faster[phase] == pytest.approx(one[phase] / 2), phase
    twice = seconds(num_iterations=2)
    assert twice["update"] == pytest.approx(2 * one["update"]) and twice["sample"] == one["sample"]
    assert one["update"] < seconds(gradient_checkpointing=True)["update"] < 1.5 * one["update"]
    slow, fast = (seconds(world_size=8, gpus_per_node=n)["communication"] for n in (4, 8))
    assert slow == pytest.approx(10 * fast)  # the network is ten times slower than the links


def test_auto_fills_the_memory_and_says_what_does_not_fit():
    wide = dict(gpt=dict(dim=64, block_size=256), num_generations=8, per_device_train_batch_size=8)
    small = MACHINE._replace(memory=planner.plan(job(micro_batch_size=4, **wide), MACHINE).peak / 0.9)
    automatic = planner.plan(job(micro_batch_size="auto", **wide), small)
    assert 2 <= automatic.at_once == automatic.fit < 8 and automatic.peak < small.memory
    full = planner.plan(job(**wide), small._replace(memory=small.memory * 0.9))
    assert any("MORE THAN THERE IS" in line for line in planner.as_lines(full))
    assert not any("MORE THAN THERE IS" in line for line in planner.as_lines(automatic))


@pytest.fixture
def small_probes(monkeypatch):
    monkeypatch.setitem(GPT_SIZES, "tiny", dict(n_layer=2, n_head=4, dim=64))
    monkeypatch.setattr(roofline, "MATMUL_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2 ** 16})


def test_the_command_takes_the_trainers_flags(small_probes, capsys):
    found = plan.main(["--config", "c2i_llamagen_3b_384", "--gpt_model", "tiny", "--gpus", "8", "--hardware", "H200"])
    printed = capsys.readouterr().out
    for name in ("machine", "batch", "micro-batch", "standing", "sample", "update", "peak", "seconds", "sent"):
        assert re.search(rf"^{name} ", printed, re.MULTILINE), name
    assert found.job.shard_group == 8 and found.job.gpt.block_size == 576 and found.job.autocast_dtype == BF16


def test_folders_of_ours_name_their_size(small_probes):
    found = plan.main(["--config", "t2i_shapes", "--device", "cpu"])
    assert found.job.gpt.block_size == 64 and found.job.vq.patch == 2


def test_check_prints_the_error(small_probes, capsys):
    plan.main(["--gpt_model", "tiny", "--image_size", "16", "--num_generations", "2", "--per_device_train_batch_size",
               "2", "--max_logp_gap", "1", "--device", "cpu", "--check"])
    printed = capsys.readouterr().out
    assert re.search(r"^step +[\d.]+ +[\d.]+ +-?[\d.]+%", printed, re.MULTILINE) and "measured" in printed


@pytest.mark.parametrize("flags,message", (
    (["--hardware", "H1000"], "hardware must be one of H100, H200, A100"),
    (["--gpus", "0"], "gpus must be at least 1"), (["--check", "--gpus", "2"], "check measures one process"),
    (["--gpt_model", "GPT-Z"], "gpt_model must be one of GPT-B"), (["--image_size", "100"], "multiple of 16"),
    (["--gpus", "12", "--hardware", "H100"], "must be a multiple of gpus_per_node"),
    (["--sharding", "some"], "--sharding: expected one of none, full, hybrid")))
def test_mistakes_are_one_line(small_probes, flags, message):
    with pytest.raises((SystemExit, ValueError)) as raised:
        plan.main(["--device", "cpu", *flags])
    if isinstance(raised.value, ValueError):  # the script's own guard makes it one line
        assert message in str(raised.value) and "\n" not in str(raised.value)


def test_heads_of_100_numbers_decode():
    """GPT-3B's: a multiple of no power of two."""
    from models.generate import generate
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(dim=200, n_head=2, n_layer=2, vocab_size=64, block_size=9, num_classes=5)).eval()
    torch.nn.init.normal_(gpt.output.weight)
    condition = torch.tensor([0, 3])
    tokens = generate(gpt, condition, SamplingConfig(greedy=True)).tokens
    with torch.no_grad():
        assert torch.equal(gpt(condition, tokens[:, :-1]).argmax(-1), tokens)
