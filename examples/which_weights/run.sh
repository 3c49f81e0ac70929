#!/usr/bin/env bash
# Which weights for SmolLM2-135M-Instruct, on a task with long completions and on one with short ones? Each is evaluated on
# the other task and on plain text too. Needs the extra `sweep`, and the model: see smollm2.py.
#
#     bash examples/which_weights/run.sh small models/SmolLM2-135M-Instruct  # under an hour on two cores
#     bash examples/which_weights/run.sh full models/SmolLM2-135M-Instruct   # for a GPU; not run so far
set -euo pipefail

SIZE=${1:?small or full}
MODEL=${2:?The folder of the model}
FOLDER=${FOLDER:-runs/which_weights/$SIZE}

if [ "$SIZE" = small ]; then
    rows=(64 48)
    flags=(--ratios 0 0.25 1 --seeds 1 2 3 --num_train_epochs 2 --per_device_train_batch_size 4
        --activation_checkpointing False --retention_prompts 8)
else
    rows=(2000 300)
    flags=(--ratios 0 0.1 0.25 0.5 1 --seeds 1 2 3 4 5 --num_train_epochs 3 --per_device_train_batch_size 16)
fi
python examples/which_weights/tasks.py "$FOLDER/data" "${rows[@]}"
for pair in "document write" "write document"; do
    read -r task other <<<"$pair"
    wit-trl sweep --model_name_or_path "$MODEL" --dtype float32 --dataset_name "$FOLDER/data/$task" \
        --eval_dataset "$other=$FOLDER/data/$other" "text=$FOLDER/data/text.jsonl" \
        --max_length 256 --learning_rate 5e-5 --eval_strategy no --output_dir "$FOLDER/$task" "${flags[@]}"
done
