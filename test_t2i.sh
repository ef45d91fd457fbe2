#!/usr/bin/env bash
# Sample a text-to-image model into GenEval's folders under test_results/NAME_STEP_CFG/, with a report.html; shapes: also
# the strict scores. Others: bash benchmark/geneval/eval.sh test_results/NAME_STEP_CFG GPU_RANK
#
#     bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [flags of sample_t2i.py]
#     bash test_t2i.sh t2i_shapes 0 latest 2                                    # a run of checkpoints/
#     bash test_t2i.sh t2i_shapes 0 base 2                                      # the model that it started from
#     bash test_t2i.sh pretrained_models/t2i_XL_stage1_256.pt 0,1 base 7.5 --config t2i_llamagen_xl_256 --top_k 2000 \
#       --prompt_files evaluation_metadata.jsonl
#
# GPU_RANK: a GPU, or several (one process each); without GPUs it is ignored, and NPROC=2 gives 2 processes.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "error: usage: bash test_t2i.sh MODEL_NAME GPU_RANK STEP CFG [flags of sample_t2i.py]" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
export CUDA_VISIBLE_DEVICES=$2
source scripts/setup_env.sh
source scripts/launch.sh
launch sample_t2i.py "" --model "$1" --step "$3" --cfg_scale "$4" --cfg_label "$4" "${@:5}"
