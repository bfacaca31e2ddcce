"""Options that change nothing with one rank are errors there, wherever the number of ranks comes from."""

import pytest

from moeyard.__main__ import main
from moeyard.engine.config import FOR_SEVERAL_RANKS, EngineConfig, ServeConfig
from moeyard.engine.engine import Engine
from moeyard.launch.frontend import FrontEnd
from moeyard.launch.llm import LLM
from moeyard.launch.local import LocalLauncher

# An option, another value than its default, and what it cannot do without.
CASES = {
    "dispatcher": ("all_gather", {}),
    "chunks": ("2", {}),
    "expert_placement": ("replicated", {"placement": "loads.json"}),
    "redundant_experts": (1, {}),
    "move_bytes": ("1MiB", {}),
    "balance": ("llep", {}),
    "guest_memory": ("1MiB", {}),
    "rank_timeout": (3.0, {}),
    "collective_timeout": (30.0, {}),
    "router": ("round_robin", {}),
    "ttft_target": (1.0, {}),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "LWS_LEADER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", FOR_SEVERAL_RANKS)
def test_what_changes_nothing_with_one_rank_is_an_error(name):
    value, needed = CASES[name]
    options = {name: value, **needed}
    words = f"^{name} is {value}, which changes nothing with one rank: .*; leave it out, or use --ep 2 or more$"
    asked = EngineConfig(**options)  # how many ranks there are is for the launcher to say
    assert getattr(EngineConfig(ep=2, **options), name) == value
    for start in (
        lambda: EngineConfig(ep=1, **options),
        lambda: ServeConfig(ep=1, **options),
        lambda: FrontEnd(asked, launcher=LocalLauncher()),
        lambda: FrontEnd(asked),
        lambda: LLM(**options),
        lambda: Engine(asked),
    ):
        with pytest.raises(ValueError, match=words):
            start()


def test_the_defaults_and_what_changes_something_are_none():
    assert CASES.keys() == FOR_SEVERAL_RANKS.keys()
    EngineConfig(ep=1)
    EngineConfig(ep=1, **{name: getattr(EngineConfig, name) for name in CASES})
    EngineConfig(ep=1, on_rank_loss="restart", placement="loads.json", launcher="local", cluster_port=7000, trace="t")


def test_plan_says_so_too(capsys):
    assert main(["plan", "--redundant-experts", "2"]) == 2
    assert capsys.readouterr().err.startswith("moeyard: error: redundant_experts is 2, which changes nothing with one")


@pytest.mark.parametrize("router", ["round_robin", "least_loaded"])
def test_a_target_that_the_router_does_not_look_at_is_an_error(router):
    with pytest.raises(ValueError, match=rf"^ttft_target is 1.0, but router {router} does not look at it; .*dualmap"):
        EngineConfig(ep=2, router=router, ttft_target=1.0)
    EngineConfig(ep=2, router="dualmap", ttft_target=1.0)


def test_balance_needs_tokens_that_go_where_a_plan_says():
    with pytest.raises(ValueError, match=r"^balance priced needs .*all_gather.*--dispatcher"):
        EngineConfig(ep=2, balance="priced", dispatcher="all_gather")
    EngineConfig(ep=2, balance="auto", dispatcher="all_gather")
    with pytest.raises(ValueError, match=r"^guest_memory is of no use with balance native"):
        EngineConfig(ep=2, balance="native", guest_memory="1GiB")
    with pytest.raises(ValueError, match=r"^guest_memory is of no use with dispatcher all_gather"):
        EngineConfig(ep=2, dispatcher="all_gather", guest_memory="1GiB")


def test_the_planners_are_those_that_there_are():
    from moeyard.engine.config import BALANCE, WITHOUT_GUESTS
    from moeyard.scheduler.balance.baselines import PLANNERS, STAYING

    assert set(BALANCE) == {"auto", *PLANNERS}
    assert set(WITHOUT_GUESTS) == set(STAYING)
