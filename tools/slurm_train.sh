#!/bin/bash
# Train on machines that Slurm lends, for as long as it takes: a job that is preempted or reaches its time limit saves
# where it is, goes back into the queue and goes on from there.
#
#   sbatch --nodes 2 --gpus-per-node 8 tools/slurm_train.sh --config configs/imagenet/davit_t.yaml --data-dir DIR
#
# Everything after the script's name goes to tools/train.py. The run folder, which --experiment and --output or the
# recipe name, has to lie on a file system that all machines see, and so does the data.
#SBATCH --job-name=visattn
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -u

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
said="slurm-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.log"  # what this start of the job says, not one before it

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_PER_NODE##*:}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:${RENDEZVOUS_PORT:-29400}" \
  tools/train.py "$@" --resume auto | tee "$said"
code=${PIPESTATUS[0]}

# What stopped the run is what it says itself; torchrun's exit code does not tell a signal from an error.
if grep -q '^stopped by SIG' "$said"; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
