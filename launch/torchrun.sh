#!/usr/bin/env bash
# Run swinmoe on several machines, or restart it by itself after a failure. Call it on every machine with the same arguments.
#
#   launch/torchrun.sh --nodes N --head HOST:PORT [--per-node P] [--max-restarts R] [--address A] [--job ID] [--]
#                      COMMAND [ARGUMENT ...]
#   launch/torchrun.sh --nodes 2 --head node0:29500 train configs/train/swin_moe_s_192_w12_e8.yaml resume=auto
#
#   --nodes N       machines
#   --head H:P      one of them, reachable from all, and a port free there: where they meet
#   --per-node P    processes on this machine; default: one per GPU ("gpu"); a number on the CPU
#   --max-restarts R  after a failure start all processes again, at most R times (default 0); needs resume=auto
#   --address A     this machine's address towards the others, where its host name does not lead to it; the one argument
#                   that differs between machines
#   --job ID        tells jobs apart that meet at the same address (default: swinmoe)
#
# The machines find each other by torch's c10d rendezvous: there is no node rank to set, in any order of starting.
#
# Told to stop (SIGTERM, SIGUSR1) it passes that on, and training saves a checkpoint. A process that has not ended
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds after it was told to is killed: 120 by default here, so that a save is not cut off;
# a rank that hangs holds up the end of a failed job for as long. Before torch 2.12 torchrun does not read that variable
# and waits 30 seconds.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nodes="" head="" per_node="gpu" restarts=0 address="" job="swinmoe"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() { echo "launch/torchrun.sh: $*" >&2; exit 2; }

while [[ $# -gt 0 ]]; do
  case "$1" in
    --nodes | --head | --per-node | --max-restarts | --address | --job)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      case "$1" in
        --nodes) nodes="$2" ;;
        --head) head="$2" ;;
        --per-node) per_node="$2" ;;
        --max-restarts) restarts="$2" ;;
        --address) address="$2" ;;
        --job) job="$2" ;;
      esac
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) fail "unknown option $1; see --help" ;;
    *) break ;;
  esac
done
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--nodes needs the number of machines, for example --nodes 2"
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "--max-restarts $restarts is not a number"
[[ "$head" == *:* ]] || fail "--head needs HOST:PORT, the same on every machine, for example --head node0:29500"
[[ $# -gt 0 ]] || fail "no command given; for example: train CONFIG"

if [[ -z "${PYTHON:-}" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then PYTHON="$root/.venv/bin/python"; else PYTHON="$(command -v python3)"; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# One thread per process unless told otherwise, without torchrun's warning that it chose so.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A process that is saving needs time; one that is stopped or hangs in a driver does not hear the signal to end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# torchrun's own list and SIGUSR1, Slurm's usual early warning, which would end the agent and leave its workers behind. Given
# as a variable, since versions of torch without the option would refuse it.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

# Each start meets at a store of its own: one that outlives a restart still holds the addresses of processes that are gone,
# and the first to come back would call those.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

where=()
if [[ -n "$address" ]]; then
  # The head is whoever has its address: torch would compare host names, which say nothing here.
  is_head=false
  if [[ "${head%:*}" == "$address" ]]; then is_head=true; fi
  where=(--local-addr "$address" --rdzv-conf "is_host=$is_head")
fi

exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "$per_node" --max-restarts "$restarts" \
  --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$job" ${where[@]+"${where[@]}"} \
  --module swinmoe.cli "$@"
