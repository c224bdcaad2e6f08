#!/usr/bin/env bash
# Several machines, started from one of them over ssh (pdsh), or by another of DeepSpeed's launchers.
#   HOSTFILE=hostfile launch/deepspeed_hostfile.sh distill run.yaml train.steps=10
#   HOSTFILE=hostfile LAUNCHER=openmpi LAUNCHER_ARGS="--mca btl_tcp_if_include ib0" launch/deepspeed_hostfile.sh distill run.yaml
#   HOSTFILE=hostfile DEEPSPEED_ARGS="--include node-0:0,1@node-1" launch/deepspeed_hostfile.sh distill run.yaml
# Needs passwordless ssh, and the same folder and the same virtual environment at the same paths on every machine:
# `lead-ds doctor --hostfile hostfile` looks. MASTER_ADDR, MASTER_PORT (29500) and SSH_PORT may be set.
# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

hostfile=${HOSTFILE:-hostfile}
launcher=${LAUNCHER:-pdsh}
if [ ! -f "$hostfile" ]; then
  echo "error: $hostfile: no such hostfile (copy $launch_folder/hostfile.example, and name it with HOSTFILE=)" >&2
  exit 2
fi
first=$(sed -n 's/^[[:space:]]*\([^#[:space:]][^[:space:]]*\).*/\1/p' "$hostfile" | head -n 1)
master=${MASTER_ADDR:-$first}
port=${MASTER_PORT:-29500}
export LEAD_DS_WATCH_PORT=${LEAD_DS_WATCH_PORT:-$((port + 1))}

# DeepSpeed exports only a few variables by itself (not DS_ACCELERATOR, not HF_HOME); the rest goes through this file. Your
# own .deepspeed_env, here or at home, is added. A blank line or a comment in it would crash the launcher.
DS_ENV_FILE=$LEAD_DS_LOGS/deepspeed_env
export DS_ENV_FILE
{
  environment_lines
  for own in ~/.deepspeed_env .deepspeed_env; do
    if [ -f "$own" ]; then sed -n '/^[[:space:]]*[^#=[:space:]][^=]*=/p' "$own"; fi
  done
  # Open MPI and SLURM tell a rank its number, but not where rank 0 is.
  if [ "$launcher" != pdsh ]; then printf 'MASTER_ADDR=%s\nMASTER_PORT=%s\n' "$master" "$port"; fi
} >"$DS_ENV_FILE"

arguments=("$@")
if [ "$launcher" = pdsh ]; then
  # pdsh hands the command to a shell on every machine: quote what that shell, or pdsh itself (%), would read.
  arguments=()
  for argument in "$@"; do
    argument=${argument//%/%%}
    if [[ $argument == *" "* ]]; then # DeepSpeed puts these into double quotes, and escapes only those
      for special in \\ \$ \`; do argument=${argument//"$special"/\\"$special"}; done
    elif [[ ! $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      argument="'${argument//\'/\'\\\'\'}'"
    fi
    arguments+=("$argument")
  done
fi

read -ra more <<<"${DEEPSPEED_ARGS:-}"
if [ -n "${SSH_PORT:-}" ]; then more+=(--ssh_port "$SSH_PORT"); fi
# Multi-node even for one host: the quoting above is for it.
run "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher "$launcher" --force_multi \
  --launcher_args="${LAUNCHER_ARGS:-}" --master_addr "$master" --master_port "$port" --log_level error \
  ${more[@]+"${more[@]}"} "$launch_folder/rank.py" "${arguments[@]}"
