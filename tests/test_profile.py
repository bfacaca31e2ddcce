"""`moeyard profile` end to end, and what `plan` and `doctor` then show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import tiny

from moeyard.__main__ import main
from moeyard.engine import constants, measure, measure_disk
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.loader import draw
from moeyard.kernels import compiled
from moeyard.kernels.environment import ENVIRONMENT
from moeyard.launch import doctor, machine, profile
from moeyard.scheduler.cost import Constants, RankConstants


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save("qwen3_moe", tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiled._DIRECTORY is not None:  # ranks need not compile for this home
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(Path(compiled._DIRECTORY).parent))
    monkeypatch.setattr(measure_disk, "CASE_S", 0.0)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "LWS_LEADER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():  # the command leaves them set
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def no_measuring(monkeypatch):
    monkeypatch.setattr(measure, "time_experts", lambda *args: pytest.fail("there is a file"))


def options(model, *more):
    return [model, "--device=cpu", "--dtype=float32", "--no-progress", "--threads=1", *more]


def test_one_rank_measures_once(model, home, capsys, monkeypatch):
    assert main(["profile", *options(model)]) == 0
    first = capsys.readouterr().out
    (record,) = constants.find("rank")
    assert isinstance(record.values, RankConstants) and record.key["threads"] == 1
    assert first.startswith("8 experts of 48 x 24 in float32, top-3, on ")
    for words in ("with 1 thread, measured ", "per expert and", "compiled kernels", str(record.path)):
        assert words in first
    assert str(record.path).startswith(str(home))

    (disk,) = constants.find("disk")
    assert f"{profile.heading(disk)}\n" in first and str(disk.path) in first
    assert disk.values.reads and disk.samples["sequential"]

    with monkeypatch.context() as patched:
        patched.setattr(measure, "time_experts", lambda *args: pytest.fail("there is a file"))
        patched.setattr(measure_disk, "measure_disk", lambda *args, **kwargs: pytest.fail("there is a file"))
        assert main(["profile", *options(model)]) == 0
        assert capsys.readouterr().out == first
        with pytest.raises(BaseException, match="there is a file"):
            main(["profile", *options(model), "--force"])
    assert main(["profile", *options(model), "--force"]) == 0
    assert constants.find("rank")[0].samples != record.samples
    assert constants.find("disk")[0].samples != disk.samples


def test_it_measures_in_the_environment_of_a_rank(model, monkeypatch):
    """Threads that spin or sleep are times apart. Torch reads this when it is loaded, so `run` must not be late."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    code = "import sys, moeyard.launch.profile; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert main(["profile", *options(model)]) == 0
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == ENVIRONMENT


def test_the_engine_takes_what_was_measured(model, no_measuring, monkeypatch):
    """Otherwise two starts could compute in two ways."""
    with monkeypatch.context() as patched:
        patched.setattr(measure, "time_experts", lambda *args: [[1, 1, 5], [2, 2, 6], [3, 3, 7]])
        patched.setattr("moeyard.engine.moe.MoELayer.measure_few_rows", lambda self: 48)
        assert main(["profile", *options(model)]) == 0
    config = EngineConfig(model=model, device="cpu", dtype="float32", threads=1, kv_memory="1MiB", progress=False)
    engine = Engine(config)
    assert [layer.few_rows for layer in engine._experts.layers] == [48] * 3
    engine.close()


def test_two_ranks(model, capsys):
    argv = options(model, "--ep=2", "--kv-memory=1MiB")
    assert main(["plan", *argv]) == 0
    assert "constants           not measured yet: moeyard profile --ep 2" in capsys.readouterr().out
    assert main(["profile", *argv]) == 0
    out = capsys.readouterr().out
    (group,), (rank,) = constants.find("group"), constants.find("rank")
    assert isinstance(group.values, Constants) and group.values.near.fs_per_byte > 0
    assert (group.key["ranks"], group.key["machines"], group.key["threads"]) == (2, "2", 1)
    for words in ("2 ranks on one machine", "all-to-all", "weights, near", "GB/s", str(group.path), str(rank.path)):
        assert words in out
    assert "weights, far" not in out

    assert main(["plan", *argv]) == 0
    shown = capsys.readouterr().out
    assert "not measured" not in shown and "2 ranks on one machine" in shown and "weights, near" in shown
    assert main(["plan", *options(model)]) == 0  # one rank with as many threads: its part is known
    shown = capsys.readouterr().out
    assert "compiled kernels" in shown and "2 ranks" not in shown and "not measured" not in shown


def test_ranks_that_cannot_write_are_an_error(model, capsys, monkeypatch):
    async def start(config):
        pass

    monkeypatch.setattr(profile, "_start", start)
    assert main(["profile", *options(model, "--ep=2")]) == 1
    assert "left no file in" in capsys.readouterr().err


def test_where_nothing_can_be_written_the_table_is_shown(model, home, capsys):
    (home / "moeyard").mkdir()
    (home / "moeyard" / "constants").write_text("not a directory")
    assert main(["profile", *options(model)]) == 0
    out = capsys.readouterr().out
    assert "compiled kernels" in out and "none: it could not be written" in out


def test_plan_and_doctor_show_what_is_known(model, capsys, monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda: iter(()))
    assert main(["plan", *options(model)]) == 0
    shown = capsys.readouterr().out
    for name in ("constants", "disk"):
        assert f"  {name:<20}not measured yet: moeyard profile\n" in shown
    assert main(["doctor"]) == 0
    assert "Constants\n  not measured yet: moeyard profile\n" in capsys.readouterr().out

    assert main(["profile", *options(model)]) == 0
    heading, *_ = capsys.readouterr().out.splitlines()
    for command in ("plan", *options(model)), ("doctor",):
        assert main(list(command)) == 0
        out = capsys.readouterr().out
        assert heading in out and "compiled kernels" in out and "not measured" not in out
    assert main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["constants"]
    rank, disk = sorted(shown, key=lambda record: "reads" in record["values"])
    assert rank["title"] == heading and rank["values"]["experts"]["ps_per_row"] > 0
    assert disk["title"].startswith("reading 8 experts of 48 x 24, 13.5 KiB each")
    assert set(disk["values"]["reads"]) == {"1", "2", "4", "8"} and "GB/s" in disk["facts"]["experts"]

    later = constants._now() + timedelta(days=40)
    monkeypatch.setattr(constants, "_now", lambda: later)
    assert main(["plan", *options(model)]) == 0
    assert f"{heading}; 40 days old, will be measured again" in capsys.readouterr().out
    assert doctor.known_constants() == []


def test_a_model_without_experts_is_refused(tmp_path, capsys, monkeypatch):
    path = tiny.save("qwen3_moe", tmp_path / "dense", decoder_sparse_step=100)
    assert main(["profile", *options(str(path))]) == 2
    assert "it has no experts" in capsys.readouterr().err


def test_layers_of_one_shape_are_measured_once(model):
    blueprint = draw(EngineConfig(model=model, device="cpu"), Path(model))
    assert len(blueprint.spec.experts) == 3 and len(profile._shapes(blueprint)) == 1


def test_shared_experts_are_shown_where_plans_may_move_them(home):
    key = {"ranks": 2, "machines": "2"}
    for shared, text in (
        ([3_000, 40_000, 70_000], "3 us + the larger of 40 us and 0.07 us per token"),
        ([0] * 3, None),
    ):
        values = Constants.from_list([*range(16), *shared])
        record = constants.save("group", key | {"shared": shared[0]}, values, {})
        assert dict(profile.facts(record)).get("shared experts") == text
