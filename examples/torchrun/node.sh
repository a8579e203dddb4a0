#!/usr/bin/env bash
# Starts this node's ranks under torchrun. The same command on every node of the job:
#
#   bash examples/torchrun/node.sh RECIPE [section.key=value ...]                        one node
#   NNODES=2 HEAD=node0:29400 bash examples/torchrun/node.sh RECIPE ...                  each of two nodes
#   NNODES=16 HEAD=node0:29400 JOB_ID=7b bash examples/torchrun/node.sh RECIPE ...       each of sixteen
#
# Environment:
#   NNODES        nodes of the job (1); MIN:MAX lets a job start, and go on, with fewer than MAX
#   HEAD          host:port of the rendezvous, the same text on every node; that host keeps it, so the job ends with it
#   JOB_ID        name of the job at the rendezvous (mtp)
#   NPROC         ranks on this node (gpu: one for each GPU)
#   MAX_RESTARTS  failures of a rank after which this node's ranks are started again, from the last checkpoint (3)
#   SAVE_SECONDS  what the ranks get, after SIGTERM, SIGINT, SIGHUP or SIGUSR1 to torchrun, to finish their step and save (600;
#                 torch 2.11 gives 30)
#   LOCAL_ADDR    address by which other nodes reach this one, where its host name is not it
#   RDZV_CONF     further settings of the rendezvous (torchrun --rdzv-conf)
#   PYTHON        interpreter (python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if (($# == 0)); then
  echo "usage: [NNODES=N HEAD=host:port] bash examples/torchrun/node.sh RECIPE [section.key=value ...]" >&2
  exit 2
fi
nnodes="${NNODES:-1}"
if [[ "$nnodes" != 1 && -z "${HEAD:-}" ]]; then
  echo "error: NNODES=$nnodes needs HEAD=host:port, the same on every node: where the nodes meet" >&2
  exit 2
fi

options=(
  --nnodes "$nnodes"
  --nproc-per-node "${NPROC:-gpu}"
  --rdzv-backend c10d
  --rdzv-endpoint "${HEAD:-localhost:0}"
  --rdzv-id "${JOB_ID:-mtp}"
  --max-restarts "${MAX_RESTARTS:-3}"
)
python="${PYTHON:-python}"
# SIGUSR1: SLURM's --signal without B: sends it to all. Not SIGHUP where nohup has it ignored.
hup=$("$python" -c 'import signal; print("" if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else ",SIGHUP")' 2>/dev/null || true)
options+=(--signals-to-handle "SIGTERM,SIGINT,SIGQUIT,SIGUSR1$hup")
# Read, not imported: torchrun of torch 2.11 has no such option and kills its ranks 30 seconds after a signal.
waits=$("$python" -c 'import importlib.util as u, pathlib; torch = u.find_spec("torch")
print("--shutdown-timeout" in (pathlib.Path(torch.origin).parent / "distributed/run.py").read_text() if torch else None)')
case "$waits" in
  True) options+=(--shutdown-timeout "${SAVE_SECONDS:-600}") ;;
  False) echo "this torch's torchrun gives ranks 30 s to save after a signal, whatever SAVE_SECONDS says; a newer torch waits" >&2 ;;
  *)
    echo "error: PYTHON=$python has no torch; name the interpreter of the environment with mtp_megatron" >&2
    exit 2
    ;;
esac
[[ -n "${LOCAL_ADDR:-}" ]] && options+=(--local-addr "$LOCAL_ADDR")
[[ -n "${RDZV_CONF:-}" ]] && options+=(--rdzv-conf "$RDZV_CONF")

# torch 2.13 keeps one store of the ranks for all rounds of the rendezvous: after a restart ranks may find addresses of the
# round before, and a node that comes back waits for an address that nobody publishes again. This gives each round its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
trap '' USR2 # asks the ranks where they are; torchrun, which may get it with them, would die of it
exec "$python" -m torch.distributed.run "${options[@]}" -m mtp_megatron.train "$@"
