"""Structured output: which tokens a JSON schema allows next, through llguidance (optional, extra `serve`)."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

# One space, or a line break with an indentation: what JSON writers put between tokens. Unlimited white space,
# which JSON allows, is a trap for small models: they write it until max_tokens.
_WHITESPACE = r"( |\n[ \t]{0,40})"
_CACHED_SCHEMAS = 64


class Grammar:
    """Position of one output inside a schema. Make one per sequence with `GrammarCompiler`.

    `error` is "" or why the grammar cannot go on (a token it forbids was given, or llguidance's limits on the size
    of its parser state were reached).
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self) -> np.ndarray:
        """Tokens allowed next: uint8 [bytes], token t at bit `t % 8` of byte `t // 8`."""
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)

    def advance(self, token_id: int) -> None:
        """Go on to the position after `token_id`; when it is not allowed, `error` is set."""
        self._matcher.consume_token(token_id)

    @property
    def finished(self) -> bool:
        """The output is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        lines = self._matcher.get_error().splitlines()
        return lines[0] if lines else ""


class GrammarCompiler:
    """Compiles JSON schemas for one tokenizer; the last few stay compiled. Threads may share it.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: columns of the logits that may be sampled; tokens without text are never allowed.
        eos_ids: tokens that may end the output (default: the tokenizer's).
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(t for t in eos_ids if t < vocab_size)
        self._ll_tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile_json_schema(self, schema_text: str) -> Grammar:
        """A grammar at its start. `{"type": "object"}` allows any JSON object.

        Raises ValueError naming json_schema and the reason when the text is not a schema, uses a keyword that
        llguidance does not have, cannot be satisfied, or llguidance is missing.
        """
        with self._lock:
            matcher = self._compiled.get(schema_text)
            if matcher is None:
                matcher = self._compiled[schema_text] = self._compile(schema_text)
                if len(self._compiled) > _CACHED_SCHEMAS:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(schema_text)
            return Grammar(matcher.deep_copy())

    def _compile(self, schema_text: str) -> Any:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise ValueError("json_schema needs llguidance: pip install 'moeyard[serve]'") from error
        try:
            schema = json.loads(schema_text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json_schema is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema is {schema_text[:40]!r}; it must be a JSON object")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema_text, {"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise ValueError(f"json_schema is not supported: {error}") from error
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise ValueError(f"json_schema is not supported: {matcher.get_error()}")
        return matcher

    def _tokens(self) -> Any:
        """llguidance's form of the tokenizer; made when first used: up to a second for a large vocabulary."""
        if self._ll_tokenizer is None:
            from llguidance.hf import from_tokenizer

            try:
                self._ll_tokenizer = from_tokenizer(
                    self._tokenizer,
                    n_vocab=max(self._vocab_size, len(self._tokenizer)),
                    eos_token=self._eos_ids or None,
                )
            except ValueError as error:
                raise ValueError(f"json_schema: llguidance cannot use this model's tokenizer: {error}") from error
        return self._ll_tokenizer
