"""The rows that `wit-trl inspect` shows, against their text."""

import io
import re
import subprocess
import sys

import pytest
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wit_trl.report import rows as inspection

from .test_weight_report import text_of


TEXTS = [
    "[red]Not red[/red] [/] [link=x]y[/link] \\[bold]",
    "<script>document.title = 'taken over'</script> &amp; <b>",
    "多字节 ñ 👩‍👩‍👧 🇨🇭 \N{REPLACEMENT CHARACTER}x é",
    "a\n\n\tb  c \n  ",
    "<eos> as text, ▌ and [prompt 0.2] too",
    "{code} {foreground} HISTOGRAM %s",
]


@pytest.fixture(params=["byte_level", "byte_fallback"])
def byte_tokenizer(request):
    """A tokenizer that makes several tokens of most characters: as of GPT, Llama 3 and Qwen, or as of Llama 2."""
    special = ["<pad>", "<eos>"]
    if request.param == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special)
    tokenizer.train_from_iterator(["the text of the red link and the script"] * 3, trainer)
    if request.param == "byte_fallback":  # the bytes are no special tokens
        state = tokenizer.to_str().replace('"special":true', '"special":false')
        tokenizer = Tokenizer.from_str(state)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def show_row(trainer, row):
    weights = (trainer.args.prompt_loss_weight, trainer.args.completion_loss_weight)
    return inspection.show_row(row, trainer.processing_class, weights, trainer.args.structure_weights)


def unmarked(text):
    return text.plain.replace("↵\n", "\n").replace("⇥\t", "\t")


@pytest.mark.parametrize("text", TEXTS)
def test_rows_show_their_text_exactly(text, byte_tokenizer, trainer_on):
    dataset = Dataset.from_dict({"prompt": [f"Q{text}|"], "completion": [text]})
    trainer = trainer_on(dataset, byte_tokenizer, max_length=None)
    (row,) = trainer.train_dataset
    assert len(row["input_ids"]) > len(text)
    prompt_tokens = row["completion_mask"].count(0)
    first, prompt, whole = (byte_tokenizer.decode(row["input_ids"][:end]) for end in (1, prompt_tokens, None))
    assert whole == f"Q{text}|{text}<eos>" or "<eos>" in text  # after which Llama 2 adds a space
    expected = f"▌{first}[prompt 0.2]{prompt[len(first) :]}[completion 0.8]{whole[len(prompt) :]}"
    assert unmarked(show_row(trainer, row)) == expected


def test_packed_documents_show_their_text_exactly(byte_tokenizer, trainer_on):
    texts = ["the 字", "red link", " and"]
    dataset = Dataset.from_dict({"text": texts})
    trainer = trainer_on(dataset, byte_tokenizer, packing=True, max_length=100)
    (row,) = trainer.train_dataset
    _, *documents = unmarked(show_row(trainer, row)).replace("[completion 0.8]", "").split("▌")
    assert sorted(document.removesuffix("\n") for document in documents) == sorted(f"{text}<eos>" for text in texts)


def test_character_cut_by_a_weight(byte_tokenizer, trainer_on):
    tokens = byte_tokenizer("Qa👩t")["input_ids"]
    for cut in range(2, len(tokens) - 1):
        mask = [0] * cut + [1] * (len(tokens) - cut)
        trainer = trainer_on(Dataset.from_list([{"input_ids": tokens, "completion_mask": mask}]), byte_tokenizer)
        _, shown = unmarked(show_row(trainer, trainer.train_dataset[0])).split("[prompt 0.2]")
        prompt, completion = shown.removeprefix("Q").split("[completion 0.8]")
        in_character = (byte_tokenizer.decode(tokens[:cut]) + byte_tokenizer.decode(tokens[cut:])).count("\ufffd") > 0
        if in_character:
            assert re.fullmatch("a\ufffd+", prompt)
            assert re.fullmatch("\ufffd+t", completion)
        else:
            assert prompt + completion == "a👩t"


def spans(text):
    """Each piece of the row that has a style, with its style."""
    return [(text.plain[span.start : span.end], span.style) for span in text.spans]


def test_documents_special_tokens_and_zero_weights_are_marked(tokenizer, trainer_on):
    documents = ["To be", "or not"]
    dataset = Dataset.from_dict({"prompt": documents, "completion": [" to be", " now"]})
    trainer = trainer_on(dataset, packing=True, prompt_loss_weight=0.0)
    (row,) = trainer.train_dataset
    text = show_row(trainer, row)
    assert len(row["seq_lengths"]) == text.plain.count("▌") == 2
    for document in text.plain.split("▌")[1:]:
        assert document.count("[prompt 0]") == document.count("[completion 0.8]") == 1
    assert text.plain.replace("\n▌", "").replace("▌", "").replace("[prompt 0]", "").replace(
        "[completion 0.8]", ""
    ) == "".join(tokenizer.decode(row["input_ids"]))
    in_prompt = True
    for piece, style in spans(text):
        if piece in ("▌", "[prompt 0]", "[completion 0.8]"):
            in_prompt = piece != "[completion 0.8]"
        else:
            assert (style.bgcolor is None) == in_prompt
            assert bool(style.bold) == (piece == "<eos>")


def test_weights_that_differ_from_token_to_token(tokenizer, trainer_on):
    row = {"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1], "token_weights": [1.0, 0.5, 0.0]}
    trainer = trainer_on(Dataset.from_list([row]))
    pieces = [tokenizer.decode([token]) for token in (7, 8, 9)]
    text = show_row(trainer, trainer.train_dataset[0])
    assert text.plain == f"▌{pieces[0]}[completion 0.4]{pieces[1]}[completion 0]{pieces[2]}"


def test_what_a_terminal_would_act_on_is_escaped(byte_tokenizer, trainer_on):
    dataset = Dataset.from_dict({"prompt": ["a\x1b[31m\r\x07\u202e"], "completion": ["b"]})
    trainer = trainer_on(dataset, byte_tokenizer)
    shown = text_of(show_row(trainer, trainer.train_dataset[0]))
    assert "\\x1b[31m\\r\\x07\\u202e[completion 0.8]b" in shown
    assert {"\x1b", "\r", "\x07", "\u202e"}.isdisjoint(shown)


def test_cut_is_marked(tokenizer, trainer_on):
    trainer = trainer_on(Dataset.from_dict({"prompt": ["What? "], "completion": ["That. " * 20]}), max_length=16)
    (row,) = trainer.train_dataset
    whole = len(tokenizer("What? " + "That. " * 20)["input_ids"]) + 1  # with the end
    assert show_row(trainer, row).plain.endswith(f"[cut off: {whole - 16} completion tokens]")
    console = Console(file=io.StringIO(), width=200)
    inspection.show_page(console, {0: row}, tokenizer, trainer.weight_report(), 1)
    cut = whole - 16
    assert f"Row 0: 16 tokens, without {cut} that were cut off, {cut} of the completion\n" in console.file.getvalue()
    whole_row = trainer_on(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})).train_dataset[0]
    assert "cut off" not in show_row(trainer, whole_row).plain


def test_import_needs_no_matplotlib():
    code = "import sys, wit_trl, wit_trl.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
