"""Rewards without a text encoder: LPIPS and MSE to a reference image, and the FID reward in both of its forms.

golden/rewards/lpips_vgg.json has numbers of lpips 0.1.4; lpips_vgg_heads.pth are the linear heads of its wheel
(weights/v0.1/vgg.pth, BSD-2-Clause, Copyright (c) 2018 Richard Zhang and others), tagged for CUDA as they came.
"""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fid_evaluation import frechet_distance
from reward_utils import fid_reward
from reward_utils.fid_reward import DECAY, FadingMoments, FidScorer, Reference, frechet_of_few, leave_one_out
from reward_utils.inception import extract, load_features
from reward_utils.lpips import BLOCKS, LpipsScorer, load_lpips
from reward_utils.quantize import FID_BOUNDS, FID_REWARDS
from reward_utils.reference_image import MseScorer, centre_crop
from reward_utils.settings import RewardSettings

GOLDEN = Path(__file__).parents[1] / "golden/rewards"
HEADS = GOLDEN / "lpips_vgg_heads.pth"
LPIPS = json.loads((GOLDEN / "lpips_vgg.json").read_text(encoding="utf-8"))
SPEC = importlib.util.spec_from_file_location("golden_rule", GOLDEN / "rule.py")
RULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(RULE)

CPU = torch.device("cpu")
WIDTHS = (64, 128, 256, 512, 512)  # VGG16's channels, block by block


def vgg_state(widths):
    """A vgg16-397923af.pth by the golden rule, with a classifier, which is not read."""
    state, inputs = {"classifier.6.weight": torch.zeros(10, 4)}, 3
    for block, width in zip(BLOCKS, widths):
        for i in block:
            weight = RULE.fill(f"features.{i}.weight", (width, inputs, 3, 3)) * np.sqrt(2)
            state[f"features.{i}.weight"] = torch.from_numpy(weight).float()
            state[f"features.{i}.bias"] = torch.from_numpy(RULE.fill(f"features.{i}.bias", (width,))).float()
            inputs = width
    return state


def noise(num_images, height, width, seed=0):
    levels = torch.rand(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 256
    return levels.to(torch.uint8)


# ---- LPIPS -----------------------------------------------------------------------------------------------------------


def test_lpips_golden_distances(tmp_path):
    torch.save(vgg_state(WIDTHS), tmp_path / "vgg16.pth")
    net = load_lpips(tmp_path / "vgg16.pth", HEADS).double()
    x, y = (torch.from_numpy(np.clip(0.5 * RULE.gauss(f"lpips/{name}", 2, 3, 64, 64), -1, 1)) for name in "xy")
    with torch.no_grad():
        assert net(x, y).tolist() == pytest.approx(LPIPS["d_xy"], abs=1e-7)
        assert net(x, 0.7 * x + 0.3 * y).tolist() == pytest.approx(LPIPS["d_mix"], abs=1e-7)
        assert net(x, x).tolist() == [0, 0]


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory):
    """REWARD_MODELS with a narrow VGG and heads to match, in the original keys."""
    folder, widths = tmp_path_factory.mktemp("reward_models"), (8, 8, 12, 16, 16)
    torch.save(vgg_state(widths), folder / "vgg16-397923af.pth")
    torch.save({f"lin{i}.model.1.weight": torch.full((1, width, 1, 1), 0.5) for i, width in enumerate(widths)},
               folder / "lpips_vgg.pth")
    return folder


@pytest.fixture
def lpips(lpips_folder):
    return LpipsScorer(RewardSettings(reward_models=str(lpips_folder), reward_batch_size=2), CPU)


def test_lpips_reads_both_images_in_one_range_and_fails_alone(lpips):
    images, references = noise(4, 32, 32), noise(4, 32, 32, seed=1)
    metadata = [{"image": references[0]}, {"image": images[1]}, {}, {"image": references[3]}]
    scores, failures = lpips(images, [""] * 4, metadata)
    wanted = 1 - lpips.net(*(x[[0, 3]].float() / 127.5 - 1 for x in (images, references)))
    torch.testing.assert_close(scores[[0, 3]], wanted, atol=1e-5, rtol=0)
    assert scores[1] == 1 and scores[[0, 3]].max() < 0.99 and scores.dtype == torch.float32
    assert scores[2].isnan() and list(failures) == [2] and "no reference image" in failures[2]


def test_lpips_of_a_batch_equals_its_images_one_by_one(lpips):
    images, metadata = noise(5, 40, 32), [{"image": image} for image in noise(5, 40, 32, seed=1)]
    scores, failures = lpips(images, [""] * 5, metadata)
    alone = [lpips(images[i: i + 1], [""], metadata[i: i + 1])[0] for i in range(5)]
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=0)
    assert not failures and scores.std() > 1e-4


def test_lpips_refuses_images_that_its_network_cannot_halve(lpips):
    with pytest.raises(ValueError, match="lpips needs 16x16 pixels, the images have 40x15"):
        lpips(noise(2, 15, 40), [""] * 2, [{"image": noise(1, 15, 40)[0]}] * 2)
    assert lpips(noise(1, 16, 16), [""], [{"image": noise(1, 16, 16)[0]}])[0].isfinite().all()


def test_lpips_that_is_only_failures(lpips):
    scores, failures = lpips(noise(2, 32, 32), [""] * 2, [{}, {}])
    assert scores.isnan().all() and list(failures) == [0, 1]


@pytest.mark.parametrize("name, key, complaint", (
    ("vgg16-397923af.pth", "features.10.weight", "not the weights of torchvision's VGG16.*features.10.weight"),
    ("vgg16-397923af.pth", "features.28.bias", "not the weights of torchvision's VGG16.*Missing"),
    ("lpips_vgg.pth", "lin3.model.1.weight", "not the weights of LPIPS' linear heads.*lin3"),
))
def test_a_foreign_lpips_file_is_refused_in_one_line(lpips_folder, tmp_path, name, key, complaint):
    for file in lpips_folder.iterdir():
        state = torch.load(file, weights_only=True)
        if file.name == name:
            del state[key]
        torch.save(state, tmp_path / file.name)
    with pytest.raises(ValueError, match=complaint) as caught:
        LpipsScorer(RewardSettings(reward_models=str(tmp_path)), CPU)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ---- MSE and reference images ----------------------------------------------------------------------------------------


def test_mse_compares_in_one_range():
    scorer = MseScorer(RewardSettings(reward_batch_size=2), CPU)
    black, white = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    images = torch.stack([black, white, white, noise(1, 8, 8)[0]])
    scores, failures = scorer(images, [""] * 4, [{"image": reference} for reference in (black, black, white, white)])
    assert scores[:3].tolist() == [1, 0, 1] and not failures  # black against white is the worst there is
    assert scores[3].item() == pytest.approx(1 - ((images[3].double() / 255 - 1) ** 2).mean().item(), abs=1e-6)


def test_a_reference_file_is_cropped_to_the_sample(tmp_path):
    picture = noise(1, 70, 100)[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "wide.png")
    sample = torch.tensor(centre_crop(picture, 24, 24)).permute(2, 0, 1)[None]
    scores, _ = MseScorer(RewardSettings(), CPU)(sample, [""], [{"image": str(tmp_path / "wide.png")}])
    assert scores.tolist() == [1]
    scores, _ = MseScorer(RewardSettings(), CPU)(sample, [""], [{"image": tmp_path / "wide.png"}])
    assert scores.tolist() == [1]


def test_centre_crop_is_adms():
    picture = noise(1, 70, 100)[0].permute(1, 2, 0).numpy()
    # short side 70 -> 35 by the box filter, then 24 by bicubic: 50 x 35 -> 34 x 24, and columns 5 to 29
    by_hand = Image.fromarray(picture).resize((50, 35), Image.Resampling.BOX).resize((34, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(centre_crop(picture, 24, 24), np.asarray(by_hand)[:, 5:29])
    assert np.array_equal(centre_crop(picture, 70, 100), picture)
    assert centre_crop(picture, 48, 32).shape == (48, 32, 3)
    assert centre_crop(picture[:5, :9], 64, 64).shape == (64, 64, 3)


def test_bad_references_fail_with_their_reasons(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    bad = [str(tmp_path / "gone.png"), str(tmp_path / "text.png"), str(tmp_path), noise(1, 8, 8)[0].float(),
           noise(1, 8, 8), 7, noise(1, 8, 8)[0]]
    scores, failures = MseScorer(RewardSettings(), CPU)(noise(7, 8, 8), [""] * 7, [{"image": image} for image in bad])
    assert scores.isnan().tolist() == [True] * 6 + [False]
    for i, reason in enumerate(("gone.png", "text.png: not a readable image", str(tmp_path), "torch.float32 [3, 8, 8]",
                                "[1, 3, 8, 8], wanted", "is int, wanted a path")):
        assert reason in failures[i] and "\n" not in failures[i]


# ---- the FID reward --------------------------------------------------------------------------------------------------


def features(num_rows, dim, seed):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dim, dim)) * np.logspace(0, -3, dim)[:, None]
    return np.abs(rng.normal(size=(num_rows, dim)) @ mixing + rng.normal(size=dim) + 3)


def moments(rows):
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize("num_rows", (2, 5, 40))
def test_distance_of_few_rows(num_rows):
    mu, sigma = moments(features(300, 12, 1))
    rows = features(num_rows, 12, 2)
    distance = frechet_of_few(torch.from_numpy(rows), Reference(mu, sigma)).item()
    assert distance == pytest.approx(frechet_distance(mu, sigma, *moments(rows)), rel=1e-7)


def brute_force(batches, mu, sigma):
    """Leave-one-out distances of the last batch, each by its own eigendecomposition of weighted moments."""
    rows = np.concatenate(batches)
    age = np.repeat(np.arange(len(batches))[::-1], [len(batch) for batch in batches])
    weights = DECAY ** age

    def distance(keep):
        mean = np.average(rows[keep], axis=0, weights=weights[keep])
        centred = (rows[keep] - mean) * np.sqrt(weights[keep])[:, None]
        return frechet_distance(mu, sigma, mean, centred.T @ centred / (weights[keep].sum() - 1))

    all_rows = np.ones(len(rows), dtype=bool)
    scores = []
    for i in range(len(rows) - len(batches[-1]), len(rows)):
        keep = all_rows.copy()
        keep[i] = False
        scores.append(distance(keep) - distance(all_rows))
    return scores


@pytest.mark.parametrize("sizes, dim", (
    ((3,), 16), ((8,), 16), ((40,), 16), ((8, 8, 4), 16), ((5,) * 12, 6), ((1, 1, 1), 4)))
def test_leave_one_out_equals_removing_each_image(sizes, dim):
    """Fewer images than features, more, and with fading earlier batches."""
    mu, sigma = moments(features(300, dim, 1))
    batches = [features(size, dim, 10 + i) for i, size in enumerate(sizes)]
    counted, reference = FadingMoments(dim), Reference(mu, sigma)
    for batch in batches:
        counted.update(torch.from_numpy(batch))
    scores = leave_one_out(torch.from_numpy(batches[-1]), counted, reference)
    assert scores.tolist() == pytest.approx(brute_force(batches, mu, sigma), rel=1e-5, abs=1e-6)


def test_leave_one_out_tells_an_outlier():
    rows = features(64, 8, 3)
    rows[5] += 4
    counted = FadingMoments(8)
    counted.update(torch.from_numpy(rows))
    scores = leave_one_out(torch.from_numpy(rows), counted, Reference(*moments(features(300, 8, 3))))
    assert scores.argmin() == 5 and scores[5] < 0


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    """Statistics of noise images in the shapes features, as fid_evaluation.py --save_stats writes them."""
    path = tmp_path_factory.mktemp("stats") / "reference.npz"
    rows, _ = extract(load_features("shapes"), noise(200, 64, 64, seed=7))
    mu, sigma = moments(rows.double().numpy())
    np.savez(path, mu=mu, sigma=sigma, features=np.array("shapes"))
    return path


def fid(stats, **changes):
    settings = RewardSettings(inception_model="shapes", fid_stats=str(stats), reward_batch_size=3, **changes)
    return FidScorer(settings, CPU)


def test_fid_scorer_leaves_images_out_and_remembers(stats):
    data, batches = np.load(stats), [noise(6, 64, 64), noise(5, 64, 64, seed=1) // 2]
    rows = [extract(load_features("shapes"), batch)[0].double().numpy() for batch in batches]
    scorer = fid(stats)
    for i in range(2):
        scores, failures = scorer(batches[i], [""] * len(batches[i]), [{}] * len(batches[i]))
        wanted = brute_force(rows[:i + 1], data["mu"], data["sigma"])
        assert scores.dtype == torch.float32 and not failures
        assert scores.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    resumed = fid(stats)
    scorer = fid(stats)
    scorer(batches[0], [""] * 6, [{}] * 6)
    resumed.counted.load_state_dict(scorer.counted.state_dict())
    assert torch.equal(resumed(batches[1], [""] * 5, [{}] * 5)[0], scores)


def test_fid_scorer_needs_three_images_at_first(stats):
    scorer = fid(stats)
    scores, failures = scorer(noise(2, 64, 64), [""] * 2, [{}] * 2)
    assert scores.isnan().all() and list(failures) == [0, 1]
    assert failures[1] == "leave_one_out needs at least 3 images in the first batch"
    assert scorer(noise(2, 64, 64), [""] * 2, [{}] * 2)[0].isfinite().all()  # the first two are remembered


@pytest.mark.parametrize("num_images, parts", ((1, (1,)), (4, (2, 2)), (6, (3, 3)), (7, (3, 3, 1))))
def test_fid_groups_are_ar_grpos(stats, num_images, parts):
    data, images = np.load(stats), noise(num_images, 64, 64, seed=2) // 2
    rows = extract(load_features("shapes"), images)[0].double().numpy()
    scores, failures = fid(stats, fid_reward="group")(images, [""] * num_images, [{}] * num_images)
    start = 0
    for size in parts:
        part = scores[start: start + size]
        if size == 1:
            assert part.isnan().all() and "no covariance" in failures[start]
        else:
            distance = frechet_distance(data["mu"], data["sigma"], *moments(rows[start: start + size]))
            step = FID_REWARDS[np.searchsorted(FID_BOUNDS, distance, side="right")]
            assert part.tolist() == [np.float32(step)] * size
        start += size


def test_fid_reads_inception_unless_told_otherwise(stats, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(fid_reward, "load_features", lambda *args: loaded.append(args) or load_features("shapes"))
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").touch()
    data = np.load(stats)
    np.savez(tmp_path / "stats.npz", mu=data["mu"], sigma=data["sigma"])  # a file of others names no network
    FidScorer(RewardSettings(reward_models=str(tmp_path), fid_stats=str(tmp_path / "stats.npz")), CPU)
    assert loaded == [("inception", tmp_path / "pt_inception-2015-12-05-6726825d.pth")]
    with pytest.raises(ValueError, match="statistics of the shapes features, not of inception"):
        FidScorer(RewardSettings(reward_models=str(tmp_path), fid_stats=str(stats)), CPU)


@pytest.mark.parametrize("content, complaint", (
    (None, "fid needs --fid_stats FILE.npz"),
    ({"mu": np.zeros(64)}, "no .npz with mu and sigma"),
    ({"mu": np.zeros(8), "sigma": np.eye(8)}, r"mu \[8\] and sigma \[8, 8\] must be \[64\]"),
    ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "finite"),
    ({"mu": np.zeros(64), "sigma": np.eye(64), "features": np.array("inception")}, "of the inception features"),
    ({"mu": np.array([{"a": 1}], dtype=object), "sigma": np.eye(64)}, "objects are never loaded"),
    (b"no zip", "no .npz with mu and sigma"),
))
def test_bad_statistics_are_named(tmp_path, content, complaint):
    path = tmp_path / "stats.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        FidScorer(RewardSettings(inception_model="shapes", fid_stats=content and str(path)), CPU)
    assert "\n" not in str(caught.value)
