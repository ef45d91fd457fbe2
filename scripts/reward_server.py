"""Serves local rewards to other processes and hosts, over JSON:

    REWARD_SERVER_API_KEY=... python -m scripts.reward_server --reward hpsv2_text --port 8100 --host 0.0.0.0
    python train_t2i.py ... --reward_servers hpsv2_text=http://gpu7:8100    # with the same key in the environment

POST /score  {"images": [base64 of a PNG or JPEG, ...], "prompts": [...], "metadata": [{...}, ...] (may be left out)}
             -> {"scores": {NAME: [number or null, ...]}, "failures": {NAME: {"INDEX": reason}}}
GET /health  -> {"status": "ok", "rewards": [NAME, ...]}

Requests that arrive within --coalesce_ms of each other, or while the model is busy, are scored as one batch. Without a
key only loopback addresses are served. Plain HTTP: across an untrusted network put it behind a TLS proxy or a tunnel.
"""
import contextlib
import hmac
import http.server
import ipaddress
import json
import logging
import math
import os
import queue
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from img_gen_grpo_rewards import RewardResult, RewardSet
from reward_utils.remote import checked_key
from reward_utils.settings import RewardSettings
from reward_utils.wire import decode_image
from utils.config import one_line_errors, parse_args
from utils.files import one_line, parse_json

KEY_VARIABLE = "REWARD_SERVER_API_KEY"
OF_THE_WHOLE_BATCH = {"fid"}  # an image's score depends on its neighbours: requests must not be mixed
MAX_REQUEST_PIXELS = 1 << 28  # 64 images of 2048 px; a small PNG can claim far more memory than it brings
MAX_REQUEST_IMAGES = 4096
MAX_PROMPT = 1 << 14  # characters
# Of a body, counted before it is parsed: 250 MB of `[],[],` would become 5 GB of lists.
MAX_CONTAINERS, MAX_MEMBERS = 1 << 20, 1 << 22
MAX_CONNECTIONS = 256  # at a time, a thread each; more are closed unanswered
MAX_WAITING = 64  # requests; then the answer is 503, which clients take as "try again"
BODIES_IN_MEMORY = 4  # times --max_body_mb, that all requests under way may bring together; then 503
READ_SEC = 120.0  # for a request to arrive, from the first byte of its head to the last of its body
DRAIN_SEC = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    reward: list[str] = field(metadata={"help": "registered names to serve; those of one model share it"})
    port: int = field(metadata={"help": "0: a free one"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; beyond loopback only with a key"})
    token: str | None = field(default=None, repr=False, metadata={
        "help": f"key that requests must bring; environment: {KEY_VARIABLE}", "secret": True})
    coalesce_ms: float = field(default=5.0, metadata={"help": "wait for further requests; 0: score each by itself"})
    max_body_mb: int = field(default=256, metadata={"help": "largest request"})

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0 to 65535, got {self.port}")
        if not self.coalesce_ms >= 0 or self.max_body_mb < 1:
            raise ValueError("coalesce_ms must be at least 0 and max_body_mb at least 1")


# ---- scoring ---------------------------------------------------------------------------------------------------------

class Request(NamedTuple):
    images: Tensor  # uint8 [n, 3, H, W]
    prompts: list[str]
    metadata: list[dict]
    result: Future  # of a RewardResult


class Batcher:
    """One thread that scores what is waiting, images of one size together.

    score: (images, prompts, metadata) -> RewardResult; only ever called by one thread at a time.
    """

    def __init__(self, score: Callable[[Tensor, list, list], RewardResult], window_sec: float):
        self.score, self.window_sec = score, window_sec
        self.waiting: queue.Queue[Request | None] = queue.Queue(MAX_WAITING)
        self.scoring = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self.thread = threading.Thread(target=self.run, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Future:
        """queue.Full when too many are waiting."""
        request = Request(images, prompts, metadata, Future())
        self.waiting.put_nowait(request)
        return request.result

    def close(self) -> None:
        """Finishes the batch under way; whatever waits behind it is cancelled."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.waiting.get_nowait().result.cancel()
        self.waiting.put(None)
        self.thread.join()
        self.scoring.shutdown()

    def run(self) -> None:
        while (requests := self.gather()) is not None:
            groups: dict[tuple, list[Request]] = {}
            for request in requests:
                groups.setdefault(tuple(request.images.shape[1:]), []).append(request)
            for group in groups.values():
                self.score_group(group)

    def gather(self) -> list[Request] | None:
        """The next request and those that follow it in time; None: closed."""
        requests, until = [self.waiting.get()], time.monotonic() + self.window_sec
        while requests[-1] is not None and self.window_sec > 0 and len(requests) < MAX_WAITING:
            try:  # also after the window: what came while the last batch was scored
                requests.append(self.waiting.get(timeout=max(until - time.monotonic(), 0)))
            except queue.Empty:
                return requests
        if requests[-1] is None:
            for request in requests[:-1]:
                request.result.cancel()
            return None
        return requests

    def score_group(self, group: Sequence[Request]) -> None:
        job = self.scoring.submit(self.score, torch.cat([request.images for request in group]),
                                  [prompt for request in group for prompt in request.prompts],
                                  [record for request in group for record in request.metadata])
        error = job.exception()  # waits
        if error is not None and len(group) > 1:  # one bad request must not spoil its neighbours
            for request in group:
                self.score_group([request])
        elif error is not None:
            group[0].result.set_exception(error)
        else:
            start = 0
            for request in group:
                request.result.set_result(_rows(job.result(), start, len(request.images)))
                start += len(request.images)


def _rows(result: RewardResult, start: int, count: int) -> RewardResult:
    return RewardResult({name: scores[start: start + count] for name, scores in result.scores.items()},
                        {name: {i - start: reason for i, reason in reasons.items() if start <= i < start + count}
                         for name, reasons in result.failures.items()})


# ---- HTTP ------------------------------------------------------------------------------------------------------------

class RefusedRequest(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds of silence after which a connection is dropped

    def setup(self):
        super().setup()
        self.until = time.monotonic() + READ_SEC
        self.server.heads[self.connection] = self.until

    def parse_request(self):
        try:
            return super().parse_request()
        finally:
            self.server.heads.pop(self.connection, None)

    def finish(self):
        self.server.heads.pop(self.connection, None)  # of one that never sent a head
        super().finish()

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, {"status": "ok", "rewards": self.server.names})
        else:
            self.reply(404, {"error": "no such address; there are GET /health and POST /score"})

    def do_POST(self):
        try:
            if self.path != "/score":
                raise RefusedRequest(404, "no such address; there are GET /health and POST /score")
            length = self.check_head()
            with self.server.room_for(length):
                images, prompts, metadata = read_request(self.read_body(length))
                self.reply(200, self.score(images, prompts, metadata))
        except RefusedRequest as error:
            self.reply(error.status, {"error": str(error)})
            self.drain()

    def check_head(self) -> int:
        """The body's length; a request without the key is refused before its body is read."""
        if self.server.token:
            given = self.headers.get("Authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
                raise RefusedRequest(401, "wrong or missing key: send Authorization: Bearer KEY")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or len(length) > 15:
            raise RefusedRequest(400, "the request must say its Content-Length")
        if int(length) > self.server.max_body:
            raise RefusedRequest(413, f"{length} bytes, at most {self.server.max_body} (--max_body_mb)")
        return int(length)

    def read_body(self, length: int) -> bytes:
        body = bytearray()
        while len(body) < length:
            chunk = self.rfile.read1(min(length - len(body), 1 << 20))
            if not chunk or time.monotonic() > self.until:
                raise RefusedRequest(400, f"only {len(body)} of {length} bytes arrived")
            body += chunk
        return bytes(body)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> dict:
        try:
            future = self.server.batcher.submit(images, prompts, metadata)
        except queue.Full as error:
            raise RefusedRequest(503, "busy: too many requests are waiting") from error
        try:
            error = future.exception()
        except CancelledError as cancelled:
            raise RefusedRequest(503, "the server is shutting down") from cancelled
        if error is None:
            return as_json(future.result())
        if isinstance(error, ValueError):  # what a reward cannot take, e.g. a record that lacks something
            raise RefusedRequest(400, one_line(error))
        log.error("scoring failed", exc_info=error)
        raise RefusedRequest(500, f"scoring failed: {type(error).__name__}: {one_line(error)}")

    def reply(self, status: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drain(self) -> None:
        """Reads on for a moment: closing with unread bytes would reset the connection, and the reason be lost."""
        self.connection.settimeout(DRAIN_SEC)
        until = time.monotonic() + DRAIN_SEC
        with contextlib.suppress(OSError):
            while time.monotonic() < until and self.rfile.read1(1 << 16):
                pass

    def send_error(self, code, message=None, explain=None):
        self.request_version = self.protocol_version  # HTTP/0.9, for an unreadable request, knows no status
        self.reply(code, {"error": message or http.HTTPStatus(code).phrase})

    def log_message(self, format, *args):
        log.debug(format, *args)


def parse_body(body: bytes):
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b",") > MAX_MEMBERS:
        raise RefusedRequest(413, f"the body has more than {MAX_CONTAINERS} lists and objects or {MAX_MEMBERS} commas")
    try:
        return parse_json(body.decode(), "the body")
    except ValueError as error:
        raise RefusedRequest(400, one_line(error)) from error


def read_request(body: bytes) -> tuple[Tensor, list[str], list[dict]]:
    """(images uint8 [n, 3, H, W], prompts, metadata), or RefusedRequest with what is wrong."""
    request = parse_body(body)
    members = request.keys() if isinstance(request, dict) else set()
    if not {"images", "prompts"} <= members <= {"images", "prompts", "metadata"}:
        raise RefusedRequest(400, "the body must be an object of images, prompts and perhaps metadata")
    encoded, prompts = request["images"], request["prompts"]
    metadata = request.get("metadata")
    if metadata is None and isinstance(prompts, list):
        metadata = [{} for _ in prompts]
    for name, values, kind in (("images", encoded, str), ("prompts", prompts, str), ("metadata", metadata, dict)):
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise RefusedRequest(400, f"{name} must be a list of {'objects' if kind is dict else 'strings'}")
    if any("image" in record for record in metadata):  # mse and lpips would open it
        raise RefusedRequest(400, "metadata may not name an image: files of this host are not read for others")
    if not encoded or not len(encoded) == len(prompts) == len(metadata):
        raise RefusedRequest(400, f"{len(encoded)} images, {len(prompts)} prompts, {len(metadata)} metadata records")
    if len(encoded) > MAX_REQUEST_IMAGES:
        raise RefusedRequest(413, f"{len(encoded)} images, at most {MAX_REQUEST_IMAGES} in a request")
    if max(map(len, prompts)) > MAX_PROMPT:
        raise RefusedRequest(413, f"a prompt of {max(map(len, prompts))} characters, at most {MAX_PROMPT}")
    return decode_images(encoded), prompts, metadata


def decode_images(encoded: list[str]) -> Tensor:
    """uint8 [n, 3, H, W]"""
    images, pixels = [], 0
    for i, one in enumerate(encoded):
        try:
            images.append(decode_image(one, f"image {i}", MAX_REQUEST_PIXELS - pixels))
        except ValueError as error:
            raise RefusedRequest(400, one_line(error)) from error
        pixels += images[-1][0].numel()
        if images[-1].shape != images[0].shape:
            raise RefusedRequest(400, f"image {i} is {_size(images[-1])}, image 0 is {_size(images[0])}: a request's "
                                      "images must be of one size")
    return torch.stack(images)


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def as_json(result: RewardResult) -> dict:
    """Scores travel as the shortest text of their double, which float32 survives; NaN is null."""
    scores = {name: [None if math.isnan(score) else score for score in scores.tolist()]
              for name, scores in result.scores.items()}
    return {"scores": scores, "failures": {name: {str(i): reason for i, reason in reasons.items()}
                                           for name, reasons in result.failures.items()}}


class RewardServer(http.server.ThreadingHTTPServer):
    """Bound to its port at once, so that a mistake shows before models are loaded; listens from `server_activate`."""

    daemon_threads = True  # a silent client must not hold up the end
    request_queue_size = 128  # with socketserver's 5, bursts wait for TCP's retransmission

    def __init__(self, config: ServerConfig):
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.token = checked_key(config.token or os.environ.get(KEY_VARIABLE), f"token or {KEY_VARIABLE}")
        self.max_body, self.names = config.max_body_mb << 20, config.reward
        self.batcher: Batcher | None = None
        self.heads: dict[socket.socket, float] = {}  # connections whose head is still arriving, and until when
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.room, self.lock = BODIES_IN_MEMORY * self.max_body, threading.Lock()
        super().__init__((config.host, config.port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise ValueError(f"cannot listen on {config.host} port {config.port}: {error.strerror}") from error
        if not self.token and not ipaddress.ip_address(self.server_address[0]).is_loopback:
            self.server_close()
            raise ValueError(f"{config.host} can be reached from other hosts: set a key, {KEY_VARIABLE} or --token, "
                             "or listen on 127.0.0.1")

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks the host's name up, which can take a minute

    @contextlib.contextmanager
    def room_for(self, length: int):
        """Takes `length` bytes of what all bodies together may hold; 503 where there are none left."""
        with self.lock:
            if length > self.room:
                raise RefusedRequest(503, "busy: the requests under way take all the memory there is for them")
            self.room -= length
        try:
            yield
        finally:
            with self.lock:
                self.room += length

    def process_request(self, request, client_address):
        if not self.slots.acquire(blocking=False):
            log.warning("%d connections: one more was closed", MAX_CONNECTIONS)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def service_actions(self):
        """Called twice a second. Ends connections whose head comes a byte now and then: a socket's own timeout is one
        of each single read. (Bodies are read in pieces, with a look at the clock.)"""
        now = time.monotonic()
        for connection, until in list(self.heads.items()):
            if now > until:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # its reader finds the end

    def handle_error(self, request, client_address):
        gone = isinstance(sys.exc_info()[1], OSError)  # a client that hung up or fell silent
        log.log(logging.DEBUG if gone else logging.ERROR, "request of %s", client_address, exc_info=True)


def make_server(config: ServerConfig, settings: RewardSettings) -> RewardServer:
    """Loaded and listening; `serve_forever` answers."""
    server = RewardServer(config)
    with contextlib.ExitStack() as undo:
        undo.callback(server.server_close)
        reward_set = RewardSet(config.reward, settings=settings, device="cuda" if torch.cuda.is_available() else "cpu")
        window_sec = 0.0 if OF_THE_WHOLE_BATCH & set(config.reward) else config.coalesce_ms / 1000
        server.batcher = Batcher(lambda *columns: reward_set.start(*columns).result(), window_sec)
        server.server_activate()
        undo.pop_all()
    return server


def main() -> None:
    config, settings = parse_args((ServerConfig, RewardSettings), description=__doc__)
    server = make_server(config, settings)
    stop = threading.Event()

    def on_signal(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the batch under way
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    print(f"serving {' '.join(config.reward)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    while not stop.wait(0.2):  # a signal that another thread receives interrupts no endless wait
        pass
    server.shutdown()
    server.server_close()
    server.batcher.close()


if __name__ == "__main__":
    with one_line_errors():
        main()
