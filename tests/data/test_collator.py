import pytest
import torch

from wit_trl import DataCollatorForWIT


EXAMPLES = [
    {"input_ids": [11, 12, 13, 14], "completion_mask": [0, 0, 1, 1]},
    {"input_ids": [15, 16], "completion_mask": [0, 1]},
]


def test_padded_batch():
    batch = DataCollatorForWIT(pad_token_id=0)(EXAMPLES)
    torch.testing.assert_close(batch["token_weights"], torch.tensor([[0, 0.2, 0.8, 0.8], [0, 0.8, 0, 0]]))
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14], [15, 16, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13, 14], [-100, 16, -100, -100]]
    assert batch["completion_mask"].tolist() == [[-100, 0, 1, 1], [-100, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("padding_free", [False, True])
def test_labels_are_ignored_exactly_where_the_weight_is_zero(weights, padding_free):
    collator = DataCollatorForWIT(
        pad_token_id=0, padding_free=padding_free, prompt_loss_weight=weights[0], completion_loss_weight=weights[1]
    )
    batch = collator(EXAMPLES)
    assert torch.equal(batch["labels"] == -100, batch["token_weights"] == 0)
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_first_token_of_flattened_document_has_no_weight():
    collator = DataCollatorForWIT(pad_token_id=0, padding_free=True, prompt_loss_weight=1, completion_loss_weight=1)
    batch = collator(EXAMPLES)
    assert batch["token_weights"].tolist() == [[0, 1, 1, 1, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert "attention_mask" not in batch


def test_first_token_of_packed_document_has_no_weight():
    packed = [{"input_ids": [1, 2, 3, 4, 5], "completion_mask": [0, 1, 0, 1, 1], "seq_lengths": [2, 3]}]
    collator = DataCollatorForWIT(pad_token_id=0, padding_free=True, prompt_loss_weight=1, completion_loss_weight=1)
    assert collator(packed)["labels"].tolist() == [[-100, 2, -100, 4, 5]]
    # Even when the first token of a document is completion
    packed[0]["completion_mask"] = [1, 1, 1, 1, 1]
    assert collator(packed)["completion_mask"].tolist() == [[-100, 1, -100, 1, 1]]


@pytest.mark.parametrize("padding_free", [False, True])
def test_padding_to_a_multiple_has_no_weight(padding_free):
    collator = DataCollatorForWIT(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=8)
    batch = collator(EXAMPLES)
    shape = (1, 8) if padding_free else (2, 8)
    for key in ("input_ids", "labels", "token_weights", "completion_mask"):
        assert batch[key].shape == shape
    assert (batch["token_weights"] != 0).sum() == 4  # six tokens, two of them the first of a document


def test_region_is_read_from_labels_when_there_is_no_mask():
    collator = DataCollatorForWIT(pad_token_id=0)
    from_labels = collator([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}])
    assert from_labels["completion_mask"].tolist() == [[-100, 0, 1]]
    all_completion = collator([{"input_ids": [1, 2, 3]}])
    assert all_completion["completion_mask"].tolist() == [[-100, 1, 1]]


def test_weights_are_not_rounded():
    collator = DataCollatorForWIT(pad_token_id=0, prompt_loss_weight=0.037, completion_loss_weight=1.9)
    torch.testing.assert_close(collator(EXAMPLES)["token_weights"][0], torch.tensor([0, 0.037, 1.9, 1.9]))


def test_packed_rows_are_flattened_even_in_padded_mode():
    packed = [{"input_ids": [1, 2, 3, 4, 5], "completion_mask": [0, 1, 0, 1, 1], "seq_lengths": [2, 3]}]
    batch = DataCollatorForWIT(pad_token_id=0)([*packed, *packed])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2] * 2]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5] * 2]
    assert batch["example_lengths"].tolist() == [5, 5]


def test_boolean_masks_and_padding_in_the_data():
    example = {
        "input_ids": [5, 6, 7, 0],
        "completion_mask": [False, False, True, False],
        "attention_mask": [1, 1, 1, 0],
    }
    batch = DataCollatorForWIT(pad_token_id=0)([example, EXAMPLES[0]])
    assert batch["completion_mask"][0].tolist() == [-100, 0, 1, -100]


def test_wrong_regions_are_refused():
    with pytest.raises(ValueError, match=r"`completion_mask` holds \[0\.5\]"):
        DataCollatorForWIT(pad_token_id=0)([{"input_ids": [5, 6], "completion_mask": [0, 0.5]}])
    with pytest.raises(ValueError, match=r"`completion_mask` has 1 entries, but `input_ids` has 2"):
        DataCollatorForWIT(pad_token_id=0)([{"input_ids": [5, 6], "completion_mask": [1]}])
