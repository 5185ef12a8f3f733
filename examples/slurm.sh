#!/usr/bin/env bash
# Runs a search on a Slurm allocation, with a Ray cluster on its nodes that ends with the job.
#   sbatch examples/slurm.sh /shared/results/first --budget 1000        start a search
#   sbatch examples/slurm.sh --resume /shared/results/first             continue an interrupted search
# Submit it from the checkout, with the Python environment in .venv. The checkout and CHISEL_CACHE must be on a disk
# that all nodes share.
#SBATCH --job-name=chisel
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0 CHISEL_CACHE="${CHISEL_CACHE:-$PWD/.cache}" PATH="$PWD/.venv/bin:$PATH"

if [ "${1:-}" = --resume ]; then where=("$1" "$2"); shift 2; else where=(--out "$1"); shift; fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))

# A secret for this cluster only.
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --block --node-ip-address="$address" --port="$port" --include-dashboard=false &
sleep 20
if [ "$SLURM_NNODES" -gt 1 ]; then
  srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" --overlap \
    ray start --block --address="$address:$port" &
  sleep 20
fi

# The search runs on the head node, and the cluster ends with the allocation.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  python search.py --ray-address "$address:$port" "${where[@]}" "$@"
