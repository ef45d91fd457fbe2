#!/usr/bin/env bash
# Sample a class-to-image model into test_results/NAME_STEP_CFG/ and .npz, then measure it; set up first if need be.
#
#     bash test.sh MODEL_NAME GPU_RANK STEP CFG [flags of sample_c2i.py]
#     bash test.sh c2i_shapes 0 latest 1.5                                      # a run of checkpoints/
#     bash test.sh c2i_shapes 0 base 1.5 --labels balanced                      # the model that it started from
#     CFG="1.5 1.75 2.0" bash test.sh c2i_shapes 0 latest                       # a sweep: one table and one plot
#     REF=VIRTUAL_imagenet256_labeled.npz \
#       bash test.sh pretrained_models/c2i_XL_384.pt 0,1 base 2.0 --config c2i_llamagen_xl_384 --eval_image_size 256
#
# CFG: one guidance scale or several in quotes, as fourth argument or in the environment.
# REF: what fid_evaluation.py compares with (also --ref); shapes models need none.
# GPU_RANK: a GPU, or several (one process each); without GPUs it is ignored, and NPROC=2 gives 2 processes.
set -euo pipefail
usage="error: usage: bash test.sh MODEL_NAME GPU_RANK STEP CFG [flags of sample_c2i.py]"
if [ $# -lt 3 ]; then
  echo "$usage" >&2
  exit 2
fi
model=$1 gpus=$2 step=$3
shift 3
case "${1:-}" in
  "" | --*) scales=${CFG:-} ;;
  *)
    scales=$1
    shift
    ;;
esac
if [ -z "${scales// /}" ]; then
  echo "$usage" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
export CUDA_VISIBLE_DEVICES=$gpus
source scripts/setup_env.sh
source scripts/launch.sh
read -ra scales <<<"$scales"  # its words; unquoted, a * among them would become the names of files
launch sample_c2i.py "" --model "$model" --step "$step" --cfg_sweep "${scales[@]}" ${REF:+--ref "$REF"} "$@"
