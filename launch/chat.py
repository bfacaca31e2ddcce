"""Text to token ids: plain prompts, and messages through the checkpoint's own chat template."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from .frontend import RequestError
from .protocol import Message


async def encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text. A long text takes a while, so a thread does it (the tokenizer releases the interpreter).

    Raises RequestError (400) for a checkpoint without a tokenizer, and for half of a surrogate pair, which JSON can say
    and no text can.
    """
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer; send token ids", status=400, param="prompt")
    return await asyncio.to_thread(_encode, tokenizer, text, add_special_tokens)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    try:
        # verbose: no warning for a text that is longer than the model, which is refused with an error later.
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except (TypeError, UnicodeError) as error:
        raise RequestError("the text is not valid Unicode", status=400, param="prompt") from error


def decode(tokenizer: Any, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Text of token ids, exactly as they stand. Raises RequestError (400) for a checkpoint without a tokenizer."""
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer; it makes no text", status=400, param="prompt")
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that the checkpoint's chat template makes of the messages.

    Raises RequestError (400) without a template, for keywords that belong to us and not to the template, and for
    whatever the template itself refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("this checkpoint has no chat template; use /v1/completions", status=400, param="messages")
    ours = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in template_kwargs or {}:
        if name in ours:
            message = f"chat_template_kwargs.{name}: not a variable of the chat template"
            raise RequestError(message, status=400, param="chat_template_kwargs")
    try:
        return tokenizer.apply_chat_template(
            [message.to_template() for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(template_kwargs or {}),
        )
    except Exception as error:
        # The template is the checkpoint's code running on the client's values: any failure is about those values.
        raise RequestError(f"the chat template refuses: {error}", status=400, param="messages") from error
