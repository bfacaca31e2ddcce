"""`moeyard doctor` on this machine, and on machines that miss something."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from moeyard.__main__ import main
from moeyard.kernels import environment
from moeyard.launch import doctor, machine
from moeyard.launch.doctor import Library, findings, libraries, report

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "LOOP_SECONDS", 0.01)


def computer(*, simd=("avx2", "avx512_bf16"), gpus=()):
    cpu = {"name": "Some CPU", "architecture": "x86_64", "cores": 4, "simd": list(simd)}
    return {"cpu": cpu, "memory": 2**34, "memory_free": 2**33, "gpus": list(gpus)}


def library(name="lib", *, extra="", installed="1.0", problem=""):
    return Library(name=name, wanted=">=1.0", extra=extra, installed=installed, problem=problem)


def test_json_tells_devices_rates_and_libraries(quick, capsys):
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["ok"] and result["broken"] == []
    assert result["machine"]["cpu"]["cores"] >= 1
    assert 0 < result["machine"]["memory_free"] <= result["machine"]["memory"]
    assert all(rate > 1e6 for rate in result["rates"].values())
    assert {"cpu_read_bytes_per_s", "cpu_float32_flops", "cpu_bfloat16_flops"} <= set(result["rates"])
    assert {"torch", "transformers", "llguidance", "ray"} <= {lib["name"] for lib in result["libraries"]}
    assert all(f"measuring {name}" in err for name in result["rates"])


def test_text(quick, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("Devices", "Measured", "GB/s", "GFLOP/s", "Libraries", "torch", "Nothing required is broken."):
        assert word in out


def test_versions_are_checked_against_the_declared_ranges(monkeypatch):
    declared = ["torch>=1", "numpy<1", "nonesuch>=2", "uvicorn>=999; extra == 'serve'", "pytest>=8; extra == 'test'"]
    declared += ["elsewhere>=1; sys_platform == 'plan9'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    found = {lib.name: lib for lib in libraries()}
    assert set(found) == {"torch", "numpy", "nonesuch", "uvicorn"}
    assert found["torch"].problem == "" and found["torch"].installed
    assert "is outside <1" in found["numpy"].problem
    assert found["nonesuch"].problem == "not installed" and found["nonesuch"].installed is None
    assert found["uvicorn"].extra == "serve" and "is outside >=999" in found["uvicorn"].problem


def test_a_required_library_that_does_not_import_is_broken(monkeypatch):
    def fail(name):
        raise OSError("libsomething.so: cannot open\nshared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    (lib,) = [lib for lib in libraries() if lib.name == "numpy"]
    assert lib.problem == "does not import: OSError: libsomething.so: cannot open shared object file"


def test_something_required_is_broken_gives_1(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=999"])
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "torch" in captured.out and "moeyard needs torch>=999" in captured.out
    assert "Something required is broken." in captured.out
    assert "measuring" not in captured.err  # without torch there is nothing to measure with


def test_each_missing_extra_says_what_it_costs():
    libs = [library(name, extra="serve", installed=None, problem="not installed") for name in doctor.COSTS]
    broken, missing = findings(libs, computer())
    assert broken == [] and len(missing) == len(doctor.COSTS)
    (line,) = [line for line in missing if line.startswith("llguidance")]
    assert line == ("llguidance: not installed; response_format json_schema is refused (pip install 'moeyard[serve]')")


def test_every_optional_requirement_has_a_cost():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    optional = {Requirement(line).name for extra, lines in extras.items() if extra != "test" for line in lines}
    assert optional == set(doctor.COSTS)


def test_instruction_sets_and_gpu_attention(monkeypatch):
    gpu = {"name": "GPU", "memory": 2**36, "memory_free": 2**35, "capability": "9.0"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    _, missing = findings([], computer(simd=["avx2"]))
    assert [line.split(":")[0] for line in missing] == ["bfloat16 instructions"]
    assert findings([], computer()) == ([], [])
    _, missing = findings([], computer(gpus=[gpu]))
    assert [line.split(":")[0] for line in missing] == ["torch.nn.attention.varlen"]


def test_the_report_shows_gpus_and_what_is_missing():
    gpu = {"name": "GPU", "memory": 2**36, "memory_free": 2**35, "capability": "9.0"}
    text = report(
        {
            "ok": False,
            "python": "3.11",
            "machine": computer(gpus=[gpu]),
            "rates": {"gpu_read_bytes_per_s": 3e12, "cpu_float32_flops": 2e11},
            "constants": [{"title": f"measured {i}", "facts": {"experts": "2 us"}} for i in range(6)],
            "libraries": [vars(library()), vars(library("x", extra="serve", installed=None, problem="not installed"))],
            "broken": ["numpy: gone"],
            "missing": ["x: gone"],
        }
    )
    for line in ("GPU 0   GPU, 64 GiB, 32 GiB free, capability 9.0", "3000.0 GB/s", "200 GFLOP/s", "numpy: gone"):
        assert line in text
    assert "measured 3\n    experts             2 us\n  and 2 older ones (--json shows all)\n" in text


def test_the_container_s_quota_counts(tmp_path, monkeypatch):
    file = tmp_path / "cpu.max"
    assert environment.quota_cores(file) is None
    file.write_text("150000 100000")
    assert environment.quota_cores(file) == 1.5
    file.write_text("max 100000")
    assert environment.quota_cores(file) is None
    monkeypatch.setattr(environment, "quota_cores", lambda: 1.5)
    assert environment.usable_cores() == 1


def test_simd_flags_are_those_of_linux(monkeypatch):
    lines = {}
    monkeypatch.setattr(machine, "_lines", lambda path: lines.get(path, []))
    lines["/proc/cpuinfo"] = ["model name\t: A CPU", "flags\t: fpu avx2 amx_bf16"]
    assert machine.simd_flags() == ["avx2", "amx_bf16"]


@pytest.mark.gpu
def test_host_to_gpu_rate():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert machine.host_to_gpu_rate() > 1e6
