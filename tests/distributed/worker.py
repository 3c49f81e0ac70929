"""
Trains tiny models and saves what the tests compare. The same code runs on one process, in pytest, and on several:

    accelerate launch --config_file ... tests/distributed/worker.py FOLDER [RUN:]SCENARIO...

which test_engines.py does.
"""

import faulthandler
import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import ParallelismConfig, is_peft_model
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers import make_trainer
from wit_trl.loss import one_pass
from wit_trl.sweep import retention


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
LORA_WITH_HEAD = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
# name: (weights, model, arguments of the trainer's configuration, configuration of PEFT)
SCENARIOS = {
    "weighted": ((0.2, 0.8), "untied", {"save_strategy": "steps", "save_steps": 2}, None),
    "completion_only": ((0.0, 1.0), "untied", {}, None),
    "tied": ((0.2, 0.8), "tied", {}, None),
    "padding_free": ((0.2, 0.8), "untied", {"padding_free": True}, None),
    # The auxiliary loss is a mean over a micro-batch, so it depends on how the work is split, as in TRL
    "experts": ((0.2, 0.8), "experts", {"router_aux_loss_coef": 0.0}, None),
    "epochs": (
        (0.2, 0.8),
        "untied",
        {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "random"},
        None,
    ),
    # With Adam's default, one of its parameters moves by the rounding of a gradient near 0
    "lora": ((0.2, 0.8), "untied", {"adam_epsilon": 1e-6}, LORA),
    "lora_completion_only": ((0.0, 1.0), "tied", {}, LORA),
    "lora_with_head": ((0.2, 0.8), "untied", {"adam_epsilon": 1e-6}, LORA_WITH_HEAD),
    "qlora": ((0.2, 0.8), "quantized", {"adam_epsilon": 1e-6}, LORA),
    "factors": ((0.2, 0.8), "untied", {"loss_type": "dft", "loss_divisor": "weights"}, None),
    "trl_head": ((0.2, 0.8), "untied", {"fused_head": "trl", "loss_type": "dft"}, None),
    # With the kernel for GPUs, where the launcher asks for Triton's interpreter
    "triton": ((0.2, 0.8), "untied", {"loss_type": "dft", "loss_divisor": "weights"}, None),
    "triton_lora": ((0.2, 0.8), "untied", {"adam_epsilon": 1e-5}, LORA),
}
# Set by the launcher: the number of ranks that share a sequence
SEQUENCE_PARALLEL_SIZE, CONTEXT_PARALLEL_SIZE = (
    int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", 1)) for name in ("SP", "CP")
)
# Set by the test: the number of ranks that share the model, each of which gets every sequence
TENSOR_PARALLEL_SIZE = int(os.environ.get("TENSOR_PARALLEL_SIZE", 1))
# Eight sequences in every step
SHARING = SEQUENCE_PARALLEL_SIZE * CONTEXT_PARALLEL_SIZE * TENSOR_PARALLEL_SIZE
BATCH_SIZE, ACCUMULATION = 4 * SHARING // int(os.environ.get("WORLD_SIZE", 1)), 2


def make_model(kind, folder):
    torch.manual_seed(0)
    config = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,  # which DeepSpeed's sequence parallelism does not work out where it is `None`
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if kind == "experts":
        experts = MixtralConfig(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1, **config)
        model = MixtralForCausalLM(experts)
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=kind == "tied", **config))
    if TENSOR_PARALLEL_SIZE > 1:
        model = reload(model, folder, distributed_config=DistributedConfig(tp_size=TENSOR_PARALLEL_SIZE))
    if kind == "quantized":
        # Packed in the dtype of the other weights, with which FSDP2 shards them
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32
        )
        model = reload(model, folder, quantization_config=quantization)
    return model


def make_rows(count):
    """Rows of uneven lengths and shares of completion. The second to the fourth have none: with batches of two on two
    ranks, the first micro-batch of the second rank has no token of the completion at all."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = 5 + 7 * i % 31
        prompt = length if i in (1, 2, 3) else 1 + i % 4
        ids = torch.randint(2, 60, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * (length - prompt)})
    return rows


def reload(model, folder, **arguments):
    """Returns the model as `from_pretrained` loads it, which alone quantizes a model or splits its tensors."""
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder)
    state.wait_for_everyone()
    return type(model).from_pretrained(folder, **arguments)


def make_scenario(folder, scenario, batch_size, accumulation, callbacks=(), **arguments):
    """Returns the trainer of a scenario."""
    weights, kind, scenario_arguments, peft_config = SCENARIOS[scenario]
    in_interpreter = "triton" in scenario and os.environ.get("TRITON_INTERPRET") == "1"
    one_pass._TRITON_DEVICES = ("cpu",) if in_interpreter else ("cuda", "xpu")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    config = {
        "output_dir": str(folder / scenario),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 5,
        "max_length": None,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }
    if SEQUENCE_PARALLEL_SIZE > 1:
        config["pad_to_multiple_of"] = 36  # more than any row: gloo gathers batches of one length only
    train_rows, eval_rows = make_rows(40), make_rows(11)
    if "triton" in scenario:  # the interpreter is slow: two to four tokens
        train_rows, eval_rows = (
            [{name: values[: 2 + i % 3] for name, values in row.items()} for i, row in enumerate(rows)]
            for rows in (train_rows, eval_rows)
        )
    trainer = make_trainer(
        functools.partial(make_model, kind, folder / scenario / "base"),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        train_rows,
        {**config, **scenario_arguments, **arguments},
        weights,
        eval_dataset=Dataset.from_list(eval_rows),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    if kind == "quantized":  # TRL trains the adapters of a quantized model in bfloat16, which would hide a difference
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def run(folder, scenario, batch_size, accumulation):
    """Trains five steps, evaluates, and saves the model and the logs."""
    # FSDP1 crashes where it saves from a CPU, and transformers does not resume tensor parallelism
    fsdp1 = os.environ.get("FSDP_VERSION") == "1"
    arguments = {"save_strategy": "no"} if fsdp1 or TENSOR_PARALLEL_SIZE > 1 else {}
    trainer = make_scenario(folder, scenario, batch_size, accumulation, **arguments)
    trainer.train()
    metrics = trainer.evaluate()
    rows = trainer.evaluate_rows().to_list() if scenario in ("weighted", "qlora") else []
    prompts = [[5, 9, 12], [7]] if scenario in ("weighted", "qlora") else []
    with mock.patch.object(retention, "MAX_ANSWER_TOKENS", 12):  # for each of which every engine gathers the model
        written = retention.answers(trainer, prompts) if retention.can_answer(trainer) else None
    if fsdp1:
        with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
            parameters = {name: p.detach().clone() for name, p in trainer.model_wrapped.named_parameters()}
        if trainer.is_world_process_zero() and is_peft_model(trainer.model):
            adapter = {
                name.replace(".default", "").replace(".modules_to_save", ""): parameter
                for name, parameter in parameters.items()
                if "lora_" in name or "modules_to_save" in name
            }
            save_file(adapter, folder / scenario / "adapter_model.safetensors")
        elif trainer.is_world_process_zero():
            trainer._save(str(folder / scenario), state_dict=parameters)
    else:
        trainer.save_model()
    write_results(trainer, folder / scenario, metrics=metrics, rows=rows, answers=written)


def heading(name):
    """The line of the output after which comes what a run prints."""
    return f"===== {name} ====="


def write_results(trainer, folder, **results):
    """Writes what tells the test that every rank came to the end of the run."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (folder / "results.json").write_text(json.dumps({"logs": logs, **results}))


class Killer(TrainerCallback):
    """Ends the process as a power cut does, in the middle of the fourth training step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def run_killed(folder, scenario):
    make_scenario(folder, scenario, BATCH_SIZE, ACCUMULATION, callbacks=[Killer()]).train()


def run_killed_while_saving(folder, scenario):
    """Ends the process in the middle of the second checkpoint, after the model and the optimizer were written."""
    trainer = make_scenario(folder, scenario, BATCH_SIZE, ACCUMULATION)
    save_rng_state = trainer._save_rng_state

    def save_or_die(output_dir):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng_state(output_dir)

    trainer._save_rng_state = save_or_die
    trainer.train()


def run_resumed(folder, scenario, checkpoint=True):
    trainer = make_scenario(folder, scenario, BATCH_SIZE, ACCUMULATION)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / f"{scenario}-resumed"))
    write_results(trainer, folder / f"{scenario}-resumed")


def run_resumed_from_the_first_checkpoint(folder, scenario):
    run_resumed(folder, scenario, str(folder / scenario / "checkpoint-2"))


def run_evaluating_a_stream(folder, scenario):
    """Evaluates 11 rows as they are stored, and as a stream of two shards, whose last batches differ in size."""
    trainer = make_scenario(folder, scenario, BATCH_SIZE, ACCUMULATION, accelerator_config={"dispatch_batches": False})
    rows = Dataset.from_list(make_rows(11))
    datasets = {"stored": rows, "stream": rows.to_iterable_dataset(num_shards=2)}
    results = {name: trainer.evaluate(dataset) for name, dataset in datasets.items()}
    (folder / scenario).mkdir(exist_ok=True)
    write_results(trainer, folder / scenario, **results)


RUNS = {
    "evaluate_stream": run_evaluating_a_stream,
    "kill": run_killed,
    "kill_while_saving": run_killed_while_saving,
    "resume": run_resumed,
    "resume_from_first": run_resumed_from_the_first_checkpoint,
}


def prepare_sequence_parallelism():
    """What accelerate does on GPUs, and DeepSpeed only once in a process, but here one trainer follows another."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    deepspeed.init_distributed("gloo")
    parallel_state_sp.initialize_sequence_parallel = functools.cache(parallel_state_sp.initialize_sequence_parallel)


if __name__ == "__main__":
    # The launcher ends the peers of a rank that failed. Its own handler, which a fork inherits, would wait for gloo.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()  # prints where a signal ended a process
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.loss import patch_once  # noqa: F401
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from tests.distributed import fsdp_on_cpu  # noqa: F401
    if CONTEXT_PARALLEL_SIZE > 1:
        from tests.distributed import context_parallel_on_cpu  # noqa: F401
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # gloo as it is, which needs no minute of compiling. The attribute `deepspeed.comm.torch` is torch itself
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    output, *names = sys.argv[1:]
    if SEQUENCE_PARALLEL_SIZE > 1:
        prepare_sequence_parallelism()
    if TENSOR_PARALLEL_SIZE > 1:
        torch.distributed.init_process_group("gloo")
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # which refuses a CPU
    for name in names:
        print(heading(name), flush=True)
        kind, _, scenario = name.rpartition(":")
        if kind:
            RUNS[kind](Path(output), scenario)
        else:
            run(Path(output), scenario, BATCH_SIZE, ACCUMULATION)
        if SEQUENCE_PARALLEL_SIZE > 1:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]  # what replaced transformers' own
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
