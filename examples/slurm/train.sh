#!/usr/bin/env bash
# Trains on several machines under Slurm: one torchrun on each, one process per GPU.
#   sbatch --nodes 4 examples/slurm/train.sh --config llama2-7b --data.train corpus/
# Everything behind the script goes to `llamapro train`. The same job submitted again continues;
# one that is complete says so and ends. docs/machines.md has the rest.
#SBATCH --job-name=llamapro
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A job that is requeued must not meet processes of its earlier start.
meeting="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-id "$meeting" --rdzv-endpoint "$first:${PORT:-29500}" \
    -m llamapro train "$@"
