"""From token ids to text, one token at a time: whole characters only, and nothing that may become a stop string.

`TextStream` decodes a short window instead of the whole output: the tokens since the last clean boundary, with the
piece before them as context (tokenizers join neighbours: the space before a word, the bytes of a character).
`StopMatcher` holds back text that may be the beginning of a stop string. `Detokenizer` is the two in a row, for one
output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What tokenizers decode the bytes of an incomplete character to."""

CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first generated token is decoded after."""

MAX_HELD_TOKENS = 24
"""Tokens without a clean end after which text is released as it is: no character takes that many, so it never becomes
valid, and the window must not grow with the output."""


class Vocabulary:
    """Texts of a transformers tokenizer's tokens; without a tokenizer (None) every text is empty."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids: frozenset[int] = frozenset()
        if tokenizer is not None:
            added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
            self.special_ids = frozenset(added | set(tokenizer.all_special_ids))
        self._texts: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def text_of(self, token_id: int) -> str:
        """One token alone, as log-probabilities show it: with the space that begins a word."""
        text = self._texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=False)
            if text and (self.tokenizer.convert_ids_to_tokens(token_id) or "").startswith("\u2581") and text[0] != " ":
                text = " " + text
            self._texts[token_id] = text
        return text


class TextStream:
    """Text of the tokens that follow `prompt_ids`, one token at a time."""

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._begin_window(0)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" while a character is incomplete."""
        if self._skip and token_id in self._vocabulary.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode()
        held = len(self._window) - self._context
        if (text.endswith(INCOMPLETE) or len(text) <= self._sent) and held <= MAX_HELD_TOKENS:
            return ""
        piece = text[self._sent :]
        self._begin_window(self._context)
        return piece

    def flush(self) -> str:
        """What is left at the end, an incomplete character as U+FFFD."""
        piece = self._decode()[self._sent :]
        self._begin_window(self._context)
        return piece

    def _decode(self) -> str:
        return self._vocabulary.decode(self._window, self._skip)

    def _begin_window(self, start: int) -> None:
        """Everything in the window is released: what lies behind `start` becomes the context of what comes."""
        self._window = self._window[start:]
        self._context = len(self._window)
        self._sent = len(self._decode())


class StopMatcher:
    """Finds stop strings in text that comes in pieces, whatever the pieces are (Knuth, Morris and Pratt's automaton).

    The stop string that is complete first wins; of several that end there, the longest.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._include = include
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.stop: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show. Sets `stop` when a stop string is found; nothing after it is shown."""
        if not self._automata or not text:
            return text
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = [len(automaton.pattern) for automaton in self._automata if automaton.step(char)]
            if found:
                self.stop = buffer[end - max(found) : end]
                self._held = ""
                return buffer[: end if self._include else end - max(found)]
        safe = len(buffer) - max(automaton.matched for automaton in self._automata)
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """The text held back, at the end."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of the end of the text so far is a beginning of `pattern`."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._fallback = [0] * len(pattern)
        length = 0
        for i in range(1, len(pattern)):
            while length and pattern[i] != pattern[length]:
                length = self._fallback[length - 1]
            length += pattern[i] == pattern[length]
            self._fallback[i] = length

    def step(self, char: str) -> bool:
        """True when the pattern is complete with this character; then the matcher stops."""
        while self.matched and char != self.pattern[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self.pattern[self.matched]
        return self.matched == len(self.pattern)


class Detokenizer:
    """Text of one output. `text` is what may be shown so far, `stop` the stop string that ended it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stops: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._stream = TextStream(vocabulary, prompt_ids, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops, include=include_stop)
        self.text = ""

    @property
    def stop(self) -> str | None:
        return self._matcher.stop

    def push(self, token_id: int, *, search: bool = True) -> None:
        """Adds a token. Without `search` no stop string is looked for in its text (`min_tokens`)."""
        piece = self._stream.push(token_id)
        self.text += self._matcher.push(piece) if search else piece

    def finish(self) -> None:
        """Releases what was held back; an output that a stop string ended has nothing left."""
        if self.stop is None:
            self.text += self._matcher.push(self._stream.flush())
            self.text += self._matcher.flush()
