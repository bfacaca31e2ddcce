"""The file of constants: what counts, what does not and says why, and two processes that write at once."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from datetime import timedelta

import pytest

from moeyard.engine import constants
from moeyard.engine.constants import MAX_AGE, find, forget, load, save
from moeyard.scheduler.cost import Constants, ExpertCost, LinkCost, RankConstants
from moeyard.scheduler.offload_cost import DiskCost, RoutingSummary

KEY = {"cpu": "a CPU", "threads": 2, "dtype": "bfloat16", "hidden": 64, "gate": True}
VALUES = RankConstants(ExpertCost(1_000, 200, 30), 64, LinkCost(10, 20))
GROUP = Constants.from_list(range(19))
DISK = DiskCost(
    reads={1: LinkCost(100, 10**6), 8: LinkCost(50, 10**5)}, sequential_fs_per_byte=10**5, expert_bytes=9_000
)
ROUTING = RoutingSummary(tokens=50, active=8.0, shares=(0.25,), default=(3.5,), lru=(4.0,), least=(2.0,))
SAMPLES = {"experts": [[1, 16, 5_000], [4, 64, 9_000]], "to_host": []}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    constants._warn_once.cache_clear()
    caplog.set_level(logging.INFO)
    return tmp_path / "moeyard" / "constants"


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("kind", "values"), [("rank", VALUES), ("group", GROUP), ("disk", DISK), ("routing", ROUTING)])
def test_what_is_written_is_read(home, caplog, kind, values):
    assert load(kind, KEY) is None
    saved = save(kind, KEY, values, SAMPLES)
    found = load(kind, KEY)
    assert type(found.values) is type(values)
    assert (found.values, found.samples, found.key, found.stale) == (values, SAMPLES, KEY, "")
    assert abs(found.date - saved.date) <= timedelta(seconds=1)
    assert [file.name for file in home.iterdir()] == [saved.path.name]  # nothing temporary is left
    assert not caplog.records


@pytest.mark.parametrize("change", [{"threads": 1}, {"hidden": 65}, {"gate": False}, {"ranks": 2}])
def test_another_machine_or_model_has_another_file(change):
    save("rank", KEY, VALUES, SAMPLES)
    assert load("rank", KEY | change) is None
    assert load("group", KEY) is None


def test_old_files_are_measured_again(monkeypatch, caplog):
    saved = save("rank", KEY, VALUES, SAMPLES)
    monkeypatch.setattr(constants, "_now", lambda: saved.date + MAX_AGE - timedelta(minutes=1))
    assert load("rank", KEY) is not None
    monkeypatch.setattr(constants, "_now", lambda: saved.date + MAX_AGE + timedelta(days=1))
    assert load("rank", KEY) is None
    assert "31 days old: measuring again" in caplog.text
    monkeypatch.setattr(constants, "_now", lambda: saved.date - timedelta(days=2))
    assert load("rank", KEY) is None
    assert "which is not yet: measuring again" in caplog.text


def test_another_build_is_measured_again(monkeypatch, caplog):
    save("rank", KEY, VALUES, SAMPLES)
    monkeypatch.setattr(constants, "build", lambda: {"moeyard": "9.9", "torch": "9.9"})
    assert load("rank", KEY) is None
    assert f"of moeyard {constants.__version__}: measuring again" in caplog.text
    newer = save("rank", KEY, replace(VALUES, few_rows=16), SAMPLES)
    assert load("rank", KEY).values == newer.values == replace(VALUES, few_rows=16)  # in the same file


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        "{}",
        b"\xff\xfe",
        {"key": []},
        {"build": None},
        {"date": "yesterday"},
        {"date": 5},
        {"date": "2026-01-01"},
        {"samples": [1]},
        {"samples": {"experts": [["x"]]}},
        {"values": {}},
        {"values": {"experts": 5, "few_rows": 3, "host": 1}},
    ],
)
def test_unreadable_files_are_measured_again(caplog, text):
    path = save("rank", KEY, VALUES, SAMPLES).path
    if isinstance(text, dict):
        rewrite(path, **text)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert load("rank", KEY) is None
    assert f"{path} are unreadable" in caplog.text and "measuring again" in caplog.text
    assert find("rank") == []
    assert save("rank", KEY, VALUES, SAMPLES).values == load("rank", KEY).values


@pytest.mark.parametrize(
    ("kind", "good", "change"),
    [
        ("disk", DISK, {"reads": {}}),
        ("disk", DISK, {"reads": {"0": {"alpha_ns": 1, "fs_per_byte": 1}}}),
        ("disk", DISK, {"reads": {"1": {"alpha_ns": -1, "fs_per_byte": 1}}}),
        ("disk", DISK, {"expert_bytes": 0}),
        ("disk", DISK, {"more": 1}),
        ("routing", ROUTING, {"lru": []}),
        ("routing", ROUTING, {"least": [-1]}),
        ("routing", ROUTING, {"active": 0}),
        ("routing", ROUTING, {"shares": None}),
    ],
)
def test_values_that_cannot_be_are_measured_again(caplog, kind, good, change):
    path = save(kind, KEY, good, SAMPLES).path
    assert load(kind, KEY) is not None
    rewrite(path, values=json.loads(path.read_text())["values"] | change)
    assert load(kind, KEY) is None
    assert f"{path} are unreadable" in caplog.text


def test_a_file_of_another_key_is_measured_again(caplog):
    path = save("rank", KEY, VALUES, SAMPLES).path
    rewrite(path, key=KEY | {"cpu": "another CPU"})
    assert load("rank", KEY) is None
    assert "of another machine or model: measuring again" in caplog.text


def test_of_two_processes_that_measured_the_first_counts():
    first = save("rank", KEY, VALUES, SAMPLES)
    assert save("rank", KEY, replace(VALUES, few_rows=16), SAMPLES).values == VALUES
    assert load("rank", KEY).path == first.path


def test_of_two_processes_that_write_at_once_one_counts(monkeypatch):
    """The other's file comes at the last moment."""
    link, other = os.link, replace(VALUES, few_rows=16)

    def late(source, target):
        monkeypatch.setattr(os, "link", link)
        save("rank", KEY, other, SAMPLES)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert save("rank", KEY, VALUES, SAMPLES).values == other == load("rank", KEY).values


def test_a_file_system_without_links_will_do(monkeypatch):
    def fail(source, target):
        raise PermissionError("no links")

    monkeypatch.setattr(os, "link", fail)
    assert save("rank", KEY, VALUES, SAMPLES).values == VALUES == load("rank", KEY).values


def test_where_nothing_can_be_written_that_is_said_once(home, caplog):
    home.parent.mkdir()
    home.write_text("not a directory")
    for _ in range(2):
        record = save("rank", KEY, VALUES, SAMPLES)
        assert record.values == VALUES and not record.path.exists()
        assert load("rank", KEY) is None
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "each start measures anew" in warning.getMessage()
    assert find("rank") == []


def test_find_gives_the_newest_first_and_forget_removes(monkeypatch):
    now = constants._now()
    for days, threads in enumerate((2, 1, 4)):
        monkeypatch.setattr(constants, "_now", lambda days=days: now + timedelta(days=days))
        save("rank", KEY | {"threads": threads}, VALUES, SAMPLES)
    save("group", KEY, GROUP, SAMPLES)
    assert [record.key["threads"] for record in find("rank", cpu="a CPU", hidden=64)] == [4, 1, 2]
    assert find("rank", cpu="a CPU", more=1) == [] == find("rank", hidden=65)
    monkeypatch.setattr(constants, "_now", lambda: now + timedelta(days=100))
    assert "days old" in find("rank")[0].stale  # those, too
    assert forget("rank", threads=1) == 1 and forget("rank", threads=1) == 0
    assert [record.key["threads"] for record in find("rank")] == [4, 2]
    assert forget("rank") == 2 and len(find("group")) == 1
