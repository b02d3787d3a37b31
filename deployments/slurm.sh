#!/usr/bin/env bash
# A graph served on nodes that Slurm gives: sbatch deployments/slurm.sh panel.yaml
# The key that callers need is in MOA_RAY_API_KEYS, or it is made and printed in the job's output.
#SBATCH --job-name=moa-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=4
#SBATCH --time=08:00:00
set -euo pipefail

spec=${1:?usage: sbatch deployments/slurm.sh SPEC}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')

# The token that Ray's processes show each other, for this job's alone.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | base64 | tr -dc 'a-zA-Z0-9')}

# Each task is a node of the cluster; the command runs on the first.
srun ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_PER_TASK:-0}" -- \
  moa-ray serve "$spec" --address auto --host "$address"
