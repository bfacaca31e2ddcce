"""Where a process finds itself, for the environment that each launcher leaves; real torchrun is asked too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.launch.rendezvous import MAX_HOSTS, PORT, SLURM_PORTS, Place, expand_hosts, find

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "41203",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "gpu[04,07]",
    "SLURM_JOB_NODELIST": "gpu[04,07]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
LWS = {"LWS_LEADER_ADDRESS": "yard-0.yard.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}


def place(source, ranks, node, nodes, address, port, *, ep, local=None, count=None):
    return Place(
        source=source,
        ep=ep,
        ranks=tuple(ranks),
        local_ranks=tuple(ranks if local is None else local),
        local_count=count or (8 if source == "torchrun" else len(ranks)),
        leader=node == 0,
        node=node,
        nodes=nodes,
        address=address,
        port=port,
    )


def local(ep, port=0, source="local"):
    return place(source, range(ep), 0, 1, "127.0.0.1", port, ep=ep)


FOUND = {
    # name: (environment, ep, port, the place)
    "alone": ({}, None, None, local(1)),
    "alone with ranks": ({}, 8, None, local(8)),
    "alone with a port": ({}, 8, 4000, local(8, 4000)),
    "other variables": ({"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}, 2, None, local(2)),
    "leftovers of torchrun": (TORCHRUN | {"TORCHELASTIC_RUN_ID": ""}, 2, None, local(2)),
    "an address alone": ({"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}, 2, None, local(2)),
    "torchrun, a process per rank": (
        TORCHRUN,
        16,
        None,
        place("torchrun", [9], 9, 16, "node-a", 29501, ep=16, local=[1]),
    ),
    "torchrun decides ep": (TORCHRUN, None, None, place("torchrun", [9], 9, 16, "node-a", 29501, ep=16, local=[1])),
    "torchrun, its first": (
        TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"},
        16,
        None,
        place("torchrun", [0], 0, 16, "node-a", 29501, ep=16),
    ),
    "torchrun, a process per node": (
        TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        16,
        None,
        place("torchrun", range(8, 16), 1, 2, "node-a", 29501, ep=16, local=range(8)),
    ),
    "torchrun, two ranks per process": (
        TORCHRUN | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        8,
        None,
        place("torchrun", [6, 7], 3, 4, "node-a", 29501, ep=8, local=[2, 3], count=4),
    ),
    "torchrun, one process": (
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        8,
        None,
        local(8, source="torchrun"),
    ),
    "torchrun, our port": (TORCHRUN, 16, 4000, place("torchrun", [9], 9, 16, "node-a", 4000, ep=16, local=[1])),
    "torchrun, our port and none of its own": (
        {k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"},
        16,
        4000,
        place("torchrun", [9], 9, 16, "node-a", 4000, ep=16, local=[1]),
    ),
    "torchrun, IPv6": (
        TORCHRUN | {"MASTER_ADDR": "fd00::a"},
        16,
        None,
        place("torchrun", [9], 9, 16, "fd00::a", 29501, ep=16, local=[1]),
    ),
    "torchrun, IPv6 in brackets": (
        TORCHRUN | {"MASTER_ADDR": "[fd00::a]"},
        16,
        None,
        place("torchrun", [9], 9, 16, "fd00::a", 29501, ep=16, local=[1]),
    ),
    "torchrun inside srun": (
        SRUN | TORCHRUN,
        16,
        None,
        place("torchrun", [9], 9, 16, "node-a", 29501, ep=16, local=[1]),
    ),
    "torchrun inside a pod": (
        LWS | TORCHRUN,
        16,
        None,
        place("torchrun", [9], 9, 16, "node-a", 29501, ep=16, local=[1]),
    ),
    "srun, a task per node": (
        SRUN,
        16,
        None,
        place("slurm", range(8, 16), 1, 2, "gpu04", 21203, ep=16, local=range(8)),
    ),
    "srun decides ep": (SRUN, None, None, place("slurm", [1], 1, 2, "gpu04", 21203, ep=2, local=[0])),
    "srun, its first task": (
        SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        16,
        None,
        place("slurm", range(8), 0, 2, "gpu04", 21203, ep=16),
    ),
    "srun, a task per rank, round the nodes": (
        SRUN
        | {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
        | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
        4,
        None,
        place("slurm", [3], 3, 4, "gpu04", 21203, ep=4, local=[1], count=2),
    ),
    "srun, fewer tasks than the job has": (
        SRUN | {"SLURM_NTASKS": "64"},
        2,
        None,
        place("slurm", [1], 1, 2, "gpu04", 21203, ep=2, local=[0]),
    ),
    "srun, a part of the job's nodes": (
        SRUN | {"SLURM_JOB_NODELIST": "gpu[01-09]"},
        2,
        None,
        place("slurm", [1], 1, 2, "gpu04", 21203, ep=2, local=[0]),
    ),
    "srun of old, without its step's own list": (
        {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP_N")},
        2,
        None,
        place("slurm", [1], 1, 2, "gpu04", 21203, ep=2, local=[0]),
    ),
    "srun, our port": (SRUN, 2, 4000, place("slurm", [1], 1, 2, "gpu04", 4000, ep=2, local=[0])),
    "srun, one task": (
        SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        8,
        None,
        local(8, source="slurm"),
    ),
    "srun, one task with a port": (
        SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        8,
        4000,
        local(8, 4000, source="slurm"),
    ),
    "srun inside a pod": (LWS | SRUN, 2, None, place("slurm", [1], 1, 2, "gpu04", 21203, ep=2, local=[0])),
    "a batch script": ({k: v for k, v in SRUN.items() if "STEP" not in k}, 8, None, local(8)),
    "the batch step": (SRUN | {"SLURM_STEP_ID": "4294967291"}, 8, None, local(8)),
    "the shell of salloc": (SRUN | {"SLURM_STEP_ID": "4294967290"}, 8, None, local(8)),
    "a pod": (
        LWS,
        16,
        None,
        place("leaderworkerset", range(8, 16), 1, 2, "yard-0.yard.default", PORT, ep=16, local=range(8)),
    ),
    "the leader's pod": (
        LWS | {"LWS_WORKER_INDEX": "0"},
        16,
        None,
        place("leaderworkerset", range(8), 0, 2, "yard-0.yard.default", PORT, ep=16),
    ),
    "a pod decides ep": (
        LWS,
        None,
        None,
        place("leaderworkerset", [1], 1, 2, "yard-0.yard.default", PORT, ep=2, local=[0]),
    ),
    "a pod, our port": (
        LWS,
        2,
        4000,
        place("leaderworkerset", [1], 1, 2, "yard-0.yard.default", 4000, ep=2, local=[0]),
    ),
    "a group of one pod": (
        LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"},
        8,
        None,
        local(8, source="leaderworkerset"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_find(name):
    environ, ep, port, expected = FOUND[name]
    assert find(environ, ep, port) == expected


REFUSED = {
    # name: (environment, ep, port, parts of the message)
    "ep": ({}, 0, None, ["ep is 0", "at least 1"]),
    "port": ({}, 1, 70000, ["cluster_port is 70000", "between 1 and 65535"]),
    "port 0": ({}, 1, 0, ["cluster_port is 0"]),
    "RANK": (TORCHRUN | {"RANK": "x"}, 16, None, ["RANK is 'x'", "not a number", "unset"]),
    "RANK of another script": (TORCHRUN | {"RANK": "٣"}, 16, None, ["RANK is '٣'", "not a number"]),
    "RANK with a sign": (TORCHRUN | {"RANK": "-1"}, 16, None, ["RANK is '-1'", "not a number"]),
    "RANK missing": (TORCHRUN | {"RANK": " "}, 16, None, ["RANK is missing", "torchrun", "unset"]),
    "RANK too high": (TORCHRUN | {"RANK": "16"}, 16, None, ["RANK is 16", "from 0 to 15", "WORLD_SIZE is 16"]),
    "WORLD_SIZE": (TORCHRUN | {"WORLD_SIZE": "0"}, 16, None, ["WORLD_SIZE is 0", "at least 1"]),
    "WORLD_SIZE does not divide ep": (TORCHRUN, 24, None, ["ep is 24", "WORLD_SIZE", "is 16", "--ep as a multiple"]),
    "more processes than ranks": (TORCHRUN, 8, None, ["ep is 8", "WORLD_SIZE", "is 16"]),
    "LOCAL_RANK": (TORCHRUN | {"LOCAL_RANK": "8"}, 16, None, ["LOCAL_RANK is 8", "LOCAL_WORLD_SIZE is 8"]),
    "LOCAL_WORLD_SIZE": (TORCHRUN | {"LOCAL_WORLD_SIZE": "17"}, 16, None, ["LOCAL_WORLD_SIZE is 17", "from 1 to 16"]),
    "MASTER_ADDR": (TORCHRUN | {"MASTER_ADDR": ""}, 16, None, ["MASTER_ADDR is missing"]),
    "MASTER_PORT": (TORCHRUN | {"MASTER_PORT": "tcp"}, 16, None, ["MASTER_PORT is 'tcp'"]),
    "no port above it": (TORCHRUN | {"MASTER_PORT": "65535"}, 16, None, ["MASTER_PORT is 65535", "one above"]),
    "SLURM_STEP_ID": (SRUN | {"SLURM_STEP_ID": "batch"}, 2, None, ["SLURM_STEP_ID is 'batch'", "not a number"]),
    "SLURM_PROCID": (SRUN | {"SLURM_PROCID": "2"}, 2, None, ["SLURM_PROCID is 2", "SLURM_STEP_NUM_TASKS is 2"]),
    "SLURM_PROCID missing": (SRUN | {"SLURM_PROCID": ""}, 2, None, ["SLURM_PROCID is missing", "srun"]),
    "SLURM_LOCALID": (SRUN | {"SLURM_LOCALID": "2"}, 2, None, ["SLURM_LOCALID is 2", "from 0 to 1"]),
    "SLURM_NTASKS": (SRUN | {"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "?"}, 2, None, ["SLURM_NTASKS is '?'"]),
    "tasks do not divide ep": (SRUN, 5, None, ["ep is 5", "SLURM_STEP_NUM_TASKS", "is 2", "multiple of 2"]),
    "no list of hosts": (
        SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""},
        2,
        None,
        ["SLURM_JOB_NODELIST is missing"],
    ),
    "a broken list of hosts": (
        SRUN | {"SLURM_STEP_NODELIST": "gpu[04,07"},
        2,
        None,
        ["SLURM_STEP_NODELIST: cannot read 'gpu[04,07'"],
    ),
    "no job": (SRUN | {"SLURM_JOB_ID": ""}, 2, None, ["SLURM_JOB_ID is missing"]),
    "task 0 elsewhere": (
        SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "1"},
        2,
        None,
        ["SLURM_NODEID is '1'", "--distribution=block"],
    ),
    "SLURM_STEP_TASKS_PER_NODE": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2x3"},
        2,
        None,
        ["SLURM_STEP_TASKS_PER_NODE is '2x3'", "such as 2(x3),1"],
    ),
    "more nodes than are listed": (
        SRUN | {"SLURM_NODEID": "2"},
        2,
        None,
        ["SLURM_NODEID is 2", "SLURM_STEP_TASKS_PER_NODE is '1(x2)'", "unset"],
    ),
    "LWS_GROUP_SIZE": (LWS | {"LWS_GROUP_SIZE": "two"}, 2, None, ["LWS_GROUP_SIZE is 'two'"]),
    "LWS_WORKER_INDEX": (LWS | {"LWS_WORKER_INDEX": "2"}, 2, None, ["LWS_WORKER_INDEX is 2", "LWS_GROUP_SIZE is 2"]),
    "LWS_WORKER_INDEX missing": (LWS | {"LWS_WORKER_INDEX": ""}, 2, None, ["LWS_WORKER_INDEX is missing"]),
    "LWS_LEADER_ADDRESS": (
        {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"},
        2,
        None,
        ["LWS_LEADER_ADDRESS is missing"],
    ),
    "pods do not divide ep": (LWS, 7, None, ["ep is 7", "LWS_GROUP_SIZE", "multiple of 2"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inconsistencies_are_named(name):
    environ, ep, port, parts = REFUSED[name]
    with pytest.raises(ValueError) as error:
        find(environ, ep, port)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({}, "no launcher"),
        (FOUND["a batch script"][0], "put srun before"),
        (FOUND["the shell of salloc"][0], "put srun before"),
        (FOUND["leftovers of torchrun"][0], "without TORCHELASTIC_RUN_ID"),
        (TORCHRUN, "process 9 of torchrun's 16"),
        (SRUN, "task 1 of srun's 2"),
        (LWS, "pod 1 of a group of 2"),
    ],
)
def test_why_is_for_the_log(environ, part):
    assert part in find(environ, None).why


@pytest.mark.parametrize(
    ("tasks", "node", "count"),
    [
        ("4", "0", 4),
        ("2(x3),1", "0", 2),
        ("2(x3),1", "2", 2),
        ("2(x3),1", "3", 1),
        ("1,3(x2)", "2", 3),
        ("", "0", None),
        ("4", "", None),
    ],
)
def test_how_many_ranks_share_a_machine_under_slurm(tasks, node, count):
    """Of unevenly spread tasks, two ranks in each."""
    environ = SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_STEP_NUM_TASKS": "7"}
    assert find(environ, 14).local_count == (count and 2 * count)


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [("node-a", "node-a:29501"), ("10.0.0.7", "10.0.0.7:29501"), ("fd00::a", "[fd00::a]:29501")],
)
def test_endpoint(address, endpoint):
    assert find(TORCHRUN | {"MASTER_ADDR": address}, 16).endpoint == endpoint


def job_of(launcher: str, machines: int, per_machine: int) -> list[dict[str, str]]:
    """The environments of the processes of one job, by machine."""
    nodes = machines * per_machine
    if launcher == "local":
        return [{}]
    if launcher == "leaderworkerset":  # one process per pod, several of which may be on one machine
        return [LWS | {"LWS_GROUP_SIZE": str(nodes), "LWS_WORKER_INDEX": str(i)} for i in range(nodes)]
    if launcher == "torchrun":
        counts = {"WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": str(per_machine)}
        return [TORCHRUN | counts | {"RANK": str(i), "LOCAL_RANK": str(i % per_machine)} for i in range(nodes)]
    counts = {"SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_STEP_NODELIST": f"n[1-{machines}]"}
    counts |= {"SLURM_STEP_TASKS_PER_NODE": f"{per_machine}(x{machines})"}
    return [
        SRUN
        | counts
        | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i // per_machine), "SLURM_LOCALID": str(i % per_machine)}
        for i in range(nodes)
    ]


@given(
    launcher=st.sampled_from(["local", "torchrun", "slurm", "leaderworkerset"]),
    machines=st.integers(1, 5),
    per_machine=st.integers(1, 4),
    block=st.integers(1, 4),
    said=st.booleans(),
    port=st.none() | st.integers(1, 65535),
)
def test_a_job_has_every_rank_once_and_one_leader(launcher, machines, per_machine, block, said, port):
    job = job_of(launcher, machines, per_machine)
    ep = len(job) * block if said else None
    places = [find(environ, ep, port) for environ in job]
    assert [rank for p in places for rank in p.ranks] == list(range(ep or len(job)))
    assert [p.node for p in places if p.leader] == [0]
    assert [p.leader for p in places] == [0 in p.ranks for p in places]
    assert [p.node for p in places] == list(range(len(job)))
    # All agree on the job, and every process that is not alone on where the leader is.
    assert len({(p.source, p.ep, p.nodes, p.address, p.port) for p in places}) == 1
    assert places[0].nodes == len(job) and places[0].ep == (ep or len(job))
    assert places[0].port == port or (port is None and (places[0].port > 0) == (len(job) > 1))
    # Ranks of one machine have devices of their own.
    assert all(len(p.local_ranks) == len(p.ranks) for p in places)
    if launcher in ("torchrun", "slurm"):
        for machine in range(machines):
            on_it = places[machine * per_machine : (machine + 1) * per_machine]
            local_ranks = [i for p in on_it for i in p.local_ranks]
            assert local_ranks == list(range(len(local_ranks)))
            assert {p.local_count for p in on_it} == {len(local_ranks)}


@given(job=st.integers(0, 2**31), step=st.integers(0, 9000))
def test_jobs_and_steps_that_share_a_node_have_ports_of_their_own(job, step):
    def port(job, step):
        return find(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}, 2).port

    ports = [port(job, step), port(job + 1, step), port(job, step + 1), port(job, step + 2), port(job + 7, step)]
    assert len(set(ports)) == len(ports) and set(ports) <= set(SLURM_PORTS)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login1", ["login1"]),
        ("a,b", ["a", "b"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[3]", ["n3"]),
        ("n[2,1]", ["n2", "n1"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("r[1-2]n[1,3]x,y", ["r1n1x", "r1n3x", "r2n1x", "r2n3x", "y"]),
        ("a-1.cluster.example,[1-2]b", ["a-1.cluster.example", "1b", "2b"]),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


BROKEN = ["", ",", "a,", ",a", "a,,b", "a b", "a\n", "n[1-3", "n1-3]", "n[]", "n[1-]", "n[-3]", "n[1--3]", "n[3-1]"]
BROKEN += ["n[1,]", "n[,1]", "n[a-b]", "n[1[2]]", "n[1-99999999]", "n[1-9999]m[1-9999]", "n[1-65536],a"]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_lists_of_hosts(text):
    with pytest.raises(ValueError, match=r"cannot read|more than 65536 hosts"):
        expand_hosts(text)


@given(st.text("abn019,-[]. ", max_size=30))
def test_any_text_is_a_list_of_hosts_or_refused(text):
    try:
        hosts = expand_hosts(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert 0 < len(hosts) <= MAX_HOSTS and all(host and not set(host) & set("[], ") for host in hosts)


part_of_a_name = st.text("abz.-", min_size=1, max_size=4)
numbers = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12), st.integers(1, 5)), min_size=1, max_size=3)
names = st.lists(st.tuples(part_of_a_name, numbers, st.just("") | part_of_a_name), min_size=1, max_size=4)


@given(names)
def test_a_list_of_hosts_written_by_hand_is_read_back(names):
    text, expected = [], []
    for head, ranges, tail in names:
        inside = ",".join(f"{a:0{w}}-{a + more:0{w}}" if more else f"{a:0{w}}" for a, more, w in ranges)
        text.append(f"{head}[{inside}]{tail}")
        expected += [f"{head}{n:0{w}}{tail}" for a, more, w in ranges for n in range(a, a + more + 1)]
    assert expand_hosts(",".join(text)) == expected


def test_real_torchrun(tmp_path):
    """Two processes for four ranks, started by torchrun itself on this machine."""
    script = tmp_path / "place.py"
    script.write_text(
        "import dataclasses, json, os, sys\nfrom moeyard.launch.rendezvous import find\n"
        "place = dataclasses.asdict(find(os.environ, 4)) | {'master_port': int(os.environ['MASTER_PORT'])}\n"
        "open(f'{sys.argv[1]}/{place[\"node\"]}.json', 'w').write(json.dumps(place))\n"
    )
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    places = [json.loads((tmp_path / f"{node}.json").read_text()) for node in range(2)]
    assert [p["source"] for p in places] == ["torchrun", "torchrun"]
    assert [p["ranks"] for p in places] == [p["local_ranks"] for p in places] == [[0, 1], [2, 3]]
    assert [p["leader"] for p in places] == [True, False]
    assert places[0]["address"] == places[1]["address"] != ""
    assert {p["port"] for p in places} == {places[0]["master_port"] + 1}
