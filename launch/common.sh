# shellcheck shell=bash
# Sourced by the launchers beside it: the interpreter, the processes, the environment, and an end in which nothing is left.
set -euo pipefail

launch_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
here=$launch_folder/../.venv/bin/python
[ -x "$here" ] || here=$(command -v python3 || command -v python)
python=${PYTHON:-$here}

# How many processes on this machine: PROCESSES, else one per NVIDIA GPU, else one on the CPU.
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true); fi
if [ "$gpus" = 0 ]; then
  # DeepSpeed finds the CPU by itself, with a warning; the same word for every rank is clearer.
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
# Without this every process starts as many threads as there are cores.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}

own_logs=
if [ -z "${LEAD_DS_LOGS:-}" ]; then
  LEAD_DS_LOGS=$(mktemp -d "${TMPDIR:-/tmp}/lead-ds-launch.XXXXXX")
  own_logs=yes
fi
export LEAD_DS_LOGS

# Run a launcher in a process group of its own, end the whole group with us, return the failing rank's status.
run() {
  local job status=0
  set -m
  "$@" </dev/null &
  job=$!
  set +m
  trap 'kill -TERM -- "-$job" 2>/dev/null || true' INT TERM HUP
  wait "$job" || status=$?
  while kill -0 "$job" 2>/dev/null; do
    status=0
    wait "$job" || status=$?
  done
  while kill -0 -- "-$job" 2>/dev/null; do sleep 0.2; done
  if [ "$status" != 0 ] && [ -s "$LEAD_DS_LOGS/failed.json" ]; then
    # torchrun always returns 1, and DeepSpeed that of whichever rank it looked at first.
    status=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$LEAD_DS_LOGS/failed.json")
  fi
  if [ "$status" != 0 ]; then
    echo "launch: ended with status $status; what every rank of this machine said: $LEAD_DS_LOGS" >&2
    if [ "$status" = 255 ] && [ "${launcher:-}" = pdsh ]; then
      echo "launch: 255 is ssh's: it lost a host, or never reached it. Ranks may have gone on; then try --resume" >&2
    fi
  elif [ -n "$own_logs" ]; then
    rm -rf -- "$LEAD_DS_LOGS"
  fi
  return "$status"
}

# A TCP port that is free on this machine now.
free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# NAME=VALUE lines of what ranks on other machines need to know. No secrets: they would show in the machines' process lists.
environment_lines() {
  local name value
  for name in $(compgen -e); do
    case $name in
      *_TOKEN | *SECRET* | *PASSWORD* | *_KEY | DS_ENV_FILE) continue ;;
      NCCL_* | TORCH_* | GLOO_* | DS_* | HF_* | FI_* | UCX_* | OMP_* | LEAD_DS_* | TRITON_* | CUDA_HOME | CUDA_DEVICE_*) ;;
      # What picks instructions and algorithms decides the bits: two hosts that differ in it give other losses than one.
      ATEN_* | ONEDNN_* | DNNL_* | MKL_* | KMP_* | OPENBLAS_* | CUBLAS_* | CUDNN_* | NVIDIA_TF32_OVERRIDE) ;;
      TRANSFORMERS_* | TOKENIZERS_* | XDG_CACHE_HOME | TMPDIR | LD_LIBRARY_PATH | http_proxy | https_proxy | no_proxy) ;;
      *) continue ;;
    esac
    value=${!name}
    # DeepSpeed puts values into a shell command, in double quotes at most: refuse what a shell would read.
    case $value in
      *[\"\$\`\\]* | *$'\n'*)
        echo "launch: $name is not passed on: its value holds a quote, \$, \` or \\" >&2
        continue
        ;;
    esac
    [ -z "$value" ] || printf '%s=%s\n' "$name" "$value"
  done
}
