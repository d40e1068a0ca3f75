"""The relay between JAX's client and process 0, over connections on loopback."""

import socket
import threading
import time

import pytest

from ltjax.system import relay


@pytest.fixture
def relayed(monkeypatch):
    """Both ends of a connection through the relay, the client's and process 0's; an event, set where that is gone."""
    told, over = threading.Event(), threading.Event()

    def gone():
        told.set()
        over.wait()  # it ends the process

    monkeypatch.setenv("no_grpc_proxy", "elsewhere")
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = relay.start(f"127.0.0.1:{server.getsockname()[1]}", gone).split(":")
        server.accept()[0].close()  # whether it answers at all
        with socket.create_connection((host, int(port))) as near, server.accept()[0] as far:
            yield near, far, told
            over.set()


def test_the_relay_passes_on_both_ways(relayed):
    near, far, _ = relayed
    near.sendall(b"ask")
    assert far.recv(9) == b"ask"
    far.sendall(b"answer")
    assert near.recv(9) == b"answer"


def test_a_client_that_goes_on_sending_when_process_0_is_gone_sees_its_connection_stand(relayed):
    near, far, told = relayed
    far.close()
    near.settimeout(0.15)
    for _ in range(2):
        near.sendall(b"heartbeat")
        with pytest.raises(TimeoutError):
            near.recv(1)
    assert told.wait(timeout=5)


def test_a_client_that_hangs_up_is_no_loss(relayed):
    near, far, told = relayed
    near.close()
    assert far.recv(1) == b""
    time.sleep(0.3)
    assert not told.is_set()


def test_an_address_where_nobody_answers_is_named(monkeypatch):
    monkeypatch.setattr(relay, "JOIN_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(OSError, match=f"process 0 does not answer at {address}"):
        relay.start(address, lambda: None)
