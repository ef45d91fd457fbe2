#!/usr/bin/env bash
# launch SCRIPT DEFAULT_CONFIG ARGS...: one process plainly, several under torchrun; sourced by the run scripts.
# SCRIPT: a file (train_c2i.py) or a module (benchmark.geneval.evaluate).
#
# GPUS (or NPROC): processes on this machine; default: every visible GPU, or one process on a CPU. GPUS must be visible.
# NNODES NODE_RANK MASTER_ADDR MASTER_PORT: the same command on each of NNODES machines, NODE_RANK from 0; MASTER_ADDR
#   is machine 0, MASTER_PORT (29500) is free there.
# MAX_RESTARTS (0): how often torchrun starts all processes again when one fails; training then resumes by itself.
#   With it, torchrun numbers the machines itself: rank 0 may be on another one than NODE_RANK=0.
# Machines that share this folder: set up on one first, or let scripts/setup_env.sh wait for its lock.
# Under srun the allocation says all this: one task per machine starts torchrun, one task per GPU is a process itself.
# Exit code: 0, or the failing process's own (2: bad usage; 143, 138: stopped by SIGTERM, SIGUSR1; 137: killed).

_launch_fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# _launch_number NAME LEAST MOST: the variable NAME, if it is set, is a whole number from LEAST to MOST.
_launch_number() {
  local value=${!1:-}
  if [ -z "$value" ]; then return 0; fi
  if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || [ "$value" -lt "$2" ] || [ "$value" -gt "$3" ]; then
    _launch_fail "$1=$value: expected a whole number from $2 to $3"
  fi
}

# _launch_first_host NODELIST: "gpu[003-006,9],x1" -> gpu003. Containers lack scontrol, which would say it too.
_launch_first_host() {
  local list=$1 host="" pattern='^([^][,]*)\[([^],-]*)[^]]*\](.*)$'
  while [[ $list =~ $pattern ]]; do
    host+=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
    list=${BASH_REMATCH[3]}
  done
  printf '%s%s' "$host" "${list%%,*}"
}

# Sets nodes, node_rank, master, port, processes (may stay empty) and tasks_per_node from the job step's variables.
_launch_read_slurm() {
  nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
  node_rank=${SLURM_NODEID:-0}
  master=${MASTER_ADDR:-$(_launch_first_host "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-localhost}}")}
  port=${MASTER_PORT:-$((15000 + (${SLURM_JOB_ID:-0} + ${SLURM_STEP_ID:-0}) % 15000))}  # below the ephemeral ones
  local tasks=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-$nodes}} gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
  if [ "$tasks" -lt "$nodes" ] || [ $((tasks % nodes)) != 0 ]; then
    _launch_fail "srun starts $tasks tasks on $nodes nodes: ask for the same number on each, --ntasks-per-node 1"
  fi
  tasks_per_node=$((tasks / nodes))
  if [ "$tasks_per_node" != 1 ]; then
    if [ "${processes:-$tasks_per_node}" != "$tasks_per_node" ]; then
      _launch_fail "$processes processes a node (GPUS or NPROC), but srun starts $tasks_per_node tasks:" \
        "unset it, or srun --ntasks-per-node 1"
    fi
    if [ "${MAX_RESTARTS:-0}" != 0 ]; then
      _launch_fail "MAX_RESTARTS=$MAX_RESTARTS needs torchrun, thus one task per node: srun --ntasks-per-node 1"
    fi
  elif [ -z "$processes" ]; then
    processes=${gpus##*:}  # "h100:4" -> 4
    [[ $processes =~ ^[1-9][0-9]*$ ]] || processes=""  # a list of types: what is visible counts
  fi
}

# Sets the same from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
_launch_read_variables() {
  nodes=${NNODES:-1}
  node_rank=${NODE_RANK:-}
  master=${MASTER_ADDR:-}
  port=${MASTER_PORT:-29500}
  tasks_per_node=1
  if [ "$nodes" = 1 ]; then return 0; fi
  [ -n "$master" ] || _launch_fail "NNODES=$nodes needs MASTER_ADDR: the name or address of machine 0"
  [ -n "$node_rank" ] || _launch_fail "NNODES=$nodes needs NODE_RANK: this machine's number, 0 to $((nodes - 1))"
  [ "$node_rank" -lt "$nodes" ] || _launch_fail "NODE_RANK=$node_rank must be below NNODES=$nodes: ranks start at 0"
}

_launch_visible_gpus() { "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'; }

# Sets processes where nothing said it, and refuses more than there are GPUs; a single one may always run on a CPU.
_launch_check_gpus() {
  local visible
  if [ -z "$processes" ]; then
    visible=$(_launch_visible_gpus) || exit
    processes=$((visible > 1 ? visible : 1))
  elif [ "${GPUS:-1}" -gt 1 ]; then
    visible=$(_launch_visible_gpus) || exit
    if [ "$GPUS" -gt "$visible" ]; then
      _launch_fail "GPUS=$GPUS, but $visible are visible (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-not set});" \
        "NPROC=$GPUS starts processes on the CPU"
    fi
  fi
}

# One process per task: what torchrun would tell each.
_launch_export_ranks() {
  export RANK=$SLURM_PROCID WORLD_SIZE=$((nodes * tasks_per_node)) MASTER_ADDR=$master MASTER_PORT=$port
  export LOCAL_RANK=${SLURM_LOCALID:-0} LOCAL_WORLD_SIZE=$tasks_per_node
  if [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[^,]+$ ]]; then export LOCAL_RANK=0; fi  # srun --gpus-per-task=1: one seen each
}

launch() {
  local script=("$1") config=$2 name processes nodes node_rank master port tasks_per_node
  [[ $1 == *.py ]] || script=(-m "$1")
  shift 2
  case " $* " in
    *" --config "* | *" --config="*) ;;
    *) set -- --config "$config" "$@" ;;
  esac
  for name in GPUS NPROC NNODES; do _launch_number "$name" 1 100000; done
  for name in NODE_RANK MAX_RESTARTS; do _launch_number "$name" 0 100000; done
  _launch_number MASTER_PORT 1 65535
  processes=${GPUS:-${NPROC:-}}
  if [ -n "${SLURM_STEP_ID:-}" ] && [ -z "${NNODES:-}" ]; then
    _launch_read_slurm
  elif [ "${SLURM_NNODES:-1}" != 1 ] && [ -z "${NNODES:-}" ]; then
    _launch_fail "this allocation has $SLURM_NNODES nodes: start with srun, as scripts/slurm_train.sbatch does," \
      "or NNODES=1 for this node alone"
  else
    _launch_read_variables
  fi
  if [ "$tasks_per_node" != 1 ]; then
    _launch_export_ranks
    exec "$PYTHON" "${script[@]}" "$@"
  fi
  _launch_check_gpus
  local restarts=${MAX_RESTARTS:-0} meeting
  if [ "$nodes" = 1 ]; then
    if [ "$processes" = 1 ] && [ "$restarts" = 0 ]; then
      exec "$PYTHON" "${script[@]}" "$@"  # signals and the exit code are the script's own
    fi
    meeting=(--standalone)
  elif [ -n "${SLURM_STEP_ID:-}" ] || [ "$restarts" != 0 ]; then  # all machines start again together only with c10d
    meeting=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_endpoint "$master:$port" --rdzv_id "${SLURM_JOB_ID:-argrpo}"
      --rdzv_conf "is_host=$([ "$node_rank" = 0 ] && echo true || echo false)")
  else  # c10d would number the machines itself
    meeting=(--nnodes "$nodes" --node_rank "$node_rank" --master_addr "$master" --master_port "$port")
  fi
  # Keys of the first attempt would stay in a store that torchrun shares with the processes (torch 2.14, gloo).
  [ "$restarts" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  exec "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/run_workers.py" "${meeting[@]}" --nproc_per_node "$processes" \
    --max_restarts "$restarts" "${script[@]}" "$@"
}
