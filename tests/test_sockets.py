"""The meter of a port, on sockets of this machine."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedkit.errors import ConfigError
from fedkit.sockets import SocketMeter, Traffic

needs_ss = pytest.mark.skipif(shutil.which("ss") is None, reason="no program `ss` (iproute2, Linux)")


@contextmanager
def connection(listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            yield client, server


def carry(sender: socket.socket, receiver: socket.socket, count: int) -> None:
    sender.sendall(bytes(count))
    while count:
        count -= len(receiver.recv(count))


@needs_ss
def test_the_meter_counts_all_connections_of_its_port_and_keeps_those_that_closed():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        meter = SocketMeter(listener.getsockname()[1])
        assert meter.read() == (0, 0)
        with connection(listener) as (client, server), connection(other) as elsewhere:
            carry(*elsewhere, 50)
            carry(client, server, 1000)
            carry(server, client, 300)
            with connection(listener) as (second, server):
                carry(second, server, 7)
                assert meter.read() == (1007, 300)
        assert meter.read() == (1007, 300)


def test_traffic_is_what_was_added():
    assert Traffic(10, 7).since(Traffic(4, 5)) == Traffic(6, 2)


def test_without_ss_the_meter_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no program `ss`"):
        SocketMeter(9092)


@needs_ss
def test_a_reading_that_fails_is_the_last_one(monkeypatch, caplog):
    meter = SocketMeter(9092)
    monkeypatch.setattr(meter, "_command", ["false"])
    assert meter.read() == (0, 0)
    assert "port 9092 was not read" in caplog.text
