#!/bin/bash
# Two network namespaces as two hosts: torchrun quantizes across them, and the result is compared with one process's.
#
#   benchmarks/two_hosts.sh FLOAT_DIR WORK_DIR [options of eightfold quantize]
#
# Needs root and `ip` (iproute2). Both hosts see the same files, as they do with a shared directory.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6s/^# \?//p' "$0"; exit 2; }
[ "$(id -u)" = 0 ] || { echo "skipped: network namespaces need root"; exit 0; }
command -v ip > /dev/null || { echo "skipped: there is no ip command"; exit 0; }
source=$1 work=$2; shift 2
python=${PYTHON:-python} port=29471 first=eightfold-a-$$ second=eightfold-b-$$
export OMP_NUM_THREADS=1

clean() { ip netns del "$first" 2> /dev/null || true; ip netns del "$second" 2> /dev/null || true; }
trap clean EXIT
ip netns add "$first"; ip netns add "$second"
ip link add name ef0 netns "$first" type veth peer name ef0 netns "$second"
host=0
for space in "$first" "$second"; do
    host=$((host + 1))
    ip -n "$space" address add "10.203.0.$host/24" dev ef0
    ip -n "$space" link set lo up
    ip -n "$space" link set ef0 up
done

node() {  # rank, options
    local space=$first rank=$1; shift
    [ "$rank" = 0 ] || space=$second
    ip netns exec "$space" "$python" -m torch.distributed.run --nnodes 2 --node_rank "$rank" --nproc_per_node 1 \
        --master_addr 10.203.0.1 --master_port $port -m eightfold quantize "$@"
}

rm -rf "$work/one" "$work/two"
"$python" -m eightfold quantize "$source" "$work/one" "$@"
node 1 "$source" "$work/two" "$@" & other=$!
node 0 "$source" "$work/two" "$@"
wait $other
diff -r "$work/one" "$work/two" && echo "two hosts: the same bytes as one process"

# The second host's processes are killed: the first must end by itself, and soon.
rm -rf "$work/two"
node 1 "$source" "$work/two" "$@" 2> /dev/null & other=$!
(
    until grep -q '"layer 0"' "$work/.two.partial/eightfold_journal.jsonl" 2> /dev/null; do sleep 0.1; done
    date +%s.%N > "$work/killed"
    ip netns pids "$second" | xargs kill -9
) & killer=$!
node 0 "$source" "$work/two" "$@" 2> "$work/log" && { echo "it ended before the others were killed; use more samples"; kill $killer; exit 1; }
echo "killed: ended after $(echo "$(date +%s.%N) - $(cat "$work/killed")" | bc) s (the launcher included)"
grep '^eightfold:' "$work/log"
wait $other || true
"$python" -m eightfold quantize "$source" "$work/two" "$@"
diff -r "$work/one" "$work/two" && echo "gone on by one process: the same bytes"
