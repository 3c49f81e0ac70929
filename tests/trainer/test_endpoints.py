"""(0, 1) is TRL's completion-only training and (1, 1) its full-sequence training, step by step."""

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from wit_trl import WITSFTConfig, WITSFTTrainer


pytestmark = pytest.mark.xdist_group("trainer_endpoints")
TYPES = [
    "prompt_completion",
    "conversational",
    "messages",
    "sharegpt",
    "text",
    "completion_mask",
    "assistant_masks",
    "labels",
    "input_ids",
]
MODES = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}


def losses_and_parameters(trainer):
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_same_training(trainer, expected, head):
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    losses, parameters = losses_and_parameters(trainer)
    expected_losses, expected_parameters = expected
    assert len(losses) == 3
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for parameter, expected_parameter, start in zip(parameters, expected_parameters, before, strict=True):
        if head == "trl_kernel":
            torch.testing.assert_close(parameter, expected_parameter, rtol=1e-6, atol=1e-8)
        else:  # rounds in another order, which Adam amplifies in single elements whose gradient is close to zero
            assert torch.linalg.norm(parameter - expected_parameter) < 1e-4 * torch.linalg.norm(expected_parameter)
        assert not torch.equal(parameter, start)


@pytest.fixture(scope="module")
def trained_by_trl():
    """Losses and parameters of TRL's trainings, which no kernel of ours changes, by what they are named."""
    return {}


WHOLE_GRID = [(mode, dataset_type, "nll") for mode in ("padded", "padding_free", "bfd") for dataset_type in TYPES]
# The other ways to pack see the same tokens, of whatever type the rows were
WHOLE_GRID += [(mode, dataset_type, "nll") for mode in ("bfd_split", "wrapped") for dataset_type in TYPES[:3]]
WHOLE_GRID += [(mode, dataset_type, "dft") for mode in ("padded", "bfd") for dataset_type in TYPES[:3]]
# A kernel knows neither the type of the data nor the mode, so with TRL's each of them comes once
EACH_ONCE = [case for case in WHOLE_GRID if case[0] == "padded" or case[1] == "prompt_completion"]


@pytest.mark.parametrize(
    ("head", "mode", "dataset_type", "loss_type"),
    [("one_pass", *case) for case in WHOLE_GRID] + [("trl_kernel", *case) for case in EACH_ONCE],
    indirect=["head"],
)
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0)])
def test_endpoints_equal_trl(
    head, weights, mode, dataset_type, loss_type, datasets_by_type, make_model, tokenizer, config_kwargs, trained_by_trl
):
    dataset, trl_dataset, completion_only, full_sequence = datasets_by_type[dataset_type]
    trl_arguments = completion_only if weights == (0.0, 1.0) else full_sequence
    if isinstance(trl_arguments, tuple):
        trl_dataset, trl_arguments = trl_arguments
    config_kwargs |= {**MODES[mode], "loss_type": loss_type}
    name = (weights, mode, dataset_type, loss_type)
    if name not in trained_by_trl:
        trainer = SFTTrainer(
            model=make_model(),
            args=SFTConfig(**config_kwargs, **trl_arguments),
            train_dataset=trl_dataset,
            processing_class=tokenizer,
        )
        trained_by_trl[name] = losses_and_parameters(trainer)
    trainer = WITSFTTrainer(
        model=make_model(),
        args=WITSFTConfig(prompt_loss_weight=weights[0], completion_loss_weight=weights[1], **config_kwargs),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    assert_same_training(trainer, trained_by_trl[name], head)


def test_dropped_and_shuffled_rows_are_those_of_trl(head, prompt_completion, make_model, tokenizer, config_kwargs):
    config_kwargs |= {"max_length": 20, "shuffle_dataset": True}
    kwargs = {"train_dataset": prompt_completion, "processing_class": tokenizer}
    expected = SFTTrainer(model=make_model(), args=SFTConfig(**config_kwargs), **kwargs)
    trainer = WITSFTTrainer(
        model=make_model(),
        args=WITSFTConfig(prompt_loss_weight=0.0, completion_loss_weight=1.0, **config_kwargs),
        **kwargs,
    )
    assert 0 < len(trainer.train_dataset) < len(prompt_completion)
    assert trainer.train_dataset["input_ids"][:] == expected.train_dataset["input_ids"][:]
    assert_same_training(trainer, losses_and_parameters(expected), head)


@pytest.mark.parametrize("formatted", [False, True])
def test_text_from_a_formatting_function_trains_as_in_trl(
    head, formatted, prompt_completion, make_model, tokenizer, config_kwargs
):
    questions = prompt_completion.rename_columns({"prompt": "question", "completion": "answer"})
    kwargs = {
        "train_dataset": questions,
        "processing_class": tokenizer,
        "formatting_func": lambda row: row["question"] + (row["answer"] if formatted else ""),
    }
    expected = SFTTrainer(model=make_model(), args=SFTConfig(**config_kwargs), **kwargs)
    trainer = WITSFTTrainer(
        model=make_model(), args=WITSFTConfig(completion_loss_weight=1.0, **config_kwargs), **kwargs
    )
    assert_same_training(trainer, losses_and_parameters(expected), head)


@pytest.mark.parametrize("mode", ["padded", "bfd"])
@pytest.mark.parametrize("dataset_type", TYPES)
def test_prepared_tokens_equal_trl_whatever_the_weights(
    dataset_type, mode, datasets_by_type, make_model, tokenizer, config_kwargs
):
    dataset, trl_dataset, _, full_sequence = datasets_by_type[dataset_type]
    config_kwargs |= MODES[mode]
    trl_arguments = full_sequence if isinstance(full_sequence, dict) else full_sequence[1]
    expected = SFTTrainer(
        make_model(), SFTConfig(**config_kwargs, **trl_arguments), train_dataset=trl_dataset, processing_class=tokenizer
    ).train_dataset
    masks = []
    for prompt_loss_weight, completion_loss_weight in ((0.2, 0.8), (1.0, 0.5)):
        prepared = WITSFTTrainer(
            make_model(),
            WITSFTConfig(
                prompt_loss_weight=prompt_loss_weight, completion_loss_weight=completion_loss_weight, **config_kwargs
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
        ).train_dataset
        if dataset_type != "labels":  # there TRL drops what truncation leaves without a label
            assert prepared["input_ids"][:] == expected["input_ids"][:]
        masks.append(prepared["completion_mask"][:])
    assert masks[0] == masks[1]
