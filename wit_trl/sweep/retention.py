"""Retention: whether a trained model still finds the answers likely that the base model gave."""

import itertools
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from ..conversation.chat_template import tokenizer_of
from ..data.vision_collator import DataCollatorForVisionLanguageWIT
from ..trainer import WITSFTTrainer


MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS = 512, 64
GENERAL_PROMPTS = (
    "What is the capital of Italy?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Translate to French: Good morning, how are you?",
    "List three things to pack for a trip to the mountains.",
    "What is 17 times 6?",
    "Summarize in one sentence: The meeting was moved from Monday to Thursday because two people were ill.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email that declines an invitation to dinner.",
    "Name a synonym of the word happy.",
    "Is the following sentence positive or negative? The film was far too long.",
    "How do I find the largest number in a list in Python?",
    "Tell me a fact about octopuses.",
    "What should I do if I cannot sleep at night?",
)


def prompts_of(rows: Iterable[dict], count: int) -> list[list[int]]:
    """Returns the first prompts as tokens, of rows that have a completion and a prompt of at most 512 tokens."""
    masked = ((row["input_ids"], row["completion_mask"]) for row in rows)
    prompts = (list(tokens[: mask.index(1)]) for tokens, mask in masked if 1 in mask)
    return list(itertools.islice((prompt for prompt in prompts if 0 < len(prompt) <= MAX_PROMPT_TOKENS), count))


def general_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns general prompts as tokens, through the chat template if the tokenizer has one."""
    if tokenizer.chat_template is None:
        return [tokenizer(f"{prompt}\n")["input_ids"] for prompt in GENERAL_PROMPTS]
    messages = [[{"role": "user", "content": prompt}] for prompt in GENERAL_PROMPTS]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def can_answer(trainer: WITSFTTrainer) -> bool:
    """Whether the model of a trainer can answer prompts of text."""
    # The parameters are whole only within the forward of its wrapper
    is_fsdp1 = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    # Their collator takes no tokens
    has_images = isinstance(trainer.data_collator, DataCollatorForVisionLanguageWIT)
    # Attention of ranks that share a sequence knows no padding and no cache
    return not (is_fsdp1 or has_images or trainer.splits_sequences())


@torch.no_grad()
def answers(trainer: WITSFTTrainer, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the greedy answer to each prompt, as tokens, up to its end or to 64 tokens. All ranks call it."""
    tokenizer, model = tokenizer_of(trainer.processing_class), trainer.accelerator.unwrap_model(trainer.model)
    training, batch_size = model.training, trainer.args.eval_batch_size
    model.eval()
    written = []
    for start in range(0, len(prompts), batch_size):
        rows = {"input_ids": prompts[start : start + batch_size]}
        inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(trainer.args.device)
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        tokens = model.generate(**inputs, **ends, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, use_cache=True)
        for answer in tokens[:, inputs["input_ids"].size(1) :].tolist():
            end = answer.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in answer else len(answer)
            written.append(answer[:end])
    model.train(training)
    return written
