#!/usr/bin/env bash
# Every GPU of this machine, or PROCESSES of them; on a machine without any, PROCESSES processes on the CPU.
#   launch/local.sh distill run.yaml train.steps=10
#   PROCESSES=2 launch/local.sh distill run.yaml
#   CUDA_VISIBLE_DEVICES=0,3 launch/local.sh distill run.yaml
# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

port=${MASTER_PORT:-$(free_port)}
LEAD_DS_WATCH_PORT=${LEAD_DS_WATCH_PORT:-$(free_port)}
export LEAD_DS_WATCH_PORT

if [ "$gpus" = 0 ]; then
  count=(--num_accelerators "$processes")
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ -z "${PROCESSES:-}" ]; then
  count=() # DeepSpeed takes the devices named there, but only where no number is given
else
  count=(--num_gpus "$processes")
fi

# A hostfile that is none: DeepSpeed would take /job/hostfile, where there is one, and leave this machine.
run "$python" -m deepspeed.launcher.runner --hostfile /dev/null "${count[@]}" --master_port "$port" \
  --log_level error "$launch_folder/rank.py" "$@"
