"""Ranks as processes on this machine: their options, ends, restarts, and that nothing is left. No engine runs here."""

import json
import os
import signal
import sys
import time

import psutil
import pytest

from moeyard.launch.local import LocalLauncher

BOUND_S = 20.0

# Writes its arguments to $OUT/<rank>, and lives until it is ended.
PROGRAM = """
import json, os, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
path = os.path.join(os.environ["OUT"], arguments["--rank"])
with open(path + ".new", "w") as file:
    json.dump(arguments, file)
os.rename(path + ".new", path)
if os.environ.get("END"):
    sys.exit(int(os.environ["END"]))
time.sleep(600)
"""


def until(condition):
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def launch(tmp_path):
    """Makes launchers of the program above; what they started is gone at the end."""
    made = []

    def make(**options):
        env = {"OUT": str(tmp_path)} | options.pop("env", {})
        made.append(LocalLauncher(command=[sys.executable, "-c", PROGRAM], env=env, **options))
        return made[-1]

    yield make
    for launcher in made:
        launcher.stop(0)
        assert all(not psutil.pid_exists(pid) for pid in launcher.pids.values())


def arguments(tmp_path, rank):
    until((tmp_path / str(rank)).exists)
    return json.loads((tmp_path / str(rank)).read_text())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {0: ("0", "1")}),
        ({"ranks": (0, 1, 2)}, {0: ("0", "3"), 1: ("1", "3"), 2: ("2", "3")}),
        ({"ranks": range(4, 6)}, {4: ("0", "2"), 5: ("1", "2")}),
        ({"ranks": (5,), "local_ranks": (1,), "local_count": 4}, {5: ("1", "4")}),
        ({"ranks": (5,), "local_ranks": (1,)}, {5: ("1", "2")}),  # at least so many
    ],
)
def test_each_rank_knows_its_place(launch, tmp_path, options, wanted):
    launcher = launch(**options)
    endpoint = launcher.start()
    assert launcher.ranks == tuple(wanted) == tuple(launcher.pids)
    assert launcher.pid == launcher.pids[launcher.ranks[0]]
    assert endpoint.startswith("ipc://")
    for rank, (local, count) in wanted.items():
        assert arguments(tmp_path, rank) == {
            "--connect": endpoint,
            "--parent": str(os.getpid()),
            "--rank": str(rank),
            "--local-rank": local,
            "--local-ranks": count,
        }


@pytest.mark.parametrize("bind", [None, "tcp://*:29577"])
def test_ranks_of_several_nodes_meet_at_an_address(launch, tmp_path, bind):
    launcher = launch(ranks=(2, 3), connect="tcp://[::1]:29577", bind=bind)
    assert launcher.start() == (bind or "tcp://[::1]:29577")
    assert arguments(tmp_path, 3)["--connect"] == "tcp://[::1]:29577"


def test_ends_have_reasons_and_ranks_come_again(launch, tmp_path):
    launcher = launch(ranks=(0, 1, 2))
    assert launcher.ended() == {} and launcher.pids == {}
    launcher.start()
    assert launcher.ended() == {} and launcher.poll() is None
    before = arguments(tmp_path, 1)
    os.kill(launcher.pids[1], signal.SIGSTOP)  # even then
    launcher.kill(1)
    until(lambda: launcher.ended() == {1: "killed by SIGKILL"})
    launcher.kill(1)  # again is nothing
    (tmp_path / "1").unlink()
    old = launcher.pids[1]
    launcher.restart(1)
    assert launcher.ended() == {} and launcher.pids[1] != old
    assert arguments(tmp_path, 1) == before
    launcher.stop(0)
    assert set(launcher.ended().values()) == {"killed by SIGTERM"} and launcher.poll() == "killed by SIGTERM"
    launcher.stop(0)


@pytest.mark.parametrize("code", [0, 7])
def test_exit_codes(launch, code):
    launcher = launch(ranks=(0, 1), env={"END": str(code)})
    launcher.start()
    until(lambda: launcher.ended() == dict.fromkeys((0, 1), f"exit code {code}"))


def test_stop_ends_what_ignores_sigterm_and_what_is_stopped(launch, monkeypatch, tmp_path):
    monkeypatch.setattr("moeyard.launch.local.TERMINATE_TIMEOUT_S", 0.3)
    launcher = launch(ranks=(0, 1))
    launcher._command[-1] = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PROGRAM
    directory = launcher.start().removeprefix("ipc://").rpartition("/")[0]
    assert arguments(tmp_path, 0) and arguments(tmp_path, 1)
    assert os.stat(directory).st_mode & 0o077 == 0
    os.kill(launcher.pids[1], signal.SIGSTOP)
    launcher.stop(0)
    assert launcher.ended() == dict.fromkeys((0, 1), "killed by SIGKILL")
    assert not os.path.exists(directory)


def test_a_program_that_is_not_there_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    launcher = LocalLauncher(ranks=(0, 1), command=["/nonexistent/program"])
    with pytest.raises(OSError, match="nonexistent"):
        launcher.start()
    assert list(tmp_path.iterdir()) == [] and launcher.ended() == {}
