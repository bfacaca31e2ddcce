"""`moeyard bench offload`: every side computes what the trace says, and the options say what they cannot be."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from moeyard.__main__ import main
from moeyard.bench.forced_routing import ForcedRouting
from moeyard.engine.predict.base import Rows

TINY = (
    "--layers 2 --experts 8 --top-k 2 --hidden 64 --expert-width 32 --vocab 300 --repeats 1 --requests 2 --input 6"
    " --output 4 --threads 1 --resident 50 --small 20"
)


class TinyTopKRouter(nn.Module):
    def forward(self, x_TD):
        logits_TE = x_TD[:, :5]
        top = logits_TE.softmax(-1).topk(2)
        return logits_TE, top.values, top.indices


class SmallEngine:
    """Runs the routers of a model as a step of an engine."""

    def __init__(self, model):
        self.model = model

    def step(self, spans):
        """What each router chose, for rows from one place of a request's tokens, by request."""
        rows = [Rows(request_id=name, first=0, token_ids=[0] * n, start=at) for name, (at, n) in spans.items()]
        return self._run_batch(None, rows)

    def _run_batch(self, batch, rows):
        return [router(torch.randn(sum(len(row.token_ids) for row in rows), 8))[2].tolist() for router in self.model]


def test_ids_are_the_traces_and_weights_the_routers():
    model = nn.ModuleList([TinyTopKRouter(), TinyTopKRouter()])
    topk = np.random.default_rng(0).permuted(np.tile(np.arange(5), (40, 2, 1)), axis=2)[:, :, :2]
    forced = ForcedRouting(model, topk)
    x = torch.randn(6, 8)
    assert torch.equal(model[0](x)[2], x[:, :5].topk(2).indices)  # nothing is forced before the start
    forced.start([3, 20], input_len=3)
    for rows in ([3, 4, 5, 20, 21, 22], [6, 23], [7, 24]):
        x = torch.randn(len(rows), 8)
        for layer, router in enumerate(model):
            _, weights, ids = router(x)
            assert ids.tolist() == topk[rows, layer].tolist()
            probabilities = x[:, :5].softmax(-1).gather(1, ids).sort(1, descending=True).values
            torch.testing.assert_close(weights, probabilities / probabilities.sum(1, keepdim=True))
    engine = SmallEngine(model)
    forced.follow(engine, {"a": 3, "b": 20, "c": 30})
    for step, rows in (({"b": (0, 2)}, [20, 21]), ({"a": (0, 1), "c": (4, 3)}, [3, 34, 35, 36]), ({"c": (7, 1)}, [37])):
        assert engine.step(step) == [topk[rows, layer].tolist() for layer in range(2)]
    with pytest.raises(ValueError, match="a step of 3 tokens"):
        model[0](torch.randn(3, 8))
    with pytest.raises(ValueError, match="the trace has 1 layers"):
        ForcedRouting(model, topk[:, :1])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("--resident 0", "resident is 0"),
        ("--resident 25 --small 25", "small is 25, the same"),
        ("--output 1", "output is 1"),
        ("--accelerate-output 1", "accelerate-output is 1"),
        ("--routing file.npz", "it must be trace:FILE"),
        ("--routing trace:nowhere.npz", "nowhere.npz"),
        ("--requests 0", "requests is 0"),
        ("--fit a", "--fit is of use with --routing"),
    ],
)
def test_options_that_cannot_work(options, what, capsys):
    assert main(["bench", "offload", *options.split()]) == 2
    text = capsys.readouterr().err
    assert what in text and len(text.strip().splitlines()) == 1


def test_every_side_runs(tmp_path, capsys):
    rng = np.random.default_rng(0)
    topk = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(60)])
    domains = {"seq_domain": np.array([0, 0, 1, 1, 1]), "domains": np.array(["fitted", "run"])}
    np.savez(tmp_path / "trace.npz", topk=topk.astype(np.int8), seq_start=np.arange(0, 60, 12), **domains)
    options = [
        *TINY.split(),
        "--workdir",
        str(tmp_path),
        "--routing",
        f"trace:{tmp_path / 'trace.npz'}",
        "--fit",
        "fitted",
    ]
    json_file = tmp_path / "report.json"
    assert main(["bench", "offload", *options, "--accelerate-output", "3", "--json", str(json_file)]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    wanted = {
        "vs_lru_50",
        "unpredicted_vs_lru_50",
        "bound_share_50",
        "bound_share_20",
        "resident_overhead",
        "vs_accelerate_50",
        "vs_accelerate_20",
    }
    assert wanted <= set(report["figures"])
    samples = json.loads(json_file.read_text())["samples"]
    counters = {name: turns[0]["counters"] for name, turns in samples.items()}
    touched = 2 * 2 * 2  # at most in a step of decoding: layers, requests, experts each
    assert counters["50 %"]["expert_misses"] > 0 and counters["20 %"]["expert_misses"] > 0
    assert counters["20 %"]["expert_misses"] + counters["20 %"]["expert_hits"] <= touched * 3
    assert counters["resident"]["expert_misses"] == 0
