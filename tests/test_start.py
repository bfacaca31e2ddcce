"""Which launcher the options and the environment lead to."""

import pytest

from moeyard import LLM
from moeyard.engine.config import EngineConfig, ServeConfig
from moeyard.launch import node, server
from moeyard.launch.frontend import FrontEnd
from moeyard.launch.local import LocalLauncher
from moeyard.launch.ray_cluster import RayLauncher
from moeyard.launch.start import choose_launcher, find_place


def torchrun(rank, size, local_size, address="10.0.0.7"):
    return {
        "TORCHELASTIC_RUN_ID": "job",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": "29500",
    }


def attributes(launcher):
    return (launcher.ranks, launcher._connect, launcher._bind, launcher._local, launcher._local_count)


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({}, {}, ((0,), None, None, {0: 0}, 1)),
        ({"ep": 3}, {}, ((0, 1, 2), None, None, {0: 0, 1: 1, 2: 2}, 3)),
        ({"ep": 2, "launcher": "local"}, {}, ((0, 1), None, None, {0: 0, 1: 1}, 2)),
        (
            {"ep": 2, "cluster_port": 7000},
            {},
            ((0, 1), "tcp://127.0.0.1:7000", "tcp://127.0.0.1:7000", {0: 0, 1: 1}, 2),
        ),
        ({}, torchrun(0, 4, 2, "head"), ((0,), "tcp://head:29501", "tcp://*:29501", {0: 0}, 2)),
        (
            {"ep": 4, "cluster_port": 7000},
            torchrun(0, 2, 1, "127.0.0.1"),
            ((0, 1), "tcp://127.0.0.1:7000", "tcp://127.0.0.1:7000", {0: 0, 1: 1}, 2),
        ),
        ({}, torchrun(0, 2, 1, "192.0.2.1"), ((0,), "tcp://192.0.2.1:29501", "tcp://*:29501", {0: 0}, 1)),
        ({}, torchrun(0, 2, 1, "2001:db8::1"), ((0,), "tcp://[2001:db8::1]:29501", "tcp://*:29501", {0: 0}, 1)),
    ],
)
def test_local_launchers(options, environ, expected):
    launcher = choose_launcher(EngineConfig(**options), environ)
    assert isinstance(launcher, LocalLauncher) and attributes(launcher) == expected


@pytest.mark.parametrize(
    ("options", "environ", "ep"),
    [({}, {}, 1), ({"ep": 5}, {}, 5), ({}, torchrun(0, 4, 2), 4), ({"ep": 8}, torchrun(0, 2, 1), 8)],
)
def test_the_number_of_ranks(monkeypatch, options, environ, ep):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_place(EngineConfig(**options), environ).ep == ep
    assert FrontEnd(EngineConfig(**options)).config.ep == ep


def test_ray_leads_from_here_whatever_the_environment_says():
    launcher = choose_launcher(EngineConfig(ep=3, launcher="ray", device="cpu"), torchrun(1, 2, 1))
    assert isinstance(launcher, RayLauncher) and launcher.ranks == (0, 1, 2)
    assert choose_launcher(EngineConfig(launcher="ray", device="cpu"), {}).ranks == (0,)


def test_only_the_leader_has_a_front_end(monkeypatch):
    environ = torchrun(1, 2, 2)
    text = "number 1 of 2 that torchrun started, and only the first has a front end; start the program once"
    with pytest.raises(ValueError, match=text):
        choose_launcher(EngineConfig(), environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=text):
        LLM()


def test_restart_needs_ranks_of_this_process():
    with pytest.raises(ValueError, match="on_rank_loss restart needs ranks that this process starts, and torchrun"):
        choose_launcher(EngineConfig(on_rank_loss="restart"), torchrun(0, 2, 1))
    choose_launcher(EngineConfig(on_rank_loss="restart", ep=2), {})


def test_serving_on_another_node_runs_its_ranks(monkeypatch):
    calls = []
    monkeypatch.setattr(node, "run", lambda *given: calls.append(given) or 7)
    for name, value in torchrun(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    config = ServeConfig(ep=4, start_timeout=5.0, drain_timeout=7.0)
    assert server.run(config) == 7
    ((place, start_timeout, drain_timeout),) = calls
    assert (place.ranks, place.leader, start_timeout, drain_timeout) == ((2, 3), False, 5.0, 7.0)


def test_an_environment_that_contradicts_the_options_is_the_users(monkeypatch):
    for name, value in torchrun(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    for start in (lambda: server.run(ServeConfig(ep=3)), lambda: LLM(ep=3)):
        with pytest.raises(ValueError, match="ep"):
            start()
