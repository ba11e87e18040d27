#!/bin/bash
# Submit with: sbatch docs/slurm.sh
# Trains on several machines, and continues after a failure or the time limit.
# out/ and data/ must be on a disk that all machines see.
#SBATCH --job-name=cria
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
# Two minutes before the time limit every process gets SIGTERM: it finishes its step and saves.
# torchrun then waits 30 seconds for its processes.
#SBATCH --signal=TERM@120

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export head
srun --kill-on-bad-exit=0 bash -c '
    trap "stop_requested=yes" TERM  # bash waits for torchrun, which gets the signal too
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        torchrun --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --nproc_per_node=8 \
            --master_addr="$head" --master_port=29500 train.py config/stories15M.py --init_from=auto && exit 0
        [ -z "$stop_requested" ] || exit 3
        sleep 5
    done
    exit 1'
[ $? -ne 3 ] || scontrol requeue "$SLURM_JOB_ID"
