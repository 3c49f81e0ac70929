"""
The one answer to "what is this token": the region and the data weight of each token of a conversation.

1. The regions come from what is marked as completion, or from the assistant's turns where nothing is marked.
2. `completion_turns="last"` leaves only the last answer in the completion.
3. Messages, their roles, and who writes a token (a message or the chat template) have weights, which multiply.

Text rows call `weigh_conversation` as they are prepared, rows with images as their batch is made.
"""

import difflib
import itertools

import numpy as np

from ..weights import StructureWeights
from .messages import message_texts, missing_end
from .parts import Span
from .token_positions import TokenPositions
from .turns import Conversation


def weigh_conversation(
    conversation: Conversation,
    input_ids: list[int],  # or the first of them
    marked: list[int] | None,
    structure: StructureWeights,
    first_answer: int = 0,
) -> tuple[list[int], np.ndarray]:
    """
    Returns the region of each token, 1 completion or 0 prompt, and its data weight, in float32.

    `marked` has 1 for each token that is marked as completion, by the chat template or because it follows the prompt,
    else 0. Where nothing marks tokens (`None`), the assistant's turns are the completion. The completion of a
    prompt-completion row begins with the turn `first_answer`.

    Raises:
        `ValueError`: it cannot be told where a turn begins or ends that has a region or a weight of its own, or what
        the template writes, where this has a weight.
    """
    only_last = structure.completion_turns == "last"
    answers = [turn for turn in conversation.answers() if turn >= first_answer]
    if only_last:
        answers = answers[-1:]
    regions = marked
    if regions is None:
        regions = conversation.assistant_masks(input_ids, only_last)
    elif only_last and first_answer < len(conversation.messages) - 1:
        turn, positions = answers[-1], conversation.positions(input_ids)
        if first_answer:  # the completion has the headers of its turns too
            start, end = conversation.answer(turn, positions)
        else:  # the template tells a header from an answer
            start, end = positions.at(conversation.start_of_turn(turn), turn), conversation.end_of_turn(turn, positions)
        regions = [region if start <= position < end else 0 for position, region in enumerate(regions)]
    return regions, _data_weights(conversation, input_ids, regions, structure, answers)


def _data_weights(
    conversation: Conversation,
    input_ids: list[int],
    regions: list[int],
    structure: StructureWeights,
    answers: list[int],
) -> np.ndarray:
    messages, tools = conversation.messages, conversation.template_kwargs["tools"]
    of_messages = [1.0 if message.get("weight") is None else message["weight"] for message in messages]
    of_roles = [structure.role_loss_weights.get(message["role"], 1.0) for message in messages]
    of_tools = structure.role_loss_weights.get("tools", 1.0) if tools else 1.0
    template_weight = structure.chat_template_loss_weight
    if {*of_messages, *of_roles, of_tools, template_weight} == {1}:
        return np.ones(len(input_ids), np.float32)
    positions = conversation.positions(input_ids)
    weights = _spread(conversation, of_roles, "role weight", positions)
    need_schemas = tools and (structure.role_loss_weights or template_weight != 1)
    of_schemas = _tools(conversation, positions) if need_schemas else []
    for start, end in of_schemas:
        weights[start:end] = of_tools
    weights *= _spread(conversation, of_messages, "`weight`", positions)
    if template_weight != 1:
        of_template = np.where(np.asarray(regions) == 0, np.float32(template_weight), 1)
        for start, end in [*of_schemas, *_contents(conversation, positions, answers)]:
            of_template[start:end] = 1
        weights *= of_template
    return weights


def _spread(conversation: Conversation, of_turns: list[float], name: str, positions: TokenPositions) -> np.ndarray:
    """Returns the weight of each token from those of the turns."""
    weights = np.full(positions.count, of_turns[-1], np.float32)
    start = 0
    for turn, (weight, following) in enumerate(itertools.pairwise(of_turns)):
        if weight == following:  # it does not matter which of the two a token belongs to
            continue
        try:
            character, end = conversation.start_of_turn(turn + 1), conversation.end_of_turn(turn, positions)
        except ValueError as error:
            raise ValueError(
                f"turn {turn} has another {name} than the next one, but where it ends cannot be told. Give both the "
                f"same. The reason: {error}"
            ) from error
        if _is_inside_the_next(conversation, turn, character):
            raise ValueError(
                f"the chat template renders turn {turn} ({conversation.messages[turn]['role']}) inside the next one, "
                f"so it cannot have a {name} of its own. Give both the same."
            )
        weights[start:end] = weight
        start = end
    return weights


def _is_inside_the_next(conversation: Conversation, turn: int, start_of_next: int) -> bool:
    if conversation.spans is not None:
        return start_of_next < conversation.spans[turn][1]
    return missing_end(message_texts(conversation.messages[turn]), conversation.text[:start_of_next]) is not None


def _contents(conversation: Conversation, positions: TokenPositions, answers: list[int]) -> list[Span]:
    """Returns the tokens of the contents. An answer that is none of the `answers` is prompt, and counts as a whole."""
    if conversation.spans is None:
        raise ValueError(
            "the chat template changes what messages say, so what it writes itself cannot be told. Choose another "
            "template (`chat_template_path`), or set `chat_template_loss_weight=1`."
        )
    contents = []
    for turn, message in enumerate(conversation.messages):
        start, end = conversation.spans[turn]
        if message["role"] == "assistant" and turn not in answers:
            contents.append(conversation.answer(turn, positions))
        elif end:  # of an answer too: some templates mark the last one alone
            contents.append((positions.at(start, turn + 1), positions.past(end, turn + 1)))
    return contents


def _tools(conversation: Conversation, positions: TokenPositions) -> list[Span]:
    """Returns the tokens that the template writes because of the `tools`."""
    without = conversation.without_tools()
    if conversation.spans is None or without.spans is None:
        raise ValueError(
            "the chat template changes what messages say, so where it writes the `tools` cannot be told. Choose "
            "another template (`chat_template_path`), or leave `role_loss_weights` and `chat_template_loss_weight` "
            "unset."
        )
    found = []
    gaps = zip(_gaps(conversation.spans, conversation.text), _gaps(without.spans, without.text), strict=True)
    for (start, written), (_, written_without) in gaps:
        matcher = difflib.SequenceMatcher(None, written_without, written, autojunk=False)
        for change, *_, first, last in matcher.get_opcodes():
            if change in ("replace", "delete"):
                raise ValueError(
                    "the chat template writes other things too where there are `tools`, so they have no weight of "
                    "their own. Choose another template (`chat_template_path`), or leave `role_loss_weights` and "
                    "`chat_template_loss_weight` unset."
                )
            if change == "insert":
                found.append((positions.at(start + first, 0), positions.at(start + last, 0)))
    return found


def _gaps(spans: list[Span], text: str) -> list[tuple[int, str]]:
    """Returns what is before, between and after the contents, each with the position of its first character."""
    contents = [span for span in spans if span[1]]
    starts, ends = [0, *(end for _, end in contents)], [*(start for start, _ in contents), len(text)]
    return [(start, text[start:end]) for start, end in zip(starts, ends, strict=True)]
