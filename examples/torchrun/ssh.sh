#!/usr/bin/env bash
# Starts node.sh on several hosts from one terminal, where there is no scheduler:
#
#   bash examples/torchrun/ssh.sh node0,node1 RECIPE [section.key=value ...]
#
# The first host keeps the rendezvous, on PORT (29400). On every host the checkout lies at the same path, ssh needs no password,
# and run.path is one shared folder. Each host's lines start with its name. Ctrl-C (or SIGTERM) reaches every host: the
# ranks finish their step, save and end. Settings of node.sh named in FORWARD ("PYTHON NPROC MAX_RESTARTS ...") are passed on.
set -euo pipefail

if (($# < 2)); then
  echo "usage: bash examples/torchrun/ssh.sh HOST,HOST[,...] RECIPE [section.key=value ...]" >&2
  exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export NNODES="${#hosts[@]}" HEAD="${hosts[0]}:${PORT:-29400}"
settings=()
for name in NNODES HEAD ${FORWARD:-JOB_ID NPROC MAX_RESTARTS SAVE_SECONDS RDZV_CONF PYTHON OMP_NUM_THREADS NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME}; do
  [[ -n "${!name:-}" ]] && settings+=("$name=${!name}")
done
# The shell on the other side writes its number first, so that a request to stop can be sent to what it became.
command="echo mtp-pid \$\$; cd $(printf %q "$checkout") && exec env $(printf '%q ' "${settings[@]}" bash examples/torchrun/node.sh "$@")"

scratch="$(mktemp -d)"
# shellcheck disable=SC2329 # trap calls it
stop() {
  for host in "${hosts[@]}"; do
    pid="$(cat "$scratch/$host.pid" 2>/dev/null || true)"
    # shellcheck disable=SC2029 # the number is known here
    [[ -n "$pid" ]] && ssh "$host" "kill -TERM $pid" </dev/null || true
  done
}
trap stop INT TERM
trap 'rm -rf "$scratch"' EXIT

jobs=()
for host in "${hosts[@]}"; do
  # A session of its own keeps Ctrl-C from ending ssh before the ranks have saved.
  setsid ssh "$host" "$command" </dev/null > >(
    while IFS= read -r line; do
      if [[ "$line" == "mtp-pid "* ]]; then echo "${line#mtp-pid }" >"$scratch/$host.pid"; else echo "$host: $line"; fi
    done
  ) 2>&1 &
  jobs+=($!)
done

status=0
for job in "${jobs[@]}"; do
  while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done # a trapped signal ends wait early
  wait "$job" || status=$?
done
exit "$status"
