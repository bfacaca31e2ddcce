"""`moeyard train-predictor`: routing that tokens decide, routing that nothing decides, documents held out whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.__main__ import main
from moeyard.bench import predictor_scores, train_predictor
from moeyard.bench.predictor_scores import Standing
from moeyard.bench.predictor_texts import Texts, split
from moeyard.bench.token_trace import TokenTrace, write_token_trace
from moeyard.engine import constants, usage
from moeyard.engine.checkpoint import Checkpoint
from moeyard.engine.next_use import NextUse
from moeyard.engine.predict import installed
from moeyard.engine.predict.path_network import PathNetwork
from moeyard.engine.resolve import EMBEDDED
from moeyard.kernels.environment import ENVIRONMENT

OPTIONS = ("--dtype", "float32", "--device", "cpu", "--threads", "1", "--kv-memory", "4MiB", "--no-progress")
LAYERS, EXPERTS = 3, 8


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setattr(constants, "directory", lambda: tmp_path / "cache" / "constants")
    return tmp_path / "cache" / "predictors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Attention and experts add nothing, so that a token's id alone decides how it is routed."""
    from transformers import AutoModelForCausalLM

    path = tiny.save("qwen3_moe", tmp_path_factory.mktemp("model"), vocab_size=4096)
    network = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    network.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(EMBEDDED) / name, path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Words in random order: what comes next is not to be known."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    words = [" for", " return", " class", " import", " print", " list", " value", " name", " error", " file", " self"]
    for i in range(6):
        (folder / f"{i}.txt").write_text("".join(rng.choice(words, 400)))
    return [str(folder / f"{i}.txt") for i in range(6)]


def noise(path: Path, **more: np.ndarray) -> str:
    """Routing that nothing decides."""
    rng = np.random.default_rng(1)
    topk = rng.permuted(np.tile(np.arange(EXPERTS), (1800, LAYERS, 1)), axis=-1)[..., :2].astype(np.int16)
    start_S = np.arange(0, 1800, 300)
    trace = TokenTrace(topk, start_S, np.arange(6), tuple(f"d{i}" for i in range(6)), "a-digest")
    write_token_trace(str(path), trace, **more)
    return str(path)


def test_what_tokens_decide_is_learnt_and_installed(model, texts, home, tmp_path, capsys):
    argv = ["train-predictor", str(model), "--text", *texts, "--epochs", "12", "--held-out", "0.34"]
    assert main([*argv, "--json", str(tmp_path / "f.json"), *OPTIONS]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "f.json").read_text())
    figures = report["figures"]
    assert figures["recall_path"] > 0.9 > 0.7 > figures["recall_decayed"]
    assert "path" in report["samples"]["installed"] and "The path network beats decayed counts" in out
    assert len(report["samples"]["held_out"]) == 2 and "4 documents to learn from" in out

    digest = Checkpoint(model).fingerprint
    assert str(installed.path_of("path", digest)) in out and installed.directory() == home
    counts_LE = usage.load(digest, LAYERS, EXPERTS)
    assert (counts_LE.sum(1) == counts_LE[0].sum()).all() and counts_LE[0].sum() > 0
    found = installed.installed(digest, LAYERS, EXPERTS)
    assert found.names[-1] == "path" and found.path.shape.vocab == 4096 and found.path.digest == digest
    # none for another model, and one that was put in its place is refused
    assert installed.installed("other", LAYERS, EXPERTS).names == ()
    shutil.copy(installed.path_of("path", digest), installed.path_of("path", "other"))
    with pytest.raises(ValueError, match="not other; make one for it with moeyard train-predictor"):
        installed.load("path", installed.path_of("path", "other"), "other", LAYERS, EXPERTS)
    assert installed.installed("other", LAYERS, EXPERTS).names == ()
    with pytest.raises(ValueError, match="for 3 layers of 8 experts, the model has 3 of 9"):
        installed.load("path", installed.path_of("path", digest), digest, LAYERS, 9)


def test_what_nothing_decides_is_refused(home, tmp_path, capsys):
    path = noise(tmp_path / "t.npz", token_ids=np.random.default_rng(2).integers(0, 50, 1800))
    assert main(["train-predictor", "--trace", path, "--epochs", "2", "--threads", "1", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "The ridge is not installed: it does not beat decayed counts on the documents held out." in out
    assert "The path network is not installed: it does not beat" in out and "Nothing is installed." in out
    assert not home.exists()


def test_without_token_ids_there_is_only_the_ridge(home, tmp_path, capsys, monkeypatch):
    path = noise(tmp_path / "t.npz")
    argv = ["train-predictor", "--trace", path, "--threads", "1", "--no-progress"]
    assert main(argv) == 0
    assert "the trace has no token ids, so that only the ridge can be fitted" in capsys.readouterr().out
    assert main([*argv, "--predictors", "path", "--epochs", "1", "--json", str(tmp_path / "f.json")]) == 0
    assert "recall_path" in json.loads((tmp_path / "f.json").read_text())["figures"]
    assert "not trained" not in capsys.readouterr().out
    # what passes takes the place of an older one; what does not leaves it
    passes = iter([True, False])
    verdict = {True: (("next_use",), []), False: ((), [])}
    monkeypatch.setattr(train_predictor, "judge", lambda standings: verdict[next(passes)])
    target = tmp_path / "here"
    assert main([*argv, "--out", str(target)]) == 0
    out = capsys.readouterr().out
    assert f"Installed: {target}/next_use-a-digest.npz" in out and not home.exists()
    assert isinstance(
        installed.load("next_use", target / "next_use-a-digest.npz", "a-digest", LAYERS, EXPERTS), NextUse
    )
    assert main([*argv, "--out", str(target)]) == 0
    assert f"An older one stays: {target}/next_use-a-digest.npz" in capsys.readouterr().out
    # memory that is not there
    monkeypatch.setattr(train_predictor, "_free_memory", lambda: 1000)
    passes = iter([False])
    assert main(argv) == 0
    assert "The ridge is not fitted: for 24 experts it needs about" in capsys.readouterr().out


def test_the_memory_of_the_ridge_is_about_what_it_takes():
    assert train_predictor.ridge_bytes(24, 32, 1000) < 1 << 30 < 4 << 30 < train_predictor.ridge_bytes(48, 128, 1000)
    assert train_predictor.ridge_bytes(24, 32, 10**6) > 4 << 30


def standing(name: str, recall: list[float], misses: float, copies: float = 0.0) -> Standing:
    recall_D = np.array(recall)
    return Standing(name=name, recall_D=recall_D, recall_double_D=recall_D, misses=misses, copies=copies, excess=0.0)


def test_who_beats_whom():
    base = standing("decayed counts", [0.4, 0.6, 0.5], 10.0, 4.0)
    assert standing("x", [0.5, 0.7, 0.6], 9.0, 4.0).beats(base)
    assert not standing("x", [0.5, 0.7, 0.6], 10.5, 4.0).beats(base)  # misses more
    assert not standing("x", [0.5, 0.7, 0.6], 9.9, 5.0).beats(base)  # copies more than it saves
    assert not standing("x", [0.8, 0.5, 0.5], 9.0, 4.0).beats(base)  # in one document only
    assert not base.beats(base) and not standing("x", [0.9], 1.0).beats(standing("y", [0.1], 10.0))

    ridge = standing("ridge", [0.5, 0.7, 0.6], 8.0)
    alone, both = standing("path network", [0.6, 0.8, 0.7], 8.5), standing("both", [0.6, 0.8, 0.7], 7.5)
    found = {"decayed": base, "next_use": ridge, "path": alone, "both": both}
    assert train_predictor.judge(found)[0] == ("next_use", "path")
    assert train_predictor.judge(found | {"both": alone})[0] == ("next_use",)
    # where the ridge is not installed the network has to do without it, and better
    weak = standing("ridge", [0.3, 0.5, 0.4], 9.0)
    assert train_predictor.judge(found | {"next_use": weak})[0] == ("path",)
    assert train_predictor.judge(found | {"next_use": weak, "path": standing("p", [0.6, 0.8, 0.7], 12)})[0] == ()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_documents_are_held_out_whole(data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=20))
    document_S = np.array(data.draw(st.permutations([i % data.draw(st.integers(4, 6)) for i in range(len(lengths))])))
    if len(np.unique(document_S)) < 4:
        return
    start_S = np.cumsum(lengths) - lengths
    tokens = sum(lengths)
    trace = TokenTrace(np.arange(tokens)[:, None, None], start_S, document_S, tuple("abcdef"))
    texts = Texts(trace=trace, token_T=np.arange(tokens), vocab=tokens, document_S=document_S, names=trace.domains)
    fit, held = split(texts, data.draw(st.sampled_from([None, "0.5", "0.01"])), seed=data.draw(st.integers(0, 9)))
    both = np.concatenate([fit.trace.topk_TLK.ravel(), held.trace.topk_TLK.ravel()])
    assert sorted(both) == list(range(tokens))  # every token once
    document_T = np.repeat(document_S, lengths)
    for part in (fit, held):
        assert np.array_equal(part.token_T, part.trace.topk_TLK.ravel())
        assert len(np.unique(part.document_S)) >= 2
        for s, (start, end) in enumerate(zip(part.trace.start_S, part.trace.end_S, strict=True)):
            assert set(document_T[part.token_T[start:end]]) == {part.document_S[s]}
    assert not set(fit.document_S) & set(held.document_S)
    names = sorted({trace.domains[d] for d in document_S})
    _, chosen = split(texts, ",".join(names[:2]))
    assert {trace.domains[d] for d in chosen.document_S} == set(names[:2])


def test_recall_counts_what_is_used():
    topk = np.array([[[0, 1]], [[2, -1]], [[3, 0]], [[1, 2]]])
    trace = TokenTrace(topk, np.array([0, 2]), np.array([0, 1]), ("a", "b"))
    scores = np.zeros((4, 1, 4))
    scores[1, 0, [2, 3]] = 1
    scores[3, 0, [1, 3]] = 1
    assert predictor_scores.recalls(scores, trace, trace.domain_S, 1).tolist() == [1.0, 0.5]
    assert predictor_scores.recalls(scores, trace, trace.domain_S, 2).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "give --text FILE ..."),
        (["--text", "a", "--trace", "b"], "and not both"),
        (["--text", "a", "b"], "--text: 2 documents are too few; give at least 4"),
        (["--text", "a", "b", "c", "d"], "--text a: No such file or directory"),
        (["--trace", "none.npz"], "--trace none.npz"),
        (["--trace", "t.npz", "--dtype", "float32"], "--dtype is of no use with --trace"),
        (["--trace", "t.npz", "--generate", "3"], "--generate is of no use with --trace"),
        (["m", "--trace", "t.npz"], "--model is of no use with --trace"),
        (["--trace", "t.npz", "--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (
            ["--trace", "t.npz", "--predictors", "ridge"],
            "--predictors is 'ridge'; give different ones of next_use, path, look_ahead",
        ),
        (["--trace", "t.npz", "--predictors", "look_ahead"], "--predictors look_ahead needs --text"),
        (
            ["--trace", "t.npz", "--predictors", "next_use", "--epochs", "3"],
            "--epochs is of use for the predictor path",
        ),
        (["--trace", "t.npz", "--resident", "1"], "--resident is 1.0; it must be above 0 and below 1"),
        (["--trace", "t.npz", "--held-out", "2"], "--held-out is 2; it must be a share"),
        (["--trace", "t.npz", "--held-out", "d0"], "leaves 5 documents to learn from and 1 held out"),
        (["--trace", "t.npz", "--held-out", "x*"], "no document is named 'x*'"),
        (["--trace", "t.npz", "--tokens", "700"], "documents: 3 documents are too few"),
        (["--trace", "bad.npz"], "token_ids are not the ids of its tokens"),
        (["--trace", "t.npz", "--json", "no/f.json"], "its directory does not exist"),
    ],
)
def test_mistakes_are_one_line(argv, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "t.npz")
    noise(tmp_path / "bad.npz", token_ids=np.zeros(3, dtype=np.int32))
    options = [] if "--trace" in argv else ["--device", "cpu", "--kv-memory", "4MiB"]
    assert main(["train-predictor", *argv, *options, "--no-progress"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moeyard: error: ") and text in err and err.count("\n") == 1


def test_a_broken_file_is_left_out_with_a_warning(home, caplog):
    home.mkdir(parents=True)
    installed.path_of("path", "d").write_text("cut")
    with caplog.at_level("WARNING", logger="moeyard.predict"):
        assert installed.installed("d", LAYERS, EXPERTS).names == ()
    assert "the predictor path is left out" in caplog.text and "moeyard train-predictor" in caplog.text
    assert installed.remove("path", "d") and not installed.remove("path", "d")


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    network = PathNetwork.__new__(PathNetwork)
    torch.nn.Module.__init__(network)
    network.digest = "d"
    with pytest.raises(ValueError, match="with --out"):
        installed.install("path", network, tmp_path / "file" / "x")
