"""
Trains and evaluates with the kernel for CPUs, and with one in Triton (TRL's, ours or Liger's) in its interpreter:

    TRITON_INTERPRET=1 python -m tests.loss.triton_worker FOLDER KERNEL MODE

Writes the logs of both as `results.json`. `TRITON_INTERPRET` has to be set before the first import of Triton.
"""

import json
import sys
from pathlib import Path

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.loss import one_pass

from ..distributed.worker import make_model, make_rows
from . import patch_once  # noqa: F401


MODES = {
    "padded": {},
    "padding_free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 64, "eval_packing": True},
    "completion_only": {"prompt_loss_weight": 0.0, "completion_loss_weight": 1.0},
    "dft": {"loss_type": "dft"},
}
# Liger's kernels for layers, of which the interpreter runs this one alone
LIGER = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False, "swiglu": False}}


def run(folder, options, num_rows=6):
    defaults = {"max_steps": 2, "max_length": None, "prompt_loss_weight": 0.2, "completion_loss_weight": 0.8}
    args = WITSFTConfig(
        folder,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        print_weight_report=False,
        **{**defaults, **options},
    )
    # Short ones: the interpreter is slow
    rows = Dataset.from_list([{name: values[:8] for name, values in row.items()} for row in make_rows(num_rows)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    trainer = WITSFTTrainer(
        make_model("untied", folder), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    metrics = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [
        {name: value for name, value in log.items() if "second" not in name and "time" not in name}
        for log in [*logs, metrics]
    ]


def use_triton_everywhere():
    """What a GPU has, on the CPU: kernels in Triton, called with the labelled rows alone."""
    one_pass._TRITON_DEVICES = ("cpu",)
    del (
        trl.kernels.chunked_logprob._forward_tile,
        trl.kernels.chunked_logprob._backward_tile,
    )  # what runs without Triton
    for module, name in (
        (trl.kernels.chunked_logprob, "_use_triton"),
        (trl.trainer.utils, "_use_triton"),
    ):
        setattr(module, name, lambda device: True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kernel, mode = sys.argv[1:]
    if kernel == "liger":  # which stays in the layers of all models
        results = [run(folder, options, num_rows=1) for options in ({}, LIGER)]
    else:
        expected = run(folder, MODES[mode])
        use_triton_everywhere()
        results = [expected, run(folder, {**MODES[mode], "fused_head": "trl" if kernel == "trl" else "one_pass"})]
    (Path(folder) / "results.json").write_text(json.dumps(results))
