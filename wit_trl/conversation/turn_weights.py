"""
The one answer to "what is this token": the region and the data weight of each token of a conversation.

1. The regions come from what is marked as completion, or from the assistant's turns where nothing is marked.
2. `completion_turns` and messages say which of the answers stay in the completion.
3. Messages, their roles, who writes a token (a message or the chat template), spans of turns, parts of contents and
   what patterns match have weights, which multiply.

Text rows call `weigh_conversation` as they are prepared, rows with images as their batch is made.
"""

import difflib
import itertools
from typing import NamedTuple

import numpy as np

from ..weights import COMPLETION_TURNS, PATTERN_BIT, SPANS, StructureWeights
from .messages import message_texts, missing_end
from .parts import Span
from .patterns import matches
from .spans import contents_of, spans_of_turn, weighed_characters
from .token_positions import TokenPositions
from .turns import Conversation


class Weighed(NamedTuple):
    """What a token of a conversation is, one entry for each."""

    regions: list[int]  # 1 completion, 0 prompt
    weights: np.ndarray  # of the data, float32
    spans: np.ndarray | None = None  # codes of `SPANS` and patterns, int32, if they have weights
    thinking_left_out: int = 0  # number of turns whose thinking the template does not write


def weigh_conversation(
    conversation: Conversation,
    input_ids: list[int],  # or the first of them
    marked: list[int] | None,
    structure: StructureWeights,
    first_answer: int = 0,
) -> Weighed:
    """
    Returns what each token is, and what it weighs in the data.

    `marked` has 1 for each token that is marked as completion, by the chat template or because it follows the prompt,
    else 0. Where nothing marks tokens (`None`), the assistant's turns are the completion. The completion of a
    prompt-completion row begins with the turn `first_answer`.

    Raises:
        `ValueError`: it cannot be told where a turn begins or ends that has a region or a weight of its own, or what
        the template writes, where this has a weight, or where a span is that has one.
    """
    which = conversation.completion_turns or structure.completion_turns
    of_row = [turn for turn in conversation.answers() if turn >= first_answer]
    answers = _completion(conversation, of_row, which)
    regions = marked
    if regions is None:
        regions = conversation.assistant_masks(input_ids, answers)
    elif answers != of_row or (which != "all" and first_answer < len(conversation.messages) - 1):
        regions = _only(conversation, input_ids, regions, answers, first_answer)
    weights = _data_weights(conversation, input_ids, regions, structure, answers)
    if not structure.has_spans and not conversation.part_weights:
        return Weighed(regions, weights)
    positions = conversation.positions(input_ids)
    for turn, start, end, weight in weighed_characters(conversation):
        weights[positions.first_from(start, turn + 1) : positions.first_from(end, turn + 1)] *= np.float32(weight)
    if not structure.has_spans:
        return Weighed(regions, weights)
    spans, left_out = _spans(conversation, positions, regions, structure, answers)
    weights *= span_factors(spans, structure)
    return Weighed(regions, weights, spans, left_out)


def span_factors(spans: np.ndarray, structure: StructureWeights) -> np.ndarray:
    """Returns what multiplies the weight of each token because of its span and of the patterns that it matches."""
    factors = np.ones(len(spans), np.float32)
    for _, weight, in_span in structure.tokens_of_spans(spans):
        factors[in_span] *= np.float32(1 if weight is None else weight)
    return factors


def _completion(conversation: Conversation, answers: list[int], which: str) -> list[int]:
    """Returns those of the assistant's turns that are completion."""
    if which not in COMPLETION_TURNS:
        raise ValueError(f"`completion_turns` is {which!r}, but must be one of {[*COMPLETION_TURNS]}.")
    if which == "last":
        answers = answers[-1:]
    elif which == "last_round":
        questions = (turn for turn, message in enumerate(conversation.messages) if message["role"] == "user")
        last_question = max(questions, default=-1)
        answers = [turn for turn in answers if turn > last_question]
    return [turn for turn in answers if conversation.messages[turn].get("completion") is not False]


def _only(
    conversation: Conversation, input_ids: list[int], marked: list[int], answers: list[int], first_answer: int
) -> list[int]:
    """Returns the marks without those of other turns than these answers."""
    positions, kept = conversation.positions(input_ids), [0] * len(input_ids)
    for turn in answers:
        if first_answer:  # the completion has the headers of its turns too
            start, end = conversation.answer(turn, positions)
        else:  # the template tells a header from an answer
            start, end = positions.at(conversation.start_of_turn(turn), turn), conversation.end_of_turn(turn, positions)
        kept[start:end] = marked[start:end]
    return kept


def _spans(
    conversation: Conversation,
    positions: TokenPositions,
    regions: list[int],
    structure: StructureWeights,
    answers: list[int],
) -> tuple[np.ndarray, int]:
    """Returns the code of each token, and the number of turns whose thinking the template leaves out."""
    codes, left_out = np.zeros(len(regions), np.int32), 0
    for turn in conversation.answers() if structure.span_loss_weights else ():
        spans, is_left_out = spans_of_turn(conversation, turn)
        left_out += is_left_out
        for name, start, end in spans:
            if name == "end_of_turn":
                last = conversation.end_of_turn(turn, positions)
            else:
                last = positions.boundary(end, turn + 1)
            codes[positions.boundary(start, turn + 1) : last] = SPANS.index(name)
    if structure.regex_loss_weights:
        if conversation.contents is None:
            raise ValueError(
                "the chat template changes what messages say, so contents cannot be found. Choose another template "
                "(`chat_template_path`), or leave `regex_loss_weights` unset."
            )
        contents = [(turn, span) for turn in answers for span in contents_of(conversation, turn)]
        texts = [span for _, span in contents]
        is_completion = np.asarray(regions) == 1
        for bit, pattern in enumerate(structure.regex_loss_weights, start=PATTERN_BIT):
            for number, start, end in matches(pattern, conversation.text, texts):
                turns = contents[number][0] + 1
                found = slice(positions.holding(start, turns), positions.first_from(end, turns))
                codes[found] |= is_completion[found] * np.int32(1 << bit)
    return codes, left_out


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
