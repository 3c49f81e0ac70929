import json
import re

import numpy as np
import pytest
from trl import TrlParser

from wit_trl import WITSFTConfig


@pytest.mark.parametrize("name", ["prompt_loss_weight", "completion_loss_weight"])
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "0.2", 1e39, 1e-50, 5e-13])
def test_weight_must_be_finite_and_not_negative(name, weight):
    with pytest.raises(
        ValueError, match=rf"`{name}` is {re.escape(repr(weight))}, but a weight must be .* 0, or 1e-12 to 1e\+38"
    ):
        WITSFTConfig(**{name: weight})


def test_both_weights_zero_is_refused():
    with pytest.raises(ValueError, match=r"both 0, so there is nothing to train on\. Set at least one above 0"):
        WITSFTConfig(prompt_loss_weight=0, completion_loss_weight=0)


def test_completion_only_loss_needs_a_prompt_weight_of_zero():
    with pytest.raises(ValueError, match=r"`completion_only_loss=True` contradicts .* Set `prompt_loss_weight=0`"):
        WITSFTConfig(completion_only_loss=True)
    WITSFTConfig(completion_only_loss=True, prompt_loss_weight=0)


def test_full_sequence_loss_needs_equal_weights():
    with pytest.raises(ValueError, match=r"`completion_only_loss=False` contradicts .* Set both weights to 1"):
        WITSFTConfig(completion_only_loss=False)
    WITSFTConfig(completion_only_loss=False, prompt_loss_weight=0.5, completion_loss_weight=0.5)


@pytest.mark.parametrize("name", ["loss_type", "loss_divisor", "fused_head", "completion_turns"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` is 'other', but must be one of \['"):
        WITSFTConfig(**{name: "other"})


def test_loss_types_of_trl_and_the_name_of_its_proposal():
    assert [WITSFTConfig(loss_type=name).loss_type for name in ("nll", "dft", "wit")] == ["nll", "dft", "nll"]


def test_label_smoothing_is_refused():
    with pytest.raises(ValueError, match=r"`label_smoothing_factor=0\.1` is not supported.* Set it to 0"):
        WITSFTConfig(label_smoothing_factor=0.1)


def test_weights_come_from_the_command_line_and_from_yaml(tmp_path):
    yaml = tmp_path / "config.yaml"
    yaml.write_text("prompt_loss_weight: 0.3\ncompletion_loss_weight: 0.6\n")
    parser = TrlParser(WITSFTConfig)
    (config,) = parser.parse_args_and_config(["--config", str(yaml), "--completion_loss_weight", "0.7"])
    assert (config.prompt_loss_weight, config.completion_loss_weight) == (0.3, 0.7)


def test_bf16_defaults_to_what_the_device_has(monkeypatch):
    monkeypatch.setattr("wit_trl.config.is_torch_bf16_gpu_available", lambda: False)
    assert WITSFTConfig().bf16 is False
    assert WITSFTConfig(use_cpu=True).bf16 is True  # as in TRL: bfloat16 autocast runs on CPU when asked for


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(1), 1])
def test_weight_may_be_any_real_number(number):
    config = WITSFTConfig(prompt_loss_weight=number, bf16=False)
    assert config.prompt_loss_weight == number
    assert json.loads(config.to_json_string())["prompt_loss_weight"] == number


@pytest.mark.parametrize("column", ["prompt", "completion", "messages"])
def test_text_field_of_another_type_of_data_is_refused(column):
    with pytest.raises(ValueError, match=rf"`dataset_text_field='{column}'` is not supported.* Rename the column"):
        WITSFTConfig(dataset_text_field=column)
