"""The Inception of 2015-12-05 against torch-fidelity's and TensorFlow's numbers, and where its weights are found."""
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from reward_utils import inception
from reward_utils.inception import extract, extract_all, find_inception, load_features
from reward_utils.inception_v3 import InceptionFeatures, resize_tf1
from tests.golden.rewards.rule import fill_state_dict, image_u8
from utils.download import download

GOLDEN = Path(__file__).parents[1] / "golden" / "rewards"
NAME = "pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as pytorch-fid's release has it (torch's old format), with the rule's pseudo-weights."""
    state = fill_state_dict(InceptionFeatures().state_dict())
    state = {key: value * 2 ** 0.5 if value.ndim == 4 else value for key, value in state.items()}
    path = tmp_path_factory.mktemp("inception") / NAME
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return load_features("inception", weights)


def golden_image(name):
    return torch.from_numpy(image_u8(f"inc/{name}", 1, 3, *[int(name[1:])] * 2))


@pytest.mark.parametrize("name", ["a256", "b384"])
def test_golden_features(net, name):
    golden = json.loads((GOLDEN / "inception.json").read_text())["out"][name]
    features, probs, spatial = extract_all(net, golden_image(name))
    assert features.shape == (1, 2048) and probs.shape == (1, 1008) and spatial.shape == (1, 2023)
    close = dict(abs=1e-5)
    assert features[0, :6].tolist() == pytest.approx(golden["pool_first"], **close)
    assert [features.mean(), features.std()] == pytest.approx([golden["pool_mean"], golden["pool_std"]], **close)
    assert spatial[0, :8].tolist() == pytest.approx(golden["spatial_first"], **close)
    assert spatial.mean() == pytest.approx(golden["spatial_mean"], **close)
    assert spatial.argmax() == golden["spatial_argmax"] and probs.argmax() == golden["softmax_argmax"]
    assert probs.max() == pytest.approx(golden["softmax_max"], **close)
    assert (features @ net.fc.weight.T).mean() == pytest.approx(golden["logit_mean"], **close)


def test_an_image_knows_nothing_of_its_batch(net):
    images = torch.from_numpy(image_u8("batch", 2, 3, 40, 60))
    for together, alone in zip(extract_all(net, images), extract_all(net, images, batch_size=1)):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_precision_settings_and_autocast_change_nothing(net):
    before = torch.backends.cudnn.conv.fp32_precision
    image = golden_image("a256")[:, :, ::4, ::4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = extract(net, image)
    assert torch.equal(features, extract(net, image)[0])
    assert torch.backends.cudnn.conv.fp32_precision == before


# ---- TensorFlow's resize ---------------------------------------------------------------------------------------------

def test_golden_resize_is_exact():
    golden = json.loads((GOLDEN / "adm_eval.json").read_text())
    small = torch.from_numpy(image_u8("resize/a", 1, 5, 7, 1)).permute(0, 3, 1, 2).float()
    assert torch.equal(resize_tf1(small, 9, 8)[0, 0], torch.tensor(golden["resize_5x7_to_9x8"]))
    large = torch.from_numpy(image_u8("resize/b", 1, 256, 256, 3)).permute(0, 3, 1, 2).float()
    resized, expected = resize_tf1(large, 299, 299), golden["resize_256_to_299"]
    assert resized.double().sum().item() == expected["sum"]
    for place, pixel in expected["px"].items():
        row, column = map(int, place.split(","))
        assert resized[0, :, row, column].tolist() == pixel


def test_resize_shrinks_without_antialiasing():
    pixels = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(resize_tf1(pixels, 4, 4), pixels[:, :, ::2, ::2])
    assert torch.equal(resize_tf1(pixels, 8, 8), pixels)


# ---- where the weights are -------------------------------------------------------------------------------------------

def test_weights_are_looked_for_in_order(tmp_path, monkeypatch):
    cached = tmp_path / "home" / "hub" / "checkpoints" / NAME
    own = tmp_path / "models" / NAME
    for path in (cached, own):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REWARD_MODELS", raising=False)
    assert find_inception() == cached
    monkeypatch.setenv("REWARD_MODELS", str(own.parent))
    assert find_inception() == own
    own.unlink()
    assert find_inception() == cached


def test_foreign_weights_are_refused(tmp_path, net):
    state = net.state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc")}, tmp_path / "headless.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 and no more")
    for name, message in (("headless", "not the weights of the inception"), ("damaged", "damaged"),
                          ("none", "no weights of the inception.*github.com/mseitzer")):
        with pytest.raises(ValueError, match=message) as error:
            load_features("inception", tmp_path / f"{name}.pth")
        assert str(tmp_path / f"{name}.pth") in str(error.value) and "\n" not in str(error.value)


class Files(BaseHTTPRequestHandler):
    content = b"weights" * 1000

    def do_GET(self):
        if self.path == "/none":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[:-5] if self.path == "/cut" else self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_once_into_the_cache(tmp_path, monkeypatch, server):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("REWARD_MODELS", raising=False)
    monkeypatch.setattr(inception, "INCEPTION_URL", f"{server}/weights.pth")
    monkeypatch.setattr(inception, "INCEPTION_DIGEST", hashlib.sha256(Files.content).hexdigest()[:8])
    path = find_inception()
    assert path == tmp_path / "hub" / "checkpoints" / NAME and path.read_bytes() == Files.content
    monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:1/")
    assert find_inception() == path


@pytest.mark.parametrize("page,message", [("none", "404.*put it at"), ("cut", "connection ended after 6995 of 7000"),
                                          ("other", "begins with .*, not 12345678")])
def test_failed_downloads_leave_nothing(tmp_path, server, page, message):
    path = tmp_path / "cache" / "weights.pth"
    with pytest.raises(ValueError, match=message) as error:
        download(f"{server}/{page}", path, "12345678")
    assert f"{server}/{page}" in str(error.value) and "\n" not in str(error.value)
    assert not list(path.parent.iterdir())


def test_no_network(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="http://127.0.0.1:1/x could not be fetched.*put it at") as error:
        download("http://127.0.0.1:1/x", path, "12345678")
    assert str(path) in str(error.value)
