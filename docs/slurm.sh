#!/bin/bash
# sbatch docs/slurm.sh: a run over several machines that goes on by itself after a fault or a time limit.
# out/ and data/ must be on a disk that all of them see.
#SBATCH --job-name=cria
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit every process is asked to finish its step and save.
#SBATCH --signal=TERM@120

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export head
srun --kill-on-bad-exit=0 bash -c '
    tries=0
    until torchrun --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --nproc_per_node=8 \
        --master_addr="$head" --master_port=29500 train.py config/stories15M.py --init_from=auto
    do
        tries=$((tries + 1))
        [ "$tries" -lt 10 ] || exit 1
        sleep 5
    done'
