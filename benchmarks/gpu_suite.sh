#!/usr/bin/env bash
# What one GPU has to say, in under eight minutes, what we most need to know first; everything into OUT.
#
#     benchmarks/gpu_suite.sh OUT
#     benchmarks/gpu_suite.sh OUT --dry-run     # the same parts in small, on a CPU: whether the script works
#
# Each part has its own time limit, fails alone and says in one line what it found. PYTHON names the interpreter; packages
# may come by PYTHONPATH. Results: OUT/*.json (a JSON object a line, written as they come), OUT/*.log, OUT/machine.txt.
set -u
if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ $# = 2 ] && [ "$2" != --dry-run ]; }; then
  echo "usage: $0 OUT [--dry-run]" >&2
  exit 2
fi
. "$(dirname "$0")/suite.sh"
cd "$(dirname "$0")/.."
out=$1 dry=${2:-}
mkdir -p "$out"
machine >"$out/machine.txt" 2>&1

train() { # seconds, preset, arguments...: throughput of a preset; dry: of a small one, whatever was asked
  local seconds=$1 preset=$2
  shift 2
  if [ -n "$dry" ]; then
    part 600 "$preset" "$python" -m benchmarks.throughput --preset tiny --providers lead-ds,bare --steps 1 --warmup 1 \
      --rounds 1 --out "$out/$preset.json"
  else
    part "$seconds" "$preset" "$python" -m benchmarks.throughput --preset "$preset" --out "$out/$preset.json" "$@"
  fi
}

limit=60 device=cuda kernel_seconds=25
[ -n "$dry" ] || deadline=470 # seconds since this script began; a part that is cut off has five more to end
if [ -n "$dry" ]; then
  limit=900 device=cpu kernel_seconds=600
elif ! sees_gpus 1; then
  exit 1
fi
if has triton "${training[@]}"; then
  part $limit first "$python" -m benchmarks.first --device $device --out "$out/first.json"
fi
if has triton; then
  for kernel in maxsim layer_kl attention_kl attention_kl_head_mean; do
    part $kernel_seconds "kernel-$kernel" \
      "$python" -m benchmarks.kernels --kernel $kernel --quick --device $device --out "$out/kernel-$kernel.json"
  done
fi
if has "${training[@]}"; then
  train 75 bert --compare teacher.passes=packed
  train 90 7b
  train 75 reranker
  train 80 8b
fi
exit $failed
