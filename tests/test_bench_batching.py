"""`moeyard bench batching`: both sides serve the same tokens, one groups them; what options cannot be."""

from __future__ import annotations

import json

import pytest

from moeyard.__main__ import main

TINY = "--layers 3 --experts 16 --top-k 2 --hidden 64 --expert-width 32 --vocab 300 --rounds 1 --input 4 --threads 1"


def test_both_sides_run_and_one_groups(tmp_path, capsys):
    json_file = tmp_path / "report.json"
    options = [*TINY.split(), "--requests", "6", "--output", "9", "--workdir", str(tmp_path), "--json", str(json_file)]
    assert main(["bench", "batching", *options]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["figures"]
    assert figures["distinct_experts_ratio_6"] < 1.1 and figures["longest_wait_6"] <= 3
    assert figures["distinct_experts_ratio_6_together"] < 1 and figures["tokens_ratio_6"] > 0
    (order,), (affinity,), (together,) = json.loads(json_file.read_text())["samples"]["6"].values()
    assert order["tokens"] == affinity["tokens"] == together["tokens"] == 6 * 8
    assert order["regrouped"] == 0 < affinity["regrouped"]
    assert order["steps"] == affinity["steps"] == 2 * together["steps"]
    assert 0 < order["missed"] <= order["touched"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("--requests x", "--requests is 'x'"),
        ("--room 0", "--room is 0"),
        ("--output 1", "--output is 1"),
        ("--resident 100", "--resident is 100"),
        ("--fit a", "--fit is of use with --trace FILE"),
        ("--trace nowhere.npz", "nowhere.npz"),
    ],
)
def test_options_that_cannot_work(options, what, capsys):
    assert main(["bench", "batching", *options.split()]) == 2
    text = capsys.readouterr().err
    assert what in text and len(text.strip().splitlines()) == 1
