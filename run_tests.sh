#!/usr/bin/env bash
# Set up if need be, then run the tests, a process for each core; arguments go to pytest.
#
#     bash run_tests.sh [-k NAME] [-x] [-n 0]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # tiny tensors: more threads only get in each other's way
# A file stays with one process: its fixtures, such as runs of several processes, are made once.
"$PYTHON" -m pytest -q -n auto --dist loadfile tests "$@"
