"""`moeyard generate`: continues one prompt, or answers one message, and prints the text."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..engine.config import EngineConfig
from ..engine.params import SamplingParams

MAX_TOKENS = 128
SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in ("n", "logit_bias", "logprobs"))
"""Options of the command, from `SamplingParams`: all but those whose result a text does not show."""


def run(config: EngineConfig, args: argparse.Namespace) -> int:
    """The command. What `args` does not have of `SAMPLING` is the checkpoint's default."""
    from .llm import LLM

    with LLM(**config.to_dict()) as llm:
        given = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
        params = dataclasses.replace(llm.default_params(), **{"max_tokens": MAX_TOKENS} | given)
        prompt = _chat_prompt(llm.tokenizer, args.prompt) if args.chat else args.prompt
        if args.stream:
            printed = ""
            for output in llm.stream(prompt, params):
                text = output.outputs[0].text
                print(text[len(printed) :], end="", flush=True)
                printed = text
            print()
        else:
            print(llm.generate(prompt, params)[0].outputs[0].text)
    return 0


def _chat_prompt(tokenizer: Any, message: str) -> dict[str, list[int]]:
    """The token ids of one user message in the checkpoint's chat template."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("--chat: the checkpoint has no chat template; leave --chat out")
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False).input_ids}
