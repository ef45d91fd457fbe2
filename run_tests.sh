#!/usr/bin/env bash
# Set up if need be, then run the tests; arguments go to pytest.
#
#     bash run_tests.sh [-k NAME] [-x]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # tiny tensors: more threads only get in each other's way
"$PYTHON" -m pytest -q tests "$@"
