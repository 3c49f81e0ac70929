"""
The embedded default: what a training without a model and data uses. Nothing of it is downloaded.

The data are the functions of Python's standard library, the tokenizer is trained on them, and the model is a Llama of 2
million parameters, randomly initialised.
"""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# What the embedded default sets differently from TRL. Any of it can be changed on the command line.
EMBEDDED_DEFAULTS = {
    "output_dir": "runs/sft_wit",
    "dataset_test_split": "validation",
    "max_length": 256,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 91,
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "activation_checkpointing": False,
}

# Not part of the library proper: third-party code, tests and applications
_SKIPPED = {"dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


def load_stdlib_functions(max_characters: int = 400, validation_share: float = 0.1) -> DatasetDict:
    """
    Returns the functions of the running interpreter's standard library as a prompt-completion data set, with the splits
    `"train"` and `"validation"`: real text that needs no download.

    The `"prompt"` asks for a function by signature and documentation, the `"completion"` is its source. Every function
    and method with a docstring counts once. Rows and splits depend on the Python version alone.

    Args:
        max_characters (`int`, *optional*, defaults to `400`):
            Longest source to keep, in characters.
        validation_share (`float`, *optional*, defaults to `0.1`):
            Share of the rows in the validation split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[str, str] = {}  # by source: a function that two modules share counts once
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            for prompt, completion in _pairs(path.read_text(encoding="utf-8", errors="replace"), max_characters):
                pairs.setdefault(completion, prompt)
    dataset = Dataset.from_dict({"prompt": list(pairs.values()), "completion": list(pairs)})
    splits = dataset.train_test_split(test_size=validation_share, seed=0)
    return DatasetDict(train=splits["train"], validation=splits["test"])


def _pairs(module: str, max_characters: int) -> Iterator[tuple[str, str]]:
    lines = module.split("\n")  # `splitlines` would also split at form feeds, which `lineno` does not count
    for node in _statements(_parse(module)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False):  # few are parsed once more
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
            for function in _parse(source).body if len(source) <= max_characters else ():
                if isinstance(function, ast.FunctionDef) and (documentation := ast.get_docstring(function)):
                    signature = f"{function.name}({ast.unparse(function.args)})"
                    yield f"Write the Python function {signature}.\n\n{documentation}\n", source


def _statements(module: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, but without the many nodes of expressions, which hold no function."""
    nodes: list[ast.AST] = [module]
    for node in nodes:
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        yield node


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # templates, deliberately broken files, functions with strings that leave the indentation
        return ast.Module(body=[], type_ignores=[])


def train_embedded_tokenizer(dataset: DatasetDict) -> PreTrainedTokenizerFast:
    """Returns a small tokenizer trained on the prompts and completions of the train split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (row["prompt"] + row["completion"] for row in dataset["train"]),
        trainers.BpeTrainer(vocab_size=2048, special_tokens=["<pad>", "<eos>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def embedded_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the configuration of a Llama of 2 million parameters with this vocabulary."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_embedded_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves the tokenizer to `folder` with a small, randomly initialised Llama."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(embedded_config(tokenizer)).save_pretrained(folder)
