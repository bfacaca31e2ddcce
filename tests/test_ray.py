"""Ranks as Ray actors, on real Ray clusters: two nodes on this machine, one of the launcher's own, `symmetric-run`."""

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import zmq

from moeyard.engine.messages import Hello, Shutdown, decode, encode
from moeyard.launch import ray_cluster
from moeyard.launch.ray_cluster import RayLauncher, local_position

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

BOUND_S = 30.0  # for what should come at once
BIN = Path(sys.executable).parent  # symmetric-run looks for `ray` on the PATH
MODULE = "fake_rank_below_ray"
FAKE_RANK = """
    import argparse, json, os, signal, sys
    import zmq
    from moeyard.engine.messages import Hello, Shutdown, decode, encode

    parser = argparse.ArgumentParser()
    parser.add_argument("--connect")
    for name in ("--parent", "--rank", "--local-rank", "--local-ranks"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    assert args.parent == os.getppid()
    if "DEAF" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.identity = f"rank-{args.rank}".encode()
    socket.linger = 0
    socket.connect(args.connect)
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    about = {"local": [args.local_rank, args.local_ranks]} | {name: os.environ.get(name) for name in names}
    print(f"these are the words of {args.rank}", file=sys.stderr, flush=True)
    socket.send(encode(Hello(pid=os.getpid(), version="0", rank=args.rank, host=json.dumps(about))))
    while os.getppid() == args.parent:
        if socket.poll(100) and isinstance(decode(socket.recv()), Shutdown):
            sys.exit(0)
    sys.exit(1)
"""


def until(condition):
    deadline = time.monotonic() + BOUND_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def folder():
    """For Ray: its sockets' names must be short."""
    path = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder):
    """Two nodes: of 2 CPUs and 2 GPUs (on paper), the driver's, and of 1 CPU."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node | {"num_cpus": 2, "num_gpus": 2})
        made.add_node(num_cpus=1, **node)
        yield made
        made.shutdown()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts ranks and binds their endpoint."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(FAKE_RANK))
    context = zmq.Context()
    made = []

    def start(ep, env=(), **options):
        env = {"PYTHONPATH": str(tmp_path)} | dict(env)
        ranks = Ranks(context, RayLauncher(ep, env=env, worker_module=MODULE, **options))
        made.append(ranks)
        ranks.bind(ranks.launcher.start())
        return ranks

    yield start
    for ranks in made:
        ranks.launcher.stop(0)
    context.destroy(linger=0)


class Ranks:
    def __init__(self, context, launcher):
        self.launcher = launcher
        self.socket = context.socket(zmq.ROUTER)
        self.socket.router_mandatory = self.socket.router_handover = True

    def bind(self, endpoint):
        self.endpoint = endpoint
        self.socket.bind(endpoint)

    def hellos(self, count):
        """Of the next `count` ranks, in their order."""
        found = {}
        while len(found) < count:
            assert self.socket.poll(int(BOUND_S * 1000)), (found, self.launcher.ended())
            identity, data = self.socket.recv_multipart()
            hello = decode(data)
            assert isinstance(hello, Hello) and identity == f"rank-{hello.rank}".encode()
            found[hello.rank] = hello
        return [found[rank] for rank in sorted(found)]

    def shut_down(self, *ranks):
        for rank in ranks:
            self.socket.send_multipart([f"rank-{rank}".encode(), encode(Shutdown())])


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def about(hello):
    return json.loads(hello.host)


@needs_ray
def test_the_life_of_ranks(cluster, start, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    before = signal.getsignal(signal.SIGTERM)
    ranks = start(3)
    launcher = ranks.launcher
    assert signal.getsignal(signal.SIGTERM) is before
    assert ranks.endpoint.startswith(f"tcp://{ray.util.get_node_ip_address()}:")
    assert launcher.ranks == (0, 1, 2) and launcher.can_restart

    hellos = ranks.hellos(3)
    assert [hello.rank for hello in hellos] == [0, 1, 2]
    assert [about(hello)["local"] for hello in hellos] == [[0, 2], [1, 2], [0, 1]]
    # What the kernels should start with, and not Ray's idea of threads.
    assert about(hellos[0])["OMP_WAIT_POLICY"] == "passive" and about(hellos[0])["OMP_NUM_THREADS"] is None
    assert launcher.ended() == {}

    launcher.kill(1)
    until(launcher.ended)
    assert launcher.ended() == {1: "killed by SIGKILL"}
    assert gone(hellos[1].pid)
    launcher.kill(1)  # nothing
    launcher.restart(1)
    assert launcher.ended() == {}
    (again,) = ranks.hellos(1)
    assert again.rank == 1 and again.pid != hellos[1].pid and about(again)["local"] == [1, 2]

    ranks.shut_down(0, 1, 2)
    until(lambda: len(launcher.ended()) == 3)
    assert set(launcher.ended().values()) == {"exit code 0"}
    launcher.stop(BOUND_S)
    launcher.stop(0)
    assert not ray.is_initialized()


@needs_ray
def test_an_actor_that_dies_takes_its_rank_along_and_can_be_replaced(cluster, start):
    ranks = start(1, address=cluster.address)
    (hello,) = ranks.hellos(1)
    os.kill(psutil.Process(hello.pid).ppid(), signal.SIGKILL)
    until(ranks.launcher.ended)
    assert ranks.launcher.ended()[0].startswith("the Ray actor died: its worker process has died.")
    until(lambda: gone(hello.pid))
    ranks.launcher.restart(0)
    ranks.hellos(1)


@needs_ray
def test_an_actor_that_does_not_kill_is_killed(cluster, start, monkeypatch):
    monkeypatch.setattr(ray_cluster, "KILL_TIMEOUT_S", 0.2)
    ranks = start(1, address=cluster.address)
    (hello,) = ranks.hellos(1)
    actor = psutil.Process(hello.pid).ppid()
    os.kill(actor, signal.SIGSTOP)
    try:
        ranks.launcher.kill(0)
        until(ranks.launcher.ended)
        assert ranks.launcher.ended()[0].startswith("the Ray actor died: ")
        until(lambda: gone(hello.pid))
    finally:
        if psutil.pid_exists(actor):
            os.kill(actor, signal.SIGKILL)


@needs_ray
def test_ranks_with_gpus_that_end_only_by_force(cluster, start, monkeypatch):
    monkeypatch.setattr(ray_cluster, "TERMINATE_TIMEOUT_S", 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = start(2, device="cuda", address=cluster.address, env={"DEAF": "1"})
    hellos = ranks.hellos(2)
    assert [about(hello)["CUDA_VISIBLE_DEVICES"] for hello in hellos] in (["0", "1"], ["1", "0"])
    assert about(hellos[0])["OMP_NUM_THREADS"] == "1"
    ranks.launcher.stop(0)
    assert all(gone(hello.pid) for hello in hellos)


@needs_ray
@pytest.mark.parametrize(
    ("ep", "options", "reason"),
    [
        (4, {}, "ray: 4 bundles of 1 CPU were asked for, the cluster has 3 CPU (3 free)"),
        (2, {"cores_per_rank": 2}, "ray: 2 bundles of 2 CPU were asked for, the cluster has 3 CPU (3 free)"),
        (
            3,
            {"device": "cuda"},
            "ray: 3 bundles of 1 GPU and 1 CPU were asked for, the cluster has 2 GPU (2 free) and 3 CPU (3 free)",
        ),
    ],
)
def test_what_the_cluster_does_not_have(connected, start, monkeypatch, ep, options, reason):
    monkeypatch.setattr(ray_cluster, "PLACE_TIMEOUT_S", 0.2)
    until(lambda: connected.available_resources().get("CPU") == 3)
    with pytest.raises(ValueError) as error:
        start(ep, **options)
    assert str(error.value).startswith(reason)
    assert connected.is_initialized()  # who connected stays so


@needs_ray
def test_a_start_that_waits_for_room_is_stopped(connected, start):
    """As when the web server is told to end meanwhile; its loop started it in a thread."""
    import ray

    before = len(ray.util.placement_group_table())
    with ThreadPoolExecutor(1) as pool:
        launcher = RayLauncher(4)
        starting = pool.submit(launcher.start)
        until(lambda: launcher._group is not None)
        launcher.stop(0)
        with pytest.raises(ValueError, match=r"^ray: the start was stopped$"):
            starting.result(BOUND_S)
    assert connected.is_initialized()
    table = ray.util.placement_group_table().values()
    assert len(table) > before and all(group["state"] == "REMOVED" for group in table if group["bundles"].keys() > {2})


@pytest.fixture(scope="module")
def connected(cluster):
    """Ray, with this process connected to the cluster."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=cluster.address)
    signal.signal(signal.SIGTERM, before)
    yield ray
    ray.shutdown()


@needs_ray
def test_a_port_in_use(connected, start):
    host = connected.util.get_node_ip_address()
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cluster_port {port} on {host}: {os.strerror(errno.EADDRINUSE)}; choose"):
            start(1, port=port)
    assert start(1, port=port).endpoint == f"tcp://{host}:{port}"


@needs_ray
def test_a_cluster_of_its_own(start, folder, tmp_path):
    """With more ranks than cores. In another process, as this one is connected already."""
    script = """
        import psutil, sys, zmq
        from moeyard.engine.messages import decode
        from moeyard.launch.ray_cluster import RayLauncher

        launcher = RayLauncher(5, env={"PYTHONPATH": sys.argv[1]}, worker_module=sys.argv[2])
        socket = zmq.Context().socket(zmq.ROUTER)
        endpoint = launcher.start()
        socket.bind(endpoint)
        hellos = []
        while len(hellos) < 5:
            assert socket.poll(60_000), launcher.ended()
            hellos.append(decode(socket.recv_multipart()[1]))
        sys.stdin.read()
        launcher.stop(0)
        left = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
        print("found", endpoint, sorted(hello.rank for hello in hellos), left)
    """
    env = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(dir=folder)}  # where no other cluster is noted
    env.pop("RAY_ADDRESS", None)
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), MODULE],
            env=env,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
        )
    try:
        # What ranks print is heard, all of it, with who said it.
        until(lambda: all(f"these are the words of {rank}" in output.read_text() for rank in range(5)))
        assert "(rank 4 pid=" in output.read_text()
        process.communicate(timeout=BOUND_S)
    finally:
        process.kill()
    assert process.returncode == 0, output.read_text()
    (line,) = [line for line in output.read_text().splitlines() if line.startswith("found ")]
    assert line.startswith("found tcp://127.0.0.1:") and line.endswith(" [0, 1, 2, 3, 4] []")


@needs_ray
def test_a_node_that_dies(cluster, start):
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    try:
        ranks = start(4, address=cluster.address)
        hellos = ranks.hellos(4)
        assert [about(hello)["local"] for hello in hellos] == [[0, 2], [1, 2], [0, 1], [0, 1]]
    finally:
        cluster.remove_node(node, allow_graceful=False)
    until(ranks.launcher.ended)
    ((lost, how),) = ranks.launcher.ended().items()
    assert lost in (2, 3) and how.startswith("the Ray actor died: ")
    until(lambda: gone(hellos[lost].pid))
    assert not any(gone(hello.pid) for hello in hellos if hello.rank != lost)
    ranks.launcher.stop(0)
    until(lambda: all(gone(hello.pid) for hello in hellos))


@needs_ray
@pytest.mark.slow
def test_symmetric_run(start, folder, tmp_path):
    """On one node. It ends with `ray stop`, which ends every Ray process that it sees: it gets to see only its own."""
    isolated = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid() != 0:
        isolated += ["--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("needs a process namespace of its own (unshare)")
    script = tmp_path / "command.py"
    script.write_text(
        textwrap.dedent(f"""
            import zmq, ray
            from moeyard.engine.messages import decode
            from moeyard.launch.ray_cluster import RayLauncher

            launcher = RayLauncher(2, env={{"PYTHONPATH": {str(tmp_path)!r}}}, worker_module={MODULE!r})
            socket = zmq.Context().socket(zmq.ROUTER)
            socket.bind(launcher.start())
            context = ray.get_runtime_context()
            for _ in range(2):
                assert socket.poll(60_000), launcher.ended()
                print("found rank", decode(socket.recv_multipart()[1]).rank, "at", context.gcs_address, flush=True)
            launcher.stop(0)
        """)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = shlex.join([sys.executable, "-m", "ray.scripts.scripts", "symmetric-run", "--address", f"127.0.0.1:{port}"])
    command = f"{ray} --min-nodes 1 --num-cpus 2 --include-dashboard false -- {shlex.quote(sys.executable)} {script}"
    env = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(dir=folder), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        # The shell stays, as the namespace's first process, which has to reap those whose parents are gone.
        [*isolated, "sh", "-c", f"{command}; exit $?"],
        env=env,
        capture_output=True,
        text=True,
        timeout=4 * BOUND_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(line for line in done.stdout.splitlines() if line.startswith("found rank"))
    assert [line.split()[2] for line in found] == ["0", "1"]
    assert all(line.endswith(f":{port}") for line in found)


@needs_ray
def test_addresses_where_no_cluster_is(monkeypatch, tmp_path):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"ray: ray://127\.0\.0\.1:1 is for Ray's remote clients"):
        RayLauncher(1).start()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{free.getsockname()[1]}"
        reason = rf"ray: no cluster answers: {re.escape(address)} \(.*refused\); see `ray status`"
        with pytest.raises(ValueError, match=reason):
            RayLauncher(1, address=address).start()
        # One that `ray start` made and that is gone.
        monkeypatch.delenv("RAY_ADDRESS")
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)

        def init(address, **options):
            """As Ray's, which cannot be asked where a cluster is connected already."""
            assert address is None and "num_cpus" in options
            raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")

        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(ValueError, match=reason):
            RayLauncher(1).start()


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    launcher = RayLauncher(1)
    with pytest.raises(ValueError, match=r'launcher ray needs Ray .*; pip install "moeyard\[ray\]"'):
        launcher.start()
    launcher.stop(0)


@pytest.mark.parametrize(
    ("nodes", "positions"),
    [
        ("a", [(0, 1)]),
        ("aabb", [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ("aab", [(0, 2), (1, 2), (0, 1)]),
        ("abab", [(0, 2), (0, 2), (1, 2), (1, 2)]),  # after a restart elsewhere
    ],
)
def test_positions_on_a_node(nodes, positions):
    assert [local_position(rank, nodes) for rank in range(len(nodes))] == positions


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "It died.\n\tpid: 7\nThe actor is dead because its process ended.\n Exit: 1. Some common causes: (1)",
            "its process ended. Exit: 1",
        ),
        ("ray::rank 0.run()\n  File x\nFileNotFoundError: no python\n", "FileNotFoundError: no python"),
        (
            "The actor ab is unavailable: closed. The task may or may not have run.",
            "The actor ab is unavailable: closed",
        ),
        ("x" * 1000, "x" * 300),
        ("", "no reason given"),
    ],
)
def test_an_account_of_an_error_becomes_one_line(text, line):
    assert ray_cluster._short(text) == line
