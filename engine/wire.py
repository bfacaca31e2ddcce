"""Settings of the sockets between ranks and front end that both ends and the heartbeat share."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

import psutil
import zmq

HEARTBEAT_IVL_MS = 2000
HEARTBEAT_TIMEOUT_MS = 20_000
"""A connection whose other machine is gone without a word is closed after this."""


def set_heartbeat(connection: Any, endpoint: str) -> None:
    """Lets ZeroMQ notice half-open connections between machines.

    Not within one: there nothing is half open, and a process that was stopped for a while would lose its connection.
    """
    if not endpoint.startswith("tcp://"):
        return
    connection.setsockopt(zmq.IPV6, 1)
    connection.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_IVL_MS)
    connection.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    connection.setsockopt(zmq.TCP_KEEPALIVE, 1)


def address_of_this_machine(endpoint: str) -> str:
    """The address at which others on the way to `endpoint` reach this machine; local for ipc endpoints.

    Many systems give their own host name to the loopback (Debian: 127.0.1.1), where no other machine can come: for a
    name that leads there it is the address of the interface that GLOO_SOCKET_IFNAME names, else of the default route,
    else of the first interface that is up.
    """
    if not endpoint.startswith("tcp://"):
        return "127.0.0.1"
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    own = _source_address(host, int(port)) or "127.0.0.1"
    if ipaddress.ip_address(own).is_loopback and host != "localhost" and not _is_number(host):
        return _outer_address() or own
    return own


def _source_address(host: str, port: int) -> str | None:
    """This machine's end of the route to `host`; None when there is none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # a datagram socket's connect sends nothing
            probe.connect(address)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _outer_address() -> str | None:
    """Of the interface by which this machine reaches the rest of the world; None when it has only the loopback."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if not chosen and (outer := _source_address("203.0.113.1", 9)):  # any address that is nowhere near
        return outer
    up = [chosen] if chosen else [name for name, stats in psutil.net_if_stats().items() if stats.isup]
    for name, addresses in psutil.net_if_addrs().items():
        for it in addresses:
            if name in up and it.family == socket.AF_INET and not ipaddress.ip_address(it.address).is_loopback:
                return it.address
    return None
