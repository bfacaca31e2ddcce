"""TCP connections that another part of this process opened: found through Linux's /proc, and cut from any thread.

Gloo has no call that ends an exchange. An exchange whose connections end does end, at once and with an error.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Collection, Iterable

_FOLDER = "/proc/self/fd"
_TCP = (socket.AF_INET, socket.AF_INET6)

Socket = tuple[int, int]
"""A file descriptor and the inode behind it: the number alone is soon another file's."""


def open_sockets() -> frozenset[Socket]:
    """All sockets of this process; none where there is no /proc."""
    try:
        numbers = [int(name) for name in os.listdir(_FOLDER)]
    except OSError:
        return frozenset()
    found = []
    for number in numbers:
        try:
            status = os.fstat(number)
        except OSError:  # closed meanwhile, as that of the listing itself
            continue
        if stat.S_ISSOCK(status.st_mode):
            found.append((number, status.st_ino))
    return frozenset(found)


def opened_since(before: Collection[Socket], spared_ports: Collection[int] = ()) -> frozenset[Socket]:
    """The TCP connections, made or being made, that `open_sockets` did not give `before`.

    Without listening sockets, and those that have one of `spared_ports` at either end.
    """
    return frozenset(it for it in open_sockets() - frozenset(before) if _is_connection(it, spared_ports))


def connected_to(port: int) -> frozenset[Socket]:
    """The TCP connections whose other end has this port."""
    found = []
    for it in open_sockets():
        if connection := _borrow(it):
            with connection, contextlib.suppress(OSError):
                if connection.family in _TCP and connection.getpeername()[1] == port:
                    found.append(it)
    return frozenset(found)


def cut(sockets: Iterable[Socket]) -> int:
    """Ends these connections in both directions, as if the other side had; how many were still there.

    Descriptors stay open and whoever owns them closes them; one that is another file's by now is left alone.
    """
    number = 0
    for it in sockets:
        connection = _borrow(it)
        if connection is None:
            continue
        with connection, contextlib.suppress(OSError):  # it has ended already
            connection.shutdown(socket.SHUT_RDWR)
            number += 1
    return number


def _is_connection(it: Socket, spared_ports: Collection[int]) -> bool:
    connection = _borrow(it)
    if connection is None:
        return False
    with connection:
        if connection.family not in _TCP or connection.type != socket.SOCK_STREAM:
            return False
        try:
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            ports = {connection.getsockname()[1]}
        except OSError:
            return False
        with contextlib.suppress(OSError):  # not connected yet
            ports.add(connection.getpeername()[1])
        return not ports & frozenset(spared_ports)


def _borrow(it: Socket) -> socket.socket | None:
    """A descriptor of our own for the same socket, which its owner may close meanwhile; None when it has."""
    number, inode = it
    try:
        own = os.dup(number)
    except OSError:
        return None
    if os.fstat(own).st_ino != inode:
        os.close(own)
        return None
    return socket.socket(fileno=own)
