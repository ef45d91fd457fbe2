#!/usr/bin/env bash
# Everything worth knowing from one GPU in at most 8 minutes; no network, no installation.
#
#     bash benchmark/gpu_check.sh [STAGE ...] [--seconds N] [--results]
#     bash benchmark/gpu_check.sh --tiny --device cpu        # tries the script itself
#
# OUT: the folder for figures, logs and the profile (default: build/gpu_check). PYTHON: default python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmark.speed.gpu_check "$@"
