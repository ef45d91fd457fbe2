"""The reward server: equal to local scores bit for bit, batches what arrives together, refuses what it should."""
import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from img_gen_grpo_rewards import REWARDS, Reward, RewardResult, RewardSet
from reward_utils.remote_reward import RemoteScorer
from reward_utils.settings import RewardSettings
from reward_utils.wire import base64_text, png
from scripts import reward_server as server_module
from scripts.reward_server import OF_THE_WHOLE_BATCH, RewardServer, ServerConfig, make_server

ROOT = Path(__file__).resolve().parents[2]
KEY = "s3cret-key"
IMAGES = torch.randint(0, 256, (6, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {i}" for i in range(6)]


class Fickle(Reward):
    """Two names with arbitrary float32 scores; fails where the metadata say so, counts batches, waits when told to."""

    batches: list[int] = []
    go = threading.Event()

    def score(self, names, images, prompts, metadata):
        self.batches.append(len(images))
        assert self.go.wait(20)
        if any(record.get("bad") for record in metadata):
            raise ValueError("a record is bad")
        if any(record.get("broken") for record in metadata):
            raise RuntimeError("CUDA out of memory,\nas it happens")
        weights = torch.rand(images[0].shape, generator=torch.Generator().manual_seed(1))
        scores = torch.stack([(image.float() * weights).sum().sin() for image in images])
        reasons = {i: "too dark" for i, record in enumerate(metadata) if record.get("dark")}
        scores[list(reasons)] = float("nan")
        return RewardResult({name: scores * (i + 1) / 3 for i, name in enumerate(names)},
                            dict.fromkeys(names, reasons))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    for name in ("fickle", "fickle_third", *OF_THE_WHOLE_BATCH):
        monkeypatch.setitem(REWARDS, name, Fickle)
    for name in ("REWARD_API_KEY", "REWARD_SERVER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Fickle, "batches", [])
    Fickle.go.set()


@pytest.fixture
def serve():
    """serve(flags of ServerConfig) -> a listening RewardServer; ended with the test."""
    servers = []

    def start(*names, **flags):
        servers.append(make_server(ServerConfig(list(names) or ["fickle"], 0, **flags), RewardSettings()))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return servers[-1]
    yield start
    Fickle.go.set()
    for server in servers:
        server.shutdown()
        server.server_close()
        server.batcher.close()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def scorer(server, **flags):
    return RemoteScorer(url(server), RewardSettings(**{"reward_deadline": 20.0, "reward_retries": 0, **flags}))


def body(images=IMAGES[:1], prompts=("a",), **more):
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return {"images": [base64_text(png(picture)) for picture in pictures], "prompts": list(prompts), **more}


def ask(server, data, method="POST", path="/score", headers=()):
    """(status, answer) of one raw request; data: bytes, or a value to send as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, data if isinstance(data, bytes) else json.dumps(data).encode(), dict(headers))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


# ---- scores ----------------------------------------------------------------------------------------------------------

def test_equal_to_local_scores_bit_for_bit(serve):
    records = [{}, {"dark": True}, {"tag": "x", "image": IMAGES[0]}, {}, {}, {}]
    names = ["fickle", "fickle_third"]
    local = RewardSet(names).start(IMAGES, PROMPTS, records).result()
    for _ in range(2):
        scores, failures = scorer(serve(*names))(names, IMAGES, PROMPTS, records)
        for name in names:
            assert scores[name].dtype == torch.float32 and torch.equal(scores[name].isnan(), local.scores[name].isnan())
            assert torch.equal(scores[name].nan_to_num(), local.scores[name].nan_to_num())
        assert failures == local.failures == dict.fromkeys(names, {1: "too dark"})


def test_the_shapes_rewards_through_a_reward_set(serve):
    """A name of --reward_servers is scored there, beside local ones."""
    import numpy as np

    from dataset.shapes import prompt_condition, render, sample_record, sample_scene
    rng = np.random.default_rng(0)
    conditions = [prompt_condition(sample_record(rng, "train")) for _ in range(4)]
    images = torch.from_numpy(np.stack([render(sample_scene(c.metadata, rng)) for c in conditions])).permute(0, 3, 1, 2)
    columns = images, [c.prompt for c in conditions], [c.metadata for c in conditions]
    names = ["shapes_strict", "shapes_quality"]
    server = serve("shapes_strict")
    flags = RewardSettings(reward_servers=[f"shapes_strict={url(server)}"])
    total, scores = RewardSet(names, settings=flags)(*columns)
    local_total, local = RewardSet(names)(*columns)
    assert torch.equal(total, local_total) and all(torch.equal(scores[name], local[name]) for name in names)


def test_a_name_that_is_not_served_fails_with_a_reason(serve):
    server = serve()
    scores, failures = scorer(server)(["fickle", "maniqa"], IMAGES, PROMPTS, [{}] * 6)
    assert scores["fickle"].isfinite().all() and failures["fickle"] == {}
    assert scores["maniqa"].isnan().all() and "no scores of maniqa" in failures["maniqa"][5]
    assert scorer(server).names() == ["fickle"]
    empty, _ = scorer(server)(["fickle"], IMAGES[:0], [], [])
    assert empty["fickle"].shape == (0,)


def eventually(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def while_busy(server, calls, when_waiting=lambda: None):
    """Results of calls that arrive while the first of them is being scored; when_waiting: once all are there."""
    Fickle.go.clear()
    with ThreadPoolExecutor(len(calls)) as pool:
        first = pool.submit(calls[0])
        eventually(lambda: Fickle.batches)
        rest = [pool.submit(call) for call in calls[1:]]
        eventually(lambda: server.batcher.waiting.qsize() == len(rest))
        when_waiting()
        Fickle.go.set()
    return [future.result() for future in (first, *rest)]


def test_requests_that_wait_become_one_batch_per_size(serve):
    server = serve(coalesce_ms=20)
    remote = scorer(server)
    small = IMAGES[:, :, :8, :8]
    local = RewardSet(["fickle"])
    want = [local(IMAGES[i: i + 1], PROMPTS[:1])[1]["fickle"] for i in range(6)] + [
        local(small[:2], PROMPTS[:2])[1]["fickle"]]
    Fickle.batches.clear()
    calls = [partial(remote, ["fickle"], IMAGES[i: i + 1], PROMPTS[:1], [{"dark": i == 3}]) for i in range(6)]
    calls.append(partial(remote, ["fickle"], small[:2], PROMPTS[:2], [{}] * 2))
    results = while_busy(server, calls)
    assert Fickle.batches[0] == 1 and sorted(Fickle.batches[1:]) == [2, 5]
    for i, (scores, failures) in enumerate(results):
        if i == 3:
            assert scores["fickle"].isnan().all() and failures["fickle"] == {0: "too dark"}
        else:
            assert torch.equal(scores["fickle"], want[i]) and failures["fickle"] == {}


def test_requests_within_the_window_become_one_batch(serve):
    server = serve(coalesce_ms=1500)
    remote = scorer(server)
    with ThreadPoolExecutor(4) as pool:
        for i in range(4):
            pool.submit(remote, ["fickle"], IMAGES[i: i + 2], PROMPTS[:2], [{}] * 2)
    assert sum(Fickle.batches) == 8 and len(Fickle.batches) < 4


@pytest.mark.parametrize("names, flags", [(["fickle"], {"coalesce_ms": 0.0}), (["fid"], {"coalesce_ms": 50.0})])
def test_where_requests_are_not_mixed(serve, names, flags):
    """Without a window; and never for rewards of the whole batch, whatever the window."""
    server = serve(*names, **flags)
    remote = scorer(server)
    while_busy(server, [partial(remote, names, IMAGES[:2], PROMPTS[:2], [{}] * 2)] * 4)
    assert Fickle.batches == [2] * 4


@pytest.mark.parametrize("fault, status, message", [("bad", 400, "a record is bad"),
                                                    ("broken", 500, "CUDA out of memory, as it happens")])
def test_a_request_that_fails_leaves_its_neighbours_alone(serve, fault, status, message):
    server = serve(coalesce_ms=20)
    remote = scorer(server)
    results = while_busy(server, [partial(remote, ["fickle"], IMAGES[i: i + 1], PROMPTS[:1], [{fault: i == 2}])
                                  for i in range(4)])
    for i, (scores, failures) in enumerate(results):
        assert scores["fickle"].isnan().all() == (i == 2)
        if i == 2:
            assert f"answered {status}" in failures["fickle"][0] and message in failures["fickle"][0]
    scores, _ = remote(["fickle"], IMAGES, PROMPTS, [{}] * 6)
    assert scores["fickle"].isfinite().all()  # and the server goes on


def test_a_full_queue_is_told(serve, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_WAITING", 1)
    server = serve(coalesce_ms=0)
    remote = scorer(server)
    told = []
    results = while_busy(server, [partial(remote, ["fickle"], IMAGES[:1], PROMPTS[:1], [{}])] * 2,
                         lambda: told.append(ask(server, body())))
    (status, answer), = told
    assert status == 503 and "busy" in answer["error"]
    assert all(scores["fickle"].isfinite().all() for scores, _ in results)


# ---- refusals --------------------------------------------------------------------------------------------------------

def picture(kind="PNG", mode="RGB", size=(24, 16)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format=kind)
    return base64_text(buffer.getvalue())


GOOD = picture()


@pytest.mark.parametrize("data, complaint", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\xff\xfe", "can't decode"), (b"[" * 100000, "not valid JSON"),
    ([], "object of"),
    ({}, "object of"), ({"images": [GOOD]}, "object of"), ({"images": [GOOD], "prompts": ["a"], "x": 1}, "object of"),
    ({"images": GOOD, "prompts": ["a"]}, "images must be a list of strings"),
    ({"images": [1], "prompts": ["a"]}, "images must be a list of strings"),
    ({"images": [GOOD], "prompts": "a"}, "prompts must be a list of strings"),
    ({"images": [GOOD], "prompts": [None]}, "prompts must be a list of strings"),
    ({"images": [GOOD], "prompts": ["a"], "metadata": [1]}, "metadata must be a list of objects"),
    ({"images": [GOOD], "prompts": ["a"], "metadata": [{"image": "/etc/hostname"}]}, "may not name an image"),
    ({"images": [], "prompts": []}, "0 images, 0 prompts"),
    ({"images": [GOOD], "prompts": ["a", "b"]}, "1 images, 2 prompts, 2 metadata records"),
    ({"images": [GOOD], "prompts": ["a"], "metadata": []}, "1 images, 1 prompts, 0 metadata records"),
    ({"images": ["?"], "prompts": ["a"]}, "image 0: not base64"), ({"images": ["ü"], "prompts": ["a"]}, "not base64"),
    ({"images": [GOOD, ""], "prompts": ["a", "b"]}, "image 1: not a readable image, wanted PNG or JPEG"),
    ({"images": [GOOD[:60]], "prompts": ["a"]}, "not a readable image, wanted PNG or JPEG"),
    ({"images": [picture("GIF")], "prompts": ["a"]}, "not a readable image, wanted PNG or JPEG"),
    ({"images": [picture("EPS")], "prompts": ["a"]}, "not a readable image, wanted PNG or JPEG"),
    ({"images": [picture(mode="RGBA")], "prompts": ["a"]}, "image 0: pixels of mode RGBA, wanted"),
    ({"images": [GOOD, picture(size=(16, 24))], "prompts": ["a", "b"]}, "image 1 is 16x24, image 0 is 24x16"),
])
def test_malformed_requests_are_told_what_is_wrong(shared, data, complaint):
    status, answer = ask(shared, data)
    assert status == 400 and complaint in answer["error"] and "\n" not in answer["error"]
    assert not Fickle.batches


@pytest.fixture(scope="module")
def shared():
    """One server for the requests that never reach a reward."""
    REWARDS["fickle"] = Fickle
    server = make_server(ServerConfig(["fickle"], 0, max_body_mb=1), RewardSettings())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    server.batcher.close()
    del REWARDS["fickle"]


def test_damaged_images_never_end_a_request_without_an_answer(shared):
    generator = random.Random(0)
    for kind in ("PNG", "JPEG"):
        data = base64.b64decode(picture(kind))
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(3):
                broken[generator.randrange(8, len(data))] = generator.randrange(256)
            status, answer = ask(shared, {"images": [base64_text(bytes(broken))], "prompts": ["a"]})
            assert status in (200, 400), answer


def test_images_that_claim_too_much(shared, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_REQUEST_PIXELS", 1000)  # one of 384 pixels fits, and a second, not a third
    assert ask(shared, {"images": [GOOD] * 2, "prompts": ["a"] * 2})[0] == 200
    status, answer = ask(shared, {"images": [GOOD] * 3, "prompts": ["a"] * 3})
    assert status == 400 and "image 2: 24x16 pixels" in answer["error"] and "the 232 allowed" in answer["error"]


def test_other_addresses_methods_and_lengths(shared):
    assert ask(shared, b"", "GET", "/health") == (200, {"status": "ok", "rewards": ["fickle"]})
    assert ask(shared, b"", "GET", "/")[0] == ask(shared, b"{}", "POST", "/")[0] == 404
    assert ask(shared, b"", "PUT")[0] == 501
    status, answer = ask(shared, b"x" * ((1 << 20) + 1))
    assert status == 413 and "at most 1048576 (--max_body_mb)" in answer["error"]
    for line in ("Content-Length: -1", "Content-Length: 1e3", "Content-Length: " + "9" * 30, "X: y",
                 "Transfer-Encoding: chunked"):
        assert raw(shared, f"POST /score HTTP/1.1\r\n{line}\r\n\r\n".encode()).startswith(b"HTTP/1.0 400")
    assert raw(shared, b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.0 400")
    assert b"only 3 of 10 bytes" in raw(shared, b"POST /score HTTP/1.1\r\nContent-Length: 10\r\n\r\n{}\n")


def raw(server, data):
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_body_that_drips_is_given_up(shared, monkeypatch):
    monkeypatch.setattr(server_module, "READ_SEC", 0.2)
    monkeypatch.setattr(server_module, "DRAIN_SEC", 0.5)
    with socket.create_connection(shared.server_address[:2], timeout=20) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        for _ in range(8):
            connection.sendall(b" ")
            time.sleep(0.05)
        answer = connection.recv(1000) + connection.recv(1000)
    assert answer.startswith(b"HTTP/1.0 400") and b"of 1000 bytes arrived" in answer


# ---- keys and addresses ----------------------------------------------------------------------------------------------

def test_a_key_is_asked_for_before_the_body_is_read(serve, monkeypatch):
    server = serve(token=KEY)
    large = body(IMAGES, PROMPTS) | {"metadata": [{"x": "y" * (8 << 20)}] + [{}] * 5}
    for headers in ({}, {"Authorization": KEY}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer ü"},
                    {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}):
        status, answer = ask(server, large, headers={k: v.encode("latin-1") for k, v in headers.items()})
        assert status == 401 and "key" in answer["error"] and KEY not in answer["error"]
    assert not Fickle.batches
    assert ask(server, b"", "GET", "/health")[0] == 200
    scores, failures = scorer(server)(["fickle"], IMAGES, PROMPTS, [{}] * 6)
    assert scores["fickle"].isnan().all() and "answered 401" in failures["fickle"][0]
    for flags, variable in (({"reward_api_key": KEY}, None), ({}, "REWARD_API_KEY"), ({}, "REWARD_SERVER_API_KEY")):
        with monkeypatch.context() as patch:
            if variable:
                patch.setenv(variable, KEY)
            assert scorer(server, **flags)(["fickle"], IMAGES, PROMPTS, [{}] * 6)[0]["fickle"].isfinite().all()
    assert KEY not in repr(ServerConfig(["fickle"], 0, token=KEY))


def test_other_hosts_need_a_key(monkeypatch):
    with pytest.raises(ValueError, match="0.0.0.0 can be reached from other hosts: set a key, REWARD_SERVER_API_KEY"):
        make_server(ServerConfig(["fickle"], 0, host="0.0.0.0"), RewardSettings())
    with pytest.raises(ValueError, match="line breaks"):
        make_server(ServerConfig(["fickle"], 0, token="a\n"), RewardSettings())
    monkeypatch.setenv("REWARD_SERVER_API_KEY", KEY)
    server = RewardServer(ServerConfig(["fickle"], 0, host="0.0.0.0"))
    assert server.token == KEY
    server.server_close()


def test_mistakes_show_before_models_are_loaded():
    class Loads(Reward):
        def __init__(self, settings, device):
            raise AssertionError("loaded")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "fickle", Loads)
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            make_server(ServerConfig(["fickle"], port), RewardSettings())
    with pytest.raises(ValueError, match="unknown reward 'fickel'"):
        make_server(ServerConfig(["fickel"], 0), RewardSettings())
    for flags in ({"port": 70000}, {"port": 0, "coalesce_ms": -1.0}, {"port": 0, "max_body_mb": 0}):
        with pytest.raises(ValueError, match="must be"):
            ServerConfig(["fickle"], **flags)


def test_no_reward_server_there(serve):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=f"no reward server: http://127.0.0.1:{port}/health: .*refused"):
        RemoteScorer(f"http://127.0.0.1:{port}", RewardSettings(reward_retries=0)).names()


# ---- the command -----------------------------------------------------------------------------------------------------

def test_the_command_serves_and_ends_on_sigterm():
    """One process start (torch's import): serves a shapes reward, and ends at once although a client is connected."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.reward_server", "--reward", "shapes_quality", "--port", "0"], cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        line = process.stdout.readline()
        assert line.startswith("serving shapes_quality at http://127.0.0.1:"), line + process.stderr.read()
        address = line.split()[-1]
        images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        columns = images, ["a photo of a red circle"] * 2, [{}, {}]
        scores, failures = RemoteScorer(address, RewardSettings())(["shapes_quality"], *columns)
        local = RewardSet(["shapes_quality"]).start(*columns).result()
        assert torch.equal(scores["shapes_quality"], local.scores["shapes_quality"]) and not failures["shapes_quality"]
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)):
            process.send_signal(signal.SIGTERM)
            _, complaint = process.communicate(timeout=20)
        assert process.returncode == 0 and complaint == ""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    finally:
        process.kill()
        process.wait()
