#!/usr/bin/env bash
# Sample 4 images per prompt into test_results/NAME_STEP_CFG_drawbench/ (GenEval's layout) and score them with rewards.
#
#     bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG [flags of test_t2i_rewards.py]
#     bash test_t2i_rewards_drawbench.sh t2i_shapes 0 latest 2                  # embedded prompts and rewards
#     bash test_t2i_rewards_drawbench.sh pretrained_models/t2i_XL_stage1_256.pt 0,1 base 7.5 \
#       --config t2i_llamagen_xl_256 --top_k 2000 --prompt_files drawbench.json --without deqa unireward
#
# GPU_RANK: a GPU, or several (one process each); without GPUs it is ignored, and NPROC=2 gives 2 processes.
# drawbench.json: python -m benchmark.drawbench.prepare DrawBench.csv drawbench.json
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "error: usage: bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG [flags of test_t2i_rewards.py]" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
export CUDA_VISIBLE_DEVICES=$2
source scripts/setup_env.sh
source scripts/launch.sh
launch test_t2i_rewards.py "" --model "$1" --step "$3" --cfg_scale "$4" --cfg_label "$4" "${@:5}"
