"""The host tier of the experts. Here the device is the CPU too, so that all but the streams is run."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import tiny
from test_offload import MANY, NEW_TOKENS, OPTIONS
from test_parity import generate, prompts, reference

from moeyard.engine import engine as engine_module
from moeyard.engine import moe, offload
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.host_experts import host_budget
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost


@pytest.fixture(scope="module", params=MANY)
def case(request, tmp_path_factory):
    path = tiny.save(request.param, tmp_path_factory.mktemp(request.param), **MANY[request.param])
    ids = prompts(100, 3, longest=20)
    return path, ids, reference(path, ids, NEW_TOKENS)


@pytest.fixture
def make(monkeypatch):
    """An engine whose experts have a host tier of a share of them."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))
    engines, plan_offload = [], engine_module.plan_offload

    def planned(share):
        def plan(config, blueprint):
            found = plan_offload(config, blueprint)
            return dataclasses.replace(found, host_bytes=int(share * blueprint.footprint.experts))

        return plan

    def made(path, share, memory="25%"):
        monkeypatch.setattr(engine_module, "plan_offload", planned(share))
        engines.append(Engine(EngineConfig(model=str(path), expert_memory=memory, **OPTIONS)))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.1])
def test_tokens_are_the_same_and_only_the_others_are_read_from_files(share, case, make, monkeypatch, caplog):
    path, ids, expected = case
    with caplog.at_level(logging.INFO, logger="moeyard.host_experts"):
        engine = make(path, share)
    host, files = engine._offload.source.host, engine._offload.source._files
    read, steps = [], files.steps
    monkeypatch.setattr(files, "steps", lambda layer, e, buffer: (read.append((layer, e)), steps(layer, e, buffer))[1])
    assert generate(engine, ids, NEW_TOKENS) == expected
    assert engine.stats(with_experts=False).expert_misses > 0
    everyone = {(layer, e) for layer, n in enumerate(files.num_experts_L) for e in range(n)}
    here = {at for at in everyone if at in host}
    assert len(here) == len(everyone) if share > 1 else abs(len(here) - share * len(everyone)) <= 0.05 * len(everyone)
    assert bool(read) == (share < 1) and not here & set(read)
    assert not host.pinned  # there is no driver to ask
    assert f"{len(here)} of {len(everyone)} experts in host memory" in caplog.text


def test_its_memory_is_its_budget(case, make):
    engine = make(case[0], 0.5)
    host, size = engine._offload.source.host, engine._offload.plan.size
    assert host.nbytes <= engine._offload.plan.host_bytes + size.readers * host._stride


def test_budgets():
    assert host_budget("50%", 1000) == 500
    assert host_budget("1KiB", 10**9) == 1024
    assert host_budget("1GiB", 1000) == 1000  # all is enough
    assert host_budget(None, 1000) == 1000
    with pytest.raises(ValueError, match=r"host_memory is 900TiB, and .* are free for this rank; ask for less"):
        host_budget("900TiB", 2**60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "1GiB"}, "host_memory is 1GiB, which changes nothing while all experts are in memory"),
        ({"host_memory": "much", "expert_memory": "25%"}, "host_memory: cannot read 'much' as a size"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_on_a_cpu_there_is_no_tier_between(case):
    with pytest.raises(ValueError, match="host_memory is 1GiB, and on a CPU that is what --expert-memory sets"):
        Engine(EngineConfig(model=str(case[0]), expert_memory="25%", host_memory="1GiB", **OPTIONS))
