"""Engines of several ranks: the same tokens as one rank's, whatever moves where meanwhile."""

import pytest
import tiny
import world
from test_parity import prompts, reference

from moeyard.engine.config import EngineConfig
from moeyard.engine.messages import Submit
from moeyard.engine.params import SamplingParams


def make_engine(group, path, **options):
    import torch

    from moeyard.engine.engine import Engine
    from moeyard.engine.parallel import Seat

    torch.set_num_threads(1)
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        device="cpu",
        threads=1,
        kv_memory="16MiB",
        progress=False,
        ep=group.size,
        **options,
    )
    return Engine(config, Seat(group=group, local_rank=group.position, local_ranks=group.size))


def run_ranks(group, path, by_rank, new_tokens, options, orders=()):
    """Each rank runs its own prompts. `orders` are (own step, function of the engine): done before that step."""
    engine = make_engine(group, path, **options)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True).to_dict()
    out = {}
    mine = by_rank[group.position]
    for i, prompt in enumerate(mine):
        engine.submit(Submit(request_id=str(i), prompt_ids=prompt, params=params))
        out[str(i)] = []
    engine.wake(1)
    reports, steps, orders = [], 0, dict(orders)
    while engine.has_work:
        if steps in orders:
            orders[steps](engine)
        for delta in engine.step():
            assert not delta.error, delta.error
            out[delta.request_id] += delta.token_ids
        reports += engine.take_reports()
        steps += 1
    stats = engine.stats(with_experts=True)
    layers = engine._experts.layers
    facts = {
        "stats": stats,
        "reports": reports,
        "degrees": layers[0].parallel.degrees if layers[0].parallel else {},
        "early": sum(layer.overlap.early_runs for layer in layers if layer.overlap),
        "slots": [layer.pool.num_slots for layer in layers],
        "tables": engine._parallel.tables,
        "phases": engine.progress.totals_ns,
    }
    return [out[str(i)] for i in range(len(mine))], facts


def shared_out(texts, ranks):
    """Prompts of each rank; the last rank gets none when there are at least two."""
    busy = max(1, ranks - 1)
    return [texts[i::busy] if i < busy else [] for i in range(ranks)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(architecture, **changes):
        key = (architecture, *changes.items())
        if key not in made:
            made[key] = tiny.save(architecture, tmp_path_factory.mktemp(architecture), **changes)
        return made[key]

    return get


@pytest.mark.parametrize(
    ("architecture", "ranks", "options"),
    [
        ("qwen3_moe", 2, {"dispatcher": "all_to_all"}),
        ("qwen3_moe", 2, {"dispatcher": "all_gather", "chunks": "4"}),
        ("deepseek_v3", 3, {"dispatcher": "all_to_all", "chunks": "2"}),
        ("gpt_oss", 4, {"redundant_experts": 1, "expert_placement": "round_robin"}),
    ],
)
def test_greedy_tokens_are_those_of_transformers(checkpoints, architecture, ranks, options):
    path = checkpoints(architecture)
    texts = prompts(131, 6, longest=40, seed=3)
    wanted = reference(path, texts, 8)
    by_rank = shared_out(texts, ranks)
    results = world.run_world(ranks, run_ranks, path, by_rank, 8, options)
    for rank, (out, facts) in enumerate(results):
        assert out == [wanted[texts.index(prompt)] for prompt in by_rank[rank]]
        stats = facts["stats"]
        if options.get("dispatcher"):
            other = {"all_to_all": "all_gather", "all_gather": "all_to_all"}[options["dispatcher"]]
            assert getattr(stats, f"steps_{options['dispatcher']}") > 0 and getattr(stats, f"steps_{other}") == 0
        if chunks := options.get("chunks"):
            assert int(chunks) in facts["degrees"]
        assert stats.sent_bytes > 0 or rank == ranks - 1
        assert all(facts["phases"][name] > 0 for name in ("plan", "dispatch", "experts", "combine", "wait"))
        if architecture == "deepseek_v3" and by_rank[rank]:
            assert facts["early"] > 0 and facts["phases"]["shared"] > 0
    assert all(facts["slots"][0] < 8 for _, facts in results)
