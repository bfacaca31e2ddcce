"""Look-ahead's ridge: fitted on streams, installed where it beats the mean on other text, and used while serving."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_look_ahead import Chooser, Experts
from test_parity import generate, prompts, reference
from torch import nn

from moeyard.__main__ import main
from moeyard.bench import look_ahead_ridge
from moeyard.bench.look_ahead_ridge import Ahead
from moeyard.engine import constants, moe, offload_plan
from moeyard.engine.checkpoint import Checkpoint
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.predict import installed, stream_fit
from moeyard.engine.predict.routers import Router
from moeyard.engine.predict.stream_ridge import StreamRidge, unit
from moeyard.engine.predict.streams import StreamRecorder, Streams
from moeyard.engine.resolve import EMBEDDED
from moeyard.kernels.environment import ENVIRONMENT
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost

HIDDEN, EXPERTS, TOP_K, TEXTS, ROWS = 8, 4, 2, 10, 600


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A cache of its own, and nothing is measured for it."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setattr(constants, "directory", lambda: tmp_path / "cache" / "constants")
    return tmp_path / "cache" / "predictors"


def router() -> Router:
    norm, chooser = nn.RMSNorm(HIDDEN), Chooser()
    return Router(
        entry=norm, norm=norm, asked=chooser, flat=True, experts=Experts(), answer=(1, 0), scorer=(chooser.gate, None)
    )


def made(turn: float, seed: int = 0) -> tuple[Streams, np.ndarray]:
    """Streams of three layers, each of which adds a linear map of what there is; and the experts that they use."""
    torch.manual_seed(seed)
    routers = [router() for _ in range(3)]
    recorder = StreamRecorder(routers, [EXPERTS] * 3, every=1)
    stream, topk = torch.randn(1, ROWS, HIDDEN) * torch.rand(1, ROWS, 1).mul(9).add(1), []
    with torch.inference_mode():
        for one in routers:
            topk.append(one.asked(one.entry(stream))[1][0].numpy())
            stream = stream + turn * stream @ torch.randn(HIDDEN, HIDDEN)
    return recorder.take(), np.stack(topk, axis=1)


def compared(turn: float) -> tuple[StreamRidge, dict[tuple[int, int], Ahead], int]:
    streams, topk_TLK = made(turn)
    text_T = np.arange(ROWS) % TEXTS
    fit_T, held_T = np.flatnonzero(text_T >= 3), np.flatnonzero(text_T < 3)
    ridge, rank = stream_fit.fit(streams, fit_T, text_T[fit_T], topk_TLK[fit_T], digest="d")
    mean_LD = streams.mean_LD(fit_T)
    return ridge, look_ahead_ridge.compare(streams, ridge, mean_LD, held_T, text_T[held_T], topk_TLK[held_T]), rank


def test_it_knows_what_layers_add_where_that_is_linear():
    ridge, found, rank = compared(turn=1.0)
    assert sorted(ridge.cells) == [(1, 1), (2, 1), (2, 2)] and rank == 4
    for ahead in found.values():
        assert ahead.better and ahead.ridge_S2[:, 0].min() > 0.9 > 0.8 > ahead.mean_S2[:, 0].mean()
    depths = look_ahead_ridge.by_depth(found)
    assert sorted(depths) == [1, 2] and all((of["better"] == of["ridge"]).all() for of in depths.values())
    assert "with the ridge" in look_ahead_ridge.ahead_table(found, TOP_K)


def test_it_is_not_better_where_layers_add_nothing():
    _, found, _ = compared(turn=0.0)
    assert all(ahead.mean_S2.min() == 1 and not ahead.better for ahead in found.values())
    depths = look_ahead_ridge.by_depth(found)
    assert all((of["better"] == of["mean"]).all() for of in depths.values())


def test_what_is_better():
    def ahead(*gains: float) -> Ahead:
        mean_S2 = np.full((len(gains), 2), 0.5)
        return Ahead(mean_S2=mean_S2, ridge_S2=mean_S2 + np.array(gains)[:, None])

    assert ahead(0.1, 0.1, 0.1).better and ahead(0.1, 0.2, 0.1).better
    assert not ahead(0.3, 0.0, 0.0).better, "in one document only"
    assert not ahead(0.0, 0.0).better and not ahead(-0.1, -0.1).better and not ahead(0.1).better


def test_the_smallest_rank_that_is_as_good():
    right_RS = np.array([[0.5, 0.5, 0.5], [0.8, 0.9, 0.7], [0.8, 0.9, 0.71], [0.8, 0.9, 0.7]])
    assert stream_fit._least_rank([4, 8, 16, 32], right_RS) == 8
    assert stream_fit._least_rank([4], right_RS[:1]) == 4


def test_a_low_rank_is_the_best_part_of_the_scores():
    """With all directions it says what the whole regression says; with fewer, what varies most."""
    streams, _ = made(turn=1.0)
    rows_T = np.arange(ROWS)
    x_TD = streams.unit_TD[0].float()
    with torch.inference_mode():
        layer, ahead, solved = next(iter(stream_fit._solve(streams, rows_T, lambda layers: None)))
        weight_ED = streams.weight_ED(layer)
        whole_TE = (x_TD - solved[0].x_D) @ solved[0].logit_DE
        errors = []
        for rank in range(1, EXPERTS + 1):
            cell = solved[0].cut(rank)
            said_TE = (x_TD @ cell.down_DR @ cell.up_RD + cell.bias_D - solved[0].normed_D) @ weight_ED.T
            errors.append(float((said_TE - whole_TE).square().mean()))
            least = torch.linalg.svdvals(whole_TE)[rank:].square().sum() / whole_TE.numel()
            assert errors[-1] == pytest.approx(float(least), rel=1e-2, abs=1e-6)
    assert (layer, ahead) == (1, 1) and errors == sorted(errors, reverse=True)


def test_rows_are_thinned_over_steps():
    torch.manual_seed(0)
    routers = [router(), None]
    recorder = StreamRecorder(routers, [EXPERTS] * 2, every=3)
    x = torch.randn(1, 11, HIDDEN)
    for part in x.split((1, 4, 6), dim=1):
        routers[0].entry(part)
    streams = recorder.take()
    assert not routers[0].entry._forward_pre_hooks and streams.rows == 4 and list(streams.unit_TD) == [0]
    assert torch.allclose(streams.stream(0, np.arange(4)), x[0, ::3], rtol=2e-3, atol=1e-3)
    assert torch.allclose(unit(x[0, ::3]), streams.unit_TD[0].float(), atol=1e-3)


def test_a_file_that_does_not_count_is_refused(home, tmp_path):
    ridge, _, _ = compared(turn=1.0)
    path = installed.install("look_ahead", ridge)
    found = installed.installed("d", 3, EXPERTS)
    assert found.names == ("look_ahead",) and found.look_ahead.cells.keys() == ridge.cells.keys()
    stream = torch.randn(1, 5, HIDDEN)
    assert torch.equal(found.look_ahead.normed(2, 2, stream), ridge.normed(2, 2, stream))
    assert found.look_ahead.normed(1, 2, stream) is None and ridge.of({(1, 1)}).normed(2, 1, stream) is None
    with pytest.raises(ValueError, match=r"made for the model d, not e; make one for it with moeyard train-predictor"):
        StreamRidge.load(str(path), "e")
    assert installed.installed("d", 4, EXPERTS).names == ()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="this is no ridge of look-ahead"):
        StreamRidge.load(str(path), "d")
    cell = ridge.cells[1, 1]
    wrong = type(cell)(down_DR=cell.down_DR, up_RD=cell.up_RD[:, 1:], bias_D=cell.bias_D)
    StreamRidge(layers=3, experts=4, digest="d", cells={(1, 1): wrong}).save(str(tmp_path / "wrong.npz"))
    with pytest.raises(ValueError, match="shapes do not agree"):
        StreamRidge.load(str(tmp_path / "wrong.npz"))
    StreamRidge(layers=3, experts=4, digest="d", cells={(1, 2): cell}).save(str(tmp_path / "wrong.npz"))
    with pytest.raises(ValueError, match="layer 1 from 2 layers before"):
        StreamRidge.load(str(tmp_path / "wrong.npz"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    words = [" for", " return", " class", " import", " print", " list", " value", " name", " error", " file", " self"]
    for i in range(6):
        (folder / f"{i}.txt").write_text("".join(rng.choice(words, 200)))
    return [str(folder / f"{i}.txt") for i in range(6)]


def tiny_model(path: Path) -> Path:
    path = tiny.save("qwen3_moe", path, vocab_size=4096, num_hidden_layers=4, num_experts=16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(EMBEDDED) / name, path)
    return path


def test_it_is_trained_installed_and_used(home, texts, tmp_path, capsys):
    path = tiny_model(tmp_path / "model")
    argv = ["train-predictor", str(path), "--text", *texts, "--held-out", "0.5", "--predictors", "look_ahead"]
    argv += ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--kv-memory", "4MiB", "--no-progress"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    digest = Checkpoint(path).fingerprint
    found = installed.installed(digest, 4, 16).look_ahead
    assert found is not None and "Look-ahead's ridge, of rank" in out
    assert f"Installed: {installed.path_of('look_ahead', digest)}" in out
    options = {"model": str(path), "dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": "8MiB"}
    for predictor in ("auto", str(installed.path_of("look_ahead", digest))):
        engine = Engine(EngineConfig(**options, expert_memory="50%", predictor=predictor, progress=False))
        look_ahead = engine._offload._look_ahead
        asked = prompts(4096, 1, longest=20)
        assert generate(engine, asked, 6) == reference(path, asked, 6)
        assert 0 < look_ahead.ridge_asks <= look_ahead.asks
        names = [meter.name for meter in engine._offload.forecast.meters]
        assert names == (["look_ahead", "coactivation", "counts"] if predictor == "auto" else ["look_ahead"])
        engine.close()
