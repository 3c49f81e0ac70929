#!/usr/bin/env bash
# FSDP2 over several machines under SLURM, two of 8 GPUs as it stands. Run again after a time limit or a failure, it goes on
# from the last complete checkpoint; it needs a file system that all machines share.
#
#     DATA=data.jsonl sbatch examples/slurm.sh [more flags of examples/sft_wit.py]
#SBATCH --job-name=wit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B}
DATA=${DATA:?Set DATA to a data set with prompt and completion, or messages: a Hub name, a folder or a file}
PROMPT_LOSS_WEIGHT=${PROMPT_LOSS_WEIGHT:-0.2}
COMPLETION_LOSS_WEIGHT=${COMPLETION_LOSS_WEIGHT:-0.8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
OUTPUT_DIR=${OUTPUT_DIR:-runs/${MODEL##*/}-WIT}

HOSTNAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_PROCESS_IP=${HOSTNAMES%%$'\n'*} # the first
RESUME=()
if compgen -G "$OUTPUT_DIR/checkpoint-*/trainer_state.json" > /dev/null; then
    RESUME=(--resume_from_checkpoint True)
fi
export MAIN_PROCESS_IP GPUS_PER_NODE

# One launcher on each machine, which starts a process for each of its GPUs
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'accelerate launch --config_file accelerate_configs/fsdp_multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
    --machine_rank "$SLURM_PROCID" --main_process_ip "$MAIN_PROCESS_IP" "$@"' launcher \
    examples/sft_wit.py \
    --model_name_or_path "$MODEL" --dataset_name "$DATA" --output_dir "$OUTPUT_DIR" \
    --prompt_loss_weight "$PROMPT_LOSS_WEIGHT" --completion_loss_weight "$COMPLETION_LOSS_WEIGHT" \
    --save_strategy steps --save_steps 200 --save_total_limit 2 \
    "${RESUME[@]}" "$@"
