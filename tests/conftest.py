"""Tests import the project from the repository root, whatever the current directory, and run on the CPU.

Bit-for-bit resume and two gloo processes hold there; on a machine with GPUs the scripts would take those.
"""
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; spawned processes and scripts inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
