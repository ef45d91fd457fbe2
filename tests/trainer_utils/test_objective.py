"""The objective against numbers worked out by hand."""
import math

import pytest
import torch

from grpo_trainer import GRPOConfig, aggregate_advantages, group_advantages, grpo_loss, learning_rate
from trainer_utils.objective import diversity_shaped, kl_penalty, token_distances
from trainer_utils.statistics import token_hamming

NAN = float("nan")


def test_group_advantages_by_hand():
    # group 1: mean 2, unbiased std 1; group 2: no spread
    out = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[-1 / 1.0001, 0, 1 / 1.0001], [0, 0, 0]]))


def test_scale_rewards():
    rewards = torch.tensor([[0.0, 2.0], [10.0, 16.0]])
    assert group_advantages(rewards, "none").tolist() == [[-1, 1], [-3, 3]]
    spread = torch.tensor([0.0, 2.0, 10.0, 16.0]).std().item() + 1e-4
    torch.testing.assert_close(group_advantages(rewards, "batch"), torch.tensor([[-1.0, 1.0], [-3.0, 3.0]]) / spread)


def test_a_failed_reward_leaves_its_group_alone():
    out = group_advantages(torch.tensor([[1.0, NAN, 2.0, 3.0], [NAN, NAN, NAN, 4.0]]))
    torch.testing.assert_close(out[0, [0, 2, 3]], group_advantages(torch.tensor([[1.0, 2.0, 3.0]]))[0])
    assert out[0, 1].isnan() and out[1, :3].isnan().all() and out[1, 3] == 0


def test_aggregation():
    scores = torch.tensor([[[0.0, 1.0]], [[100.0, 0.0]]])  # [K, P, G]
    summed = aggregate_advantages(scores, [1.0, 2.0], "sum", "none")
    assert summed.tolist() == [[99.5, -99.5]]
    normalised = aggregate_advantages(scores, [1.0, 2.0], "normalise", "group")
    unit = 0.5 / (0.5 ** 0.5 + 1e-4)
    assert normalised[0, 0].item() == pytest.approx(-unit + 2 * 50 / (5000 ** 0.5 + 1e-4), rel=1e-5)


def test_loss_on_policy_is_minus_the_advantage_and_its_gradient():
    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    loss, metrics = grpo_loss(logps, logps.detach(), None, torch.tensor([1.0, -2.0]))
    assert loss.item() == pytest.approx(0.5) and metrics["ratio"].item() == 1
    loss.backward()
    assert logps.grad.tolist() == [[-0.25, -0.25], [0.5, 0.5]]


def test_clipping_by_hand():
    ratios = torch.tensor([[1.5], [1.5], [0.5], [0.5]])
    logps = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = grpo_loss(logps, torch.zeros(4, 1), None, advantages, epsilon=0.2, epsilon_high=0.3)
    # min(1.5, 1.3), min(-1.5, -1.3), min(0.5, 0.8), min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8) / 4)
    assert metrics["clip_high"].item() == 0.25 and metrics["clip_low"].item() == 0.25
    loss.backward()
    assert logps.grad.squeeze().tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])


def test_kl_is_k3():
    logps, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    loss, metrics = grpo_loss(logps, logps, ref, torch.tensor([0.0]), beta=0.1)
    k3 = ((math.exp(-0.5) + 0.5 - 1) + (math.exp(1.0) - 1.0 - 1)) / 2
    assert metrics["kl"].item() == pytest.approx(k3) and loss.item() == pytest.approx(0.1 * k3)


def test_sequence_level_uses_the_geometric_mean_ratio():
    logps, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.2, -1.6]])
    loss, _ = grpo_loss(logps, old, None, torch.tensor([1.0]), epsilon=9.0, importance_sampling_level="sequence")
    assert loss.item() == pytest.approx(-math.exp(0.4))


def test_nan_advantage_takes_the_sample_out():
    logps = torch.randn(3, 4, requires_grad=True)
    old, ref = torch.randn(3, 4), torch.randn(3, 4)
    loss, metrics = grpo_loss(logps, old, ref, torch.tensor([1.0, NAN, -1.0]), beta=0.1)
    kept = [0, 2]
    expected, expected_metrics = grpo_loss(logps[kept], old[kept], ref[kept], torch.tensor([1.0, -1.0]), beta=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    loss.backward()
    assert torch.isfinite(logps.grad).all() and not logps.grad[1].any()
    empty, _ = grpo_loss(logps, old, ref, torch.full((3,), NAN), beta=0.1)
    assert empty.item() == 0 and empty.requires_grad


def test_learning_rate():
    config = GRPOConfig(learning_rate=1.0, warmup_steps=4, exit_step=14, lr_scheduler="cosine")
    assert [learning_rate(config, step) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5])
    assert learning_rate(GRPOConfig(learning_rate=1.0), 399) == 1.0


def test_token_hamming():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 0, 0]])
    assert token_hamming(tokens, 2).item() == pytest.approx(0.25)


@pytest.mark.parametrize("changes,message", [
    (dict(num_generations=8, per_device_train_batch_size=12), "must be a multiple of num_generations"),
    (dict(num_generations=1), "at least 2"),
    (dict(scale_rewards="std"), "scale_rewards must be one of"),
    (dict(reward_aggregation="mean"), "reward_aggregation"),
    (dict(exit_step=0), "exit_step must be at least 1"),
    (dict(rollout_batch_size=12), "rollout_batch_size"),
    (dict(beta=-0.1), "beta must be at least 0"),
    (dict(epsilon_high=-0.2), "epsilon_high must be at least 0"),
    (dict(max_grad_norm=-1.0), "max_grad_norm must be at least 0"),
    (dict(head_chunk_tokens=0), "head_chunk_tokens must be at least 1"),
])
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)


# ---- forms of the penalty, and variety -------------------------------------------------------------------------------

@pytest.mark.parametrize("form,exact", (
    ("k3", lambda policy, ref: (ref.exp() * (ref - policy)).sum()),  # KL(ref | policy)
    ("k2", lambda policy, ref: (policy.exp() * (policy - ref)).sum())))  # KL(policy | ref)
def test_expected_gradients_of_the_penalty_are_those_of_a_kl(form, exact):
    """Over all tokens of one position, weighted as the policy draws them."""
    torch.manual_seed(0)
    logits, ref = torch.randn(2, 6, dtype=torch.float64)
    ref = ref.log_softmax(0)
    sampled, enumerated = (logits.clone().requires_grad_() for _ in range(2))
    logps = sampled.log_softmax(0)
    (logps.detach().exp() * kl_penalty(logps, ref, form)).sum().backward()
    exact(enumerated.log_softmax(0), ref).backward()
    torch.testing.assert_close(sampled.grad, enumerated.grad)


def test_forms_of_the_penalty_by_hand():
    d = torch.tensor([-1.0, 0.0, 0.5])
    zero = torch.zeros(3)
    assert kl_penalty(zero, d, "k3").tolist() == pytest.approx([math.exp(-1), 0, math.exp(0.5) - 1.5])
    assert kl_penalty(zero, d, "k2").tolist() == pytest.approx([0.5, 0, 0.125])
    js = [0.5 * (math.log(2) - math.log(1 + w) + w * (math.log(2) - math.log(1 + 1 / w))) for w in d.exp().tolist()]
    assert kl_penalty(zero, d, "js").tolist() == pytest.approx(js, abs=1e-7)
    small = torch.full((1,), 1e-2, dtype=torch.float64)
    ratio = kl_penalty(torch.zeros_like(small), small, "js") / kl_penalty(torch.zeros_like(small), small, "k3")
    assert ratio.item() == pytest.approx(0.25, rel=0.02)  # the strength near the reference


@pytest.mark.parametrize("form", ("k3", "k2", "js"))
def test_gradients_of_the_loss_equal_finite_differences(form):
    torch.manual_seed(1)
    old, ref = -torch.rand(2, 3, 4, dtype=torch.float64) * 3
    logps = (old + 0.1 * torch.randn_like(old)).requires_grad_()

    def loss(logps):
        return grpo_loss(logps, old, ref, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), beta=0.3, kl_form=form,
                         kl_ratio_weight=True)[0]

    assert torch.autograd.gradcheck(loss, logps)


def test_the_ratio_weight_changes_nothing_before_the_first_update():
    logps, ref = -torch.rand(2, 2, 3)
    advantages = torch.tensor([1.0, -1.0])
    plain, weighted = (grpo_loss(logps, logps, ref, advantages, beta=0.3, kl_ratio_weight=on)[0]
                       for on in (False, True))
    assert torch.equal(plain, weighted)
    off = grpo_loss(logps, logps - math.log(2), ref, advantages, beta=0.0)[0]
    doubled = grpo_loss(logps, logps - math.log(2), ref, advantages, beta=0.3, kl_ratio_weight=True)[0] - off
    single = grpo_loss(logps, logps - math.log(2), ref, advantages, beta=0.3)[0] - off
    torch.testing.assert_close(doubled, 2 * single)


def test_distances_and_shaped_advantages_by_hand():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])  # codes 0 and 2 point the same way
    tokens = torch.tensor([[[0, 0], [2, 0], [1, 1], [0, 1]]])  # [P=1, G=4, L=2]
    distances = token_distances(tokens, codebook)
    torch.testing.assert_close(distances[0], torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 0.5],
                                                           [1.0, 1.0, 0.0, 0.5], [0.5, 0.5, 0.5, 0.0]]))
    # nearest: 0, 0, 0.5, 0.5; mean 0.25
    shaped = diversity_shaped(torch.tensor([[1.0, -1.0, 2.0, 0.5]]), distances)
    assert shaped.tolist() == [[0.0, -1.0, 4.0, 1.0]]
    assert diversity_shaped(torch.tensor([[1.0, -1.0, 2.0, 0.5]]), distances, 2.0).tolist() == [[0.0, -1.0, 8.0, 2.0]]
    failed = diversity_shaped(torch.tensor([[1.0, NAN, 2.0, 0.5]]), distances)  # its twin's absence counts
    assert failed[0, 1].isnan() and failed[0, 0] > 0
    alike = diversity_shaped(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2, 2))
    assert alike.tolist() == [[1.0, -1.0]]
