"""Command-line options made from the configuration dataclasses, and a parser whose errors are one line.

Nothing here has a default of its own: an option that is not given is left to the dataclass. Importing this
module pulls in no model library.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
METAVARS = {int: "N", float: "X"}


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest option or command and exits with 2 after one line.

    `fill`, when given, adds the arguments at the moment this parser is used, so that the help of one command
    does not import what another one needs.
    """

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self._fill = fill
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        args = sys.argv[1:] if args is None else list(args)
        self._refuse_misspelt(args)
        return super().parse_known_args(args, namespace)

    def _refuse_misspelt(self, args: list[str]) -> None:
        """Before argparse looks: it would report a missing argument where the cause is a misspelt option."""
        commands = next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        for arg in args:
            if arg == "--":
                return
            name = arg.split("=", 1)[0]
            if arg.startswith("--") and " " not in name:
                if name not in self._option_string_actions:
                    self.error(f"unknown option {name}" + _nearest(name, self._option_string_actions))
            elif commands is not None and not arg.startswith("-"):
                if arg not in commands.choices:
                    self.error(f"unknown command {arg!r}" + _nearest(arg, commands.choices))
                return  # what follows belongs to the command

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moeyard: error: {message} (see {self.prog} --help)\n")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def flag(name: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + name.replace("_", "-")


def add_options(
    parser: Any, cls: type, *, model_positional: bool = False, only: Collection[str] = (), defaults: bool = True
) -> None:
    """Adds one option per field of the dataclass `cls`, or per field in `only`; `config_from` reads them back.

    With `model_positional` the field `model` can also be given as a positional MODEL. A tuple is an option that may be
    repeated. `defaults`: whether the help shows the fields' own.
    """
    hints = get_type_hints(cls)
    if model_positional:
        text = next(f for f in dataclasses.fields(cls) if f.name == "model").metadata["help"]
        parser.add_argument("model_positional", nargs="?", metavar="MODEL", help=text)
    for f in dataclasses.fields(cls):
        if only and f.name not in only:
            continue
        kwargs: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        help_text = "the same as MODEL" if f.name == "model" and model_positional else f.metadata["help"]
        value_type = _plain_type(hints[f.name])
        if value_type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
            help_text += f" (default: {'on' if f.default else 'off'})"
        else:
            if get_origin(value_type) is tuple:
                value_type = get_args(value_type)[0]
                kwargs["action"] = "append"
            kwargs["type"] = value_type
            kwargs["choices"] = f.metadata.get("choices") or None
            kwargs["metavar"] = f.metadata.get("metavar") or METAVARS.get(value_type)
            if defaults and f.default not in (None, ""):
                help_text += f" (default: {f.default})"
        parser.add_argument(flag(f.name), help=help_text.replace("%", "%%"), **kwargs)


def _plain_type(hint: Any) -> type:
    """`int | None` -> `int`."""
    if get_origin(hint) is types.UnionType:
        (hint,) = (a for a in get_args(hint) if a is not type(None))
    return hint


def one_model(positional: str | None, option: str | None) -> str | None:
    """What MODEL and --model agree on. Raises ValueError when they do not."""
    if positional is not None and option is not None and positional != option:
        raise ValueError(f"MODEL is {positional!r} and --model is {option!r}; give one of them")
    return option if positional is None else positional


def config_from(args: argparse.Namespace, cls: type[Config]) -> Config:
    """The `cls` that the parsed options describe. Raises ValueError as `cls` does, or for two models."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {k: v for k, v in vars(args).items() if k in names}
    model = one_model(getattr(args, "model_positional", None), values.get("model"))
    if model is not None:
        values["model"] = model
    if "api_key" in names and "api_key" not in values:
        values["api_key"] = os.environ.get("MOEYARD_API_KEY") or None
    return cls(**values)
