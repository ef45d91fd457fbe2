"""Tests import the project from the repository root, whatever the current directory, and run on the CPU.

Bit-for-bit resume and two gloo processes hold there; on a machine with GPUs the scripts would take those. The tests
that are made for GPUs too see them with ARGRPO_TEST_GPU=1:

    ARGRPO_TEST_GPU=1 python -m pytest tests/trainer_utils/test_sharding.py tests/models/test_streams.py
"""
import os
import sys
import threading
from pathlib import Path

import pytest

if os.environ.get("ARGRPO_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; spawned processes and scripts inherit it
    os.environ["TRITON_INTERPRET"] = "1"  # before models.kernels is imported; the scripts' own runs draw on the CPU
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world's folder, for tests that have none of their own."""
    from tests.tiny_world import make_world

    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def serve(monkeypatch):
    """serve(script) -> FakeServer; ended with the test."""
    from reward_utils import remote
    from tests.fake_server import FakeServer

    monkeypatch.setattr(remote, "BACKOFF_SEC", 0.01)
    for name in ("DEQA", "UNIREWARD", "QWENVL", "GENEVAL", "REWARD_SERVER", "REWARD"):
        monkeypatch.delenv(f"{name}_API_KEY", raising=False)
        monkeypatch.delenv(f"{name}_URL", raising=False)
    servers = []

    def start(script):
        servers.append(FakeServer(script))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return servers[-1]
    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()
