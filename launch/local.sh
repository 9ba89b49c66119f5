#!/usr/bin/env bash
# Run swinmoe with several processes on this machine.
#
#   launch/local.sh [--processes N] [--cpu] [--max-restarts R] [--] COMMAND [ARGUMENT ...]
#   launch/local.sh --processes 2 train configs/debug/digits_sparse_v1.yaml parallel.ep_size=2
#
#   --processes N   how many processes; default: one per GPU, or 1 without a GPU
#   --cpu           stay on the CPU (gloo) although there are GPUs
#   --max-restarts R  when a process dies or fails unforeseen start all of them again, at most R times (default 0); needs
#                   resume=auto. What the user has to mend (status 2), an interrupt, and a stop with all saved (status 75)
#                   end the job.
#
# The exit status is that of the process that failed first, or 0. Set PYTHON to choose an interpreter, OMP_NUM_THREADS for
# threads per process (default: this machine's cores, shared out), MASTER_PORT for a fixed port (default: a free one).
#
# Told to stop (SIGTERM, SIGUSR1) it passes that on and waits for the checkpoint. Once a rank has ended so, the others have
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (default here: 120) to end too; after a failure, which nothing is saved after, 10.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
processes="" restarts=0 grace="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() { echo "launch/local.sh: $*" >&2; exit 2; }

while [[ $# -gt 0 ]]; do
  case "$1" in
    --processes) [[ $# -ge 2 ]] || fail "--processes needs a number"; processes="$2"; shift 2 ;;
    --processes=*) processes="${1#*=}"; shift ;;
    --max-restarts) [[ $# -ge 2 ]] || fail "--max-restarts needs a number"; restarts="$2"; shift 2 ;;
    --max-restarts=*) restarts="${1#*=}"; shift ;;
    --cpu) export ACCELERATE_USE_CPU=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) fail "unknown option $1; use --processes N, --cpu or --max-restarts R, then a swinmoe command" ;;
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
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "--max-restarts $restarts is not a number"
[[ "$grace" =~ ^[0-9]+$ ]] || fail "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace is not a number of seconds"

if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores="$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 1)"
  threads=$((cores / processes))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

if [[ "$processes" -eq 1 && "$restarts" -eq 0 ]]; then exec "$PYTHON" -m swinmoe.cli "$@"; fi

# Named as torchrun names them: a run under a launcher that restarts it must resume, whichever that is.
export TORCHELASTIC_MAX_RESTARTS="$restarts"
free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

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
await_children() { # at most $1 tenths of a second; false if some are left then
  for ((tenth = 0; tenth < $1; tenth++)); do
    any_alive || return 0
    sleep 0.1 || true # a signal to all of the process group ends it
  done
  return 1
}
end_children() {
  stop_children TERM
  stop_children CONT # a stopped process hears nothing else
  await_children 100 || stop_children KILL
}
trap 'end_children; exit 130' INT
# Whoever asks the job to stop gets a checkpoint and status 75: the ranks settle on a step, save and end by themselves. A
# scheduler that loses patience kills.
stopping=""
trap 'stopping=yes; stop_children TERM' TERM
trap 'stopping=yes; stop_children USR1' USR1
trap 'end_children; exit 129' HUP

start_children() {
  children=()
  if [[ "$processes" -gt 1 ]]; then
    port="${MASTER_PORT:-$(free_port)}"
    for ((rank = 0; rank < processes; rank++)); do
      MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" WORLD_SIZE="$processes" LOCAL_WORLD_SIZE="$processes" \
        RANK="$rank" LOCAL_RANK="$rank" "$PYTHON" -m swinmoe.cli "$@" &
      children+=("$!")
    done
  else
    "$PYTHON" -m swinmoe.cli "$@" &
    children+=("$!")
  fi
}

# Waits until all have ended well, or one has failed; its exit status is then in `code`. The first to fail ends the
# rest: they would wait for it until their timeout. Before that they get time to end by themselves and to say why: a
# rank that fails settles with the others, within seconds, which of them speaks, and has done so when it exits; one that
# was killed has not.
watch_children() {
  waiting=("${children[@]}")
  code=0
  while [[ ${#waiting[@]} -gt 0 ]]; do
    sleep 0.2 || true
    running=()
    for child in "${waiting[@]}"; do
      if kill -0 "$child" 2> /dev/null; then
        running+=("$child")
        continue
      fi
      wait "$child" 2> /dev/null || code=$?
      if [[ "$code" -ne 0 ]]; then
        patience=10
        # It has saved; what the others still write is not cut off.
        if [[ "$code" -eq 75 ]]; then patience=$((10 * grace)); fi
        if [[ "$code" -gt 128 && "$processes" -gt 1 ]]; then
          patience=80
          for rank in "${!children[@]}"; do
            if [[ "${children[rank]}" == "$child" ]]; then
              echo "launch/local.sh: rank $rank was ended by SIG$(kill -l "$code") (exit status $code)" >&2
            fi
          done
        fi
        # Not SIGTERM: it asks for a checkpoint, which takes all ranks.
        await_children "$patience" || stop_children KILL
        wait 2> /dev/null || true
        return
      fi
    done
    waiting=(${running[@]+"${running[@]}"})
  done
}

for ((restart = 0; ; restart++)); do
  export TORCHELASTIC_RESTART_COUNT="$restart"
  start_children "$@"
  watch_children
  case "$code" in 0 | 2 | 75 | 130) exit "$code" ;; esac
  if [[ -n "$stopping" || "$restart" -ge "$restarts" ]]; then exit "$code"; fi
  echo "launch/local.sh: failed with exit status $code; starting again (restart $((restart + 1)) of $restarts)" >&2
done
