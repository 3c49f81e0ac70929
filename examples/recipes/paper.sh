#!/usr/bin/env bash
# The 15 settings of the paper, each with its best pair of weights, on 8 GPUs. docs/reproduce.md has the rest. None of
# them was run.
#
#     bash examples/recipes/paper.sh                      # lists them
#     bash examples/recipes/paper.sh 4 [more flags]       # trains the fourth
#     bash examples/recipes/paper.sh 4 --prompt_loss_weight 0 --completion_loss_weight 1   # its conventional tuning
set -euo pipefail

# model, data, prompt_loss_weight, completion_loss_weight
SETTINGS=(
    "meta-llama/Llama-3.2-1B tulu 0.6 1"
    "meta-llama/Llama-3.2-1B alpaca 1 1"
    "meta-llama/Llama-3.2-1B lima 0 0.4"
    "google/gemma-2-2b tulu 0.2 0.8"
    "google/gemma-2-2b alpaca 0.2 0.4"
    "google/gemma-2-2b lima 0 0.6"
    "meta-llama/Llama-3.2-3B tulu 0 0.4"
    "meta-llama/Llama-3.2-3B alpaca 0 0.8"
    "meta-llama/Llama-3.2-3B lima 0 0.8"
    "mistralai/Mistral-7B-v0.1 tulu 0 0.4"
    "mistralai/Mistral-7B-v0.1 alpaca 0.6 0.4"
    "mistralai/Mistral-7B-v0.1 lima 0 0.6"
    "meta-llama/Meta-Llama-3-8B tulu 0.6 0.8"
    "meta-llama/Meta-Llama-3-8B alpaca 1 0.6"
    "meta-llama/Meta-Llama-3-8B lima 1 0.4"
)
declare -A EPOCHS=([tulu]=1 [alpaca]=2 [lima]=5)
# data.py writes two of them
declare -A DATASETS=([tulu]=runs/data/tulu.jsonl [alpaca]=yahma/alpaca-cleaned [lima]=runs/data/lima.jsonl)

if [[ $# == 0 ]]; then
    printf '%s\n' "${SETTINGS[@]}" | nl
    exit
fi
read -r MODEL DATA PROMPT COMPLETION <<< "${SETTINGS[$1 - 1]}"
shift
LEARNING_RATE=2e-5
CONFIG=multi_gpu
[[ $MODEL == mistralai/* ]] && LEARNING_RATE=5e-6
[[ $MODEL == *-7B* || $MODEL == *-8B ]] && CONFIG=fsdp1 # which do not fit on a GPU with their optimizer state

wit-trl sft --accelerate_config "$CONFIG" --num_processes "${NUM_PROCESSES:-8}" --config examples/recipes/base.yaml \
    --model_name_or_path "$MODEL" --dataset_name "${DATASETS[$DATA]}" --num_train_epochs "${EPOCHS[$DATA]}" \
    --learning_rate "$LEARNING_RATE" --prompt_loss_weight "$PROMPT" --completion_loss_weight "$COMPLETION" \
    --output_dir "runs/paper/${MODEL##*/}-$DATA" "$@"
