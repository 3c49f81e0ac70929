"""
Data with images: which tokens are completion, prompt or never a target, and how much each weighs.

The processors are those of `vision_families`. Not among them, because their image processors need torchvision: Pixtral
(and so Mistral 3), LFM2-VL, Llama 4, Cohere 2 Vision, Perception LM. PaliGemma's refuses a completion without an image,
which is how TRL passes them.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl.chat_template_utils import has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from wit_trl import DataCollatorForVisionLanguageWIT, WITSFTConfig
from wit_trl.conversation.chat_template import training_chat_template
from wit_trl.data.training_rows import check_image_rows
from wit_trl.weights import SPANS

from ..vision_families import FAMILIES, make_processor


pytestmark = pytest.mark.xdist_group("vision_data_collator")
WEIGHTS = {"prompt_loss_weight": 0.25, "completion_loss_weight": 0.75}
ANSWERS = (["Answer one, two.", "The second."], ["Return nothing."])


def picture(height, width):
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8))


def turns(answers):
    return [
        message
        for question, answer in zip(("What is it?", "More?"), answers, strict=False)
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def examples(kind):
    """Two examples, with images of different shapes."""
    first, second = turns(ANSWERS[0]), turns(ANSWERS[1])
    images = picture(30, 40), picture(40, 20)
    if kind == "messages":
        return [{"messages": first, "images": [images[0]]}, {"messages": second, "images": [images[1]]}]
    return [
        {"prompt": first[:3], "completion": first[3:], "image": images[0]},
        {"prompt": second[:1], "completion": second[1:], "image": images[1]},
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return FAMILIES[name]


@pytest.fixture(scope="module")
def processor(name):
    return make_processor(name)


@pytest.fixture(scope="module")
def llava():
    return make_processor("llava")


@pytest.fixture(scope="module")
def qwen():
    return make_processor("qwen2_5_vl")


def runs(processor, input_ids, selected):
    """The text of each run of selected tokens."""
    texts, run = [], []
    for token, is_selected in zip([*input_ids.tolist(), 0], [*selected.tolist(), False], strict=True):
        if is_selected:
            run.append(token)
        elif run:
            texts.append(processor.tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_completion_is_the_answer_and_its_end_of_turn(kind, name, family, processor):
    batch = DataCollatorForVisionLanguageWIT(processor)(examples(kind))
    for answers, input_ids, region in zip(ANSWERS, batch["input_ids"], batch["completion_mask"], strict=True):
        if kind == "prompt_completion":
            answers = answers[-1:]
        expected = [answer + family.end_of_turn for answer in answers]
        if name == "glm46v":  # which ends a turn by the header of the next
            expected[-1] = answers[-1]
        if (
            name == "mllama" and kind == "prompt_completion"
        ):  # the processor puts it before every text, so TRL trains it
            expected[-1] = "<s>" + expected[-1]
        assert [text.strip() for text in runs(processor, input_ids, region == 1)] == expected


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_what_stands_for_an_image_is_never_a_target(kind, family, processor):
    batch = DataCollatorForVisionLanguageWIT(processor)(examples(kind))
    placeholders = torch.tensor(processor.tokenizer.convert_tokens_to_ids(family.placeholders))
    never = torch.isin(batch["input_ids"], placeholders)
    assert (never.sum(1) > 0).all()
    never |= batch["attention_mask"] == 0
    never[:, 0] = True
    region = batch["completion_mask"]
    torch.testing.assert_close(region == -100, never)
    assert set(region.unique().tolist()) == {-100, 0, 1}
    torch.testing.assert_close(batch["token_weights"], 0.2 * (region == 0) + 0.8 * (region == 1))
    torch.testing.assert_close(batch["labels"], batch["input_ids"].masked_fill(never, -100))


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_spans_and_patterns_have_weights(kind, name, family, processor):
    plain = DataCollatorForVisionLanguageWIT(processor)(examples(kind))
    settings = {"span_loss_weights": {"answer": 0.5, "end_of_turn": 2.0}, "regex_loss_weights": {r"\w+": 3.0}}
    collator = DataCollatorForVisionLanguageWIT(processor, **settings)
    if name == "mllama" and kind == "prompt_completion":  # the processor puts `<s>` before the completion
        with pytest.raises(ValueError, match="or what is inside them, have different weights, but its tokens"):
            collator(examples(kind))
        return
    batch = collator(examples(kind))
    for answers, input_ids, region, codes in zip(
        ANSWERS, batch["input_ids"], batch["completion_mask"], batch["token_spans"], strict=True
    ):
        said = runs(processor, input_ids, codes % 8 == SPANS.index("answer"))
        assert [text.strip() for text in said] == answers
        ends = runs(processor, input_ids, codes % 8 == SPANS.index("end_of_turn"))
        if name != "glm46v":  # which ends a turn by the header of the next
            assert [text.strip() for text in ends] == [family.end_of_turn] * len(answers)
        matched = codes >> 3 & 1 == 1
        assert (region[matched] == 1).all()
        assert "".join(runs(processor, input_ids, matched))
    factors = torch.tensor([1.0, 1.0, 1.0, 0.5, 2.0])[batch["token_spans"] % 8]
    factors = torch.where(batch["token_spans"] >> 3 & 1 == 1, 3 * factors, factors)
    torch.testing.assert_close(batch["token_weights"], plain["token_weights"] * factors)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_batch_is_that_of_trl(kind, processor):
    # With the weights (0, 1) the labels too; where TRL finds the completion
    found = kind == "prompt_completion" or has_generation_markers(training_chat_template(processor))
    expected = DataCollatorForVisionLanguageModeling(
        processor,
        completion_only_loss=kind == "prompt_completion",
        assistant_only_loss=kind == "messages" and found,
        chat_template=training_chat_template(processor) if kind == "messages" else None,
    )(examples(kind))
    batch = DataCollatorForVisionLanguageWIT(processor, prompt_loss_weight=0, completion_loss_weight=1)(examples(kind))
    assert set(batch) - set(expected) == {"completion_mask", "token_weights"}
    for key, value in expected.items():
        if key != "labels" or found:
            torch.testing.assert_close(batch[key], value)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_examples_are_not_changed(kind, processor):
    rows = examples(kind)
    collator = DataCollatorForVisionLanguageWIT(processor)
    first, second = collator(rows), collator(rows)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value)
    for row, original in zip(rows, examples(kind), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("image")} == {
            k: v for k, v in original.items() if not k.startswith("image")
        }
        assert list(row) == list(original)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_weights_of_the_data_multiply_those_of_the_regions(kind, processor):
    plain = DataCollatorForVisionLanguageWIT(processor, **WEIGHTS)(examples(kind))
    rows = examples(kind)
    first = rows[0]["messages"] if kind == "messages" else rows[0]["prompt"] + rows[0]["completion"]
    for message, weight in zip(first, (None, 0.5, 1.5, 0), strict=True):
        message["weight"] = weight
    rows[1]["weight"] = 2
    batch = DataCollatorForVisionLanguageWIT(processor, **WEIGHTS)(rows)
    torch.testing.assert_close(batch["input_ids"], plain["input_ids"])
    torch.testing.assert_close(batch["completion_mask"], plain["completion_mask"])
    torch.testing.assert_close(batch["token_weights"][1], 2 * plain["token_weights"][1])
    ratio = batch["token_weights"][0] / plain["token_weights"][0]

    def weighing(weight):
        return " ".join(runs(processor, batch["input_ids"][0], ratio == weight))

    assert set(ratio[~ratio.isnan()].tolist()) == {1, 0.5, 1.5, 0}
    assert "What is it?" in weighing(1)
    assert "Answer one, two." in weighing(0.5)
    assert "More?" in weighing(1.5)
    assert "The second." in weighing(0)
    for text, weight in (("What", 1), ("Answer", 0.5), ("More", 1.5), ("second", 0)):
        assert all(text not in weighing(other) for other in {1, 0.5, 1.5, 0} - {weight})
    assert (batch["labels"] != -100).equal(batch["token_weights"] != 0)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_same_weight_of_all_messages_is_that_of_the_row(kind, llava):
    weighted = examples(kind)
    for row in weighted:
        for message in row["messages"] if kind == "messages" else row["prompt"] + row["completion"]:
            message["weight"] = 0.5
    expected = DataCollatorForVisionLanguageWIT(llava)([{**row, "weight": 0.5} for row in examples(kind)])
    batch = DataCollatorForVisionLanguageWIT(llava)(weighted)
    assert batch["token_weights"].unique().tolist() == pytest.approx([0, 0.1, 0.4])
    torch.testing.assert_close(batch["token_weights"], expected["token_weights"])


def test_examples_without_an_image(processor):
    collator = DataCollatorForVisionLanguageWIT(processor)
    for images in ([[picture(30, 40)], []], [[], []]):
        rows = [{"messages": turns(answers), "images": image} for answers, image in zip(ANSWERS, images, strict=True)]
        batch = collator(rows)
        for answers, input_ids, region in zip(ANSWERS, batch["input_ids"], batch["completion_mask"], strict=True):
            texts = runs(processor, input_ids, region == 1)
            assert len(texts) == len(answers)
            assert all(answer in text for answer, text in zip(answers, texts, strict=True))
    row = {"messages": turns(ANSWERS[0])}
    expected = collator([{**row, "images": []}])
    for without in ({"images": None}, {"image": None}, {}):
        torch.testing.assert_close(collator([{**row, **without}])["labels"], expected["labels"])


@pytest.mark.parametrize("max_length", [12, 30, 40, 50])
@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_truncation_cuts_weights_with_tokens(model, kind, max_length, request):
    # With a template whose turns are found by rendering, and with one that marks them; without images, to cut anywhere
    processor = request.getfixturevalue(model)
    rows = [{**row, "image": None, "images": []} for row in examples(kind)]
    messages = rows[0]["messages"] if kind == "messages" else rows[0]["prompt"]
    messages[1]["weight"] = 0.5
    whole = DataCollatorForVisionLanguageWIT(processor)(rows)
    batch = DataCollatorForVisionLanguageWIT(processor, max_length=max_length)(rows)
    assert batch["input_ids"].size(1) == max_length < whole["input_ids"].size(1)
    for key, value in batch.items():
        torch.testing.assert_close(value, whole[key][:, :max_length])


def test_every_token_of_a_text_is_completion(llava):
    rows = [{"text": "<image>\nWhat is it?", "image": picture(30, 40)}, {"text": "A text.", "image": None, "weight": 3}]
    batch = DataCollatorForVisionLanguageWIT(llava, **WEIGHTS)(rows)
    assert runs(llava, batch["input_ids"][0], batch["completion_mask"][0] == 1) == ["\nWhat is it?"]
    assert batch["token_weights"].unique().tolist() == [0, 0.75, 2.25]


def test_prompt_and_completion_of_text(llava):
    rows = [
        {"prompt": "<image>What is it?", "completion": " A test.", "images": [picture(30, 40)]},
        {"prompt": "What?", "completion": " No.", "images": []},
    ]
    batch = DataCollatorForVisionLanguageWIT(llava)(rows)
    for row, input_ids, region in zip(rows, batch["input_ids"], batch["completion_mask"], strict=True):
        assert runs(llava, input_ids, region == 1) == [row["completion"]]


def test_turns_of_a_completion_have_their_own_weights(qwen):
    messages = turns(ANSWERS[0])
    rows = [{"prompt": messages[:1], "completion": messages[1:], "images": [picture(30, 40)]}]
    plain = DataCollatorForVisionLanguageWIT(qwen)(rows)
    messages[3]["weight"] = 0.5
    batch = DataCollatorForVisionLanguageWIT(qwen)(rows)
    ratio = batch["token_weights"] / plain["token_weights"]
    assert runs(qwen, batch["input_ids"][0], ratio[0] == 0.5) == ["<|im_start|>assistant\nThe second.<|im_end|>\n"]


def test_turns_of_a_completion_that_is_tokenized_apart_are_refused(qwen):
    messages = turns(ANSWERS[0])
    messages[1]["content"] = "\n    So."  # merges with the header's line break in the whole conversation
    messages[3]["weight"] = 0.5
    rows = [{"prompt": messages[:1], "completion": messages[1:], "images": []}]
    with pytest.raises(ValueError, match=r"its turns cannot be found\. Pass the conversation as `messages`"):
        DataCollatorForVisionLanguageWIT(qwen)(rows)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_turns_of_sharegpt_give_the_same_batch(kind, llava):
    names = {"user": "human", "assistant": "gpt"}

    def as_sharegpt(value):
        is_turns = isinstance(value, list) and isinstance(value[0], dict)
        return [{"from": names[turn["role"]], "value": turn["content"]} for turn in value] if is_turns else value

    collator = DataCollatorForVisionLanguageWIT(llava)
    expected = collator(examples(kind))
    batch = collator([{key: as_sharegpt(value) for key, value in row.items()} for row in examples(kind)])
    assert (batch["completion_mask"] == 1).any(1).all()
    for name in ("input_ids", "completion_mask", "token_weights", "labels"):
        assert torch.equal(batch[name], expected[name]), name


@pytest.mark.parametrize("weight", ["0.5", -1, float("nan"), float("inf"), [1]])
@pytest.mark.parametrize("of", ["row", "message"])
def test_wrong_weight_is_refused(of, weight, llava):
    rows = examples("messages")
    (rows[1] if of == "row" else rows[1]["messages"][1])["weight"] = weight
    with pytest.raises(ValueError, match=r"Example 1 of the batch, .*What is.*`weight` .*is .* (a finite|one) number"):
        DataCollatorForVisionLanguageWIT(llava)(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "`prompt` is missing or None"),
        ({"messages": None}, "`messages` is missing or None"),
        ({"prompt": turns(["a"])[:1], "completion": None}, "`completion` is missing or None"),
        ({"text": None}, "`text` is missing or None"),
        ({"messages": []}, "`messages` must be a list of messages"),
        ({"messages": turns(["a"])[:1]}, "`messages` has no assistant turn"),
        ({"prompt": turns(["a"])[:1], "completion": turns(["a"])[:1]}, "`completion` has no assistant turn"),
        ({"messages": [{"content": "a"}]}, r"turn 0 of `messages` must have a `role`"),
        ({"messages": turns([None])}, r"turn 1 of `messages` \(assistant\) must have a `content`"),
        ({"messages": turns([[{"text": "a"}]])}, r"turn 1 of `messages` \(assistant\) has the part {'text': 'a'}"),
        ({"messages": turns([[{"type": "text", "text": None}]])}, "has the part {'type': 'text', 'text': None}"),
        ({"messages": [{"role": "user"}]}, r"turn 0 of `messages` \(user\) must have a `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *turns(["a"])]}, "Number of images provided"),
    ],
)
def test_incomplete_example_is_refused(row, message, llava):
    with pytest.raises(ValueError, match=message):
        DataCollatorForVisionLanguageWIT(llava)([{"images": [], **row}])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 3}, "`images` must be a list, but is 3. Name a single one `image`"),
        ({"images": ["missing.png"]}, "missing.png"),
        ({"images": [None]}, "no images were passed"),
    ],
)
def test_image_that_cannot_be_read_is_refused_by_example(wrong, message, llava):
    rows = examples("messages")
    rows[1] |= wrong
    with pytest.raises(ValueError, match=rf"^Example 1 of the batch, .*({message})"):
        DataCollatorForVisionLanguageWIT(llava)(rows)


def test_batch_without_a_token_is_refused(llava):
    with pytest.raises(ValueError, match="No example of the batch has a token"):
        DataCollatorForVisionLanguageWIT(llava)([{"text": "", "images": []}])


def test_text_beside_prompt_and_completion_is_left_out(llava):
    row = {"prompt": "<image>What is it? ", "completion": "A test.", "text": "<image>a caption"}
    batch = DataCollatorForVisionLanguageWIT(llava)([{**row, "images": examples("messages")[0]["images"][:1]}])
    assert runs(llava, batch["input_ids"][0], batch["completion_mask"][0] == 1) == ["A test."]


def test_conversations_without_a_template_are_refused(llava):
    processor = make_processor("llava")
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"there is no chat template, or no default one\. Set `chat_template_path`"):
        DataCollatorForVisionLanguageWIT(processor)(examples("messages"))


def test_template_whose_marks_leave_out_the_answer_is_refused(llava):
    template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match=r"Example 0 of the batch, .*marks no token of the assistant's turns"):
        DataCollatorForVisionLanguageWIT(llava, chat_template=template)([{"messages": turns(["a"]), "images": []}])


def test_image_in_each_turn_gives_the_same_answers_or_is_refused(name, family, processor):
    messages = turns(ANSWERS[0])
    for turn in (0, 2):
        text = {"type": "text", "text": messages[turn]["content"]}
        messages[turn] = {**messages[turn], "content": [{"type": "image"}, text]}
    example = {"messages": messages, "images": [picture(30, 40), picture(40, 20)]}
    collator = DataCollatorForVisionLanguageWIT(processor)
    if name == "llava_onevision":
        with pytest.raises(ValueError, match="the first turns alone have other tokens than in the whole conversation"):
            collator([example])
        return
    batch = collator([example])
    expected = [answer + family.end_of_turn for answer in ANSWERS[0]]
    if name == "glm46v":
        expected[-1] = ANSWERS[0][-1]
    found = runs(processor, batch["input_ids"][0], batch["completion_mask"][0] == 1)
    assert [text.strip() for text in found] == expected


def test_image_in_a_later_row_only(name, processor):
    first, second = examples("messages")
    rows = [{**first, "images": []}, second]
    collator = DataCollatorForVisionLanguageWIT(processor)
    both, alone = collator(rows), [collator([row]) for row in rows]
    for position, batch in enumerate(alone):
        length = batch["input_ids"].size(1)
        for column in ("input_ids", "completion_mask", "token_weights"):
            assert both[column][position, :length].tolist() == batch[column][0].tolist()


def test_system_column_and_arguments_as_json():
    processor = make_processor("qwen3_vl")
    collator = DataCollatorForVisionLanguageWIT(processor)
    batches = []
    for arguments in ({"x": 1}, '{"x": 1}'):
        (example, _) = examples("messages")
        call = {"type": "function", "function": {"name": "f0", "arguments": arguments}}
        example["messages"] = [*example["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
        batches.append(collator([{**example, "system": "BE KIND"}]))
    text = processor.tokenizer.decode(batches[0]["input_ids"][0])
    assert "system\nBE KIND" in text
    assert '"arguments": {"x": 1}' in text
    assert batches[1]["input_ids"].tolist() == batches[0]["input_ids"].tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_null_arguments_that_arrow_adds_are_left_out_and_told(streaming, tmp_path, caplog):
    processor = make_processor("qwen3_vl")
    collator, rows = DataCollatorForVisionLanguageWIT(processor), examples("messages")
    for row, arguments in zip(rows, ({"x": 1}, {"text": "hi"}), strict=True):
        call = {"type": "function", "function": {"name": "f0", "arguments": arguments}}
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    data = Dataset.from_list(rows)
    check_image_rows(data.to_iterable_dataset() if streaming else data, collator, WITSFTConfig(tmp_path, use_cpu=True))
    assert "Row 0 of the train dataset: in turn 1 of `messages`, the argument 'text' of the call of 'f0'" in caplog.text
    assert '"arguments": {"x": 1}' in processor.tokenizer.decode(collator([data[0]])["input_ids"][0])
