#!/usr/bin/env bash
# Set up if need be, then class-to-image GRPO; the same command again resumes. Arguments go to train_c2i.py.
#
#     bash run_c2i_train.sh                                              # the shapes world, on a laptop
#     GPUS=4 bash run_c2i_train.sh --config c2i_llamagen_xl_384          # LlamaGen checkpoints, 4 GPUs
#     NPROC=2 bash run_c2i_train.sh --run_name two                       # 2 CPU processes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
source scripts/launch.sh
launch train_c2i.py c2i_shapes "$@"
