#!/bin/bash
# Serves one model from two nodes with eight GPUs each.
#
#   sbatch examples/slurm.sh MODEL
#
# It works when the curl line that the job's log begins with answers 200.
# Put your site's partition and time here:
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --job-name=moeyard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --no-kill
set -euo pipefail

model=${1:?usage: sbatch examples/slurm.sh MODEL}
# sed reads to the end: head would not, and scontrol, cut off, would end the script.
leader=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
echo "when it is ready: curl -f http://$leader:8000/ready"

# One task per node: each finds its eight ranks by SLURM_PROCID, and task 0, on the first node, answers HTTP.
# --no-kill and --kill-on-bad-exit=0: when a node or a task is lost, the others go on. A site may have set the opposite.
# --wait=0: they go on without a limit in time.
# --cpus-per-task: since Slurm 22.05 srun no longer takes it from the lines above, and a task has one core without it.
# --host: requests come from other machines, so set MOEYARD_API_KEY before sbatch, which passes it on.
exec srun --no-kill --kill-on-bad-exit=0 --wait=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    moeyard serve "$model" --ep 16 --host 0.0.0.0
