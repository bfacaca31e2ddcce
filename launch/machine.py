"""What this machine is, and how fast it moves and multiplies: measured in a few seconds, not looked up.

Rates are the best of a short loop, so that a busy moment does not count. Units: bytes per second and
floating-point operations per second.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

X86_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
ARM_FLAGS = ("asimd", "sve", "bf16", "i8mm")
LOOP_SECONDS = 0.5


def describe() -> dict[str, Any]:
    """CPU, memory and GPUs. `gpus` is empty without CUDA; needs torch."""
    import psutil
    import torch

    from ..kernels.environment import usable_cores

    memory = psutil.virtual_memory()
    limit = _first_line("/sys/fs/cgroup/memory.max")
    total = min(memory.total, int(limit)) if limit.isdigit() else memory.total
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        free, _ = torch.cuda.mem_get_info(i)
        sizes = {"memory": p.total_memory, "memory_free": free}
        gpus.append({"name": p.name, "capability": f"{p.major}.{p.minor}"} | sizes)
    cpu = {
        "name": _cpu_name(),
        "architecture": platform.machine(),
        "simd": simd_flags(),
        "cores": usable_cores(),
    }
    return {"cpu": cpu, "memory": total, "memory_free": min(memory.available, total), "gpus": gpus}


def simd_flags() -> list[str]:
    """The instruction sets that matter here among this CPU's, as Linux names them; empty elsewhere."""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(value.split())
            return [f for f in X86_FLAGS + ARM_FLAGS if f in present]
    return []


def rates() -> Iterator[tuple[str, Callable[[], float]]]:
    """Names of what can be measured here, each with the function that measures it (under two seconds)."""
    import torch

    yield "cpu_read_bytes_per_s", lambda: read_rate("cpu")
    yield "cpu_float32_flops", lambda: matmul_rate("cpu", torch.float32)
    yield "cpu_bfloat16_flops", lambda: matmul_rate("cpu", torch.bfloat16)
    if torch.cuda.is_available():
        yield "gpu_read_bytes_per_s", lambda: read_rate("cuda")
        yield "gpu_float32_flops", lambda: matmul_rate("cuda", torch.float32)
        yield "gpu_bfloat16_flops", lambda: matmul_rate("cuda", torch.bfloat16)
        yield "host_to_gpu_bytes_per_s", host_to_gpu_rate


def read_rate(device: str) -> float:
    """Bytes per second read from the device's memory by all its cores, over more than the caches hold."""
    import psutil
    import torch

    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    size = min(512 * 2**20, free // 4)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / _best_time(buffer.sum, device)


def matmul_rate(device: str, dtype: Any) -> float:
    """Operations per second of a square matrix product, of a size that takes some 20 ms."""
    import torch

    rate = 0.0
    for n in (512, 1024, 2048, 4096, 8192):
        a, b = (torch.randn(n, n, dtype=torch.float32).to(device, dtype) for _ in range(2))
        seconds = _best_time(lambda a=a, b=b: a @ b, device, limit=LOOP_SECONDS / 4)  # type: ignore[misc]
        rate = max(rate, 2 * n**3 / seconds)
        if seconds > 0.02:
            break
    return rate


def host_to_gpu_rate() -> float:
    """Bytes per second of a copy from page-locked memory to the GPU."""
    import torch

    size = 256 * 2**20
    source = torch.ones(size, dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size / _best_time(lambda: target.copy_(source, non_blocking=True), "cuda")


def _best_time(call: Callable[[], Any], device: str, limit: float = LOOP_SECONDS) -> float:
    """Seconds of the fastest call in a loop of about `limit` seconds, after the first call."""
    import torch

    best = float("inf")
    end = None
    while end is None or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if end is None:
            end = now + limit
        best = min(best, now - start)
    return best


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.lower().startswith(("model name", "hardware")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux, or no such control group
        return []


def _first_line(path: str) -> str:
    return next(iter(_lines(path)), "").strip()
