"""`moeyard doctor`: devices, measured rates and constants, libraries, and what is missing with what that costs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.config import format_size
from . import machine

# What goes without an optional library. A required one costs everything.
COSTS = {
    "fastapi": "`moeyard serve` does not start",
    "starlette": "`moeyard serve` does not start",
    "pydantic": "`moeyard serve` does not start",
    "uvicorn": "`moeyard serve` does not start",
    "prometheus-client": "`moeyard serve` does not start",
    "llguidance": "response_format json_schema is refused",
    "ray": "`--launcher ray` is refused",
    "httpx": "`moeyard bench serve` does not run",
    "openai": "the demo and the client examples do not run",
    "triton": "on a GPU experts run on PyTorch's grouped products",
    "llama-cpp-python": "`moeyard bench throughput` has no llama.cpp to compare with",
    "gguf": "`moeyard bench throughput` has no llama.cpp to compare with",
    "accelerate": "`moeyard bench offload` has no transformers to compare with",
}
MOST_CONSTANTS = 4
"""Files of measured constants that the text shows."""
MODULES = {
    "pyzmq": "zmq",
    "llama-cpp-python": "llama_cpp",
}  # where the module is not the distribution's name with underscores


@dataclass(frozen=True, kw_only=True)
class Library:
    """One requirement of this package. `extra` is "" for a required one, `problem` is "" when all is well."""

    name: str
    wanted: str
    extra: str
    installed: str | None
    problem: str


def libraries(package: str = "moeyard") -> list[Library]:
    """The requirements that `package` declares here, against what is installed; without those of the tests."""
    from packaging.requirements import Requirement

    found = []
    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        extra = _extra_of(requirement)
        elsewhere = not extra and requirement.marker is not None and not requirement.marker.evaluate()
        if extra == "test" or requirement.name == package or elsewhere:
            continue
        found.append(_check(requirement.name, str(requirement.specifier), extra))
    return found


def _extra_of(requirement: Any) -> str:
    """The extra that brings this requirement in, "" when it always applies."""
    marker = str(requirement.marker or "")
    return marker.partition("extra ==")[2].strip(" \"'")


def _check(name: str, wanted: str, extra: str) -> Library:
    from packaging.specifiers import SpecifierSet

    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Library(name=name, wanted=wanted, extra=extra, installed=None, problem="not installed")
    problem = ""
    if not SpecifierSet(wanted).contains(installed, prereleases=True):
        problem = f"{installed} is outside {wanted}"
    elif not extra:
        try:
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
        except Exception as error:  # a broken binary can raise anything
            problem = f"does not import: {type(error).__name__}: {' '.join(str(error).split())}"
    return Library(name=name, wanted=wanted, extra=extra, installed=installed, problem=problem)


def findings(libs: list[Library], computer: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """(what is broken, what is missing and its cost), one line each. `computer` is `machine.describe()`."""
    broken, missing = [], []
    for lib in libs:
        if not lib.problem:
            continue
        if lib.extra:
            remedy = f"pip install 'moeyard[{lib.extra}]'"
            missing.append(f"{lib.name}: {lib.problem}; {COSTS.get(lib.name, 'unused')} ({remedy})")
        else:
            broken.append(f"{lib.name}: {lib.problem}; moeyard needs {lib.name}{lib.wanted}")
    if not (Path(__file__).parents[1] / "engine" / "reference_model" / "model.safetensors").is_file():
        broken.append("embedded checkpoint: not found; reinstall moeyard, or always name a model")
    if computer is None:
        return broken, missing
    simd = computer["cpu"]["simd"]
    if simd and not computer["gpus"] and not {"avx512_bf16", "amx_bf16", "bf16"} & set(simd):
        missing.append("bfloat16 instructions: not on this CPU; --dtype float32 may be faster")
    if computer["gpus"] and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        missing.append("torch.nn.attention.varlen: not in this PyTorch; GPU attention copies each sequence's history")
    if not computer["gpus"] and Path("/dev/nvidia0").exists():
        missing.append("CUDA: there is a GPU, but this PyTorch cannot use it; models run on the CPU")
    return broken, missing


def examine() -> dict[str, Any]:
    """Everything `moeyard doctor --json` prints. Shows on stderr what is being measured."""
    libs = libraries()
    computer, measured, constants = None, {}, []
    if not any(lib.problem for lib in libs if lib.name in ("torch", "psutil")):
        computer = machine.describe()
        for name, measure in machine.rates():
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            measured[name] = measure()
        constants = known_constants()
    broken, missing = findings(libs, computer)
    return {
        "ok": not broken,
        "python": sys.version.split()[0],
        "machine": computer,
        "rates": measured,
        "constants": constants,
        "libraries": [asdict(lib) for lib in libs],
        "broken": broken,
        "missing": missing,
    }


def known_constants() -> list[dict[str, Any]]:
    """What `moeyard profile`, or a start, has measured on this machine, the newest first."""
    from ..engine.constants import cpu_name, find
    from .profile import facts, heading

    found = [
        record
        for kind in ("rank", "misses", "group", "disk")
        for record in find(kind, cpu=cpu_name())
        if not record.stale
    ]
    return [
        {
            "title": heading(record),
            "facts": dict(facts(record)),
            "key": dict(record.key),
            "values": asdict(record.values),
            "file": str(record.path),
        }
        for record in sorted(found, key=lambda record: record.date, reverse=True)
    ]


def report(result: dict[str, Any]) -> str:
    """`examine()` as text."""
    lines = []
    computer = result["machine"]
    if computer is not None:
        cpu = computer["cpu"]
        lines += ["Devices", f"  CPU     {cpu['name']} ({cpu['architecture']}), {cpu['cores']} usable cores"]
        lines += [f"          {' '.join(cpu['simd']) or 'instruction sets unknown'}"]
        lines += [f"  memory  {format_size(computer['memory'])}, {format_size(computer['memory_free'])} free"]
        for i, gpu in enumerate(computer["gpus"]):
            memory = f"{format_size(gpu['memory'])}, {format_size(gpu['memory_free'])} free"
            lines.append(f"  GPU {i}   {gpu['name']}, {memory}, capability {gpu['capability']}")
        lines += ["", "Measured", *(f"  {_rate(name, value)}" for name, value in result["rates"].items()), ""]
        lines += ["Constants", *_constants(result["constants"]), ""]
    lines.append(f"Libraries (Python {result['python']})")
    for lib in result["libraries"]:
        state = "ok" if not lib["problem"] else "missing" if lib["extra"] else "broken"
        extra = f"  for moeyard[{lib['extra']}]" if lib["extra"] else ""
        row = f"  {state:<7}  {lib['name']:<18} {lib['installed'] or '-':<14} {lib['wanted']}{extra}"
        lines.append(row.rstrip())
    for title, found in (("Broken", result["broken"]), ("Missing", result["missing"])):
        if found:
            lines += ["", title, *(f"  {text}" for text in found)]
    lines += ["", "Nothing required is broken." if result["ok"] else "Something required is broken."]
    return "\n".join(lines)


def _constants(records: list[dict[str, Any]]) -> list[str]:
    from .profile import NOT_MEASURED

    lines = [] if records else [f"  {NOT_MEASURED}"]
    for record in records[:MOST_CONSTANTS]:
        lines += [f"  {record['title']}", *(f"    {name:<20}{value}" for name, value in record["facts"].items())]
    if len(records) > MOST_CONSTANTS:
        lines.append(f"  and {len(records) - MOST_CONSTANTS} older ones (--json shows all)")
    return lines


def _rate(name: str, value: float) -> str:
    if name.endswith("_flops"):
        return f"{name.removesuffix('_flops').replace('_', ' '):<20} {value / 1e9:10.0f} GFLOP/s"
    return f"{name.removesuffix('_bytes_per_s').replace('_', ' '):<20} {value / 1e9:10.1f} GB/s"


def run(args: argparse.Namespace) -> int:
    """The command. 0, or 1 when something required is broken."""
    result = examine()
    print(json.dumps(result) if args.json else report(result))
    return 0 if result["ok"] else 1
