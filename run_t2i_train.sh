#!/usr/bin/env bash
# Set up if need be, then text-to-image GRPO; the same command again resumes. Arguments go to train_t2i.py.
#
#     bash run_t2i_train.sh                                              # the shapes world, on a laptop
#     GPUS=4 bash run_t2i_train.sh --config t2i_llamagen_xl_256          # LlamaGen checkpoints, 4 GPUs
#     NPROC=2 bash run_t2i_train.sh --run_name two                       # 2 CPU processes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
source scripts/launch.sh
launch train_t2i.py t2i_shapes "$@"
