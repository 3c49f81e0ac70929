"""Tiny processors and models of vision-language families, built from configs in an environment without torchvision."""

from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import transformers as tr
from tokenizers import processors
from transformers.models.smolvlm import processing_smolvlm

from .conftest import CHAT_TEMPLATES, train_tokenizer


CHATML = ["<|im_start|>", "<|im_end|>"]
QWEN = [*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS_PLACEHOLDERS = ["<fake_token_around_image>", "<global-img>"]
IDEFICS_PLACEHOLDERS += [*(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)), "<image>"]
IDEFICS = ["<|begin_of_text|>", "<|im_start|>", "<end_of_utterance>", *IDEFICS_PLACEHOLDERS]
AYA = ["<|START_OF_IMG|>", "TILE", "TILE_GLOBAL", "<|IMG_PATCH|>", "<|END_OF_IMG|>"]
GLM = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|image|>", "<|end_of_image|>"]
OVIS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<IMG_ATOM>"]
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA4 = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
GEMMA4 |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>"}
INTERNVL |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}

# LLaVA 1.5: TRL does not know it, and it does not mark the assistant's turns
VICUNA = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}\
{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# The same text with marks
MARKED_VICUNA = """\
{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT:{% generation %}\
{{ ' ' + message['content'][0]['text'] + eos_token }}{% endgeneration %}{% else %}{{ 'USER: ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{{ ' ' }}\
{% endif %}{% endfor %}"""


def blocks(start: str, header: str, image: str, end: str) -> str:
    """A chat template of marked turns, as of most families. TRL does not know it either."""
    header, end = (f"{{{{ {text!r} }}}}" for text in (header, end))  # Jinja drops a line break after a tag
    return (
        f"{{% for message in messages %}}{start}{{{{ message['role'] }}}}{header}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{end}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{start}assistant{header}{{% endif %}}"
    )


class NoVideos(tr.BaseVideoProcessor):
    """In the place of a video processor, all of which need torchvision."""

    num_frames, fps, size, merge_size, temporal_patch_size = 1, 1, {"longest_edge": 16}, 2, 2
    do_sample_frames = False

    def __init__(self):
        self.model_input_names = []


def size(edge):
    return {"height": edge, "width": edge}


def pixels(low, high):
    return {"shortest_edge": low, "longest_edge": high}


@dataclass
class Family:
    processor: str
    image_processor: Callable
    image_processor_kwargs: dict
    chat_template: str  # or the name of one of TRL's
    end_of_turn: str
    placeholders: list[str]
    special_tokens: list[str] = field(default_factory=list)
    tokenizer_kwargs: dict = field(default_factory=dict)
    kwargs: dict = field(default_factory=dict)
    has_videos: bool = False


CLIP = {"size": {"shortest_edge": 24}, "crop_size": size(24)}
LLAVA = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
QWEN_PLACEHOLDERS = ["<|image_pad|>", "<|video_pad|>"]
FAMILIES = {
    "llava": Family(
        "LlavaProcessor", tr.CLIPImageProcessorPil, CLIP, VICUNA, "</s>", ["<image>"], ["<image>"], kwargs=LLAVA
    ),
    "llava_next": Family(
        "LlavaNextProcessor",
        tr.LlavaNextImageProcessorPil,
        CLIP | {"image_grid_pinpoints": [[24, 48], [48, 24]]},
        "llava_next",
        "</s>",
        ["<image>"],
        ["<image>"],
        kwargs=LLAVA,
    ),
    "llava_onevision": Family(
        "LlavaOnevisionProcessor",
        tr.LlavaOnevisionImageProcessorPil,
        {"size": size(16), "image_grid_pinpoints": [[16, 32], [32, 16]]},
        blocks("<|im_start|>", "\n", "<image>\n", "<|im_end|>\n"),
        "<|im_end|>",
        ["<image>", "<video>"],
        ["<image>", "<video>", *CHATML],
        kwargs={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        has_videos=True,
    ),
    "qwen2_vl": Family(
        "Qwen2VLProcessor",
        tr.Qwen2VLImageProcessorPil,
        {"patch_size": 8, "size": pixels(256, 1024)},
        "qwen2_5_vl",
        "<|im_end|>",
        QWEN_PLACEHOLDERS,
        QWEN,
        has_videos=True,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLProcessor",
        tr.Qwen2VLImageProcessorPil,
        {"patch_size": 8, "size": pixels(256, 1024)},
        "qwen2_5_vl",
        "<|im_end|>",
        QWEN_PLACEHOLDERS,
        QWEN,
        has_videos=True,
    ),
    "qwen3_vl": Family(
        "Qwen3VLProcessor",
        tr.Qwen2VLImageProcessorPil,
        {"patch_size": 8, "size": pixels(256, 1024)},
        "qwen3_vl",
        "<|im_end|>",
        QWEN_PLACEHOLDERS,
        QWEN,
        has_videos=True,
    ),
    "idefics2": Family(
        "Idefics2Processor",
        tr.Idefics2ImageProcessorPil,
        {"size": pixels(16, 32), "do_image_splitting": False},
        blocks("", ":", "<image>", "<end_of_utterance>\n"),
        "<end_of_utterance>",
        ["<image>"],  # the processor does not name the tokens around it
        IDEFICS,
        kwargs={"image_seq_len": 4},
    ),
    "idefics3": Family(
        "Idefics3Processor",
        tr.Idefics3ImageProcessorPil,
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        "idefics3",
        "<end_of_utterance>",
        IDEFICS_PLACEHOLDERS,
        IDEFICS,
        kwargs={"image_seq_len": 4},
    ),
    "smolvlm": Family(
        "SmolVLMProcessor",
        tr.SmolVLMImageProcessorPil,
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        "smolvlm",
        "<end_of_utterance>",
        IDEFICS_PLACEHOLDERS,
        [*IDEFICS, "<video>"],
        kwargs={"image_seq_len": 4},
        has_videos=True,
    ),
    "gemma3": Family(
        "Gemma3Processor",
        tr.Gemma3ImageProcessorPil,
        {"size": size(16)},
        "gemma3",
        "<end_of_turn>",
        [*GEMMA.values()],
        ["<start_of_turn>", "<end_of_turn>", *GEMMA.values()],
        {"extra_special_tokens": GEMMA},
        {"image_seq_length": 4},
    ),
    "gemma4": Family(
        "Gemma4Processor",
        tr.Gemma4ImageProcessorPil,
        {"patch_size": 8, "max_soft_tokens": 70},
        "gemma4",
        "<turn|>",
        ["<|image>", "<image|>", "<|image|>"],
        ["<|turn>", "<turn|>", *GEMMA4.values()],
        {"extra_special_tokens": GEMMA4},
        {"feature_extractor": None},
        has_videos=True,
    ),
    "internvl": Family(
        "InternVLProcessor",
        tr.GotOcr2ImageProcessorPil,
        {"size": size(16), "max_patches": 2},
        blocks("<|im_start|>", "\n", "<IMG_CONTEXT>\n", "<|im_end|>\n"),
        "<|im_end|>",
        ["<img>", "<IMG_CONTEXT>", "</img>"],
        [*CHATML, *INTERNVL.values()],
        {"extra_special_tokens": INTERNVL},
        {"image_seq_length": 4},
        has_videos=True,
    ),
    "mllama": Family(
        "MllamaProcessor",
        tr.MllamaImageProcessorPil,
        {"size": size(16), "max_image_tiles": 2},
        "{{ bos_token }}" + blocks("<|start_header_id|>", "<|end_header_id|>\n\n", "<|image|>", "<|eot_id|>"),
        "<|eot_id|>",
        ["<|image|>"],
        ["<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "aya_vision": Family(
        "AyaVisionProcessor",
        tr.GotOcr2ImageProcessorPil,
        {"size": size(16), "max_patches": 2},
        "{{ bos_token }}" + blocks("<|START_OF_TURN_TOKEN|>", " ", "<image>", "<|END_OF_TURN_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
        AYA,
        ["<image>", *AYA, "<|IMG_LINE_BREAK|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"],
        kwargs={"patch_size": 8, "img_size": 16},
    ),
    "aria": Family(
        "AriaProcessor",
        tr.AriaImageProcessorPil,
        {},
        blocks("<|im_start|>", "\n", "<|img|>", "<|im_end|>\n"),
        "<|im_end|>",
        ["<|img|>"],
        ["<|img|>", *CHATML],
        {"extra_special_tokens": {"image_token": "<|img|>"}},
        {"size_conversion": {490: 4, 980: 8}},
    ),
    "ovis2": Family(
        "Ovis2Processor",
        tr.Ovis2ImageProcessorPil,
        {"size": size(16)},
        blocks("<|im_start|>", "\n", "<image>\n", "<|im_end|>\n"),
        "<|im_end|>",
        OVIS,
        ["<image>", *OVIS, *CHATML],
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"image_seq_length": 4},
    ),
    "glm46v": Family(
        "Glm46VProcessor",
        tr.Glm46VImageProcessorPil,
        {"patch_size": 8, "size": pixels(256, 1024)},
        "[gMASK]<sop>" + blocks("<|", "|>\n", "<|begin_of_image|><|image|><|end_of_image|>", ""),
        "<|user|>",
        ["<|image|>"],
        [*GLM, "<|video|>"],
        has_videos=True,
    ),
}


def make_processor(name: str) -> tr.ProcessorMixin:
    family = FAMILIES[name]
    tokenizer = train_tokenizer(["<pad>", "<unk>", "<s>", "</s>", *family.special_tokens])
    if name == "llava":  # as the tokenizer of Llama
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    template = family.chat_template
    if "{" not in template:
        template = (CHAT_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    kwargs = dict(family.kwargs)
    if family.has_videos:
        kwargs["video_processor"] = NoVideos()
    processing_smolvlm.num2words = str  # a package that spells the number of video frames
    # The class of the video processor, which is not one, and of the feature extractor of Gemma 4, which has none here
    with patch.object(tr.ProcessorMixin, "check_argument_for_proper_class"):
        return getattr(tr, family.processor)(
            image_processor=family.image_processor(**family.image_processor_kwargs),
            tokenizer=tr.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer,
                pad_token="<pad>",
                unk_token="<unk>",
                bos_token="<s>",
                eos_token="</s>" if family.end_of_turn == "<|user|>" else family.end_of_turn,
                additional_special_tokens=family.special_tokens,
                **family.tokenizer_kwargs,
            ),
            chat_template=template,
            **kwargs,
        )


TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "vocab_size": 512, "pad_token_id": 0, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_model(name: str, processor: tr.ProcessorMixin) -> tr.PreTrainedModel:
    """The same tiny model at every call."""
    torch.manual_seed(0)
    image_token_id = processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].placeholders[-1])
    if name == "llava":
        text, vision = tr.LlamaConfig(**TEXT), tr.CLIPVisionConfig(image_size=24, patch_size=8, **VISION)
        config = tr.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token_id)
        return tr.LlavaForConditionalGeneration(config)
    if name == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        config = tr.Qwen2_5_VLConfig(
            text_config=TEXT
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
            vision_config=vision | {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]},
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
        )
        return tr.Qwen2_5_VLForConditionalGeneration(config)
    if name == "gemma3":
        vision = tr.SiglipVisionConfig(image_size=16, patch_size=4, **VISION)
        config = tr.Gemma3Config(
            text_config=tr.Gemma3TextConfig(**TEXT, sliding_window=16),
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=image_token_id,
            boi_token_index=processor.tokenizer.boi_token_id,
            eoi_token_index=processor.tokenizer.eoi_token_id,
        )
        return tr.Gemma3ForConditionalGeneration(config)
    assert name == "idefics3"
    config = tr.Idefics3Config(
        vision_config=VISION | {"image_size": 16, "patch_size": 4},
        text_config=tr.LlamaConfig(**TEXT),
        image_token_id=image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return tr.Idefics3ForConditionalGeneration(config)
