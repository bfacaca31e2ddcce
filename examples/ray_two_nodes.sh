#!/bin/bash
# Serves one model from two nodes with eight GPUs each, on a Ray cluster that lives as long as the server. Start the
# same line on both within 30 seconds, HEAD being one node's address as the other one reaches it (not 127.0.0.1):
#
#   examples/ray_two_nodes.sh MODEL HEAD
#
# It works when curl -f http://HEAD:8000/ready answers 200; `ray status` on HEAD shows 16 GPUs in use.
# RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 gives the nodes more time to find each other.
set -euo pipefail

model=${1:?usage: $0 MODEL HEAD}
head=${2:?usage: $0 MODEL HEAD}

# Ray runs the command behind -- on HEAD only, and --launcher ray places one rank on each GPU of the cluster. No other
# Ray may run on these nodes: the command ends with `ray stop`.
# --host: requests come from other machines, so set MOEYARD_API_KEY.
exec ray symmetric-run --address "$head:6379" --min-nodes 2 --num-gpus 8 -- \
    moeyard serve "$model" --ep 16 --launcher ray --host 0.0.0.0
