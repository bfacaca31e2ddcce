"""Which ranks this process starts and where the first of them is, read from what a launcher left in the environment.

One command line serves everywhere: alone, or once per node (or per rank) under torchrun, srun or a LeaderWorkerSet.
Ray is not here: `ray symmetric-run` runs the command on one node, and `--launcher ray` then asks the Ray cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

LOCALHOST = "127.0.0.1"
# Below the ports that kernels (32768 and up on Linux) and Kubernetes services (30000 and up) give away by themselves.
PORT = 29577
SLURM_PORTS = range(20000, 30000)
# Slurm's own steps (batch script, interactive shell, extern) have ids from here up; srun's count from 0.
FIRST_RESERVED_STEP = 0xFFFFFFF0
MAX_HOSTS = 2**16  # more than Slurm's largest job; a damaged list is an error before it fills the memory

_LWS = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The part of one job that one process has. The processes of a job have the ranks in order, in equal blocks.

    `local_ranks` gives for each of `ranks` its index among the ranks on its machine, which chooses its device (modulo
    the devices that are visible: a launcher may have left only one of them), and `local_count` how many ranks share the
    machine's cores and memory. `why` is one sentence for the log.
    """

    source: str  # "local", "torchrun", "slurm" or "leaderworkerset"
    ep: int  # ranks in all
    ranks: tuple[int, ...]  # those that this process starts
    local_ranks: tuple[int, ...]
    leader: bool  # has rank 0 and the HTTP front end; one process of the job is
    node: int  # index of this process among the job's processes
    nodes: int  # how many processes the job has
    address: str  # the leader's host as the other processes reach it: a name, IPv4 or IPv6 without brackets
    port: int  # the leader's port for ranks; 0, any free one, only when nodes is 1
    local_count: int | None = None  # None where the launcher does not say
    why: str = field(default="", compare=False)

    @property
    def endpoint(self) -> str:
        """`host:port`, or `[host]:port` for IPv6, as URLs want it."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def find(environ: Mapping[str, str], ep: int | None, port: int | None = None) -> Place:
    """The place of the process that has the variables `environ`, in a job of `ep` ranks.

    `ep` None means one rank per process that the launcher started (alone: 1), `port` None a port from the launcher.
    The innermost launcher counts, because it started this process: torchrun before srun before the pod's
    LeaderWorkerSet. So torchrun inside srun is torchrun, srun inside a pod is Slurm. A launcher whose variables are
    there but did not start this process is passed over, and `Place.why` says so:

    * RANK and WORLD_SIZE without TORCHELASTIC_RUN_ID, which torchrun always sets, were left by something else.
    * A Slurm job without a step of srun's: a batch script (or the shell of salloc) runs once, on the job's first node,
      whatever SLURM_NTASKS says, so there are no other processes to meet.

    Raises ValueError naming the variable or option, what it is, and the remedy.
    """
    if ep is not None and ep < 1:
        raise ValueError(f"ep is {ep}; it must be at least 1")
    if port is not None and not 0 < port <= 65535:
        raise ValueError(f"cluster_port is {port}; it must be between 1 and 65535")
    if environ.get("TORCHELASTIC_RUN_ID"):
        place = _torchrun(environ, ep, port)
    elif _inside_srun(environ):
        place = _slurm(environ, ep, port)
    elif any(environ.get(name) for name in _LWS):
        place = _leaderworkerset(environ, ep, port)
    else:
        why = "no launcher in the environment"
        if environ.get("SLURM_JOB_ID"):
            why = "in a Slurm job but not started by srun: this node alone (put srun before the command for all nodes)"
        elif environ.get("RANK") and environ.get("WORLD_SIZE"):
            why = "RANK and WORLD_SIZE are ignored: without TORCHELASTIC_RUN_ID torchrun did not start this process"
        place = _place("local", why, ep)
    # Alone, nobody else has to find this process: no name to resolve, and no port but one that the user wants.
    return replace(place, address=LOCALHOST, port=port or 0) if place.nodes == 1 else place


def expand_hosts(text: str) -> list[str]:
    """The hosts of a list in Slurm's compact form, in order: `gpu[01-03,07],login1` has five.

    Several brackets in one name multiply, the last one fastest. Raises ValueError for what is not such a list.
    """
    hosts: list[str] = []
    for name in _split(text):
        hosts += _expand(name, MAX_HOSTS - len(hosts), text)
    return hosts


def _torchrun(environ: Mapping[str, str], ep: int | None, port: int | None) -> Place:
    variables = _Variables(environ, "torchrun")
    nodes = variables.number("WORLD_SIZE", 1)
    node = variables.number("RANK", 0, nodes - 1, f"WORLD_SIZE is {nodes}")
    local_nodes = variables.number("LOCAL_WORLD_SIZE", 1, nodes, f"WORLD_SIZE is {nodes}")
    local_node = variables.number("LOCAL_RANK", 0, local_nodes - 1, f"LOCAL_WORLD_SIZE is {local_nodes}")
    address = variables.text("MASTER_ADDR")
    if port is None:
        port = (
            variables.number("MASTER_PORT", 1, 65534, "ranks meet one above it") + 1
        )  # torchrun's store listens on it
    why = f"process {node} of torchrun's {nodes} (RANK, WORLD_SIZE)"
    counter = "WORLD_SIZE, from torchrun's --nnodes and --nproc-per-node,"
    return _place("torchrun", why, ep, node, nodes, local_node, local_nodes, address, port, counter)


def _inside_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, as opposed to sbatch or salloc."""
    if not environ.get("SLURM_STEP_ID"):
        return False
    return _Variables(environ, "srun").number("SLURM_STEP_ID") < FIRST_RESERVED_STEP


def _slurm(environ: Mapping[str, str], ep: int | None, port: int | None) -> Place:
    """Task n has block n of the ranks; the leader is task 0, on the first host of the step.

    SLURM_LAUNCH_NODE_IPADDR is where srun itself runs, often a login node, so it is not the leader's address. The port
    comes from the ids of the job and the step, because jobs that share a node must not meet on one port: neighbouring
    jobs, and the steps of one job, have different ones. `--cluster-port` is the way out of the rest.
    """
    variables = _Variables(environ, "srun")
    # The step's own count: SLURM_NTASKS can be the job's, where a step was started with fewer tasks.
    count = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    nodes = variables.number(count, 1)
    node = variables.number("SLURM_PROCID", 0, nodes - 1, f"{count} is {nodes}")
    local_node = 0  # right for one task per node, should the variable be missing
    if environ.get("SLURM_LOCALID"):
        local_node = variables.number("SLURM_LOCALID", 0, nodes - 1, f"{count} is {nodes}")
    hosts = "SLURM_STEP_NODELIST" if environ.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    text = variables.text(hosts)
    try:
        address = expand_hosts(text)[0]
    except ValueError as error:
        raise ValueError(f"{hosts}: {error}") from None
    if node == 0 and environ.get("SLURM_NODEID", "0") != "0":
        raise ValueError(
            f"SLURM_NODEID is {environ['SLURM_NODEID']!r} for task 0, but the others look for it on the first host of"
            f" {hosts}; start srun with --distribution=block"
        )
    if port is None:
        # 4999 and 10000 have no common divisor, so that steps differ; it is large, so that step 1 is not the next job.
        number = variables.number("SLURM_JOB_ID") + 4999 * variables.number("SLURM_STEP_ID")
        port = SLURM_PORTS[number % len(SLURM_PORTS)]
    why = f"task {node} of srun's {nodes} (SLURM_PROCID, {count})"
    counter = f"{count}, from srun's --ntasks,"
    return _place("slurm", why, ep, node, nodes, local_node, _tasks_here(environ), address, port, counter)


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """How many of the step's tasks this node has, from a list by node such as `2(x3),1`; None when there is no list."""
    if not environ.get("SLURM_STEP_TASKS_PER_NODE") or not environ.get("SLURM_NODEID"):
        return None
    variables = _Variables(environ, "srun")
    text = variables.text("SLURM_STEP_TASKS_PER_NODE")
    before, node = 0, variables.number("SLURM_NODEID")
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not a list of counts such as 2(x3),1")
        before += int(match[2] or 1)
        if node < before:
            return int(match[1])
    raise ValueError(
        f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE is {text!r}, for {before} nodes; srun sets both, so"
        " unset what is left over from another job"
    )


def _leaderworkerset(environ: Mapping[str, str], ep: int | None, port: int | None) -> Place:
    """One process per pod; the leader pod has index 0, and the controller puts its name into all of them."""
    variables = _Variables(environ, "a LeaderWorkerSet")
    nodes = variables.number("LWS_GROUP_SIZE", 1)
    node = variables.number("LWS_WORKER_INDEX", 0, nodes - 1, f"LWS_GROUP_SIZE is {nodes}")
    address = variables.text("LWS_LEADER_ADDRESS")
    why = f"pod {node} of a group of {nodes} (LWS_WORKER_INDEX, LWS_GROUP_SIZE)"
    counter = "LWS_GROUP_SIZE, from the LeaderWorkerSet's size,"
    return _place("leaderworkerset", why, ep, node, nodes, 0, 1, address, port or PORT, counter)


def _place(
    source: str,
    why: str,
    ep: int | None,
    node: int = 0,
    nodes: int = 1,
    local_node: int = 0,
    local_nodes: int | None = 1,
    address: str = LOCALHOST,
    port: int = 0,
    counter: str = "",
) -> Place:
    """Process `node` of `nodes`, `local_node` of `local_nodes` on its machine; an error calls `nodes` `counter`."""
    ep = nodes if ep is None else ep
    if ep % nodes:
        raise ValueError(
            f"ep is {ep}, but {counter} is {nodes}: each process starts the same number of ranks, so choose --ep as a"
            f" multiple of {nodes}, or start another number of processes"
        )
    block = ep // nodes
    return Place(
        source=source,
        ep=ep,
        ranks=tuple(range(node * block, (node + 1) * block)),
        local_ranks=tuple(range(local_node * block, (local_node + 1) * block)),
        local_count=None if local_nodes is None else local_nodes * block,
        leader=node == 0,
        node=node,
        nodes=nodes,
        address=address.removeprefix("[").removesuffix("]"),
        port=port,
        why=why,
    )


class _Variables:
    """Reads what `launcher` sets; every error names the variable and says how it can have come about."""

    def __init__(self, environ: Mapping[str, str], launcher: str) -> None:
        self._environ = environ
        self._launcher = launcher

    def text(self, name: str) -> str:
        value = self._environ.get(name, "").strip()
        if not value:
            raise ValueError(
                f"{name} is missing, but other variables of {self._launcher} are set; start the command with"
                f" {self._launcher}, or unset them"
            )
        return value

    def number(self, name: str, low: int = 0, high: int | None = None, because: str = "") -> int:
        """The variable as an integer from `low` to `high`, for the reason `because`."""
        text = self.text(name)
        remedy = f"{self._launcher} sets it, so unset what is left over from another job"
        # Not all that int() takes: neither signs nor underscores nor other scripts' digits.
        if not re.fullmatch("[0-9]{1,18}", text):
            raise ValueError(f"{name} is {text!r}, not a number; {remedy}")
        value = int(text)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high} ({because})"
            raise ValueError(f"{name} is {value}; it must be {bounds}; {remedy}")
        return value


def _split(text: str) -> Iterator[str]:
    """The parts between the commas that are outside brackets."""
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[0-9,-]+\])+(?:,(?:[^\[\],\s]|\[[0-9,-]+\])+)*", text):
        raise ValueError(f"cannot read {text!r} as a list of hosts such as gpu[01-03,07],login1")
    return (match.group() for match in re.finditer(r"(?:[^\[\],]|\[[^\]]*\])+", text))


def _expand(name: str, room: int, text: str) -> list[str]:
    """The hosts of one name with any number of brackets, at most `room` of them."""
    hosts = [""]
    for part in re.split(r"(\[[^\]]*\])", name):
        ends = _numbers(part[1:-1], room, text) if part.startswith("[") else [part]
        if len(hosts) * len(ends) > room:
            raise ValueError(f"{text!r} has more than {MAX_HOSTS} hosts")
        hosts = [host + end for host in hosts for end in ends]
    return hosts


def _numbers(ranges: str, room: int, text: str) -> list[str]:
    """`01-03,07` -> `["01", "02", "03", "07"]`: the width of a range's first number holds for all of it."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch("([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"cannot read [{ranges}] in {text!r} as numbers and ranges such as 01-03,07")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(numbers) + last - first + 1 > room:
            raise ValueError(f"{text!r} has more than {MAX_HOSTS} hosts")
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers
