#!/usr/bin/env bash
# Run swinmoe with several processes on this machine.
#
#   launch/local.sh [--processes N] [--cpu] [--] COMMAND [ARGUMENT ...]
#   launch/local.sh --processes 2 train configs/debug/digits_sparse_v1.yaml parallel.ep_size=2
#
#   --processes N   how many processes; default: one per GPU, or 1 without a GPU
#   --cpu           stay on the CPU (gloo) although there are GPUs
#
# The exit status is that of the process that failed first, or 0. Set PYTHON to choose an interpreter, OMP_NUM_THREADS for
# threads per process (default: this machine's cores, shared out), MASTER_PORT for a fixed port (default: a free one).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
processes=""

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() { echo "launch/local.sh: $*" >&2; exit 2; }

while [[ $# -gt 0 ]]; do
  case "$1" in
    --processes) [[ $# -ge 2 ]] || fail "--processes needs a number"; processes="$2"; shift 2 ;;
    --processes=*) processes="${1#*=}"; shift ;;
    --cpu) export ACCELERATE_USE_CPU=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) fail "unknown option $1; use --processes N or --cpu, then a swinmoe command" ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "no command given; for example: launch/local.sh --processes 2 train CONFIG"

if [[ -z "${PYTHON:-}" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then PYTHON="$root/.venv/bin/python"; else PYTHON="$(command -v python3 || command -v python)"; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z "$processes" ]]; then
  processes=1
  if [[ -z "${ACCELERATE_USE_CPU:-}" ]] && command -v nvidia-smi > /dev/null; then
    gpus="$(nvidia-smi --list-gpus 2> /dev/null | wc -l)"
    if [[ "$gpus" -gt 1 ]]; then processes="$gpus"; fi
  fi
fi
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes $processes is not a positive number"

if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores="$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 1)"
  threads=$((cores / processes))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

if [[ "$processes" -eq 1 ]]; then exec "$PYTHON" -m swinmoe.cli "$@"; fi

if [[ -z "${MASTER_PORT:-}" ]]; then
  MASTER_PORT="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
fi
export MASTER_PORT MASTER_ADDR=127.0.0.1 WORLD_SIZE="$processes" LOCAL_WORLD_SIZE="$processes"

# Plain processes and not an agent: the user sees the program's own messages and exit status, no wrapper's traceback.
children=()
stop_children() {
  # Never SIGINT: a shell starts its background processes with that signal ignored.
  for child in "${children[@]}"; do kill -"$1" "$child" 2> /dev/null || true; done
}
any_alive() {
  for child in "${children[@]}"; do if kill -0 "$child" 2> /dev/null; then return 0; fi; done
  return 1
}
end_children() {
  stop_children TERM
  for ((tenth = 0; tenth < 100; tenth++)); do
    any_alive || return 0
    sleep 0.1
  done
  stop_children KILL
}
trap 'end_children; exit 130' INT
trap 'end_children; exit 143' TERM
trap 'end_children; exit 129' HUP

for ((rank = 0; rank < processes; rank++)); do
  RANK="$rank" LOCAL_RANK="$rank" "$PYTHON" -m swinmoe.cli "$@" &
  children+=("$!")
done

# The first to fail ends the rest: they would wait for it until their timeout. Those that fail of the same cause, such
# as a wrong config, get a moment to say so themselves.
waiting=("${children[@]}")
while [[ ${#waiting[@]} -gt 0 ]]; do
  sleep 0.2
  running=()
  for child in "${waiting[@]}"; do
    if kill -0 "$child" 2> /dev/null; then
      running+=("$child")
      continue
    fi
    code=0
    wait "$child" 2> /dev/null || code=$?
    if [[ "$code" -ne 0 ]]; then
      sleep 1
      end_children
      wait 2> /dev/null || true
      exit "$code"
    fi
  done
  waiting=(${running[@]+"${running[@]}"})
done
