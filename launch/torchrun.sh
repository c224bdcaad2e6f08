#!/usr/bin/env bash
# torchrun, for clusters whose tools expect it and for restarts: after a failure every rank starts again, up to RESTARTS
# times, and `distill` continues from its last good checkpoint. Wrong input (status 2) is not tried again.
#   launch/torchrun.sh distill run.yaml
#   on each of two machines:  NODES=2 RENDEZVOUS=node-0:29400 launch/torchrun.sh distill run.yaml
# PROCESSES per machine. Under Kubernetes' PyTorchJob the PET_* variables say the same.
# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=${NODES:-${PET_NNODES:-1}}
if [ "$nodes" = 1 ]; then
  where=(--standalone)
  LEAD_DS_WATCH_PORT=${LEAD_DS_WATCH_PORT:-$(free_port)}
else
  endpoint=${RENDEZVOUS:-${PET_RDZV_ENDPOINT:-${MASTER_ADDR:-}:${MASTER_PORT:-29400}}}
  if [ "${endpoint#:}" != "$endpoint" ]; then
    echo "error: RENDEZVOUS: is not set (RENDEZVOUS=first-machine:29400 NODES=$nodes $0 ...)" >&2
    exit 2
  fi
  where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${JOB:-lead-ds}")
  LEAD_DS_WATCH_PORT=${LEAD_DS_WATCH_PORT:-29501}
  # torchrun starts no rank before all machines have met, and waits for ten minutes without a word.
  set -m
  (
    sleep "${LEAD_DS_WAIT:-8}"
    if ! compgen -G "$LEAD_DS_LOGS/rank-*.log" >/dev/null; then
      echo "launch: still waiting for all of $nodes machines to meet at $endpoint: is this started on each of them, with the" \
        "same RENDEZVOUS, NODES and JOB, and can each reach that address?" >&2
    fi
  ) &
  told=$!
  set +m
  trap 'kill -- "-$told" 2>/dev/null || true' EXIT
fi
export LEAD_DS_WATCH_PORT
# A store of its own for every attempt: in the agent's, a restarted rank can find the dead attempt's addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

run "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "${PET_NPROC_PER_NODE:-$processes}" \
  --max-restarts "${RESTARTS:-3}" "$launch_folder/rank.py" "$@"
