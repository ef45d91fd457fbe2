"""The HTTP client of the remote rewards: bounded whatever a server does, in order, with reasons and without keys."""
import json
import socket
import threading
import time

import pytest
import torch

from reward_utils import remote
from reward_utils.deqa_client import DeQAClient
from reward_utils.geneval_client import GenEvalClient
from reward_utils.qwen_client import QwenClient
from reward_utils.remote import Endpoint, Failure, post_all
from reward_utils.settings import RewardSettings
from reward_utils.unireward_client import UniRewardClient
from tests.fake_server import KEY, SLACK_SEC, always_500, close, drip_body, hang, settings
from utils.config import parse_args, resolved

IMAGES = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)


def endpoint(server, **flags):
    return Endpoint.of(server.url, "", settings(server.url, **flags), "deqa")


def drip_head(handler, body, number):
    handler.drip(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 60000)


def drip_requests_continue(handler, body, number):
    handler.drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def cut_short(handler, body, number):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"[0.5")


def no_http(handler, body, number):
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n" + KEY.encode())


def test_order_is_kept_and_concurrency_bounded(serve):
    active, most = [], []

    def script(handler, body, number):
        active.append(1)
        most.append(len(active))
        time.sleep(0.05 if json.loads(body) % 2 else 0.0)
        active.pop()
        handler.answer(json.loads(body) * 10)
    server = serve(script)
    for _ in range(2):  # a second call finds everything as the first did
        bodies = [str(i).encode() for i in range(12)]
        assert post_all(endpoint(server, reward_concurrency=3), bodies, json.loads) == [10 * i for i in range(12)]
    assert 2 <= max(most) <= 3


def test_calls_from_several_threads_do_not_meet(serve):
    server = serve(lambda handler, body, number: handler.answer(body))
    results = {}

    def call(k):
        results[k] = post_all(endpoint(server), [str(100 * k + i).encode() for i in range(8)], int)
    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {k: [100 * k + i for i in range(8)] for k in range(4)}


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_passes_is_tried_again(serve, status):
    server = serve(lambda handler, body, number: handler.answer({"n": number}, 200 if number == 3 else status))
    assert post_all(endpoint(server), [b"x"], json.loads) == [{"n": 3}]


@pytest.mark.parametrize("script, attempts, reason", [
    (always_500, 3, "answered 500 {\"error\": \"out of memory\"} (attempt 3)"),
    (close, 3, "the connection was closed before the answer was complete (attempt 3)"),
    (cut_short, 3, "the connection was closed before the answer was complete (attempt 3)"),
    (no_http, 3, "that is no HTTP answer (BadStatusLine) (attempt 3)"),
    (lambda handler, body, number: handler.answer(b"no such model", 404), 1, "answered 404 no such model (attempt 1)"),
    (lambda handler, body, number: handler.answer(b"<html>", 200), 1, "the answer is not JSON"),
    (lambda handler, body, number: handler.answer(b"[" * 200000, 200), 1, "the answer is not JSON"),
])
def test_reasons_and_numbers_of_attempts(serve, script, attempts, reason):
    server = serve(script)
    answer, = post_all(endpoint(server), [b"x"], remote.read_json)
    assert answer.reason.startswith(f"{server.url}/: ") and reason in answer.reason
    assert len(server.requests) == attempts
    assert "\n" not in answer.reason and len(answer.reason) < 300


@pytest.mark.parametrize("script", [hang, drip_head, drip_body, drip_requests_continue],
                         ids=lambda script: script.__name__)
def test_the_deadline_holds_whatever_the_server_does(serve, script):
    server, start = serve(script), time.monotonic()
    answers = post_all(endpoint(server, reward_deadline=0.5, reward_concurrency=4), [b"x"] * 10, json.loads)
    assert 0.3 < time.monotonic() - start < 0.5 + SLACK_SEC
    assert len(answers) == 10 and all(isinstance(answer, Failure) for answer in answers)
    assert 4 <= len(server.requests) <= 4 * 3
    until = time.monotonic() + SLACK_SEC
    while any(thread.name.startswith("post") for thread in threading.enumerate()):
        assert time.monotonic() < until, "a thread outlives the call"
        time.sleep(0.01)


def test_a_request_that_got_stuck_is_asked_again(serve):
    server = serve(lambda handler, body, number: hang(handler, body, number) if number == 1 else handler.answer(7))
    start = time.monotonic()
    assert post_all(endpoint(server, reward_deadline=2.0), [b"x"], json.loads) == [7]
    assert 0.9 < time.monotonic() - start < 2.0 + SLACK_SEC


def test_large_answers_are_not_read(serve, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 1 << 20)
    written = []

    def endless(handler, body, number):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.released.is_set():
            handler.wfile.write(b" " * 65536)
            written.append(65536)
    answer, = post_all(endpoint(serve(endless)), [b"x"], json.loads)
    assert "an answer of more than 1 MB" in answer.reason
    assert sum(written) < 64 << 20  # the rest lies in the sockets' buffers
    claims = serve(lambda handler, body, number: handler.answer(b"", headers=[("Content-Length", str(1 << 40))]))
    assert isinstance(post_all(endpoint(claims), [b"x"], json.loads)[0], Failure)


def test_redirects_are_not_followed(serve):
    elsewhere = serve(lambda handler, body, number: handler.answer(1))
    server = serve(lambda handler, body, number: handler.answer(b"", 307, [("Location", elsewhere.url)]))
    answer, = post_all(endpoint(server), [b"x"], json.loads)
    assert "answered 307" in answer.reason and not elsewhere.requests


def test_a_refusal_before_the_body_is_read_keeps_its_reason(serve):
    """A server may answer and close while a large request is still being sent."""
    def refuse(connection):
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\n\r\ntoo long")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: refuse(listener.accept()[0]), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answer, = post_all(Endpoint.of(url, "", settings(url), "deqa"), [b"x" * (8 << 20)], json.loads)
    assert "answered 413 too long" in answer.reason


def test_a_server_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url, start = f"http://127.0.0.1:{port}", time.monotonic()
    scores, failures = DeQAClient(settings(url, reward_retries=1))(IMAGES)
    assert scores.isnan().all() and scores.shape == (5,) and time.monotonic() - start < SLACK_SEC
    assert set(failures) == set(range(5)) and "refused" in failures[0] and url in failures[0]


def test_keys_stay_out_of_messages(serve, monkeypatch, capsys):
    monkeypatch.setenv("REWARD_API_KEY", "common-key")
    monkeypatch.setenv("DEQA_API_KEY", KEY)

    def echo(handler, body, number):
        handler.answer({"error": f"bad key {handler.headers['Authorization']}"}, 401)
    server = serve(echo)
    (settled,) = parse_args((RewardSettings,), ["--deqa_url", server.url])
    _, failures = DeQAClient(settled)(IMAGES)
    assert "answered 401" in failures[0] and "bad key Bearer ***" in failures[0]
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}" and len(server.requests) == 1
    flagged = RewardSettings(reward_api_key=KEY)
    assert KEY not in repr(flagged) + json.dumps(resolved(flagged)) + repr(endpoint(server, reward_api_key=KEY))
    monkeypatch.delenv("DEQA_API_KEY")
    assert endpoint(server).key == "common-key" and endpoint(server, reward_api_key=KEY).key == KEY
    with pytest.raises(SystemExit):
        parse_args((RewardSettings,), ["--help"])
    assert "common-key" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="line breaks") as error:
        endpoint(server, reward_api_key=KEY + "\n")
    assert KEY not in str(error.value)


@pytest.mark.parametrize("url, complaint", [
    *[(url, "not a server's address: .*give http://HOST:PORT") for url in (
        "127.0.0.1:80", "ftp://host", "http://", "http://host:99999", "http://host:0", "http://host:80/a b",
        "http://h\nost", "http://[::1", "http://häuschen")],
    *[(url, "more than host, port and path") for url in (
        "http://me:s3cret@host:80", "me:s3cret@host:80", "http://host/?key=s3cret", "http://host/#s3cret")],
])
def test_addresses(url, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        DeQAClient(RewardSettings(deqa_url=url))
    assert "s3cret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("client, service", [(DeQAClient, "deqa"), (GenEvalClient, "geneval"),
                                             (UniRewardClient, "unireward"), (QwenClient, "qwenvl")])
def test_a_missing_address_says_what_to_give(client, service, monkeypatch):
    monkeypatch.delenv(f"{service.upper()}_URL", raising=False)
    with pytest.raises(ValueError, match=f"--{service}_url or {service.upper()}_URL, e.g. http://127.0.0.1:"):
        client(RewardSettings())
