"""FID, Inception Score, precision and recall against ADM's evaluator; KID and intervals against their definitions."""
import json
from pathlib import Path

import numpy as np
import pytest

import fid_evaluation as fid
from reward_utils import fid_math
from reward_utils.fid_math import Moments, bootstrap_interval, kernel_distance, moments
from tests.golden.rewards.rule import gauss

FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "adm_metrics.npz", allow_pickle=False) as data:
        return dict(data)


@pytest.fixture(scope="module")
def adm():
    """(numbers of guided-diffusion's evaluator, reference features, sample features), by the fixture's recipe."""
    basis = gauss("pr/A", 8, 64)

    def features(key, count, shift, scale):
        rows = (gauss(f"{key}/z", count, 8) * scale + shift) @ basis * 0.3 + 0.05 * gauss(f"{key}/e", count, 64)
        return np.maximum(rows, 0).astype(np.float32)

    numbers = json.loads((FOLDER / "rewards" / "adm_eval.json").read_text())
    return numbers, features("pr/ref", 300, 0, 1.0), features("pr/smp", 400, 0.3, 0.9)


def statistics(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


# ---- golden numbers --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("features,name", [("pool", "fid"), ("spatial", "sfid")])
@pytest.mark.parametrize("batch_size", [1000, 37])
def test_golden_frechet_distance_from_streamed_moments(golden, features, name, batch_size):
    both = []
    for side in ("ref", "sample"):
        rows = golden[f"{side}_{features}"]
        found = Moments()
        for start in range(0, len(rows), batch_size):
            found.update(rows[start:start + batch_size])
        both += found.result()
    assert fid.frechet_distance(*both) == pytest.approx(float(golden[name]), rel=1e-6)


def test_golden_inception_score(golden):
    score = fid.inception_score(golden["sample_probs"], split_size=int(golden["inception_split_size"]))
    assert score == pytest.approx(float(golden["inception_score"]), rel=1e-6)


@pytest.mark.parametrize("block", [10_000, 110, 97])  # 300 = 3 * 97 + 9
def test_golden_precision_recall_in_any_block(golden, block, monkeypatch):
    monkeypatch.setattr(fid_math, "ADM_BLOCK", block)
    result = fid.precision_recall(golden["ref_pool"], golden["sample_pool"])
    assert result == (float(golden["precision"]), float(golden["recall"]))


def test_adm_precision_recall_and_radii(adm):
    numbers, ref, samples = adm
    assert fid.precision_recall(ref, samples) == pytest.approx((numbers["precision"], numbers["recall"]), abs=1e-12)
    assert fid.precision_recall(ref, samples, half_distances=False) == pytest.approx(
        (numbers["precision"], numbers["recall"]), abs=1.01 / 300)
    for name, rows in (("ref", ref), ("smp", samples)):
        radii = fid_math._neighbour_radii(rows, 3, True)[:6]
        assert radii.tolist() == pytest.approx(numbers[f"radii_{name}_first"], rel=2 ** -9)  # a unit of float16


def test_adm_frechet_distance(adm):
    numbers, ref, samples = adm
    assert fid.frechet_distance(*statistics(ref), *statistics(samples)) == pytest.approx(numbers["fid"], rel=1e-6)
    singular = fid.frechet_distance(*statistics(ref), *statistics(samples[:40]))  # rank 39 of 64
    assert singular == pytest.approx(numbers["fid_first40_singular"], rel=1e-6)


def test_adm_inception_score(adm):
    numbers, _, samples = adm
    logits = samples @ (0.5 * gauss("is/W", 64, 40)).astype(np.float32)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    for split_size, expected in numbers["inception_score"].items():
        assert fid.inception_score(probs, int(split_size)) == pytest.approx(expected, rel=1e-6)


# ---- definitions and limits ------------------------------------------------------------------------------------------

def test_half_distances_are_redone_where_float16_overflows():
    rng = np.random.default_rng(0)
    ref, samples = (rng.normal(size=(40, 8)).astype(np.float32) for _ in range(2))
    exact = fid.precision_recall(ref, samples, half_distances=False)
    assert 0 < exact[0] < 1
    assert fid.precision_recall(ref * 3e3, samples * 3e3) == pytest.approx(exact, abs=1 / 40)


def test_precision_recall_against_distances_one_by_one():
    rng = np.random.default_rng(1)
    ref, samples = rng.normal(size=(30, 5)), rng.normal(size=(25, 5)) + 0.5

    def share_inside(points, centres):
        radii = [sorted(((c - o) ** 2).sum() for o in centres)[3] for c in centres]
        return np.mean([any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii)) for p in points])
    expected = share_inside(samples, ref), share_inside(ref, samples)
    assert fid.precision_recall(ref, samples, half_distances=False) == pytest.approx(expected)


@pytest.mark.parametrize("merged", [1, 10, 1024])
def test_moments_keep_their_digits_far_from_zero(merged, monkeypatch):
    monkeypatch.setattr(fid_math, "MERGED", merged)
    rows = np.random.default_rng(2).normal(size=(50, 4))
    found, other = Moments(), Moments()
    for i, part in enumerate(np.array_split(rows + 1e6, 7)):
        (found if i % 2 else other).update(part)
    found.merge(other)
    found.merge(Moments())  # a process that had no images
    assert found.count == 50 and np.allclose(found.result()[1], np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-7)


def test_frechet_distance_of_singular_covariances():
    rows = np.random.default_rng(3).normal(size=(5, 20))  # rank 4 of 20
    mu, sigma = rows.mean(0), np.cov(rows, rowvar=False)
    assert fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-5)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(80, rel=1e-6)


def test_inception_score_knows_its_limits():
    assert fid.inception_score(np.eye(10)) == pytest.approx(10)  # zeros are no NaN
    assert fid.inception_score(np.full((10, 4), 0.25)) == pytest.approx(1)


def test_non_finite_numbers_are_refused(golden):
    bad = golden["ref_pool"].copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        fid.precision_recall(bad, golden["sample_pool"])
    with pytest.raises(ValueError, match="NaN"):
        fid.frechet_distance(bad[3], np.eye(24), bad[4], np.eye(24))
    with pytest.raises(ValueError, match="same feature network"):
        fid.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="features of 24 and 20 numbers .* same feature network"):
        fid.precision_recall(golden["ref_pool"], golden["sample_pool"][:, :20])


def test_exact_distances_in_small_blocks(adm, monkeypatch):
    _, ref, samples = adm
    whole = fid.precision_recall(ref[:60], samples[:50], half_distances=False)
    monkeypatch.setattr(fid_math, "BLOCK", 3)  # narrower than k + 1
    assert fid.precision_recall(ref[:60], samples[:50], half_distances=False) == whole


def test_kernel_distance_against_its_definition():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(12, 6)), rng.normal(size=(12, 6)) + 0.5

    def kernel(a, b):
        return (sum(a * b) / 6 + 1) ** 3
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(rows[i], rows[j]) for rows in (x, y) for i, j in pairs if i != j) / (12 * 11)
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 144
    mean, deviation = kernel_distance(x, y, num_subsets=3)
    assert mean == pytest.approx(expected, rel=1e-9) and deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_of_subsets():
    rng = np.random.default_rng(5)
    x, y, z = rng.normal(size=(300, 6)), rng.normal(size=(200, 6)), rng.normal(size=(200, 6)) + 0.5
    same, spread = kernel_distance(x, y, 40, 50)
    assert abs(same) < 2 * spread and spread > 0  # unbiased: around zero for one distribution
    assert kernel_distance(x, z, 40, 50)[0] > 5 * spread
    assert kernel_distance(x, y, 40, 50) == (same, spread) != kernel_distance(x, y, 40, 50, seed=1)
    with pytest.raises(ValueError, match="at least 2 images on both sides, not 300 and 1"):
        kernel_distance(x, y[:1])


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(6).normal(size=400)
    mean = values.mean()
    low, high = bootstrap_interval(mean, lambda rows: values[rows].mean(), 400, 2000, lowest=-np.inf)
    reach = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((mean - reach, mean + reach), abs=0.1 * reach)
    assert bootstrap_interval(mean, lambda rows: values[rows].mean(), 400, 2000, lowest=-np.inf) == (low, high)


def test_bootstrap_interval_is_about_the_value_and_in_range():
    rows = np.random.default_rng(7).normal(size=(60, 20))
    mu, sigma = statistics(np.random.default_rng(8).normal(size=(5000, 20)))

    def distance(indices):
        return fid.frechet_distance(mu, sigma, *moments(rows, indices))
    value = distance(np.arange(60))
    assert np.mean([distance(np.random.default_rng(s).integers(60, size=60)) for s in range(20)]) > 1.3 * value
    low, high = bootstrap_interval(value, distance, 60, 100)
    assert 0 < low < value < high
    assert bootstrap_interval(0.01, lambda rows: float(rows.mean() / 60), 60, 50, highest=0.02) == (0.0, 0.02)
