#!/usr/bin/env bash
# Several machines without ssh between them: the same command on each, told which one it is.
#   on the first:   NODES=2 NODE_RANK=0 MASTER_ADDR=node-0 launch/no_ssh.sh distill run.yaml
#   on the second:  NODES=2 NODE_RANK=1 MASTER_ADDR=node-0 launch/no_ssh.sh distill run.yaml
# PROCESSES per machine (all its GPUs), the same on all. MASTER_PORT (29500) and the port after it must be reachable.
# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for name in NODES NODE_RANK MASTER_ADDR; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name: is not set (NODES=2 NODE_RANK=0 MASTER_ADDR=first-machine $0 ...)" >&2
    exit 2
  fi
done
port=${MASTER_PORT:-29500}
export LEAD_DS_WATCH_PORT=${LEAD_DS_WATCH_PORT:-$((port + 1))}

# Only the number of lines and slots matters here: nothing connects to these names.
hostfile=$LEAD_DS_LOGS/hostfile-$NODE_RANK
for ((node = 0; node < NODES; node++)); do echo "node-$node slots=$processes"; done >"$hostfile"

run "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" \
  --master_addr "$MASTER_ADDR" --master_port "$port" --log_level error "$launch_folder/rank.py" "$@"
