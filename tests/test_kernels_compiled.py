"""How the CPU kernels are compiled, kept, and spread over threads."""

import os
import subprocess
import sys

import pytest
import torch

from moeyard.kernels import compiled
from moeyard.kernels.environment import ENVIRONMENT
from moeyard.kernels.scalars import get_int64, put_int64
from moeyard.kernels.threads import set_threads

MOST = compiled.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

CHECK = """
import torch
from moeyard.kernels import tile
from moeyard.kernels.small_linear import small_linear
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):  # results up to about 70
    for rows in (1, 2, 3, 4, 9):
        x, w = torch.randn(rows, 333).to(dtype), torch.randn(77, 333).to(dtype)
        error = (small_linear(x, w).double() - x.double() @ w.double().T).abs().max()
        assert error < tolerance, (dtype, rows, error)
"""

ATTENTION = """
from moeyard.kernels.paged_attention import paged_decode_attention
for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
    q, keys = torch.randn(1, 7, 70).to(dtype), torch.randn(3, 16, 1, 70).to(dtype)
    table, lengths = torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([45], dtype=torch.int32)
    out = paged_decode_attention(q, keys, keys, table, lengths, 0.1)
    flat = keys[[2, 0, 1]].flatten(0, 1)[:45, 0].double()
    expected = torch.softmax(q[0].double() @ flat.T * 0.1, -1) @ flat
    assert (out[0].double() - expected).abs().max() < tolerance
"""

RECORD = """
from numba.core import event
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
"""

NOTHING_COMPILED = """
assert not recorder.buffer, [e.data for _, e in recorder.buffer]
"""


def python(code, **environment):
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_package_of_kernels_does_not_import_numba():
    python("import sys, moeyard.kernels; assert not {'numba', 'torch'} & set(sys.modules), sorted(sys.modules)")


def test_nothing_is_compiled_after_warm_up():
    code = f"""
import torch
from moeyard.kernels.warm_up import warm_up
warm_up()
{RECORD}
from moeyard.kernels.grouped_linear import combine, grouped_gate_up_silu, grouped_linear
from moeyard.kernels.paged_attention import paged_decode_attention
from moeyard.kernels.small_experts import small_experts
from moeyard.kernels.small_linear import small_linear
from moeyard.kernels.sort_rows import sort_rows
from moeyard.kernels.write_kv import write_kv
for dtype in (torch.float32, torch.bfloat16):
    for ids in (torch.tensor([[0, 1], [2, -1]]), torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)):
        x, weight = torch.zeros(2, 20).to(dtype), torch.zeros(3, 16, 20).to(dtype)
        down = torch.zeros(3, 20, 8).to(dtype)
        rows = sort_rows(ids, 3)
        small_experts(x, ids, torch.ones(2, 2), weight, down, torch.arange(3, dtype=torch.int32))
    y = grouped_linear(x, weight, rows.starts, rows.experts_G, weight[:, :, 0].contiguous(), rows.token_R)
    grouped_gate_up_silu(x, weight, rows.starts, rows.experts_G, rows.token_R)
    combine(y, rows.position_TK, torch.ones(2, 2))
    small_linear(x, weight[0], x[0, :16])
    cache, new = torch.zeros(2, 4, 2, 8).to(dtype), torch.zeros(2, 2, 8).to(dtype)
    write_kv(new, new, cache, cache, torch.tensor([0, 5]))
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    q = torch.zeros(1, 4, 8).to(dtype)
    paged_decode_attention(q, cache, cache, table, lengths, 1, 3, torch.zeros(4), 2)
{NOTHING_COMPILED}
"""
    python(code)


# The next two also run the code paths of x86 processors without AVX-512, by naming an older one.
X86 = os.uname().machine == "x86_64"
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma"} if X86 else {}
SSE2 = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"} if X86 else {}


def lanes(n):
    return f"assert tile.LANES == {n} and not tile.HAS_BFLOAT16_DOT\n" if X86 else ""


def test_machine_code_is_kept_between_processes(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": "", **AVX2}
    python(CHECK + ATTENTION + lanes(8), **environment)
    assert list((tmp_path / "moeyard" / "numba").rglob("*.nbi"))
    python(RECORD + CHECK + ATTENTION + NOTHING_COMPILED, **environment)


def test_without_a_place_to_keep_it_kernels_compile_and_say_so(tmp_path):
    (tmp_path / "file").touch()
    _, errors = python(CHECK + lanes(4), XDG_CACHE_HOME=str(tmp_path / "file"), NUMBA_CACHE_DIR="", **SSE2)
    assert "compiled anew by each process" in errors


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_torch_and_the_kernels_share_one_pool_of_threads():
    code = """
import os, torch
from moeyard.kernels import compiled
from moeyard.kernels.small_linear import small_linear
torch.set_num_threads(2)
(torch.randn(1 << 20) + 1).sum()
count = len(os.listdir("/proc/self/task"))
small_linear(torch.zeros(1, 2048), torch.zeros(2048, 2048))
assert compiled.workers_for(1 << 24) == 2
assert len(os.listdir("/proc/self/task")) == count
import numba
assert numba.threading_layer() == "omp"
assert torch.get_num_threads() == 2
"""
    # Where scipy is installed numba imports it, and its own library of linear algebra starts threads that sleep.
    python(code, NUMBA_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1")


@compiled.Part
def _mark(part, parts, args):
    put_int64(get_int64(args, 0), part, 10 * parts + part)


@pytest.mark.parametrize("workers", {1, min(2, MOST)})
def test_run_calls_every_part_once(workers):
    room = torch.full((4,), -1)
    compiled.run(workers, _mark, room.data_ptr())
    assert room.tolist() == [10 * workers + part for part in range(workers)] + [-1] * (4 - workers)


def test_share_covers_everything_once():
    for n in (0, 1, 8, 9, 63, 515):
        for parts in (1, 2, 3, 7):
            shares = [compiled.share(n, part, parts) for part in range(parts)]
            columns = [c for low, high in shares for c in range(low, high)]
            assert columns == list(range(n))


def test_set_threads():
    before = torch.get_num_threads()
    try:
        for n in {1, MOST}:
            set_threads(n)
            assert torch.get_num_threads() == n == compiled.workers_for(1 << 40)
        assert compiled.workers_for(1000) == 1
        for n in (0, MOST + 1):
            with pytest.raises(ValueError, match=f"threads: {n} is not in 1..{MOST}"):
                set_threads(n)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(MOST < 2, reason="one thread is all there is")
@pytest.mark.parametrize("started", [True, False])
def test_set_threads_holds_for_openmp_before_and_after_numba_starts(started):
    """numba's start sets OpenMP's number to its own limit, which torch's loops would then use."""
    code = f"""
import torch
from numba import get_num_threads
from moeyard.kernels.threads import set_threads
torch.get_num_threads()  # OpenMP's number is read and set from here on
if {started}:
    get_num_threads()
set_threads(1)
get_num_threads()
lines = [line.strip() for line in torch.__config__.parallel_info().splitlines()]
assert "omp_get_max_threads() : 1" in lines and "at::get_num_threads() : 1" in lines, lines
"""
    python(code, NUMBA_NUM_THREADS="2")


@pytest.mark.parametrize("environment", [{}, AVX2], ids=["this processor", "AVX2"])
def test_quantised_weights_on_processors_without_avx512(environment):
    code = f"""
import torch
from moeyard.kernels.warm_up import warm_up
if {not environment}:
    warm_up(quantised=True)
    {RECORD.replace(chr(10), chr(10) + "    ")}
from moeyard.kernels.quantised import FORMATS, MXFP4
from moeyard.kernels.quantised_linear import dequantise, quantised_linear
torch.manual_seed(0)
for form in (*FORMATS.values(), MXFP4):
    matrix = form.quantise(torch.randn(9, 150))
    for dtype in (torch.float32, torch.bfloat16):
        plain = matrix.dequantise(dtype)
        assert torch.equal(dequantise(matrix, dtype), plain), (form.name, dtype)
        x = torch.randn(3, 150).to(dtype)
        y = quantised_linear(x, [matrix], torch.tensor([0, 3], dtype=torch.int32), None)
        torch.testing.assert_close(y.double(), x.double() @ plain.double().t(), rtol=2**-7, atol=2**-6)
if {not environment}:
    {NOTHING_COMPILED.replace(chr(10), chr(10) + "    ")}
"""
    python(code, **environment)
