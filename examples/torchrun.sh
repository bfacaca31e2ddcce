#!/bin/bash
# Serves one model from two nodes with eight GPUs each. Start it on both, HEAD being node 0 as the other one reaches it:
#
#   examples/torchrun.sh MODEL HEAD 0     on HEAD
#   examples/torchrun.sh MODEL HEAD 1     on the other node
#
# It works when curl -f http://HEAD:8000/ready answers 200. Ranks meet at port 29501 of HEAD, one above torchrun's own.
set -euo pipefail

model=${1:?usage: $0 MODEL HEAD NODE}
head=${2:?usage: $0 MODEL HEAD NODE}
node=${3:?usage: $0 MODEL HEAD NODE}

# One process per node, which starts eight ranks: torchrun ends all of its processes when one of them ends, and a lost
# rank must not take the others with it.
# --host: requests come from other machines, so set MOEYARD_API_KEY.
exec torchrun --nnodes 2 --node-rank "$node" --nproc-per-node 1 --master-addr "$head" --master-port 29500 --no-python \
    moeyard serve "$model" --ep 16 --host 0.0.0.0
