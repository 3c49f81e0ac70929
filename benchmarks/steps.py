"""The steps of three trainers in turn, which `gpu.py` times: on random rows, half of each prompt."""

import tempfile
import time
from collections.abc import Iterator

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.check.timing import median_and_quartiles, peak_memory, reset_peak_memory, synchronize


LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# name: (kind of model, its configuration, weight of the prompt, LoRA, rows); the weight of the completion is 1
CASES = {
    "step, Llama-3.2-1B, λp = 0, 4 rows": ("llama", LLAMA, 0.0, False, 4),
    "step, Llama-3.2-1B, λp = 0.2, 16 rows": ("llama", LLAMA, 0.2, False, 16),
    "step, Llama-3.2-1B, λp = 0.2, LoRA, 16 rows": ("llama", LLAMA, 0.2, True, 16),
    "step, Qwen2.5-0.5B, λp = 0.2, 16 rows": ("qwen2", QWEN, 0.2, False, 16),
}
TRAINERS = ("wit_trl", "trl", "wit_trl, fused_head=trl")
TOKENS = 1024  # of a row
# Blocks of steps of one trainer, in turn and then in turn backwards: what the host does meanwhile meets all of them
BLOCKS = 4
WARM_UP = 2  # steps of a block that are not counted: the allocator was emptied before


class Clock(TrainerCallback):
    """The seconds of each step, and its peak in MiB above what the models and the states of the optimizers take."""

    def __init__(self, device: str):
        self.device, self.seconds, self.memory = device, [], []

    def on_step_begin(self, *args, **kwargs):
        synchronize(self.device)
        self.resident = reset_peak_memory(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.start)
        self.memory.append(peak_memory(self.device) - self.resident)


def build(contender: str, case: str, device: str, steps: int, clock: Clock) -> SFTTrainer:
    """Returns a trainer with a model of its own, the same for each of them."""
    kind, config, prompt_loss_weight, lora, batch_size = CASES[case]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    # Of few tokens, so that there is something to learn
    ids = torch.randint(2, min(model.vocab_size, 1000), (steps * batch_size, TOKENS), generator=generator).tolist()
    masks = [[0] * (TOKENS // 2) + [1] * (TOKENS - TOKENS // 2)] * len(ids)
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "learning_rate": 1e-4,  # less would change few weights in bfloat16
        "per_device_train_batch_size": batch_size,
        "bf16": False,  # the model is in bfloat16 itself
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    if contender == "trl":
        args, trainer_class = SFTConfig(completion_only_loss=prompt_loss_weight == 0, **arguments), SFTTrainer
    else:
        args, trainer_class = (
            WITSFTConfig(
                completion_loss_weight=1.0,
                prompt_loss_weight=prompt_loss_weight,
                fused_head="one_pass" if contender == "wit_trl" else "trl",
                print_weight_report=False,
                **arguments,
            ),
            WITSFTTrainer,
        )
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return trainer_class(
        model,
        args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        callbacks=[clock],
    )


def time_trainers(case: str, device: str, repeats: int) -> Iterator[dict]:
    """Yields what is known after each block: seconds, memory and losses of each trainer, or the error that ended it."""
    trainers, found = {}, {}
    clocks = {contender: Clock(device) for contender in TRAINERS}
    for block in range(BLOCKS):
        for contender in TRAINERS[:: -1 if block % 2 else 1]:
            result = found.setdefault(contender, {"losses": []})
            if "error" in result:
                continue
            clock = clocks[contender]
            try:
                if contender not in trainers:
                    trainers[contender] = build(contender, case, device, WARM_UP + repeats, clock)
                trainers[contender].train()  # goes on with the model and the state of the optimizer, at the first row
            except Exception as error:  # whatever a kernel or a device raises
                result["error"] = f"{type(error).__name__}: {error}"
                trainers.pop(contender, None)
                continue
            result["losses"] += [log["loss"] for log in trainers[contender].state.log_history if "loss" in log]
            counted = [i for i in range(len(clock.seconds)) if i % (WARM_UP + repeats) >= WARM_UP]
            result |= median_and_quartiles([clock.seconds[i] for i in counted])
            result["MiB"] = max(clock.memory[i] for i in counted)
        own = found["wit_trl"]["losses"]
        for contender, result in found.items():
            if contender.startswith("wit_trl, ") or (contender == "trl" and CASES[case][2] == 0):  # the same loss
                pairs = zip(own, result["losses"], strict=False)  # up to where one of them ended
                result["loss_difference"] = max((abs(a - b) for a, b in pairs), default=0.0)
        yield {"trainers": found, "is_partial": block + 1 < BLOCKS}
