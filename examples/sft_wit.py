"""
Fine-tune a language model with Weighted Instruction Tuning, with the flags of TRL's own `sft.py`. It runs what `wit-trl
sft` launches; start from here to change it.

# The embedded default: offline, on any device, in minutes
python examples/sft_wit.py

# Full fine-tuning
accelerate launch --config_file accelerate_configs/single_device.yaml examples/sft_wit.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B \
    --dataset_name trl-lib/Capybara \
    --prompt_loss_weight 0.2 \
    --completion_loss_weight 0.8 \
    --output_dir Qwen2.5-0.5B-WIT

# LoRA: add --use_peft --learning_rate 2e-4
# QLoRA: add --use_peft --load_in_4bit --learning_rate 2e-4

`--dataset_name` is a Hub name, a local folder or a local file (`.jsonl`, `.json`, `.csv`, `.parquet`), in a format of
TRL or in that of Alpaca, Dolly, ShareGPT or the original WIT scripts.
`--resume_from_checkpoint True` goes on from the last complete checkpoint of `--output_dir`.
"""

from wit_trl.cli.sft import main


if __name__ == "__main__":
    main()
