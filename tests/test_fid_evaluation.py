"""fid_evaluation.py end to end on tiny images; the mathematics is in test_fid_math.py."""
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import fid_evaluation as fid
from reward_utils import fid_math
from reward_utils.inception import ShapesFeatures, extract, load_features
from utils import image_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "features.safetensors"
    net = ShapesFeatures()
    net.head.weight.data *= 40  # decided and varied classes: an Inception Score that depends on its splits
    features, _ = extract(net, torch.tensor(make_images(0)).permute(0, 3, 1, 2))
    net.head.bias.data = -net.head.weight.data @ features.mean(0)
    save_file(net.state_dict(), path)
    return path


class Spatial(torch.nn.Module):
    """Stands for Inception: any image size, spatial features, no weights that matter."""

    image_size, feature_dim, spatial_dim = None, 12, 8

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, images):
        pooled = F.adaptive_avg_pool2d(images * self.scale / 255, 2).flatten(1)  # [N, 12]
        return pooled, pooled[:, :5] * 30, pooled[:, :8].square()


@pytest.fixture
def spatial(monkeypatch):
    monkeypatch.setattr(fid, "load_features", lambda *_: Spatial())


def make_images(seed, count=24):
    """Smooth random pictures uint8 [N, 64, 64, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def write_npz(path, images):
    np.savez(path, arr_0=images)
    return path


def write_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


def words(tmp_path, weights, ref, samples, *flags):
    network = ["--features", "shapes", "--weights", weights] if weights else []
    return list(map(str, [ref, samples, *network, "--json", tmp_path / "out" / "numbers.json", "--batch_size", 7,
                          *flags]))


def run(tmp_path, weights, ref, samples, *flags):
    fid.main(words(tmp_path, weights, ref, samples, *flags))
    return json.loads((tmp_path / "out" / "numbers.json").read_text())


def assert_same_numbers(a, b):
    names = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "kid_std", "num_ref_images",
             "num_sample_images")
    assert {n: a[n] or 0 for n in names} == pytest.approx({n: b[n] or 0 for n in names}, rel=1e-4, abs=1e-7)


# ---- the feature network ---------------------------------------------------------------------------------------------

def test_extract_does_not_depend_on_the_batch_size(weights):
    net = load_features("shapes", weights)
    images = torch.tensor(make_images(0, 10)).permute(0, 3, 1, 2)
    features, probs = extract(net, images, batch_size=10)
    assert features.shape == (10, 64) and probs.shape == (10, 32) and features.dtype == torch.float32
    assert torch.allclose(probs.sum(1), torch.ones(10))
    assert torch.allclose(extract(net, images, batch_size=3)[0], features, atol=1e-5)
    assert features.std(0).max() > 1e-3  # it does look at the images


def test_feature_network_errors(tmp_path, weights):
    with pytest.raises(ValueError, match="python pretrain.py --stage features"):
        load_features("shapes", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="known: inception, shapes"):
        load_features("vgg")
    (tmp_path / "damaged.safetensors").write_bytes(b"not a file of tensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name in ("damaged", "foreign"):
        with pytest.raises(ValueError, match=f"{name}.safetensors: .* the shapes feature network"):
            load_features("shapes", tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="64x64"):
        extract(load_features("shapes", weights), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 1)


# ---- the command -----------------------------------------------------------------------------------------------------

def test_the_default_is_inception():
    args = fid.parse_args(["a.npz", "b"])
    assert (args.features, args.fp16_distances, args.keep_order) == ("inception", False, False)


def test_folder_npz_and_order_give_the_same_numbers(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.setattr(fid.inception_score, "__defaults__", (10,))  # several splits, so that order could matter
    ref, samples = make_images(1), make_images(2, 27)
    ref_npz = write_npz(tmp_path / "ref.npz", ref)
    first = run(tmp_path, weights, ref_npz, write_npz(tmp_path / "samples.npz", samples))
    assert first["fid"] > 0 and first["inception_score"] > 1.5 and first["num_sample_images"] == 27
    assert f"{first['fid']:.4f}" in capsys.readouterr().out
    assert_same_numbers(first, run(tmp_path, weights, write_folder(tmp_path / "ref", ref),
                                   write_folder(tmp_path / "samples", samples)))
    shuffled = write_npz(tmp_path / "shuffled.npz", samples[np.random.default_rng(0).permutation(27)])
    assert_same_numbers(first, run(tmp_path, weights, ref_npz, shuffled))


def test_compressed_npz_and_other_formats(tmp_path, weights):
    images = make_images(1)
    ref = write_npz(tmp_path / "ref.npz", images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    same = run(tmp_path, weights, ref, tmp_path / "small.npz")
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1
    folder = tmp_path / "lossy"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / (f"{i}.webp" if i % 2 else f"{i}.JPG"), quality=95)
    (folder / "notes.txt").write_text("not an image")
    assert run(tmp_path, weights, ref, folder)["num_sample_images"] == len(images)


def test_statistics_file_stands_for_the_reference(tmp_path, weights):
    ref, samples = write_npz(tmp_path / "ref.npz", make_images(1)), write_npz(tmp_path / "s.npz", make_images(2))
    stats = tmp_path / "stats" / "ref_stats.npz"
    first = run(tmp_path, weights, ref, samples, "--save_stats", str(stats))
    again = run(tmp_path, weights, stats, samples)
    assert again["fid"] == first["fid"] and again["inception_score"] == first["inception_score"]
    assert again["precision"] is None and again["recall"] is None and again["num_ref_images"] is None
    with np.load(stats, allow_pickle=False) as data:  # ADM's reference batches carry both
        np.savez(tmp_path / "both.npz", arr_0=make_images(5), mu=data["mu"], sigma=data["sigma"])
    both = run(tmp_path, weights, tmp_path / "both.npz", samples)
    assert both["fid"] == first["fid"] and both["num_ref_images"] == 24 and both["precision"] is not None


def truncated(path):
    good = write_npz(path, make_images(1)).read_bytes()
    path.write_bytes(good[:len(good) // 2])


def flipped(path):
    data = bytearray(write_npz(path, make_images(1)).read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def corrupt_png(path):
    write_folder(path, make_images(1))
    (path / "005.png").write_bytes((path / "005.png").read_bytes()[:60])


def odd_size(path):
    write_folder(path, make_images(1))
    Image.new("RGB", (32, 48)).save(path / "007.png")


def announced(path):
    """A header that claims a million images, before a few."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False,
                                                      "shape": (10 ** 6, 64, 64, 3)})
        member.write(make_images(1).tobytes())


def bomb(path):
    path.mkdir()
    Image.new("1", (11000, 11000)).save(path / "bomb.png")  # 121 million pixels in 10 kB


@pytest.mark.parametrize("name,make,message", [
    ("missing.npz", lambda path: None, "no such .npz file or folder"),
    ("floats.npz", lambda path: write_npz(path, make_images(1).astype(np.float32)), "must be uint8"),
    ("flat.npz", lambda path: write_npz(path, make_images(1)[..., 0]), r"must be uint8 \[N, H, W, 3\]"),
    ("key.npz", lambda path: np.savez(path, images=make_images(1)), "key arr_0; keys: images"),
    ("one.npz", lambda path: write_npz(path, make_images(1, 1)), "at least 2 images, not 1"),
    ("small.npz", lambda path: write_npz(path, make_images(1)[:, :32, :32]), "64x64 images, not 32x32"),
    ("truncated.npz", truncated, "damaged or truncated"),
    ("flipped.npz", flipped, "damaged or truncated"),
    ("empty", lambda path: path.mkdir(), "no PNG, JPEG or WebP"),
    ("corrupt", corrupt_png, "005.png: not a readable image"),
    ("sizes", odd_size, "007.png: 32x48 pixels, but 000.png has 64x64"),
    ("announced.npz", announced, r"announces \[1000000, 64, 64, 3\] uint8 but ends"),
    ("text.npz", lambda path: path.write_text("no zip"), "damaged or truncated"),
    ("bomb", bomb, "bomb.png: 11000x11000 pixels, more than"),
])
def test_bad_samples_give_one_line_that_names_them(tmp_path, weights, name, make, message):
    make(tmp_path / name)
    ref = write_npz(tmp_path / "ref.npz", make_images(1))
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(tmp_path, weights, ref, tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "numbers.json").exists()


def test_mistaken_samples_show_before_the_reference_is_read(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(fid, "Evaluation", lambda args: pytest.fail("the reference was read"))
    with pytest.raises((ValueError, OSError), match="none.npz: no such .npz file"):
        run(tmp_path, weights, write_npz(tmp_path / "ref.npz", make_images(1)), tmp_path / "none.npz")


def test_statistics_of_another_network_are_refused(tmp_path, weights):
    samples = write_npz(tmp_path / "s.npz", make_images(2))
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), features=np.array("inception"))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "half.npz", mu=np.zeros(64))
    for name, message in (("other", "statistics of the inception"), ("wide", "same feature network"),
                          ("half", "both mu and sigma")):
        with pytest.raises((ValueError, OSError), match=message):
            run(tmp_path, weights, tmp_path / f"{name}.npz", samples)


# ---- options ---------------------------------------------------------------------------------------------------------

def test_unreadable_files_are_skipped_and_counted_on_demand(tmp_path, weights, capsys):
    ref = write_npz(tmp_path / "ref.npz", make_images(1))
    whole = make_images(2, 27)
    folder = write_folder(tmp_path / "samples", whole)
    for name in ("003.png", "020.png"):
        (folder / name).write_bytes(b"no picture")
    found = run(tmp_path, weights, ref, folder, "--skip_bad")
    assert found["num_sample_images"] == 25 and found["num_skipped"] == 2
    assert "warning: 2 sample files could not be read and were left out" in capsys.readouterr().out
    assert "003.png: not a readable image" in found["warnings"][-1]
    good = write_npz(tmp_path / "good.npz", np.delete(whole, (3, 20), axis=0))
    assert_same_numbers(found, run(tmp_path, weights, ref, good))
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises((ValueError, OSError), match=r"none of the images can be read \(.*samples/000.png"):
        run(tmp_path, weights, ref, folder, "--skip_bad")


def test_keep_order_is_the_originals_inception_score(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(fid.inception_score, "__defaults__", (9,))
    images = make_images(2, 27)
    probs = extract(load_features("shapes", weights), torch.tensor(images).permute(0, 3, 1, 2))[1].numpy()
    by_class = images[probs.argmax(1).argsort()]
    ref = write_npz(tmp_path / "ref.npz", make_images(1))
    scores = [run(tmp_path, weights, ref, write_folder(tmp_path / f"samples{i}", rows), "--keep_order")
              ["inception_score"] for i, rows in enumerate((images, by_class))]
    assert scores[0] == pytest.approx(fid.inception_score(probs, 9), rel=1e-5)
    assert scores[1] < 0.95 * scores[0]


def test_larger_images_are_made_smaller_as_llamagen_does(tmp_path, weights):
    ref, large = make_images(1), make_images(2, 27).repeat(2, axis=1).repeat(2, axis=2)
    large[:, ::3] //= 2
    pixels = F.interpolate(torch.tensor(large).permute(0, 3, 1, 2).double() / 127.5 - 1, (64, 64), mode="bicubic")
    expected = (127.5 * pixels + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    found = fid.shrink(torch.tensor(large).permute(0, 3, 1, 2), 64).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.99  # ties
    paths = [write_npz(tmp_path / f"{name}.npz", x) for name, x in (("r", ref), ("l", large), ("s", expected))]
    resized = run(tmp_path, weights, *paths[:2], "--image_size", "64")
    assert "samples: 128x128 px, stored levels made 64x64 (bicubic" in resized["protocol"]
    assert "reference: 64x64 px;" in resized["protocol"]
    plain = run(tmp_path, weights, paths[0], paths[2])
    assert resized["fid"] == pytest.approx(plain["fid"], rel=1e-3) and "bicubic" not in plain["protocol"]
    with pytest.raises((ValueError, OSError), match="r.npz: images of 64x64 pixels cannot be made smaller to 100x100"):
        run(tmp_path, weights, *paths[:2], "--image_size", "100")


def test_statistics_of_spatial_features(tmp_path, spatial):
    ref, samples = write_npz(tmp_path / "ref.npz", make_images(1)), write_npz(tmp_path / "s.npz", make_images(2))
    stats = tmp_path / "stats.npz"
    first = run(tmp_path, None, ref, samples, "--save_stats", stats)
    rows = [Spatial()(torch.tensor(make_images(i)).permute(0, 3, 1, 2))[2].double().numpy() for i in (1, 2)]
    expected = fid.frechet_distance(*(f(x) for x in rows for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))))
    assert first["sfid"] == pytest.approx(expected, rel=1e-5)
    with np.load(stats, allow_pickle=False) as data:
        assert sorted(data) == ["features", "mu", "mu_s", "sigma", "sigma_s"] and data["mu_s"].shape == (8,)
        arrays = dict(data)
    again = run(tmp_path, None, stats, samples)
    assert (again["fid"], again["sfid"]) == (first["fid"], first["sfid"]) and again["kid"] is None
    np.savez(tmp_path / "adm.npz", arr_0=make_images(5), **{k: arrays[k] for k in ("mu", "sigma", "mu_s", "sigma_s")})
    adm = run(tmp_path, None, tmp_path / "adm.npz", samples)
    assert (adm["fid"], adm["sfid"]) == (first["fid"], first["sfid"]) and adm["precision"] is not None
    np.savez(tmp_path / "no_spatial.npz", mu=arrays["mu"], sigma=arrays["sigma"], arr_0=make_images(5))
    assert run(tmp_path, None, tmp_path / "no_spatial.npz", samples)["sfid"] is None


def test_statistics_without_samples(tmp_path, weights, capsys):
    ref = write_npz(tmp_path / "ref.npz", make_images(1))
    fid.main([str(ref), "--features", "shapes", "--weights", str(weights), "--save_stats", str(tmp_path / "s.npz")])
    assert (tmp_path / "s.npz").is_file() and [*tmp_path.glob(".*")] == [] and capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        fid.parse_args([str(ref)])
    assert "--save_stats" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fid.parse_args([str(ref), "--save_stats", "stats"])
    assert "--save_stats stats: the name must end in .npz" in capsys.readouterr().err


def test_bootstrap_intervals(tmp_path, spatial, capsys):
    ref, samples = write_npz(tmp_path / "ref.npz", make_images(1)), write_npz(tmp_path / "s.npz", make_images(2, 40))
    found = run(tmp_path, None, ref, samples, "--bootstrap", 50)
    assert sorted(found["bootstrap"]) == ["fid", "inception_score", "precision", "recall", "sfid"]
    for name, (low, high) in found["bootstrap"].items():
        assert low <= found[name] <= high and low < high, name
        assert f"{found[name]:.4f}   [{low:.4f}, {high:.4f}]" in capsys.readouterr().out or name != "fid"
    assert "95 % of 50 resamples of the samples" in found["protocol"]
    assert run(tmp_path, None, ref, samples, "--bootstrap", 50)["bootstrap"] == found["bootstrap"]


def test_distances_in_float16_on_demand(tmp_path, weights, monkeypatch):
    asked = []
    monkeypatch.setattr(fid, "inside", lambda *args: asked.append(args[3]) or fid_math.inside(*args))
    paths = write_npz(tmp_path / "ref.npz", make_images(1)), write_npz(tmp_path / "s.npz", make_images(2))
    for flags, name in (((), "float64"), (("--fp16_distances",), "float16, as ADM")):
        assert f"distances: {name}" in run(tmp_path, weights, *paths, *flags)["protocol"]
    assert asked == [False, True]


def test_too_few_images_for_the_covariance(tmp_path, weights):
    few, many = (write_npz(tmp_path / f"{count}.npz", make_images(count, count)) for count in (64, 65))
    [warning] = run(tmp_path, weights, few, many)["warnings"]
    assert "64 reference images are too few for a covariance of 64 features (it is rank deficient)" in warning


# ---- shares and memory -----------------------------------------------------------------------------------------------

def test_npz_is_read_in_batches(tmp_path):
    images = make_images(1, 10)
    path = write_npz(tmp_path / "a.npz", images)
    batches = list(fid.read_batches(path, 4))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), images)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_shares_are_the_set(tmp_path, kind, monkeypatch):
    images = make_images(1, 10)
    path = write_npz(tmp_path / "a.npz", images) if kind == "npz" else write_folder(tmp_path / "a", images)
    monkeypatch.setattr(image_files, "MAX_BATCH_BYTES", 3 * images[0].nbytes)
    seen = {}
    for rank in range(3):
        for batch in fid.read_batches(path, 5, image_files.Share(rank, 3)):
            assert len(batch.images) <= 3  # what fits
            seen |= {int(index): image for index, image in zip(batch.indices, batch.images)}
    assert sorted(seen) == list(range(10)) and all(np.array_equal(seen[i], images[i]) for i in range(10))


def test_sizes_that_differ_between_processes(weights):
    net, parts = load_features("shapes", weights), [fid.Part(), fid.Part()]
    for part, size in zip(parts, (64, 32)):
        fid.add_batch(part, image_files.Batch(np.arange(2), make_images(1, 2)), net)
        part.size = (size, size)
    with pytest.raises(ValueError, match="several sizes: .*32x32"):
        fid.merge(parts)


def test_parts_are_put_in_order(tmp_path, weights):
    images, net = make_images(1, 10), load_features("shapes", weights)
    path = write_npz(tmp_path / "a.npz", images)

    def measured(**options):
        parts = [fid.Part(), fid.Part()]
        for rank, part in enumerate(parts):
            for batch in fid.read_batches(path, 3, image_files.Share(rank, 2)):
                fid.add_batch(part, batch, net)
        return fid.merge(parts, **options)
    kept, drawn = measured(keep_order=True), measured()
    features = extract(net, torch.tensor(images).permute(0, 3, 1, 2))[0].numpy()
    assert np.allclose(kept.features, features, atol=1e-5) and not np.allclose(drawn.features, features, atol=0.1)
    assert np.allclose(kept.sigma, np.cov(features.T), atol=1e-6)
    alone = fid.measure([images[::-1]], net)  # another order of the files
    assert np.allclose(alone.features, drawn.features, atol=1e-5)


def test_two_processes_find_what_one_finds(tmp_path, weights):
    ref, folder = write_npz(tmp_path / "ref.npz", make_images(1)), write_folder(tmp_path / "s", make_images(2, 27))
    (folder / "004.png").write_bytes(b"no picture")
    flags = ("--skip_bad", "--bootstrap", 5, "--save_stats", tmp_path / "stats.npz")
    alone = run(tmp_path, weights, ref, folder, *flags)
    stats = dict(np.load(tmp_path / "stats.npz"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "fid_evaluation.py"), *words(tmp_path, weights, ref, folder, *flags)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert_same_numbers(together, alone)
    assert together["warnings"] == alone["warnings"] and together["protocol"] == alone["protocol"]
    assert together["bootstrap"]["fid"] == pytest.approx(alone["bootstrap"]["fid"], rel=1e-4)
    sigma = stats["sigma"]  # of float32 features, whose last bits depend on the batch
    assert np.allclose(np.load(tmp_path / "stats.npz")["sigma"], sigma, rtol=1e-5, atol=1e-6 * np.abs(sigma).max())
    assert done.stdout.count("Inception Score ") == 1


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_memory_does_not_grow_with_the_images(tmp_path, spatial, kind):
    """Beyond the features (136 bytes an image here); an image is 12 kB, so 300 of them would be 3.7 MB."""
    peaks = []
    for count in (60, 360):
        images = make_images(3, count)
        path = tmp_path / f"{count}.npz"
        if kind == "npz":
            np.savez_compressed(path, arr_0=images)
        else:
            path = write_folder(tmp_path / str(count), images)
        del images
        args, net = fid.parse_args([str(path), str(path), "--batch_size", "10"]), Spatial()
        tracemalloc.start()
        measured = fid.measure_path(path, net, args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(measured.features) == count
    assert peaks[1] - peaks[0] < 0.4e6, peaks
