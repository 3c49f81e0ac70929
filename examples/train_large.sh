#!/usr/bin/env bash
# The paper's recipe for models that do not fit on one GPU with their optimizer state, such as Llama-3-8B: FSDP with
# SHARD_GRAD_OP. Its settings: batch 64, two epochs, cosine with 1 % warm-up, no gradient clipping, learning rate 2e-5
# (5e-6 for Mistral-7B). The paper used 8 GPUs of 80 GB. `sync_each_batch` keeps the accumulated gradients sharded.
#
#     DATA=data.jsonl bash examples/train_large.sh [more flags of examples/sft_wit.py]
set -euo pipefail

MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B}
DATA=${DATA:?Set DATA to a data set with prompt and completion, or messages: a Hub name, a folder or a file}
PROMPT_LOSS_WEIGHT=${PROMPT_LOSS_WEIGHT:-0.2}
COMPLETION_LOSS_WEIGHT=${COMPLETION_LOSS_WEIGHT:-0.8}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
NUM_PROCESSES=${NUM_PROCESSES:-8} # GPUs; a divisor of 64
OUTPUT_DIR=${OUTPUT_DIR:-runs/${MODEL##*/}-WIT}

accelerate launch --config_file accelerate_configs/fsdp1.yaml --num_processes "$NUM_PROCESSES" \
    examples/sft_wit.py \
    --model_name_or_path "$MODEL" --dataset_name "$DATA" --output_dir "$OUTPUT_DIR" \
    --prompt_loss_weight "$PROMPT_LOSS_WEIGHT" --completion_loss_weight "$COMPLETION_LOSS_WEIGHT" \
    --per_device_train_batch_size 1 --gradient_accumulation_steps $((64 / NUM_PROCESSES)) \
    --num_train_epochs 2 --learning_rate "$LEARNING_RATE" --lr_scheduler_type cosine --warmup_steps 0.01 \
    --weight_decay 0.1 --max_grad_norm 0 --max_length 4096 --seed 23 \
    --accelerator_config '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}' \
    "$@"
