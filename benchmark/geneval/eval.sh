#!/usr/bin/env bash
# Score GenEval folders (test_t2i.sh writes them): IMAGES_DIR/results.jsonl, summary.json, and GenEval's summary.
#
#     bash benchmark/geneval/eval.sh IMAGES_DIR GPU_RANK [flags of benchmark/geneval/evaluate.py]
#     bash benchmark/geneval/eval.sh test_results/t2i_XL_stage1_256_base_7.5 0,1 --reward_models reward_models
#     bash benchmark/geneval/eval.sh test_results/t2i_shapes_base_2 0 --detector shapes
#
# GPU_RANK: a GPU, or several (one process each); without GPUs it is ignored, and NPROC=2 gives 2 processes.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "error: usage: bash benchmark/geneval/eval.sh IMAGES_DIR GPU_RANK [flags of benchmark/geneval/evaluate.py]" >&2
  exit 2
fi
images=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case $images in
  /*) ;;
  *) [ "$PWD" = "$root" ] || images=$PWD/$images ;;
esac
cd "$root"
export CUDA_VISIBLE_DEVICES=$2
source scripts/setup_env.sh
source scripts/launch.sh
launch benchmark.geneval.evaluate "" --images_dir "$images" "${@:3}"
