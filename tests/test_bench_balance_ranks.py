"""`moeyard bench balance --ranks`: real processes on a tiny checkpoint, and options that do not go together."""

import json

import pytest

from moeyard.__main__ import main

SHAPE = ["--hidden", "64", "--layers", "2", "--experts", "16", "--top-k", "4", "--expert-width", "32", "--vocab", "300"]
LOAD = ["--tokens", "2048", "--hot", "4", "--shares", "60", "--repeats", "1"]


def test_both_sides_over_two_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "report.json"
    options = ["--workdir", str(tmp_path), "--dtype", "float32", "--balance", "moonep", "--json", str(file)]
    assert main(["bench", "balance", "--ranks", "2", *SHAPE, *LOAD, *options]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert {"real_ratio_balanced", "real_ratio_60", "peak_memory_ratio_60"} <= figures.keys()
    assert all(value > 0 for value in figures.values())
    samples = json.loads(file.read_text())["samples"]
    assert samples["60"]["figures"]["moved_bytes"] > 0 and samples["60"]["figures"]["layers"] == 2
    assert samples["balanced"]["figures"]["moved_bytes"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --simulate, for the grid by the model, or --ranks N"),
        (["--simulate", "--ranks", "2"], "give --simulate, for the grid by the model, or --ranks N"),
        (["--simulate", "--tokens", "64"], "--tokens is of no use with --simulate"),
        (["--simulate", "--hidden", "64"], "--hidden is of no use with --simulate"),
        (["--ranks", "2", "--quick"], "--quick is of no use with --ranks"),
        (["--ranks", "1"], "--ranks is 1; there is nothing to balance below 2"),
        (["--ranks", "2", "--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--ranks", "2", "--hot", "9"], "--hot is 9; the first of 2 ranks has 8"),
        (["--ranks", "2", "--hot", "4", "--shares", "150"], "--shares 150: so many copies do not fit"),
        (["--ranks", "2", "--shares", "many"], "--shares is 'many'"),
        (["--ranks", "2", "--balance", "best"], "balance is 'best'; choose one of"),
    ],
)
def test_what_cannot_work_is_one_line(options, words, tmp_path, capsys):
    shape = [] if "--simulate" in options or not options else [*SHAPE, "--workdir", str(tmp_path)]
    assert main(["bench", "balance", *options, *shape]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moeyard: error: ") and words in error
