"""Hostile clients of the reward server, and hostile requests. What else it refuses: test_reward_server.py (keys,
addresses, malformed bodies, damaged images, bodies that drip); its clients: test_remote_http.py."""
import http.client
import json
import socket
import threading
import time

import pytest
import torch

from img_gen_grpo_rewards import REWARDS, Reward
from reward_utils.pixels import to_pil
from reward_utils.settings import RewardSettings
from reward_utils.wire import base64_text, png
from scripts import reward_server as server_module
from scripts.reward_server import ServerConfig, make_server

GOOD = base64_text(png(to_pil(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0]))


class Broken(Reward):
    """Fails as a bug would, and holds on until it is let go."""

    wait = threading.Event()

    def score(self, names, images, prompts, metadata):
        self.wait.wait(20)
        raise KeyError("secret state /home/someone/model.py\nline 2")


@pytest.fixture
def server():
    REWARDS["broken"] = Broken
    Broken.wait.set()
    running = make_server(ServerConfig(["broken"], 0, max_body_mb=1), RewardSettings())
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield running
    Broken.wait.set()
    running.shutdown()
    running.server_close()
    running.batcher.close()
    del REWARDS["broken"]


def ask(server, body, headers=None):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/score", data, headers or {})
    response = connection.getresponse()
    return response.status, response.read().decode()


def until_closed(connection, data=b"", every=0.02):
    """What comes back while `data` is dripped, until the server closes."""
    connection.settimeout(every)
    answer = b""
    for i in range(1000):
        try:
            if data:
                connection.sendall(data[i % len(data):][:1])
            got = connection.recv(1000)
            if not got:
                return answer
            answer += got
        except TimeoutError:
            continue
        except OSError:
            return answer
    raise AssertionError("still open")


def test_a_bug_shows_no_stack_to_the_client(server, caplog):
    status, answer = ask(server, {"images": [GOOD], "prompts": ["a"]})
    assert status in (200, 500) and "Traceback" not in answer and 'File "' not in answer and "\n" not in answer


def test_heads_that_drip_do_not_keep_a_thread(server, monkeypatch):
    monkeypatch.setattr(server_module, "READ_SEC", 0.3)
    for head in (b"POST /score HTTP/1.1\r\n" + b"X: y\r\n" * 200, b"G", b""):
        with socket.create_connection(server.server_address[:2]) as connection:
            until_closed(connection, head)
    deadline = time.monotonic() + 20
    while server.heads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.heads


def test_connections_have_a_limit(server):
    server.slots = threading.BoundedSemaphore(2)
    idle = [socket.create_connection(server.server_address[:2]) for _ in range(2)]
    deadline = time.monotonic() + 20
    while server.slots._value and time.monotonic() < deadline:
        time.sleep(0.01)
    with socket.create_connection(server.server_address[:2]) as third:
        assert until_closed(third) == b""
    for connection in idle:
        connection.close()
    while not server.slots._value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(server, b"{}")[0] == 400  # there is room again


def test_bodies_under_way_have_a_limit_together(server):
    Broken.wait.clear()
    server.room = len(json.dumps({"images": [GOOD], "prompts": ["a"]})) + 10
    first = threading.Thread(target=ask, args=(server, {"images": [GOOD], "prompts": ["a"]}))
    first.start()
    deadline = time.monotonic() + 20
    while server.room > 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    status, answer = ask(server, {"images": [GOOD], "prompts": ["b"]})
    assert status == 503 and "busy" in answer
    Broken.wait.set()
    first.join()
    while server.room <= 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.room > 10


@pytest.mark.parametrize("limit, most, body, message", [
    ("MAX_CONTAINERS", 100, {"images": [GOOD], "prompts": ["a"], "metadata": [{"x": [[]] * 200}]}, "200|more than 100"),
    ("MAX_MEMBERS", 100, {"images": [GOOD], "prompts": ["a"], "metadata": [{"x": [0] * 200}]}, "100 commas"),
    ("MAX_REQUEST_IMAGES", 3, {"images": [GOOD] * 4, "prompts": ["a"] * 4}, "4 images, at most 3"),
    ("MAX_PROMPT", 100, {"images": [GOOD], "prompts": ["a" * 101]}, "a prompt of 101 characters, at most 100"),
])
def test_requests_have_limits(server, monkeypatch, limit, most, body, message):
    monkeypatch.setattr(server_module, limit, most)
    status, answer = ask(server, body)
    assert status == 413 and any(part in answer for part in message.split("|"))


@pytest.mark.parametrize("body", ['{"images": [NaN], "prompts": []}', '{"images": [1e999], "prompts": []}',
                                  '{"images": [%s], "prompts": []}' % ("9" * 5000), '{"x":' * 90 + "1" + "}" * 90])
def test_hostile_json(server, body):
    status, answer = ask(server, body.encode())
    assert status == 400 and "not valid JSON" in answer


def test_heads_have_limits(server):
    for headers, status in (({f"X-{i}": "y" for i in range(200)}, 431), ({"X": "y" * 70_000}, 431)):
        assert ask(server, b"{}", headers)[0] == status
