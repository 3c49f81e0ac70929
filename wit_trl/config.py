"""`WITSFTConfig`: the weights and the form of the loss, and what contradicts them."""

import copy
import dataclasses
import numbers
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch.distributed import get_world_size, is_initialized
from transformers import TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from .loss.params import FUSED_HEADS
from .loss.token_factors import TOKEN_FACTORS
from .weights import COMPLETION_TURNS, MOST_PATTERNS, SPANS, WEIGHT_RANGE, StructureWeights, check_pattern, is_weight


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What decides about the weights of tokens, besides the data. A collator has the fields that it needs
STRUCTURE_SETTINGS = (
    "role_loss_weights",
    "span_loss_weights",
    "regex_loss_weights",
    "chat_template_loss_weight",
    "completion_turns",
)
WEIGHT_SETTINGS = ("prompt_loss_weight", "completion_loss_weight", *STRUCTURE_SETTINGS)
# What decides about the loss of a row, besides the data
LOSS_SETTINGS = (*WEIGHT_SETTINGS, "loss_type", "loss_divisor")
# The columns of each type of data set, but for plain text, whose column the user names
DATASET_COLUMNS = (("input_ids",), ("prompt", "completion"), ("conversations",), ("messages",))


def _setting(default: Any, text: str, choices: list[str] | None = None) -> Any:
    """Returns a field with the help of its flag. The docstring of the class says more."""
    return field(default=default, metadata={"help": text} | ({"choices": choices} if choices else {}))


@dataclass
class WITSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`WITSFTTrainer`].

    This class includes only the parameters that are specific to Weighted Instruction Tuning
    ([paper](https://huggingface.co/papers/2507.07817)). For all others, see [`~trl.SFTConfig`].

    Parameters:
        prompt_loss_weight (`float`, *optional*, defaults to `0.2`):
            Weight of a prompt token in the loss, λp in the paper. The paper advises 0 to 0.5.
        completion_loss_weight (`float`, *optional*, defaults to `0.8`):
            Weight of a completion token in the loss, λr (response) in the paper. The paper advises 0.5 to 1.
        role_loss_weights (`dict[str, float]`, *optional*):
            Factor for the weight of all tokens of a role, such as `{"system": 0, "tool": 0.5}`. The schemas of `tools`,
            and all else that the chat template writes because of them, belong to the role `"tools"`. Other roles have
            the factor 1.
        span_loss_weights (`dict[str, float]`, *optional*):
            Factors for what lies inside the assistant's turns, in prompt and completion alike: `"thinking"` (with its
            tags), `"tool_calls"` (with theirs), `"answer"` (the rest of what is said) and `"end_of_turn"` (the tokens
            that end the turn). Others have the factor 1. The losses of these spans are logged, too.
        regex_loss_weights (`dict[str, float]`, *optional*):
            Factors for what patterns of [`re`](https://docs.python.org/3/library/re.html) match in the contents of the
            completion, such as `{"\\boxed\{.*?\}": 3.0}`: for each token that holds a character of it. Those of
            several patterns multiply.
        chat_template_loss_weight (`float`, *optional*, defaults to `1.0`):
            Factor for the weight of the prompt tokens that the chat template writes itself: headers, separators, the
            end-of-turn token of a turn that is not the assistant's, a default system prompt. 0 leaves them out, as
            Instruction Modelling does ([paper](https://huggingface.co/papers/2405.14394)).
        completion_turns (`str`, *optional*, defaults to `"all"`):
            Which of the assistant's turns are completion: `"all"`; `"last"`, before which all is prompt; or
            `"last_round"`, all of them after the last turn of the user, so that the calls of an agent's last round
            stay. A row may have a column of this name, and `"completion": False` in a message makes it prompt.
        loss_type (`str`, *optional*, defaults to `"nll"`):
            Factor for the loss of each token in training: none (`"nll"`, or `"wit"`, another name of it), or its own
            probability, without gradient (`"dft"`, Dynamic Fine-Tuning,
            [paper](https://huggingface.co/papers/2508.05629)). Other factors: [`WITSFTTrainer.token_factors`].
        loss_divisor (`str`, *optional*, defaults to `"count"`):
            What the weighted sum is divided by: the number of tokens whose weight is not zero (`"count"`, that of the
            paper), or the sum of the weights of all tokens (`"weights"`, a weighted mean).
        fused_head (`str`, *optional*, defaults to `"auto"`):
            What computes the loss of the LM head: the kernel of this package (`"one_pass"`), TRL's (`"trl"`), or the
            first on a CPU and the second elsewhere (`"auto"`).
        print_weight_report (`bool`, *optional*, defaults to `True`):
            Whether training starts with a table of what is weighted, and with warnings of what is odd in it.

    One default differs from [`~trl.SFTConfig`]: where the device has no bfloat16, `bf16` left unset means `False`,
    while TRL asks for `bf16=False` or `use_cpu=True`.

    The pair (0, 1) is conventional completion-only training, (1, 1) training on the full sequence.

    Raises:
        `ValueError`: a weight is negative or not finite; both are zero; `completion_only_loss` contradicts them (`True`
        needs a prompt weight of 0, `False` two equal weights); a choice is none of those above; a pattern is wrong;
        `label_smoothing_factor` is not 0; `dataset_text_field` is a column that makes another type of data set; several
        processes were launched without a device for each.
    """

    _VALID_DICT_FIELDS: ClassVar = [
        *SFTConfig._VALID_DICT_FIELDS,
        "role_loss_weights",
        "span_loss_weights",
        "regex_loss_weights",
    ]

    prompt_loss_weight: float = _setting(0.2, "Weight of a prompt token (the paper's λp, advised range 0 to 0.5).")
    completion_loss_weight: float = _setting(0.8, "Weight of a completion token (its λr, advised range 0.5 to 1).")
    role_loss_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": 'Factor for the tokens of a role, such as \'{"system": 0, "tool": 0.5}\'.'}
    )
    span_loss_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Factor for spans of the assistant's turns, such as '{\"thinking\": 0.5}'."}
    )
    regex_loss_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Factor for what a pattern matches in the completion, as JSON."}
    )
    chat_template_loss_weight: float = _setting(
        1.0, "Factor for the weight of the prompt tokens that the chat template writes itself."
    )
    completion_turns: str = _setting("all", "Which turns of the assistant are completion.", [*COMPLETION_TURNS])
    loss_type: str = _setting(
        "nll",
        "Factor for the loss of each token in training: none (nll, wit), or its own probability (dft).",
        [*TOKEN_FACTORS, "chunked_nll"],  # TRL's old name of nll
    )
    loss_divisor: str = _setting(
        "count", "Divisor of the loss: the number of tokens with a weight, or their weights.", ["count", "weights"]
    )
    fused_head: str = _setting(
        "auto", "Kernel of the LM head: this package's, TRL's, or one by the device (auto).", [*FUSED_HEADS]
    )
    print_weight_report: bool = _setting(True, "Whether training starts with a table of what is weighted.")

    def __post_init__(self):
        if self.bf16 is None and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            self.bf16 = False
        super().__post_init__()
        if is_initialized() and get_world_size() > 1 and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                f"{get_world_size()} processes were launched, but there is no GPU for them, so each would train alone. "
                "Launch one process (accelerate_configs/single_device.yaml), or set `use_cpu=True` to train on several "
                "CPU processes together."
            )
        for name in ("prompt_loss_weight", "completion_loss_weight", "chat_template_loss_weight"):
            setattr(self, name, _check_loss_weight(getattr(self, name), f"`{name}`"))
        of_what = {"role_loss_weights": "roles", "span_loss_weights": "spans", "regex_loss_weights": "patterns"}
        for name, what in of_what.items():
            setattr(self, name, _check_loss_weights(getattr(self, name) or {}, name, what) or None)
        if unknown := sorted({*(self.span_loss_weights or {})} - {*SPANS[1:]}):
            raise ValueError(f"`span_loss_weights` names {unknown}, but the spans are {[*SPANS[1:]]}.")
        for pattern in self.regex_loss_weights or {}:
            check_pattern(pattern)
        if (patterns := len(self.regex_loss_weights or {})) > MOST_PATTERNS:
            raise ValueError(
                f"`regex_loss_weights` has {patterns} patterns, but may have {MOST_PATTERNS}. Join those of the same "
                "weight with `|`."
            )
        for name in ("completion_turns", "loss_type", "loss_divisor", "fused_head"):
            value, choices = getattr(self, name), type(self).__dataclass_fields__[name].metadata["choices"]
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}, but must be one of {choices}.")
        if self.loss_type == "wit":  # which TRL does not know
            self.loss_type = "nll"
        prompt, completion = self.prompt_loss_weight, self.completion_loss_weight
        if prompt == completion == 0:
            raise ValueError(
                "`prompt_loss_weight` and `completion_loss_weight` are both 0, so there is nothing to train on. Set at "
                "least one above 0: (0, 1) trains on completions only, (0.2, 0.8) is the default."
            )
        if self.completion_only_loss and prompt != 0:
            raise ValueError(
                f"`completion_only_loss=True` contradicts `prompt_loss_weight={prompt}`. Set `prompt_loss_weight=0` to "
                "train on completions only, or leave `completion_only_loss` unset to use the weights."
            )
        if self.completion_only_loss is False and prompt != completion:
            raise ValueError(
                f"`completion_only_loss=False` contradicts `prompt_loss_weight={prompt}` and `completion_loss_weight="
                f"{completion}`, which differ. Set both weights to 1 to train on the full sequence, or leave "
                "`completion_only_loss` unset to use the weights."
            )
        if self.label_smoothing_factor > 0:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` is not supported: the weighted loss has no "
                "smoothed form. Set it to 0 (the default)."
            )
        if any(self.dataset_text_field in columns for columns in DATASET_COLUMNS):
            raise ValueError(
                f"`dataset_text_field={self.dataset_text_field!r}` is not supported: a column of this name makes "
                "another type of data set. Rename the column, for example to `text`."
            )

    @property
    def structure_weights(self) -> StructureWeights:
        """What the structure of a conversation says of the weights of its tokens."""
        return StructureWeights.of(self)

    @property
    def loss_settings(self) -> dict[str, Any]:
        """A copy of what decides about the loss of a row, besides the data."""
        return {name: copy.deepcopy(getattr(self, name)) for name in LOSS_SETTINGS}

    def check_unchanged(self, made_with: dict[str, Any]) -> None:
        """Raises `ValueError` if the `loss_settings` are no longer those with which a trainer was made."""
        now = self.loss_settings
        if changed := [name for name in now if now[name] != made_with[name]]:
            pairs = ", ".join(f"`{name}` was {made_with[name]!r} and is {now[name]!r}" for name in changed)
            raise ValueError(
                f"The loss was changed after the trainer was made: {pairs}. Set it back, or make a new trainer: the "
                "data was prepared for the old settings."
            )

    @classmethod
    def of(cls, args: TrainingArguments | None, model: "str | PreTrainedModel") -> "WITSFTConfig":
        """
        Returns other arguments of a training with the default weights; without any, an output folder named after the
        model. A [`WITSFTConfig`] comes back as it is.

        Raises:
            `ValueError`: `args` has fields that this class has not.
        """
        if args is None:
            from ._upstream import get_config_model_id  # imports all of TRL, which the flags of a command do not need

            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            return cls(f"{model_name.split('/')[-1]}-WIT")
        if isinstance(args, cls):
            return args
        fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
        if added := fields.keys() - {f.name for f in dataclasses.fields(cls)}:
            raise ValueError(
                f"`args` is a `{type(args).__name__}` with fields of its own, {sorted(added)}. Make it a subclass of "
                "`WITSFTConfig`."
            )
        return cls(**fields)


def _check_loss_weights(weights: Any, name: str, what: str) -> dict[str, float]:
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"`{name}` is {weights!r}, but must be a dict of {what} with their weights.")
    return {key: _check_loss_weight(weight, f"`{name}[{key!r}]`") for key, weight in weights.items()}


def _check_loss_weight(weight: Any, name: str) -> float:
    if not isinstance(weight, numbers.Real) or not is_weight(weight):
        raise ValueError(f"{name} is {weight!r}, but {WEIGHT_RANGE}")
    return float(weight)  # numpy's numbers cannot be written to JSON
