"""`moeyard bench replay`: its figures against the replays they stand for, the split of domains, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moeyard.__main__ import main
from moeyard.bench import replay as bench
from moeyard.bench.replay_report import Row, figures, picture
from moeyard.bench.token_trace import read_token_trace, split_domains
from moeyard.engine.next_use import NextUse
from moeyard.engine.predict.base import Predictor, Rows
from moeyard.scheduler.residency.policies import LRU
from moeyard.scheduler.residency.replay import Tally, replay
from moeyard.scheduler.residency.slots import Budget

LAYERS, EXPERTS = 2, 16


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three domains of ten sequences; every sequence has its own few experts, and others now and then."""
    rng = np.random.default_rng(0)
    topk = np.empty((30, 24, LAYERS, 2), dtype=np.int8)
    for sequence in topk:
        for layer in range(LAYERS):
            own = rng.choice(EXPERTS, 5, replace=False)
            for t in range(24):
                sequence[t, layer] = rng.choice(own if rng.random() < 0.8 else EXPERTS, 2, replace=False)
    topk[0, 0, 0, 0] = EXPERTS - 1
    path = tmp_path_factory.mktemp("trace") / "made.npz"
    np.savez(
        path,
        topk=topk.reshape(-1, LAYERS, 2),
        seq_start=np.arange(30) * 24,
        seq_domain=np.arange(30) % 3,
        domains=["law", "maths-a", "maths-b", "empty"],
        digest="abc",
    )
    return str(path)


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[dict, str]:
    assert main(["bench", "replay", *argv]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_the_command(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture_path, json_path = tmp_path / "p.svg", tmp_path / "r.json"
    made, out = report(
        capsys, "--trace", trace, "--fit", "maths-*", "--score", "law", "--expert-bytes", "1KiB",
        "--picture", str(picture_path), "--json", str(json_path), "--save-predictor", str(tmp_path / "p.npz"),
        "--jobs", "1",
    )  # fmt: skip
    found = made["figures"]
    assert made["bench"] == "replay" and "fitted on maths-a, maths-b" in out and "240 tokens of law" in out
    scored = read_token_trace(trace).of({"law"})
    lru = replay(LRU(Budget.per_layer(LAYERS, EXPERTS, 4)), scored.topk_TLK)
    assert found["hit_rate_lru"] == pytest.approx(lru.hit_rate, rel=1e-4)
    assert found["read_bytes_lru"] == pytest.approx(lru.misses / 240 * 1024, rel=1e-4)
    assert found["copied_bytes_lru"] == found["read_bytes_lru"]
    assert found["copied_bytes_default"] < found["read_bytes_default"]
    assert (found["excess_closed_lru"], found["copies_lru"], found["excess_closed_belady_bypass"]) == (0, 1, 1)
    assert 0 < found["copies_used_lru"] < found["copies_used_belady_bypass"] <= 1
    ahead = [found[f"excess_closed_foresight_{window}"] for window in (1, 4, 16)]
    assert ahead[0] < ahead[1] <= ahead[2] <= 1
    for name in ("lfu", "lfru", "decayed", "default", "predicted", "predicted_live", "belady"):
        assert found[f"excess_closed_{name}"] <= 1 and f"hit_rate_{name}_50" in found
        assert found[f"hit_rate_{name}_50"] > found[f"hit_rate_{name}"]
    assert found["copies_default"] < 0.5 < found["copies_lfru"]
    rows = json.loads(json_path.read_text())["samples"]["rows"]
    assert len(rows) == 2 * len(bench.NAMES) and json_path.read_text().count('"law"') == 1
    assert ET.parse(picture_path).getroot().tag.endswith("svg")
    saved = NextUse.load(str(tmp_path / "p.npz"), "abc")
    assert saved.experts == EXPERTS and saved.next_token is not None


def test_processes_find_the_same(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trace", trace, "--policies", "lru,default", "--residents", "0.5,0.25", "--tokens", "50")
    one, out = report(capsys, *options, "--jobs", "1")
    two, _ = report(capsys, *options, "--jobs", "2")
    assert one["figures"] == two["figures"] and "hit_rate_lru_25" in one["figures"]
    assert "50 tokens of law, maths-a, maths-b" in out and "left out" not in out


def test_pooled_slots_are_another_replay(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trace", trace, "--policies", "lru", "--residents", "0.25", "--jobs", "1")
    split, _ = report(capsys, *options)
    pooled, out = report(capsys, *options, "--layout", "pooled")
    topk = read_token_trace(trace).topk_TLK
    want = replay(LRU(Budget(layers=LAYERS, experts=EXPERTS, slots=8, floor=2)), topk)
    assert pooled["figures"]["hit_rate_lru"] == pytest.approx(want.hit_rate, rel=1e-4)
    assert pooled["figures"]["hit_rate_lru"] != split["figures"]["hit_rate_lru"] and "pooled" in out
    no_floor, _ = report(capsys, *options, "--layout", "pooled", "--floor", "0")
    want = replay(LRU(Budget(layers=LAYERS, experts=EXPERTS, slots=8)), topk)
    assert no_floor["figures"]["hit_rate_lru"] == pytest.approx(want.hit_rate, rel=1e-4)


def test_a_higher_margin_copies_less(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trace", trace, "--fit", "maths-a", "--policies", "predicted", "--residents", "0.25", "--jobs", "1")
    low, _ = report(capsys, *options, "--margin", "0")
    high, _ = report(capsys, *options, "--margin", "0.5")
    assert high["figures"]["copies_predicted"] < low["figures"]["copies_predicted"]


def test_the_live_policy_decides_after_it_has_told_the_layer(trace: str) -> None:
    """Its predictor wants what the layer has just used; each sequence begins at its first token."""
    told = []

    class Fake(Predictor):
        def begin_step(self, rows: Sequence[Rows]) -> None:
            told.append(rows[0].start)
            self.scores_LE = np.zeros((LAYERS, EXPERTS), dtype=np.float32)

        def routed(self, layer: int, ids_TK: np.ndarray) -> None:
            self.scores_LE[layer, ids_TK[0]] = 1

        def future(self) -> np.ndarray:
            return self.scores_LE

    short = read_token_trace(trace).first(60)
    policy = bench.LivePolicy(Budget.per_layer(LAYERS, EXPERTS, 2), 0.5, Fake(), short)
    tally = replay(policy, short.topk_TLK)
    assert told == [t % 24 for t in range(60)]
    assert tally.copies == tally.misses > 0  # with slots for just what a token uses, all it misses is worth more


def test_without_a_fit_predicted_is_left_out_aloud(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = report(capsys, "--trace", trace, "--tokens", "9", "--residents", "0.25", "--jobs", "1")
    assert "predicted and predicted-live are left out" in out and "hit_rate_predicted" not in made["figures"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fit", "law", "--score", "l*"], "--fit and --score both have law"),
        (["--fit", "*"], "leave one for --score"),
        (["--fit", "physics"], "no domain 'physics'; those it has: law, maths-a, maths-b"),
        (["--fit", "empty"], "no domain 'empty'"),
        (["--policies", "lru,mru"], "--policies is"),
        (["--policies", "predicted"], "needs --fit"),
        (["--policies", "predicted-live"], "has predicted-live, which needs --fit"),
        (["--policies", "lru", "--fit", "law"], "only of use with the policies predicted"),
        (["--residents", "0.25,0.25"], "--residents is"),
        (["--residents", "25"], "--residents is"),
        (["--residents", "x"], "--residents is"),
        (["--floor", "1"], "--floor is of use with --layout pooled"),
        (["--layout", "pooled", "--floor", "5", "--residents", "0.25"], "--floor is 5"),
        (["--margin", "0.5"], "--margin is of use with the policies predicted"),
        (["--margin", "-1", "--fit", "law"], "--margin is -1"),
        (["--save-predictor", "x.npz"], "--save-predictor is of use with"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--shape", "Kimi-K2", "--expert-bytes", "1GB"], "say the same"),
        (["--expert-bytes", "big"], "--expert-bytes: cannot read"),
        (["--picture", "/missing/x.svg"], "does not exist"),
    ],
)
def test_mistakes(trace: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "replay", "--trace", trace, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"seq_start": [0]}, "no array topk"),
        ({"topk": np.zeros((4, 1, 1), dtype=int)}, "no array seq_start"),
        ({"topk": np.zeros((4, 1)), "seq_start": [0]}, "topk has shape"),
        ({"topk": np.zeros((4, 1, 1), dtype=int), "seq_start": [1]}, "seq_start must"),
        ({"topk": np.zeros((4, 1, 1), dtype=int), "seq_start": [0, 4]}, "seq_start must"),
        (
            {"topk": np.zeros((4, 1, 1), dtype=int), "seq_start": [0, 2], "seq_domain": [0, 1], "domains": ["a"]},
            "seq_domain must",
        ),
    ],
)
def test_what_is_not_a_trace(arrays: dict, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{name: np.array(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says) as error:
        read_token_trace(str(path))
    assert "--trace" in str(error.value)


def test_domains_are_taken_whole(trace: str) -> None:
    whole = read_token_trace(trace)
    part = whole.of({"law", "maths-b"})
    assert len(part.start_S) == 20 and part.start_S.tolist() == [24 * i for i in range(20)]
    np.testing.assert_array_equal(part.topk_TLK[24:48], whole.topk_TLK[48:72])  # the second is the third of all
    first = part.first(30)
    assert len(first.topk_TLK) == 30 and first.start_S.tolist() == [0, 24] and first.end_S.tolist() == [24, 30]
    assert split_domains(whole, "law", None) == ({"law"}, {"maths-a", "maths-b"})
    assert split_domains(whole, None, None) == (set(), {"law", "maths-a", "maths-b"})


def test_a_trace_without_domains(tmp_path: Path) -> None:
    path = tmp_path / "plain.npz"
    np.savez(path, topk=np.arange(6).reshape(3, 1, 2), seq_start=np.array([0]))
    trace = read_token_trace(str(path))
    assert split_domains(trace, None, None) == (set(), {""}) and trace.experts == 6
    with pytest.raises(ValueError, match="those it has: none"):
        split_domains(trace, "law", None)
    with pytest.raises(ValueError, match="--fit has all domains"):
        split_domains(trace, "*", None)


def test_figures_where_lru_has_nothing_to_improve() -> None:
    """All experts fit: no excess, and no copies but the first."""
    tally = Tally(steps=4, hits=6, misses=2, copies=2, used=1)
    row = Row.of("lru", 1.0, tally, tally, tally)
    assert (row.excess_closed, row.copies_vs_lru, row.read_per_token) == (1.0, 1.0, 0.5)
    assert figures([row], None) == {
        "hit_rate_lru": 0.75, "excess_closed_lru": 1.0, "copies_lru": 1.0, "copies_used_lru": 0.5
    }  # fmt: skip
    nothing = Row.of("none", 1.0, Tally(steps=4, hits=8, misses=0, copies=0, used=0), tally, tally)
    assert "none" in picture([row, nothing])
