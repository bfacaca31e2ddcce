"""How the ranks are started, from the options and from what a launcher left in the environment."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from ..engine.config import EngineConfig
from .local import Launcher, LocalLauncher
from .rendezvous import LOCALHOST, Place, find


def find_place(config: EngineConfig, environ: Mapping[str, str]) -> Place:
    """The part of the job that this process has.

    With `launcher` ray this process leads all ranks, wherever they run: `ep` of them, or 1. Raises ValueError for an
    environment that contradicts itself or the options, on every node: none is left to wait for the others.
    """
    if config.launcher != "ray":
        place = find(environ, config.ep, config.cluster_port)
        if config.on_rank_loss == "restart" and place.nodes > 1:
            raise ValueError(
                f"on_rank_loss restart needs ranks that this process starts, and {place.source} starts those of"
                f" {place.nodes} nodes; use --on-rank-loss continue or --launcher ray"
            )
        return place
    ep = config.ep or 1
    return Place(
        source="ray",
        ep=ep,
        ranks=tuple(range(ep)),
        local_ranks=tuple(range(ep)),
        leader=True,
        node=0,
        nodes=1,
        address=LOCALHOST,
        port=config.cluster_port or 0,
        why="--launcher ray",
    )


def choose_launcher(config: EngineConfig, environ: Mapping[str, str]) -> Launcher:
    """What starts the ranks of the leader's front end.

    Raises ValueError for a process that is not the leader: it has no front end (`node` is for it).
    """
    place = find_place(config, environ)
    if not place.leader:
        raise ValueError(
            f"this process is number {place.node} of {place.nodes} that {place.source} started, and only the first has"
            " a front end; start the program once, with ep ranks on this machine or with launcher ray on several, or"
            " run `moeyard serve` on every node"
        )
    if config.launcher == "ray":
        return _ray(config, place)
    if place.nodes == 1 and not place.port:
        return LocalLauncher(ranks=place.ranks)
    return LocalLauncher(
        ranks=place.ranks,
        local_ranks=place.local_ranks,
        local_count=place.local_count,
        bind=f"tcp://{place.endpoint if _is_here(place.address) else f'*:{place.port}'}",
        connect=f"tcp://{place.endpoint}",
    )


def _is_here(address: str) -> bool:
    """Whether it is the number of one of this machine's interfaces. A name may stand for several, or for none of ours
    (a service's), and which of them the other nodes take is not known here."""
    try:
        kind = ipaddress.ip_address(address)
        with socket.socket(socket.AF_INET6 if kind.version == 6 else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except (ValueError, OSError):
        return False
    return True


def _ray(config: EngineConfig, place: Place) -> Launcher:
    from .ray_cluster import RayLauncher

    device = config.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return RayLauncher(place.ep, device=device, cores_per_rank=config.threads, port=config.cluster_port)
