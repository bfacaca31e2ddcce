"""Settings of the sockets between ranks and front end that both ends and the heartbeat share."""

from __future__ import annotations

import socket
from typing import Any

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
    """The address at which others on the way to `endpoint` reach this machine; local for ipc endpoints."""
    if not endpoint.startswith("tcp://"):
        return "127.0.0.1"
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # a datagram socket's connect sends nothing
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
