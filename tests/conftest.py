"""Tests import the project from the repository root, whatever the current directory, and run on the CPU.

Bit-for-bit resume and two gloo processes hold there; on a machine with GPUs the scripts would take those. The tests
that are made for GPUs too see them with ARGRPO_TEST_GPU=1:

    ARGRPO_TEST_GPU=1 python -m pytest tests/test_sharding.py tests/test_streams.py
"""
import os
import sys
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
