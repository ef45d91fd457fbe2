"""Many requests to one HTTP server: side by side, repeated where that can help, over by a deadline, in order.

    endpoint = Endpoint.of("http://127.0.0.1:17140", "/v1/chat/completions", settings, "unireward")
    answers = post_all(endpoint, bodies, parse)  # parse(bytes) of each answer, or a Failure that says why there is none

Standard library only: no event loop that a second call could find closed. Redirects are not followed and proxies of the
environment are not used: a request, which carries a key, goes to the address that was given or nowhere. Keys appear in
no message.
"""
import contextlib
import http.client
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from reward_utils.settings import RewardSettings
from utils.files import one_line

BACKOFF_SEC = 0.25  # before the second attempt; doubles from there
MAX_ANSWER_BYTES = 16 << 20
SHOWN_CHARACTERS = 200  # of a server's complaint
LARGEST = torch.finfo(torch.float32).max
PASSING_STATUSES = (408, 425, 429)  # worth another attempt, as all from 500 on


@dataclass(frozen=True)
class Failure:
    """In the place of a score: why there is none."""

    reason: str


@dataclass(frozen=True)
class Endpoint:
    """Where to send requests, and for how long to try."""

    host: str
    port: int
    path: str
    tls: bool = False
    key: str | None = field(default=None, repr=False)
    content_type: str = "application/json"
    deadline: float = 120.0  # seconds for all requests of a call
    retries: int = 3
    concurrency: int = 16

    @classmethod
    def of(cls, url: str, path: str, settings: RewardSettings, service: str, default_key: str | None = None):
        """url: scheme, host, port, perhaps a path that `path` is appended to; service: names the key's variable."""
        parts = _checked_url(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.hostname, port, parts.path.rstrip("/") + path or "/", parts.scheme == "https",
                   api_key(service, settings) or default_key, deadline=settings.reward_deadline,
                   retries=settings.reward_retries, concurrency=settings.reward_concurrency)

    def __str__(self):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.path}"

    def headers(self) -> dict[str, str]:
        bearer = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Content-Type": self.content_type, "Accept": self.content_type, "Connection": "close", **bearer}

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _checked_url(url: str):
    mend = "give http://HOST:PORT"
    if any(character in url for character in "@?#"):  # not shown: it may hold a key
        raise ValueError(f"a server's address holds more than host, port and path; {mend}, and the key as "
                         "--reward_api_key or REWARD_API_KEY")
    try:
        parts = urlsplit(url)
        port_fits = parts.port != 0
    except ValueError:
        port_fits = False
    clean = url.isascii() and url.isprintable() and " " not in url
    if not (clean and port_fits and parts.scheme in ("http", "https") and parts.hostname):
        raise ValueError(f"not a server's address: {url!r}; {mend}")
    return parts


def api_key(service: str, settings: RewardSettings) -> str | None:
    """The key of one service (environment), else the common one (flag, then environment)."""
    variable = f"{service.upper()}_API_KEY"
    key = os.environ.get(variable) or settings.reward_api_key or os.environ.get("REWARD_API_KEY")
    return checked_key(key, f"{variable}, reward_api_key or REWARD_API_KEY")


def checked_key(key: str | None, name: str) -> str | None:
    """The key, if it fits into a header: http.client's own complaint would show it."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"the key in {name} holds spaces, line breaks or special characters")
    return key or None


def need_url(url: str | None, service: str, example: str) -> str:
    if not url:
        raise ValueError(f"{service} is scored by a server: give its address as --{service}_url or "
                         f"{service.upper()}_URL, e.g. {example}")
    return url


# ---- many requests ---------------------------------------------------------------------------------------------------

def post_all(endpoint: Endpoint, bodies: Sequence[bytes], parse: Callable[[bytes], Any]) -> list:
    """parse(answer) or a Failure for each body, in order, within endpoint.deadline seconds whatever the server does.

    A ValueError of `parse` is a Failure. Attempts are repeated after connection errors, timeouts and the statuses 408,
    425, 429 and 5xx. Safe to call from several threads at once.
    """
    if not bodies:
        return []
    call = _Call(endpoint, parse)
    pool = ThreadPoolExecutor(min(endpoint.concurrency, len(bodies)), thread_name_prefix="post")
    try:
        futures = [pool.submit(call.ask, body) for body in bodies]
        wait(futures, timeout=call.left())
    finally:
        call.cut()
        pool.shutdown(wait=False, cancel_futures=True)
    late = Failure(f"{endpoint}: no answer within the {endpoint.deadline:g} s of --reward_deadline")
    return [future.result() if future.done() and not future.cancelled() else late for future in futures]


class _Call:
    """One post_all: its deadline, and the sockets that are shut when it has passed.

    A timeout of a socket is one of each single read, which a server that drips bytes never runs into. Hence the thread
    that waits for the workers is also the one that cuts their connections.
    """

    def __init__(self, endpoint: Endpoint, parse: Callable[[bytes], Any]):
        self.endpoint, self.parse = endpoint, parse
        self.until = time.monotonic() + endpoint.deadline
        self.over = threading.Event()
        self.lock, self.sockets = threading.Lock(), set()

    def left(self) -> float:
        return max(self.until - time.monotonic(), 0.0)

    def cut(self) -> None:
        self.over.set()
        with self.lock:
            for sock in self.sockets:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's own would race with its reader

    def ask(self, body: bytes):
        """The parsed answer, or the Failure of the last attempt."""
        reason = "the deadline passed before it was asked"
        for attempt in range(self.endpoint.retries + 1):
            # half of what is left, so that a request which got stuck is asked again; the last one may take all
            seconds = self.left() / (2 if attempt < self.endpoint.retries else 1)
            if self.over.is_set() or seconds <= 0:
                break
            try:
                status, answer = self.exchange(body, seconds)
                if 200 <= status < 300:
                    return self.parse(answer)
                reason = f"answered {status} {_shown(self.endpoint.without_key(answer.decode('utf-8', 'replace')))}"
                if status < 500 and status not in PASSING_STATUSES:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = _said(error)
            except ValueError as error:
                reason = self.endpoint.without_key(str(error))
                break
            if attempt == self.endpoint.retries or self.over.wait(min(BACKOFF_SEC * 2 ** attempt, self.left())):
                break
        return Failure(f"{self.endpoint}: {reason.strip()} (attempt {attempt + 1})")

    def exchange(self, body: bytes, seconds: float) -> tuple[int, bytes]:
        """One attempt: (status, answer)."""
        kind = http.client.HTTPSConnection if self.endpoint.tls else http.client.HTTPConnection
        connection = kind(self.endpoint.host, self.endpoint.port, timeout=seconds)
        until = time.monotonic() + seconds
        with contextlib.closing(connection):
            connection.connect()
            sock = connection.sock
            with self.lock:
                self.sockets.add(sock)
            try:
                if self.over.is_set():
                    raise TimeoutError
                # a server that refuses a request may stop reading it; its answer says why
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request("POST" if body else "GET", self.endpoint.path, body or None,
                                       self.endpoint.headers())
                with contextlib.closing(connection.getresponse()) as response:
                    return response.status, _read(response, sock, until)
            finally:
                with self.lock:
                    self.sockets.remove(sock)


def _read(response: http.client.HTTPResponse, sock: socket.socket, until: float) -> bytes:
    """The whole body, by `until`, and not more than MAX_ANSWER_BYTES."""
    data = bytearray()
    while max(len(data), response.length or 0) <= MAX_ANSWER_BYTES:
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        sock.settimeout(seconds)
        chunk = response.read1(1 << 16)
        if not chunk:
            if response.length:  # of bytes that were announced and never came
                raise http.client.IncompleteRead(bytes(data), response.length)
            return bytes(data)
        data += chunk
    raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MB")


def _shown(text: str) -> str:
    return one_line(text, SHOWN_CHARACTERS)


def _said(error: Exception) -> str:
    """One short line; http.client's own texts are not used, as they can hold whatever the server sent."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "the connection was closed before the answer was complete"
    if isinstance(error, http.client.HTTPException):
        return f"that is no HTTP answer ({type(error).__name__})"
    return _shown(f"{type(error).__name__}: {error}")


# ---- answers ---------------------------------------------------------------------------------------------------------

def read_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON ({_shown(str(error))})") from error


def number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> float | Failure:
    """A score as a server gave it, if it is a finite number of [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Failure(f"the server's score is no number: {type(value).__name__}")
    try:
        score = float(value)
    except OverflowError:  # JSON has whole numbers of any length
        score = math.inf
    if not low <= score <= high:  # NaN is within no bounds
        return Failure(f"the server's score is {score:g}, outside {low:g} to {high:g}")
    return score


def as_scores(values: Sequence[float | Failure]) -> tuple[Tensor, dict[int, str]]:
    """(float32 [N], NaN where there is a Failure; {index: reason})."""
    failures = {i: value.reason for i, value in enumerate(values) if isinstance(value, Failure)}
    numbers = [math.nan if i in failures else value for i, value in enumerate(values)]
    return torch.tensor(numbers, dtype=torch.float32), failures
