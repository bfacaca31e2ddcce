"""The trace file: its events, what is left of it at any moment, and a disk that is full."""

import json
import logging

import pytest

from moeyard.launch.trace import TraceWriter

SPANS = [["experts", 3, 1, 5_000_000, 2_500], ['a "name"', 4, -1, 5_010_000, 0]]


def spans_of(events):
    return [event for event in events if event["ph"] == "X"]


def test_events(tmp_path):
    path = tmp_path / "t.json"
    writer = TraceWriter(str(path))
    writer.add(1, SPANS, offset_ns=1_000)
    writer.add(0, SPANS, offset_ns=0)
    writer.add(1, [], offset_ns=0)
    writer.add(1, SPANS[:1], offset_ns=1_000)
    writer.close()
    writer.close()
    writer.add(1, SPANS, offset_ns=0)  # after the end: nothing
    events = json.loads(path.read_text())
    names = [event for event in events if event["ph"] == "M"]
    assert [(event["pid"], event["name"], event["args"]) for event in names] == [
        (1, "process_name", {"name": "rank 1"}),
        (0, "process_name", {"name": "rank 0"}),
    ]
    one, two, three, four, five = spans_of(events)
    assert {name: one[name] for name in ("name", "pid", "tid", "dur", "args")} == {
        "name": "experts",
        "pid": 1,
        "tid": 0,
        "dur": 2.5,
        "args": {"step": 3, "layer": 1},
    }
    assert two["name"] == 'a "name"' and two["ts"] - one["ts"] == pytest.approx(10.0)
    assert one["ts"] - three["ts"] == pytest.approx(1.0), "the clocks differ by 1,000 ns"
    assert (four["pid"], five["pid"], five["ts"]) == (0, 1, one["ts"])


def test_a_file_without_spans(tmp_path):
    TraceWriter(str(tmp_path / "t")).close()
    assert json.loads((tmp_path / "t").read_text()) == []


def test_what_a_crash_leaves_lacks_only_the_bracket(tmp_path):
    path = tmp_path / "t"
    writer = TraceWriter(str(path))
    for n in range(1, 4):
        writer.add(0, SPANS, offset_ns=0)
        assert len(spans_of(json.loads(path.read_text() + "]"))) == 2 * n
    writer.close()


def test_a_full_disk_ends_the_trace_with_one_line(caplog):
    caplog.set_level(logging.INFO)
    writer = TraceWriter("/dev/full")
    for _ in range(3):
        writer.add(0, SPANS, offset_ns=0)
    writer.close()
    assert writer.stopped
    assert [record.getMessage() for record in caplog.records] == [
        "trace: cannot write /dev/full: No space left on device; tracing stops"
    ]


def test_a_file_that_cannot_be_opened_is_the_users(tmp_path):
    with pytest.raises(ValueError, match=r"trace: cannot write .*/no/t: No such file or directory"):
        TraceWriter(str(tmp_path / "no" / "t"))
