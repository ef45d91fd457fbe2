"""The trainer as a whole on a tiny model: it learns, its guards stop it, and how a batch is cut changes nothing."""
import json

import pytest
import torch

import grpo_trainer
from grpo_trainer import GRPOConfig, TrainingStopped, group_advantages
from models.build import PolicyConfig
from models.generate import SamplingConfig
from tests.tiny_world import Brightness, make_trainer, weights

NAN = float("nan")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "write_report", lambda folder: None)  # seconds of plotting; tested elsewhere


def lines_of(run, key="reward"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def same(first, second, **tolerance):
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or dict(rtol=0, atol=0)), msg=name)


def changed(first, second):
    return any(not torch.equal(first[name], second[name]) for name in first)


def failing(rows):
    """Brightness whose score of these rows of a batch is missing."""
    def score(self, names, images, prompts, metadata):
        scores = Brightness.score(self, names, images, prompts, metadata)
        for values in scores.values():
            values[[row for row in rows if row < len(values)]] = NAN
        return scores
    return type("Failing", (Brightness,), {"score": score})


def test_the_reward_rises_and_every_number_is_logged(world, tmp_path):
    trainer = make_trainer(world, tmp_path, learning_rate=3e-3, per_device_train_batch_size=64, exit_step=25,
                           eval_steps=25, eval_generations=32, beta=0.001)
    start = weights(trainer)
    trainer.train()
    before, after = lines_of(tmp_path, "eval/entropy")
    assert (before["step"], after["step"]) == (0, 25)
    reward, stderr = "eval/rewards/brightness", "eval/rewards/brightness_stderr"
    assert after[reward] - before[reward] > 5 * (before[stderr] ** 2 + after[stderr] ** 2) ** 0.5
    steps = lines_of(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, 26))
    first, last = steps[0], steps[-1]
    assert set(first) >= {"reward", "rewards/brightness", "reward_std", "reward_failures", "zero_spread_groups", "kl",
                          "entropy", "clip_low", "clip_high", "ratio", "loss", "grad_norm", "learning_rate",
                          "skipped_updates", "logp_gap_max", "logp_gap_mean", "images_per_sec", "seconds/sample",
                          "seconds/decode", "seconds/score", "seconds/reference", "seconds/update", "seconds/step"}
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["clip_low"] == first["clip_high"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-3
    assert max(line["logp_gap_max"] for line in steps) < 1e-4
    assert first["entropy"] > last["entropy"] > 0
    assert first["reward"] == first["rewards/brightness"] and last["reward_std"] > 0
    same(trainer.reference.scorer.gpt.state_dict(), start)  # the reference stays where the run began
    assert changed(start, weights(trainer))
    assert (tmp_path / "checkpoint-25" / "trainer.pt").is_file()


def test_several_passes_move_the_ratio_and_clip(world, tmp_path):
    make_trainer(world, tmp_path, num_iterations=3, num_minibatches=2, epsilon=0.01, exit_step=3).train()
    step = lines_of(tmp_path)[-1]
    assert abs(step["ratio"] - 1) > 1e-5 and step["clip_low"] > 0 and step["clip_high"] > 0
    assert step["logp_gap_max"] < 1e-4  # of the first update, before the policy moved


@pytest.mark.parametrize("options", (
    dict(scale_rewards="none", importance_sampling_level="sequence", num_iterations=2),
    dict(scale_rewards="batch", rewards=("brightness", "shapes_quality"), weights=[1.0, 0.5],
         reward_aggregation="normalise"),
    dict(beta=0.0, lr_scheduler="cosine", warmup_steps=1, rollout_batch_size=8, eval_steps=1, eval_generations=16),
    dict(guidance_logprob="guided_detach_uncond", sampling=dict(cfg_scale=2.0, top_k=8, top_p=0.9, temperature=0.9)),
    dict(guidance_logprob="guided", sampling=dict(cfg_scale=3.0, cfg_interval=4), max_logp_gap=1e-3),
), ids=lambda options: next(iter(options)))
def test_options_train(world, tmp_path, options):
    trainer = make_trainer(world, tmp_path, **options)
    start = weights(trainer)
    trainer.train()
    assert changed(start, weights(trainer))
    last = lines_of(tmp_path)[-1]
    assert ("kl" in last) == (options.get("beta") != 0.0)
    assert {f"rewards/{name}" for name in options.get("rewards", ("brightness",))} <= set(last)


@pytest.mark.parametrize("missing", ((), (1, 2, 9)))
def test_micro_batches_change_nothing(world, monkeypatch, missing):
    """Failed rewards fall into the first and the second micro-batch unequally: means must be over all valid samples."""
    results = []
    for size, accumulation in ((16, 1), (4, 4), (2, 8)):
        trainer = make_trainer(world, None, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                               num_minibatches=2, learning_rate=1e-4, beta=0.05)
        trainer.reward_set.rewards = {Brightness: failing(missing)()}
        trainer.train()
        results.append(weights(trainer))
    same(results[0], results[1], rtol=0, atol=1e-6)
    same(results[0], results[2], rtol=0, atol=1e-6)


def test_rollouts_in_parts_draw_the_same_images(world):
    rollouts = []
    for size in (0, 4, 8):
        trainer = make_trainer(world, None, rollout_batch_size=size)
        rollouts.append(trainer.rollout(3, grpo_trainer.distributed.Metrics(trainer.device)))
    assert all(torch.equal(rollouts[0].tokens, other.tokens) for other in rollouts[1:])
    assert len(rollouts[0].tokens.unique(dim=0)) == 16


def test_evaluation_batches_never_exceed_the_rollout_batch(world):
    trainer = make_trainer(world, None, rollout_batch_size=4, eval_steps=1, eval_generations=16)
    sizes, sample = [], trainer.policy.sample
    trainer.policy.sample = lambda *inputs: sizes.append(len(inputs[2])) or sample(*inputs)
    trainer.evaluate(0)
    assert sizes == [16, 16, 16]  # a group is the least


def test_a_scorer_of_another_policy_stops_before_the_first_update(world):
    trainer = make_trainer(world, None)
    trainer.scorer.sampling = SamplingConfig(temperature=1.3)
    start = weights(trainer)
    with pytest.raises(TrainingStopped, match="--max_logp_gap 0.1"):
        trainer.train()
    same(start, weights(trainer))


def test_weights_that_change_under_the_rollout_are_noticed_and_nans_too(world):
    for value in (0.5, NAN):
        trainer = make_trainer(world, None)
        sample = trainer.policy.sample

        def meddle(*inputs):
            generation = sample(*inputs)
            with torch.no_grad():
                trainer.scorer.gpt.norm.weight += value
            return generation

        trainer.policy.sample = meddle
        with pytest.raises(TrainingStopped, match="disagree on the policy"):
            trainer.train()


def test_conditional_scoring_is_let_through_and_its_gap_logged(world, tmp_path):
    trainer = make_trainer(world, tmp_path, guidance_logprob="conditional", sampling=dict(cfg_scale=4.0))
    start = weights(trainer)
    trainer.train()
    assert changed(start, weights(trainer))
    for line in lines_of(tmp_path):
        assert line["logp_gap_max"] > 0.1 and line["ratio"] == pytest.approx(1, abs=1e-5)


def poison_gradients(trainer, updates):
    """The gradient of one parameter is NaN in the given updates (counted from 0)."""
    count = iter(range(10 ** 6))
    trainer.parameters[3].register_hook(lambda grad: grad * NAN if next(count) in updates else grad)


def test_a_bad_gradient_skips_its_update_alone(world, tmp_path):
    trainer = make_trainer(world, tmp_path, exit_step=4, max_bad_updates=2)
    poison_gradients(trainer, {0, 2})
    start = weights(trainer)
    after = []
    log = trainer.log
    trainer.log = lambda *inputs: after.append(weights(trainer)) or log(*inputs)
    trainer.train()
    same(start, after[0])
    assert changed(after[0], after[1])
    same(after[1], after[2])
    assert changed(after[2], after[3]) and all(tensor.isfinite().all() for tensor in after[3].values())
    assert [line["skipped_updates"] for line in lines_of(tmp_path)] == [1, 0, 1, 0]


def test_bad_gradients_in_a_row_stop_the_run(world, tmp_path):
    trainer = make_trainer(world, tmp_path, exit_step=9, max_bad_updates=3)
    poison_gradients(trainer, range(1, 9))
    with pytest.raises(TrainingStopped, match="3 updates in a row had a non-finite gradient"):
        trainer.train()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_few_failed_rewards_are_counted_and_left_out(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    trainer.reward_set.rewards = {Brightness: failing((0, 5, 6, 7))()}
    start = weights(trainer)
    trainer.train()
    step = lines_of(tmp_path)[-1]
    assert step["reward_failures"] == 0.25 and 0 < step["reward"] < 1 and step["loss"] is not None
    assert changed(start, weights(trainer)) and all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_too_many_failed_rewards_save_and_stop(world, tmp_path):
    trainer = make_trainer(world, tmp_path, exit_step=5, max_reward_failures=0.3)
    good, log = trainer.reward_set.rewards, trainer.log

    def fail_from_now_on(*inputs):
        trainer.reward_set.rewards = {Brightness: failing(range(8))()}
        log(*inputs)

    trainer.log = fail_from_now_on
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert "50% of the images have no reward" in str(stopped.value)
    assert "brightness failed on 8 of 16" in str(stopped.value)
    assert (tmp_path / "checkpoint-1" / "trainer.pt").is_file()
    resumed = make_trainer(world, tmp_path, exit_step=5, max_reward_failures=0.3)
    assert resumed.checkpoints.resume() == 1
    same(weights(trainer), weights(resumed))
    resumed.reward_set.rewards = good
    resumed.train()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_failing_from_the_start_leaves_one_evaluation_of_step_0(world, tmp_path):
    for rows in (range(16), ()):
        trainer = make_trainer(world, tmp_path, eval_steps=2)
        trainer.reward_set.rewards = {Brightness: failing(rows)()}
        if rows:
            with pytest.raises(TrainingStopped, match="checkpoint-0"):
                trainer.train()
        else:
            trainer.train()
    assert [line["step"] for line in lines_of(tmp_path, "eval/entropy")] == [0, 2]


def test_equal_rewards_are_zero_spread_and_carry_no_gradient(world, tmp_path):
    trainer = make_trainer(world, tmp_path, beta=0.0, num_generations=6, per_device_train_batch_size=12, exit_step=1)
    flat = type("Flat", (Brightness,), {"score": lambda self, names, images, *_: {
        name: torch.full((len(images),), 0.3) for name in names}})
    trainer.reward_set.rewards = {Brightness: flat()}
    start = weights(trainer)
    trainer.train()
    (step,) = lines_of(tmp_path)
    assert step["zero_spread_groups"] == 2 and step["grad_norm"] == 0 and step["reward_std"] == 0
    same(start, weights(trainer))
    for group in range(2, 20):  # a mean of equal numbers is rounded: 0.3 six times gives 0.30000001
        assert not group_advantages(torch.full((3, group), 0.3)).any()


@pytest.mark.parametrize("name", ("save_total_limit", "max_bad_updates"))
def test_limits_of_zero_are_mistakes(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GRPOConfig(**{name: 0})


def test_evaluations_repeat_exactly_and_leave_training_alone(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "a", eval_steps=1, exit_step=2, learning_rate=0.0)
    trainer.train()
    lines = lines_of(tmp_path / "a", "eval/entropy")
    assert [line["step"] for line in lines] == [0, 1, 2]
    evaluations = [{key: value for key, value in line.items() if key.startswith("eval/")} for line in lines]
    assert evaluations[0] == evaluations[1] == evaluations[2]
    grids = sorted((tmp_path / "a" / "samples").iterdir())
    assert [grid.name for grid in grids] == [f"step_{step:06d}.png" for step in (0, 1, 2)]
    assert grids[0].read_bytes() == grids[2].read_bytes()

    trained = []
    for eval_steps in (0, 1):
        trainer = make_trainer(world, tmp_path / f"eval{eval_steps}", eval_steps=eval_steps, exit_step=3)
        trainer.train()
        trained.append(weights(trainer))
    same(*trained)


def test_dropout_of_the_config_never_enters(world):
    """GPTConfig's defaults carry LlamaGen's dropout of pretraining: a scorer in train mode would fail the gate."""
    trainer = make_trainer(world, None, max_logp_gap=1e-4)
    assert trainer.scorer.gpt.config.resid_dropout_p > 0
    trainer.train()


def test_an_evaluation_tells_which_rewards_failed_and_why(world, tmp_path, caplog):
    trainer = make_trainer(world, tmp_path, eval_steps=1, exit_step=1)
    conditions, reward_set = trainer.eval_set
    reward_set.rewards = {Brightness: failing((0,))()}
    numbers = trainer.evaluate(7)
    assert "evaluation after step 7: brightness failed on 1 of 12 images (no score)" in caplog.text
    assert numbers["eval/rewards/brightness"].isfinite()


# ---- float16 ---------------------------------------------------------------------------------------------------------

def test_float16_learns_as_float32_does(world):
    """Its scaled gradients give the same updates, and sampler and trainer stay within the default gate."""
    options = dict(exit_step=3, learning_rate=1e-4, sampling=dict(cfg_scale=2.0))
    exact, rounded = (make_trainer(world, None, dtype=dtype, **options) for dtype in ("float32", "float16"))
    start = weights(exact)
    for trainer in (exact, rounded):
        trainer.train()
    assert rounded.scaler.is_enabled() and not exact.scaler.is_enabled() and rounded.checkpoints.bad_updates == 0
    moves = [torch.cat([(new - old).flatten() for new, old in zip(weights(trainer).values(), start.values())])
             for trainer in (exact, rounded)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.8


def test_an_overflow_halves_the_scale_and_is_counted(world, tmp_path):
    trainer = make_trainer(world, tmp_path, dtype="float16", exit_step=3, save_steps=3)
    poison_gradients(trainer, {1})
    trainer.train()
    assert [line["skipped_updates"] for line in lines_of(tmp_path)] == [0, 1, 0]
    assert trainer.scaler.get_scale() == 2.0 ** 15
    resumed = make_trainer(world, tmp_path, dtype="float16", exit_step=3, save_steps=3)
    resumed.train()
    assert resumed.scaler.get_scale() == 2.0 ** 15


def test_bf16_is_another_name(tmp_path):
    def config(**values):
        return PolicyConfig("gpt", "vq", **values)

    assert config(bf16=True).autocast_dtype == config(dtype="bfloat16").autocast_dtype == torch.bfloat16
    assert config(dtype="float16").autocast_dtype == torch.float16 and config().autocast_dtype is None
    with pytest.raises(ValueError, match="bf16 means --dtype bfloat16, but --dtype float16 is given"):
        config(bf16=True, dtype="float16")


def test_variety_is_logged_and_shapes_advantages_when_asked(world, tmp_path):
    plain, shaped = (make_trainer(world, tmp_path / name, exit_step=2, beta=0.05, diversity_advantage=name,
                                  kl_form=form) for name, form in (("none", "k3"), ("tokens", "js")))
    for trainer in (plain, shaped):
        trainer.train()
    first, second = (lines_of(tmp_path / name)[0] for name in ("none", "tokens"))
    assert first["group_distance"] == second["group_distance"] > 0  # the same images
    assert first["grad_norm"] != second["grad_norm"]
