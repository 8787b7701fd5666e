#!/usr/bin/env bash
# Start Ray on one machine of your own, in the environment that has softseg (the same versions on every machine):
#
#   cluster/onprem/start-node.sh head ADDRESS        on the first; ADDRESS is its own in the private network; no CPUs for work
#   cluster/onprem/start-node.sh worker ADDRESS      on the others, and on the first too if it shall work
#
# All need the same token: make it once with `ray get-auth-token --generate`, copy ~/.ray/auth_token (mode 600) to each.
# Stop a machine with `ray stop`.
set -euo pipefail

role=${1:-} address=${2:-}
if [[ $# -ne 2 || ($role != head && $role != worker) ]]; then
    echo "usage: $0 head|worker ADDRESS_OF_THE_HEAD" >&2
    exit 2
fi
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
export RAY_USAGE_STATS_ENABLED=0 MALLOC_ARENA_MAX=1 OMP_NUM_THREADS=1
if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    echo "error: no token at $RAY_AUTH_TOKEN_PATH; make it with: ray get-auth-token --generate" >&2
    exit 2
fi
# The name of this machine may mean 127.0.1.1 on it (Debian's /etc/hosts), where no other machine reaches it.
known=$(getent ahosts "$address" | awk 'NR == 1 { print $1 }') || true
if [[ -z $known || $known == 127.* || $known == ::1 ]]; then
    echo "error: ADDRESS must be one that the other machines reach, $address is ${known:-unknown} here; \`hostname -I\` shows some" >&2
    exit 2
fi
ulimit -n 65536 2> /dev/null || true

if [[ $role == head ]]; then
    # The dashboard listens on this machine only; reach it with: ssh -L 8265:127.0.0.1:8265 ADDRESS
    ray start --head --node-ip-address "$known" --port 6379 --num-cpus 0 --num-gpus 0 --dashboard-host 127.0.0.1 \
        --disable-usage-stats
else
    ray start --address "$known:6379"
fi
