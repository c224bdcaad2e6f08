#!/usr/bin/env bash
# Kernels and training throughput on one GPU, in under nine minutes, everything into OUT.
#
#     benchmarks/gpu_suite.sh OUT
#
# Each part has its own time limit and fails alone. PYTHON names the interpreter. Results: OUT/*.json (a JSON object a line),
# OUT/*.log, OUT/machine.txt.
set -u
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$1
mkdir -p "$out"
export DS_SKIP_CUDA_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
failed=0

part() { # seconds name command...: run it within its time, say how it went
  local seconds=$1 name=$2 status=0
  shift 2
  local start=$SECONDS
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) echo "$name: done in $((SECONDS - start)) s" ;;
    124) echo "$name: cut off after $seconds s, see $out/$name.log" ;;
    *) echo "$name: failed with status $status: $(grep -v '^ *$' "$out/$name.log" | tail -n 1)" ;;
  esac
  [ "$status" = 0 ] || failed=1
}

has() { # modules...: name those that are missing
  local missing=""
  for module in "$@"; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" || missing="$missing $module"
  done
  if [ -n "$missing" ]; then
    echo "missing for this part:$missing (pip install$missing)"
    return 1
  fi
}

{
  nvidia-smi || echo "no nvidia-smi"
  "$python" --version
  "$python" -m pip list 2>/dev/null | grep -iE "^(torch|triton|deepspeed|transformers|flash|pydantic) "
} >"$out/machine.txt" 2>&1
if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "error: $python sees no CUDA device (is this torch a CUDA build, and is there a GPU?)" >&2
  exit 1
fi

if has triton; then
  for kernel in maxsim layer_kl attention_kl; do
    part 50 "kernel-$kernel" "$python" -m benchmarks.kernels --kernel $kernel --quick --out "$out/kernel-$kernel.json"
  done
else
  failed=1
fi
if has deepspeed pydantic transformers accelerate tokenizers safetensors yaml rich; then
  part 85 bert "$python" -m benchmarks.throughput --preset bert --out "$out/bert.json" --compare teacher.passes=packed
  part 105 7b "$python" -m benchmarks.throughput --preset 7b --out "$out/7b.json"
  part 105 8b "$python" -m benchmarks.throughput --preset 8b --out "$out/8b.json"
  part 90 reranker "$python" -m benchmarks.throughput --preset reranker --out "$out/reranker.json"
else
  failed=1
fi
exit $failed
