# shellcheck shell=bash disable=SC2034
# Sourced by gpu_suite.sh and gpus_suite.sh, which set `out`, and `deadline` if the whole has one: a part and its time, what is
# missing, where we are.
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DS_SKIP_CUDA_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
failed=0
# Modules, and the packages that they come in where those have another name; hjson and what follows are DeepSpeed's own.
training=(deepspeed pydantic transformers sentence_transformers accelerate tokenizers safetensors yaml rich matplotlib)
training+=(hjson einops msgpack psutil cpuinfo ninja)

part() { # seconds name command...: run it within its time and the whole's, say in one line what it found
  local seconds=$1 name=$2 status=0 told left
  shift 2
  left=$((${deadline:-SECONDS + seconds} - SECONDS))
  if [ "$left" -lt 5 ]; then
    echo "$name: not begun, the time of the whole is over"
    failed=1
    return
  fi
  [ "$seconds" -le "$left" ] || seconds=$left
  local start=$SECONDS
  timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  told=$(grep '^found: ' "$out/$name.log" | sed 's/^found: //' | paste -s -d '|' | sed 's/|/ | /g')
  case $status in
    0) echo "$name ($((SECONDS - start)) s): ${told:-done}" ;;
    124 | 137) echo "$name: cut off after $seconds s, see $out/$name.log; so far: ${told:-$(grep -v '^ *$' "$out/$name.log" | tail -n 1)}" ;;
    *) echo "$name: failed with status $status: ${told:-$(grep -v '^ *$' "$out/$name.log" | tail -n 1)}" ;;
  esac
  [ "$status" = 0 ] || failed=1
}

has() { # modules...: name those that are missing
  local missing
  missing=$("$python" -c "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))" "$@")
  if [ -n "$missing" ]; then
    echo "missing for this part: $missing (pip install $missing; names with _ are written with -; yaml is pyyaml, cpuinfo is py-cpuinfo)"
    failed=1
    return 1
  fi
}

sees_gpus() { # number: whether torch sees so many
  if ! "$python" -c "import torch, sys; sys.exit(torch.cuda.device_count() < $1)"; then
    echo "error: $python sees fewer than $1 CUDA device(s) (is this torch a CUDA build, and is there a GPU?)" >&2
    return 1
  fi
}

machine() { # what the numbers were measured on
  nvidia-smi || echo "no nvidia-smi"
  [ "${1:-}" != several ] || nvidia-smi topo -m
  "$python" --version
  "$python" -m pip list 2>/dev/null | grep -iE "^(torch|triton|deepspeed|transformers|flash.*|pydantic|nvidia-nccl.*) "
}
