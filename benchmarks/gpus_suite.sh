#!/usr/bin/env bash
# What 2 to 8 GPUs of one machine have to say, in under fifteen minutes; everything into OUT.
#
#     benchmarks/gpus_suite.sh OUT [GPUS]             # default: all that there are
#     benchmarks/gpus_suite.sh OUT 2 --dry-run        # the same parts in small, on a CPU over gloo
#
# Resume on another number of GPUs; ZeRO-3's gathers beside hpZ's and a replica, with the communication that nothing hides;
# queries a second on 1, 2, 4 and 8. Parts, results and PYTHON are as in gpu_suite.sh.
set -u
if [ $# -lt 1 ] || [ $# -gt 3 ] || { [ $# = 3 ] && [ "$3" != --dry-run ]; }; then
  echo "usage: $0 OUT [GPUS [--dry-run]]" >&2
  exit 2
fi
. "$(dirname "$0")/suite.sh"
cd "$(dirname "$0")/.."
out=$1 dry=${3:-}
gpus=${2:-$("$python" -c "import torch; print(torch.cuda.device_count())")}
case $gpus in [2-8]) ;; *) echo "error: $gpus GPUs: this is for 2 to 8 of one machine" >&2 && exit 2 ;; esac
mkdir -p "$out"
machine several >"$out/machine.txt" 2>&1
if [ -z "$dry" ] && ! sees_gpus "$gpus"; then exit 1; fi
has "${training[@]}" || exit 1

train() { # seconds, name, processes, preset, arguments...: throughput of a preset on so many GPUs
  local seconds=$1 name=$2 count=$3 preset=$4
  shift 4
  if [ -n "$dry" ]; then
    seconds=900 preset=tiny
    set -- --steps 1 --warmup 1 --rounds 1 "$@"
  fi
  part "$seconds" "$name" "$python" -m torch.distributed.run --standalone --nproc_per_node "$count" \
    -m benchmarks.throughput --preset "$preset" --out "$out/$name.json" "$@"
}

part $([ -n "$dry" ] && echo 900 || echo 180) resume \
  "$python" -m benchmarks.resume --processes "$gpus" --out "$out/resume.json"
train 240 gathers "$gpus" 7b --providers lead-ds,bare teacher.placement=zero3 \
  --compare deepspeed.teacher=ds_configs/teacher_zero3_hpz.json --compare teacher.placement=replicate
for count in 1 2 4 8; do
  [ "$count" -gt "$gpus" ] || train 90 "scaling-$count" "$count" bert --providers lead-ds
done
exit $failed
