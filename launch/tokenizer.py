"""The files of a checkpoint that the front end reads: the tokenizer, the sampling defaults, the end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engine.params import SamplingParams

_TOKENIZER_FILES = ["tokenizer*", "*.tiktoken", "tekken.json", "vocab.*", "spiece.model", "sentencepiece*"]
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_tokenizer(path: Path, *, remote_code: bool = False) -> Any:
    """The checkpoint's transformers tokenizer, or None when it has no tokenizer files.

    Raises ValueError when the files are there but cannot be read.
    """
    if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code)
    except Exception as error:  # the libraries below raise their own kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model: the tokenizer in {path} cannot be loaded: {reason}") from error


def sampling_defaults(path: Path) -> dict[str, Any]:
    """What `generation_config.json` says about sampling, {} without one. Raises ValueError naming the file."""
    file = path / "generation_config.json"
    values = _read_json(file)
    defaults = {name: values[name] for name in _DEFAULTS if values.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}; mend it or give --generation-config none") from error
    return defaults


def end_token_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """The ids that end an output: from `generation_config.json`, else `config.json`, and the tokenizer's own."""
    own = getattr(tokenizer, "eos_token_id", None)
    found = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(path / name).get("eos_token_id")
        if ids is not None:
            return frozenset([*found, *(ids if isinstance(ids, list) else [ids])])
    return frozenset(found)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model: {file} must hold a JSON object")
    return values
