"""Triton kernels compiled for GPUs that are not here, and what came out: Triton's wheel has all that it takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
TENSOR_CORES = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|QGMMA|UTCQMMA)\b")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one kernel: bytes of shared memory, registers of a thread, bytes that it spills, tensor-core instructions."""

    shared: int
    registers: int
    spilled: int
    tensor: tuple[str, ...]


def tool() -> str:
    """NVIDIA's disassembler, "" where there is none."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else shutil.which("cuobjdump") or ""


def why_not() -> str:
    """Why kernels cannot be compiled here, "" if they can."""
    from moeyard.kernels.triton_version import why_no_triton

    if reason := why_no_triton():
        return reason
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: nothing is compiled"
    return "" if tool() else "there is no cuobjdump: not in triton's wheel, not on the path"


def compile_for(
    architecture: int, kernel: Any, pointers: dict[str, str], integers: dict[str, int], constants: dict[str, Any],
    *, warps: int = 4, stages: int = 3,
) -> Facts:  # fmt: skip
    """Compiles a kernel as a launch with such arguments would: addresses and integers that 16 divides are known to be.

    `pointers` are types ("bf16") by argument, "" for None.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {**constants, **{name: None for name, dtype in pointers.items() if not dtype}}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
        if name in pointers or integers[name] % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=given, attrs=attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool(), "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    stack = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert stack, text[:500]
    return Facts(
        shared=made.metadata.shared,
        registers=int(stack[1]),
        spilled=int(stack[2]),
        tensor=tuple(sorted(set(TENSOR_CORES.findall(text)))),
    )
