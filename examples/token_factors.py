"""
Losses that depend on what the model itself predicts, a few lines each. They train the embedded default, offline:

    python examples/token_factors.py [ProFitTrainer | EntropyTrainer]
"""

import math
import sys

import torch
from transformers import LlamaForCausalLM

from wit_trl import WITSFTConfig, WITSFTTrainer
from wit_trl.embedded import embedded_config, load_stdlib_functions, train_embedded_tokenizer


class ProFitTrainer(WITSFTTrainer):
    """Leaves out tokens that the model finds improbable, as ProFit does (https://arxiv.org/abs/2601.09195)."""

    min_probability = 1e-4  # for a model that is untrained and guesses with 1 / 2048; of a pretrained one, much higher

    def token_factors(self, nll, entropy):
        return super().token_factors(nll, entropy) * (torch.exp(-nll) > self.min_probability)


class EntropyTrainer(WITSFTTrainer):
    """
    Weighs a token by the entropy of the prediction, as a share of the largest: little where the model is sure, whether
    it is right or not. EAFT does so with the entropy of the 20 most likely tokens (https://arxiv.org/abs/2601.02151).
    """

    def token_factors(self, nll, entropy):
        return super().token_factors(nll, entropy) * entropy / math.log(self.model.config.vocab_size)


def main(name: str = "ProFitTrainer", **arguments) -> WITSFTTrainer:
    """Trains with one of the two, and returns the trainer. `arguments` are those of the `WITSFTConfig`."""
    dataset = load_stdlib_functions()
    tokenizer = train_embedded_tokenizer(dataset)
    torch.manual_seed(0)
    trainer = globals()[name](
        model=LlamaForCausalLM(embedded_config(tokenizer)),
        args=WITSFTConfig(
            **{"output_dir": f"runs/{name}", "learning_rate": 1e-3, "max_steps": 20, "logging_steps": 5, **arguments}
        ),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
