"""Which token of a text a character belongs to."""

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .._upstream import common_prefix_length


class Tokens:
    """The added tokens of a tokenizer, at which it splits every text before all else, and the tokens of texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        # Not those that are found between words alone: their text is in others too
        added = tokenizer.added_tokens_decoder.items()
        self.contents = {token: content.content for token, content in added if not content.single_word}
        self._is_added = np.zeros(max([*self.contents, 0]) + 2, bool)
        self._is_added[[*self.contents]] = True
        # Of a text, without those that a tokenizer puts around any. The headers of turns come again and again
        self.of = functools.lru_cache(256)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def added(self, input_ids: list[int]) -> list[int]:
        """Returns the positions of added tokens."""
        return np.flatnonzero(self._is_added[np.minimum(np.asarray(input_ids, int), len(self._is_added) - 1)]).tolist()


def token_begins(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Returns the character with which each token begins, from the offsets that a tokenizer gives. These leave out
    whitespace at the beginning of some tokens. Tokens that make one character together begin with it.
    """
    starts, ends = np.asarray(offsets, int).reshape(-1, 2).T
    return np.minimum(starts, np.append(0, ends[:-1])) if len(ends) else starts


def first_holding(begins: np.ndarray, character: int) -> int:
    """Returns the position of the first token that holds a character, from the characters with which tokens begin."""
    return int(np.searchsorted(begins, begins[np.searchsorted(begins, character, "right") - 1]))


class TokenPositions:
    """
    Maps characters of a text to its tokens, as if the text were tokenized up to each of them. What is tokenized is only
    the part after the last added token: it does not depend on what precedes it.

    Where added tokens do not tell, `tokenize_beginning` returns the tokens of the text up to a character. It gets the
    character and the number of turns whose images are before it. `input_ids` may be only the first of the tokens.
    """

    def __init__(
        self, text: str, input_ids: list[int], tokens: Tokens, tokenize_beginning: Callable[[int, int], list[int]]
    ):
        self.count = len(input_ids)
        self._text, self._input_ids, self._tokens = text, input_ids, tokens
        self._tokenize_beginning = tokenize_beginning
        self._added: list[tuple[int, int, int]] = []  # of added tokens: first character, the one after it, position
        end = 0
        for position in tokens.added(input_ids):
            content = tokens.contents[input_ids[position]]
            start = text.find(content, end)
            if start < 0:  # it is not in the text: the processor of a model with images writes more than that
                self._added = []
                break
            end = start + len(content)
            self._added.append((start, end, position))

    def at(self, character: int, turns: int) -> int:
        """
        Returns the position of the token that begins at a character, before which are the images of this number of
        turns. A token that begins before the character and ends after it counts as after it.
        """
        return self._find(character, turns)[0]

    def past(self, character: int, turns: int) -> int:
        """Returns the same, but a token that begins before the character and ends after it counts as before it."""
        position, is_boundary = self._find(character, turns)
        return min(position + (not is_boundary), self.count)

    def first_from(self, character: int, turns: int) -> int:
        """
        Returns the position of the first token that begins at a character or after it: a token belongs to what holds
        its first character. `turns` as in `at`.
        """
        if self._begins is None:
            return self.past(character, turns)
        return min(int(np.searchsorted(self._begins, character)), self.count)

    def boundary(self, character: int, turns: int) -> int:
        """Returns the same as `first_from`, without tokenizing the text again where a token begins at the character."""
        position, begins_there = self._find(character, turns)
        return position if begins_there else self.first_from(character, turns)

    def holding(self, character: int, turns: int) -> int:
        """Returns the position of the first token that holds a character. `turns` as in `at`."""
        return self.at(character, turns) if self._begins is None else first_holding(self._begins, character)

    @functools.cached_property
    def _begins(self) -> np.ndarray | None:
        """The first character of each token. `None` where the tokens are not those of the text: images are more."""
        tokenizer = self._tokens.tokenizer
        if not tokenizer.is_fast:
            return None
        encoded = tokenizer(self._text, add_special_tokens=False, return_offsets_mapping=True)
        is_same = encoded["input_ids"][: self.count] == self._input_ids
        return token_begins(encoded["offset_mapping"]) if is_same else None

    def is_added(self, position: int) -> bool:
        """Whether there is an added token at a position."""
        return position < self.count and self._input_ids[position] in self._tokens.contents

    def _find(self, character: int, turns: int) -> tuple[int, bool]:
        """Returns the position, and whether a token begins there."""
        if character <= 0 or character >= len(self._text):
            return (0 if character <= 0 else self.count), True
        number = bisect_left(self._added, (character,))
        if number < len(self._added) and self._added[number][0] == character:
            return self._added[number][2], True
        position, tokens = 0, []
        if number:
            start, end, position = self._added[number - 1]
            if end == character:
                return position + 1, True
            tokens = self._tokens.of(self._text[start:character])
        if tokens[:1] != self._input_ids[position : position + 1]:  # no added token is before it, or it is none here
            position, tokens = 0, self._tokenize_beginning(character, turns)
        common = common_prefix_length(tokens, self._input_ids[position : position + len(tokens)])
        # Only the last token, and what follows an added one, may be tokenized otherwise when more text follows
        certain = max(self._tokens.added(tokens[:-1]), default=-1) + 1
        if common < min(certain, self.count - position):
            raise ValueError(
                "the first turns alone have other tokens than in the whole conversation, so their turns cannot be "
                "found. Some processors cut one image into patches, but not several. Put all images into the first "
                "turn, make a `prompt` and `completion` of each answer, or choose a template that marks the "
                "assistant's turns with `{% generation %}` (`chat_template_path`)."
            )
        return position + common, common == len(tokens)
