"""A scripted HTTP server on loopback, and the ways in which it can misbehave."""
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from reward_utils.settings import RewardSettings

SLACK_SEC = 5  # a bounded call on a busy machine; an unbounded one would take minutes
KEY = "s3cret-key"


class FakeServer(ThreadingHTTPServer):
    """`script(handler, body, number of the request)` answers; what was asked is in `requests`."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.script, self.requests, self.lock = script, [], threading.Lock()
        self.released = threading.Event()  # ends the handlers that hang
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self):
        return [json.loads(body) for _, _, body in self.requests]

    def handle_error(self, request, client_address):
        pass  # clients hang up on purpose here


class FakeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            number = len(self.server.requests)
        self.server.script(self, body, number)

    do_GET = do_POST

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("Content-Length", str(len(data))), *headers):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def drip(self, data):
        while data and not self.server.released.wait(0.02):
            self.wfile.write(data[:1])
            data = data[1:]


def settings(url, **flags):
    flags = {"reward_deadline": 20.0, "reward_retries": 2, **flags}
    return RewardSettings(deqa_url=url, unireward_url=url, qwenvl_url=url, geneval_url=url, **flags)


def chat_answer(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def hang(handler, body, number):
    handler.server.released.wait(60)


def drip_body(handler, body, number):
    handler.send_response(200)
    handler.end_headers()
    handler.drip(b"[" + b" " * 100000)


def close(handler, body, number):
    handler.connection.shutdown(socket.SHUT_RDWR)


def always_500(handler, body, number):
    handler.answer({"error": "out of memory"}, 500)
