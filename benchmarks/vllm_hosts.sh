#!/bin/bash
# Two network namespaces as two hosts: vLLM serves one model on both, without Ray, and answers a prompt.
#
#   benchmarks/vllm_hosts.sh OUT [options of vllm serve, such as --tensor-parallel-size 2]
#
# Needs root, `ip` (iproute2) and vLLM with eightfold. VLLM is how to call it (default: vllm).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \?//p' "$0"; exit 2; }
[ "$(id -u)" = 0 ] || { echo "skipped: network namespaces need root"; exit 0; }
command -v ip > /dev/null || { echo "skipped: there is no ip command"; exit 0; }
model=$1 vllm=${VLLM:-vllm} port=8471 first=vllm-a-$$ second=vllm-b-$$; shift
logs=$(mktemp -d)
export VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 GLOO_SOCKET_IFNAME=ef1

clean() {
    for space in "$first" "$second"; do
        ip netns pids "$space" 2> /dev/null | xargs -r kill 2> /dev/null || true
    done
    sleep 5
    for space in "$first" "$second"; do
        ip netns pids "$space" 2> /dev/null | xargs -r kill -9 2> /dev/null || true
        ip netns del "$space" 2> /dev/null || true
    done
}
trap clean EXIT
ip netns add "$first"; ip netns add "$second"
ip link add name ef1 netns "$first" type veth peer name ef1 netns "$second"
host=0
for space in "$first" "$second"; do
    host=$((host + 1))
    ip -n "$space" address add "10.204.0.$host/24" dev ef1
    ip -n "$space" link set lo up
    ip -n "$space" link set ef1 up
done

node() {  # namespace, rank, options
    local space=$1 rank=$2; shift 2
    VLLM_HOST_IP=10.204.0.$((rank + 1)) ip netns exec "$space" $vllm serve "$model" --nnodes 2 --node-rank "$rank" \
        --master-addr 10.204.0.1 --master-port 29571 --distributed-executor-backend mp \
        --max-model-len 512 --max-num-seqs 2 --enforce-eager --served-model-name model "$@" > "$logs/$rank" 2>&1 &
}

node "$second" 1 --headless "$@"
node "$first" 0 --port $port "$@"
server=$!
until ip netns exec "$first" curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
    kill -0 $server 2> /dev/null || { echo "no server:"; tail -n 25 "$logs/0" "$logs/1"; exit 1; }
    sleep 2
done
ip netns exec "$first" curl -s "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "model", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'
echo
grep -h -i 'SHM\|Selected\|rank [01] in world\|nnodes' "$logs/0" "$logs/1" | cut -c1-200 || true
