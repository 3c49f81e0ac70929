"""
What `speed.py --device cuda` runs: the head against float64, then times and memory of head and training step.

All contenders run in one process, one after another on the same data, since a GPU's allocator tells the peak of each.
Nothing here was run on a GPU so far.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from contenders import loss_function
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTConfig, WITSFTTrainer


HEAD_CONTENDERS = ("products", "wit_trl", "trl", "liger", "cce", "full_logits")
# Tokens, hidden size, vocabulary, share of tokens of weight zero, frozen head
HEAD_CASES = list(itertools.product((8192, 2048), (2048, 4096), (128256, 151936), (0.5, 0.0), (False, True)))
MODELS = {
    "Llama-3.2-1B": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        )
    ),
    "Qwen2.5-0.5B": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ),
}
STEP_CASES = list(itertools.product(MODELS, (0.0, 0.2), (False, True)))  # with the prompt's weight, and with LoRA
SEQUENCE, BATCH = 1024, 4


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def measured(call: Callable[[], None], device: str, repeats: int) -> dict[str, float]:
    """Returns the median seconds of a call, and its peak memory in MiB, without what was allocated before."""
    call()  # compiles
    before = 0
    if device != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.accelerator.max_memory_allocated() if device != "cpu" else 0
    return {"seconds": statistics.median(seconds), "MiB": (peak - before) / 2**20, "all_seconds": seconds}


def head_inputs(device: str, tokens: int, hidden_size: int, vocab: int, zero_share: float, frozen: bool, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype).requires_grad_(not frozen)
    targets = torch.randint(vocab, (tokens,), device=device)
    token_weights = (torch.arange(tokens, device=device) % 2 >= 2 * zero_share).float() * 0.8
    return hidden, weight, targets, token_weights


def head_call(contender: str, device: str, *case) -> Callable[[], None]:
    """Returns a function that runs head and loss once, forward and backward."""
    hidden, weight, targets, token_weights = head_inputs(device, *case, torch.bfloat16)
    index = token_weights.nonzero().squeeze(1)
    if contender == "products":

        def products():
            with torch.no_grad():
                kept = hidden[index]
                logits = kept @ weight.t()
                logits @ weight
                if weight.requires_grad:
                    logits.t() @ kept

        return products
    loss = loss_function("original" if contender == "full_logits" else contender, device)
    # TRL gives only the weighted tokens to its kernel, and the kernels of others take no weights
    rows = index if contender in ("trl", "liger", "cce") else slice(None)

    def call():
        loss(hidden[rows], weight, targets[rows], token_weights[rows], len(index)).backward()
        hidden.grad = weight.grad = None

    return call


def check(device: str, *case) -> None:
    """Ends the program if the head is wrong: in float32 against float64, in bfloat16 against the error of TRL's."""
    print(f"{'check against float64':32}{'loss':>10}{'hidden states':>16}{'head':>10}")
    errors = {}
    for dtype, contender in itertools.product((torch.float32, torch.bfloat16), ("wit_trl", "trl")):
        inputs = head_inputs(device, *case, dtype)
        hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
        nll = F.cross_entropy(hidden @ weight.t(), inputs[2], reduction="none")
        expected = (nll * inputs[3]).sum() / inputs[3].count_nonzero()
        expected.backward()
        loss = loss_function(contender, device)(*inputs, inputs[3].count_nonzero())
        loss.backward()
        pairs = ((loss, expected), (inputs[0].grad, hidden.grad), (inputs[1].grad, weight.grad))
        found = [(torch.linalg.norm(a.double() - b) / torch.linalg.norm(b)).item() for a, b in pairs]
        errors[dtype, contender] = found
        print(f"{f'{contender}, {dtype}':32}{found[0]:10.1e}{found[1]:16.1e}{found[2]:10.1e}", flush=True)
    wrong = max(errors[torch.float32, "wit_trl"]) > 1e-5
    of_trl = errors[torch.bfloat16, "trl"]
    # A GPU may round the parts of a long sum to bfloat16
    wrong |= any(a > 2 * b + 1e-3 for a, b in zip(errors[torch.bfloat16, "wit_trl"], of_trl, strict=True))
    if wrong:
        raise SystemExit("The head is wrong on this device: nothing is timed.")


class Clock(TrainerCallback):
    """The seconds of each training step."""

    def __init__(self, device: str):
        self.device, self.seconds = device, []

    def on_step_begin(self, *args, **kwargs):
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.start)


def train(contender: str, device: str, make_model, weights: tuple[float, float], steps: int, **arguments):
    """Trains on random rows, half of them prompt. Returns the seconds of the steps, and the trainer."""
    set_seed(arguments.get("seed", 0))
    model = make_model().to(torch.bfloat16)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            # Of few tokens, so that there is something to learn
            "input_ids": torch.randint(2, min(vocab, 1000), (SEQUENCE,), generator=generator).tolist(),
            "completion_mask": [0] * (SEQUENCE // 2) + [1] * (SEQUENCE - SEQUENCE // 2),
        }
        for _ in range(BATCH * 8)
    ]
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    peft_config = arguments.pop("peft_config", None)
    kwargs = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        **arguments,
    }
    clock = Clock(device)
    if contender == "wit_trl":
        prompt, completion = weights
        args = WITSFTConfig(
            prompt_loss_weight=prompt,
            completion_loss_weight=completion,
            fused_head="one_pass",
            print_weight_report=False,
            **kwargs,
        )
        trainer_class = WITSFTTrainer
    else:
        args, trainer_class = SFTConfig(completion_only_loss=weights[0] == 0, **kwargs), SFTTrainer
    trainer = trainer_class(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        peft_config=peft_config,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds, trainer


def step(contender: str, device: str, make_model, prompt_loss_weight: float, lora: bool, repeats: int):
    """Returns the median seconds and the peak memory of a training step. The first three steps warm up."""
    peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    if device != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
    seconds, _ = train(contender, device, make_model, (prompt_loss_weight, 0.8), repeats + 3, peft_config=peft_config)
    peak = torch.accelerator.max_memory_allocated() if device != "cpu" else 0
    return {"seconds": statistics.median(seconds[3:]), "MiB": peak / 2**20, "all_seconds": seconds[3:]}


def compare(case: str, contenders: tuple[str, ...], measure: Callable[[str], dict]) -> dict[str, dict]:
    """Measures contenders, and prints them with their ratios to this package."""
    results = {}
    for contender in contenders:
        try:
            results[contender] = measure(contender)
        except Exception as error:  # whatever a kernel raises: it is not installed, or out of memory
            print(f"{case:56}{contender:12}did not run: {(repr(error).splitlines())[0][:60]}", flush=True)
    own = results.get("wit_trl", {"seconds": float("nan"), "MiB": float("nan")})
    for contender, result in results.items():
        ratios = result["seconds"] / own["seconds"], result["MiB"] / max(own["MiB"], 1)
        print(
            f"{case:56}{contender:12}{1000 * result['seconds']:10.2f}{result['MiB']:9.0f}"
            f"{ratios[0]:16.2f}{ratios[1]:18.2f}",
            flush=True,
        )
    return results


def curves(device: str, make_model, steps: int = 200, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, float]:
    """
    Returns two mean differences of losses: at (0, 1) against TRL's with the same seed, and of TRL's between seeds.
    """
    losses = {}
    for contender, seed in itertools.product(("wit_trl", "trl"), seeds):
        _, trainer = train(contender, device, make_model, (0.0, 1.0), steps, seed=seed, learning_rate=1e-4)
        history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        losses[contender, seed] = torch.tensor(history)
    kernels = [(losses["wit_trl", seed] - losses["trl", seed]).abs().mean().item() for seed in seeds]
    noise = [(losses["trl", a] - losses["trl", b]).abs().mean().item() for a, b in itertools.combinations(seeds, 2)]
    found = {"kernels": max(kernels), "seeds": max(noise)}
    print(
        f"mean difference of the losses of {steps} steps: {found['kernels']:.4f} between the kernels with the same "
        f"seed, {found['seeds']:.4f} between seeds of TRL",
        flush=True,
    )
    return found


def main(device: str, output: Path, repeats: int, with_curves: bool) -> None:
    name = torch.get_device_module(device).get_device_name() if device != "cpu" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    check(device, 512, 2048, 128256, 0.5, False)
    print(f"{'case':56}{'contender':12}{'ms':>10}{'MiB':>9}{'time ÷ wit_trl':>16}{'memory ÷ wit_trl':>18}")
    found = {"device": name, "torch": torch.__version__, "results": {}}
    output.mkdir(parents=True, exist_ok=True)

    def keep(**more):  # called after each case, so that nothing is lost
        found.update(more)
        (output / "speed_gpu.json").write_text(json.dumps(found, indent=1))

    results = found["results"]
    for case in HEAD_CASES:
        tokens, hidden_size, vocab, zero_share, frozen = case
        label = f"{tokens} tokens, H {hidden_size}, V {vocab}, {'half' if zero_share else 'all'}"
        if frozen:
            label += ", frozen"
        results[label] = compare(
            label, HEAD_CONTENDERS, lambda c, case=case: measured(head_call(c, device, *case), device, repeats)
        )
    for model, prompt, lora in STEP_CASES:
        label = f"step, {model}, λp = {prompt:g}{', LoRA' if lora else ''}"
        arguments = (device, MODELS[model], prompt, lora, repeats)
        results[label] = compare(label, ("wit_trl", "trl"), lambda c, arguments=arguments: step(c, *arguments))
        keep()
    if with_curves:
        keep(curves=curves(device, MODELS["Qwen2.5-0.5B"]))
    print(f"speed_gpu.json written to {output}")
