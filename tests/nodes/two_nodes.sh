#!/usr/bin/env bash
# Two network namespaces as two machines, each with its own loopback and one end of a cable (a veth pair), and on each
# `torchrun --nnodes 2`. Needs root. The first machine hosts the rendezvous; both wait for each other.
#
#   tests/nodes/two_nodes.sh PYTHON PROCESSES_PER_NODE ARGUMENTS_OF_HEADSTART...
set -euo pipefail
python=$1 processes=$2
shift 2

name=hs$$
clean() {
    # Only what this script made: processes in its own namespaces, these, and with them the cable.
    for node in a b; do
        ip netns pids "$name$node" 2>/dev/null | xargs -r kill -9 || true
        ip netns del "$name$node" 2>/dev/null || true
    done
}
trap clean EXIT
trap 'exit 143' TERM INT

ip netns add "${name}a"
ip netns add "${name}b"
ip link add "${name}x" netns "${name}a" type veth peer name "${name}y" netns "${name}b"
ip -n "${name}a" addr add 10.77.0.1/24 dev "${name}x"
ip -n "${name}b" addr add 10.77.0.2/24 dev "${name}y"
for node in a b; do ip -n "$name$node" link set lo up; done
ip -n "${name}a" link set "${name}x" up
ip -n "${name}b" link set "${name}y" up

# Without is_host, the local address and the interface's name, processes look for each other under the machine's host
# name, which both have, and hang.
node() { # namespace, interface, own address, whether it hosts the rendezvous, arguments
    local namespace=$1 interface=$2 address=$3 host=$4
    shift 4
    ip netns exec "$namespace" env GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface" \
        "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node "$processes" \
        --rdzv-backend c10d --rdzv-id "$name" --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf "is_host=$host" \
        --local-addr "$address" \
        -m headstart "$@"
}

node "${name}a" "${name}x" 10.77.0.1 1 "$@" &
first=$!
node "${name}b" "${name}y" 10.77.0.2 0 "$@" &
second=$!
wait "$first"
wait "$second"
