#!/usr/bin/env bash
# Sample a class-to-image model into test_results/NAME_STEP_CFG/ and .npz, set up first if need be; shapes: also FID.
#
#     bash test.sh MODEL_NAME GPU_RANK STEP CFG [flags of sample_c2i.py]
#     bash test.sh c2i_shapes 0 latest 1.5                                      # a run of checkpoints/
#     bash test.sh c2i_shapes 0 base 1.5                                        # the model that it started from
#     bash test.sh pretrained_models/c2i_XL_384.pt 0,1 base 2.0 --config c2i_llamagen_xl_384 --eval_image_size 256
#
# GPU_RANK: a GPU, or several (one process each); without GPUs it is ignored, and NPROC=2 gives 2 processes.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: bash test.sh MODEL_NAME GPU_RANK STEP CFG [flags of sample_c2i.py]" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
export CUDA_VISIBLE_DEVICES=$2
source scripts/setup_env.sh
source scripts/launch.sh
launch sample_c2i.py "" --model "$1" --step "$3" --cfg_scale "$4" --cfg_label "$4" "${@:5}"
