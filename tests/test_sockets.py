"""Connections that are found and cut: those that were asked for, and no others."""

import contextlib
import os
import socket
import sys

import pytest

from moeyard.engine import sockets
from moeyard.engine.sockets import connected_to, cut, open_sockets, opened_since

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


@contextlib.contextmanager
def pair(host="127.0.0.1", family=socket.AF_INET):
    """Both ends of a TCP connection, and its server's port."""
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as one,
        server.accept()[0] as other,
    ):
        yield one, other, server.getsockname()[1]


def numbers(found):
    return {number for number, _ in found}


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_an_exchange_that_waits_ends(host, family):
    if family == socket.AF_INET6:
        try:
            socket.create_server((host, 0), family=family).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    before = open_sockets()
    with pair(host, family) as (one, other, _):
        found = opened_since(before)
        assert numbers(found) == {one.fileno(), other.fileno()}
        other.sendall(b"x")
        assert cut(it for it in found if it[0] == one.fileno()) == 1
        assert one.recv(10) in (b"", b"x") and other.recv(10) == b""
        with pytest.raises(OSError):
            one.sendall(b"y")
        assert one.fileno() in numbers(open_sockets())  # its owner closes it


def test_only_connections_that_were_opened_since():
    with pair() as (old, _, _):
        before = open_sockets()
        assert old.fileno() in numbers(before) and opened_since(before) == frozenset()
        local, datagrams = socket.socketpair(), socket.socket(type=socket.SOCK_DGRAM)
        with local[0], local[1], datagrams, pair() as (one, other, port), pair() as (first, second, _):
            assert numbers(opened_since(before)) == {it.fileno() for it in (one, other, first, second)}
            assert numbers(opened_since(before, [port])) == {first.fileno(), second.fileno()}
            assert numbers(connected_to(port)) == {one.fileno()}
        assert opened_since(before) == frozenset()


def test_one_that_is_not_connected_yet():
    before = open_sockets()
    with socket.socket() as connecting:
        assert numbers(opened_since(before)) == {connecting.fileno()}
        assert cut(opened_since(before)) in (0, 1)


def test_a_number_that_is_another_file_by_now_is_left_alone():
    with pair() as (one, other, _):
        found = [it for it in open_sockets() if it[0] == one.fileno()]
        with pair() as (young, far, _):
            os.dup2(young.fileno(), one.fileno())
            assert cut(found) == 0
            far.sendall(b"alive")
            assert young.recv(10) == b"alive"
        assert other.recv(10) == b""  # nobody has the other end
    assert cut(found) == 0


def test_without_proc_there_is_nothing_to_cut(monkeypatch):
    monkeypatch.setattr(sockets, "_FOLDER", "/nonexistent")
    with pair():
        assert open_sockets() == opened_since(()) == connected_to(1) == frozenset()
