"""The file of recorded loads: what is read, what is refused, and a disk on which nothing can be written."""

import errno
import json
import logging
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.launch import recorded
from moeyard.launch.recorded import RecordedLoads

GOOD = {"version": 1, "model": "m", "tokens": 9, "experts": [3, 2], "loads": [[5, 0, 1], [2, 4]]}


def write(path, **changes):
    path.write_text(json.dumps(GOOD | changes))
    return str(path)


def test_a_run_keeps_half_and_adds_its_own(tmp_path):
    loads = RecordedLoads(write(tmp_path / "f"), "m")
    assert loads.earlier == [[2, 0, 0], [1, 2]] == loads.loads(None)
    assert loads.loads([[1, 1, 1], [0, 7]]) == [[3, 1, 1], [1, 9]]
    loads.save([[1, 1, 1], [0, 7]], tokens=3)
    assert json.loads((tmp_path / "f").read_text()) == GOOD | {"tokens": 7, "loads": [[3, 1, 1], [1, 9]]}
    loads.save([[2, 1, 1], [0, 7]], tokens=4)
    assert RecordedLoads(str(tmp_path / "f"), "m").earlier == [[2, 0, 0], [0, 4]]


def test_nothing_new_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "f"
    loads = RecordedLoads(str(path), "m")
    for nothing in (None, [], [[0, 0]]):
        loads.save(nothing, tokens=1)
    assert loads.loads(None) is None and not path.exists()
    loads.save([[1, 0]], tokens=1)
    before = path.stat().st_ino
    loads.save([[1, 0]], tokens=1)
    assert path.stat().st_ino == before
    loads.save([[1, 1]], tokens=2)
    assert path.stat().st_ino != before and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        ("{", "JSON", "something else"),
        ("[]", "a JSON object", "list"),
        ({"version": 2}, "version 1", "version 2"),
        ({"version": None}, "version 1", "version None"),
        ({"loads": None}, '"loads" with a list', "None"),
        ({"loads": []}, '"loads" with a list', r"\[\]"),
        ({"loads": [[1, 0, 0], [1]], "experts": [3, 1.0]}, None, None),
        ({"loads": [[1, "2", 0], [1, 2]]}, '"loads" with a list', "'2'"),
        ({"loads": [[1, -2, 0], [1, 2]]}, '"loads" with a list', "-2"),
        ({"loads": [[1, True, 0], [1, 2]]}, '"loads" with a list', "True"),
        ({"loads": [[1, 2**62, 0], [1, 2]]}, '"loads" with a list', str(2**62)),
        ({"loads": [[1, 0], [1, 2]]}, r'"experts" \[2, 2\], as "loads" has', r"\[3, 2\]"),
        ({"tokens": -1}, '"tokens" of 0 or more', "-1"),
        ("[" * 100_000, "JSON", "something else"),
        ("\udcff", "JSON", "something else"),
    ],
)
def test_damaged_files(tmp_path, content, expected, found):
    path = tmp_path / "f"
    if isinstance(content, str):
        path.write_text(content, errors="surrogateescape")
    else:
        write(path, **content)
    if expected is None:  # 1.0 is 1
        assert RecordedLoads(str(path), "m").earlier
        return
    with pytest.raises(ValueError, match=f"placement: .*f: expected {expected}.*, found .*{found}.*remove the file"):
        RecordedLoads(str(path), "m")


def test_the_shape_of_the_model(tmp_path):
    loads = RecordedLoads(write(tmp_path / "f"), "m")
    loads.check_shape([3, 2])
    with pytest.raises(ValueError, match=r"expected loads of 2 layers of 4 experts.*found 2 layers of 2 or 3 experts"):
        loads.check_shape([4, 4])
    RecordedLoads(str(tmp_path / "new"), "m").check_shape([4, 4])


def test_loads_that_fit_no_count_are_left_alone(tmp_path, caplog):
    """The engine should refuse such a file; if it does not, the file of another model is not overwritten."""
    path = tmp_path / "f"
    loads = RecordedLoads(write(path), "m")
    assert loads.loads([[1, 2]]) == [[1, 2]]
    loads.save([[1, 2]], tokens=1)
    loads.save([[1, 3]], tokens=1)
    assert json.loads(path.read_text()) == GOOD
    assert len([r for r in caplog.records if "not written" in r.getMessage()]) == 1


def test_another_model_of_the_same_shape_is_said(tmp_path, caplog):
    RecordedLoads(write(tmp_path / "f"), "other")
    assert "was recorded with the model 'm'" in caplog.text


def test_what_is_not_a_file_is_refused(tmp_path):
    """Reading /dev/full never ends; replacing it would be worse."""
    for path in ("/dev/full", str(tmp_path)):
        with pytest.raises(ValueError, match="expected a file"):
            RecordedLoads(path, "m")
    with pytest.raises(ValueError, match="the directory does not exist"):
        RecordedLoads(str(tmp_path / "no" / "f"), "m")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_said_once_and_tried_again(tmp_path, monkeypatch, caplog, call):
    caplog.set_level(logging.INFO)
    path = tmp_path / "f"
    loads = RecordedLoads(write(path), "m")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(recorded.os, call, full)
        loads.save([[1, 0, 0], [0, 0]], tokens=1)
        loads.save([[2, 0, 0], [0, 0]], tokens=2)
    assert json.loads(path.read_text()) == GOOD and os.listdir(tmp_path) == ["f"]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage() == (
        f"placement: cannot write {path}: No space left on device; serving goes on, and it is tried again"
    )
    loads.save([[2, 0, 0], [0, 0]], tokens=2)
    assert json.loads(path.read_text())["loads"][0] == [4, 0, 0]
    assert caplog.records[-1].getMessage().endswith("is written again")


def test_a_link_stays_a_link_and_the_umask_counts(tmp_path):
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        RecordedLoads(str(path), "m").save([[1]], tokens=1)
    finally:
        os.umask(before)
    assert path.is_symlink() and stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


@given(st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 2**40))
def test_what_is_written_can_be_read(tmp_path_factory, counts, tokens):
    path = tmp_path_factory.mktemp("recorded") / "f"
    RecordedLoads(str(path), "m").save(counts, tokens)
    again = RecordedLoads(str(path), "m")
    assert again.earlier == ([[n // 2 for n in row] for row in counts] if any(map(any, counts)) else None)
