"""A relay inside a process between JAX's client and process 0, of several that train together.

JAX ends a process in a backtrace at the moment that its connection to process 0 breaks, and with a callback of our own
(`missed_heartbeat_callback`, jax 0.10) in another one. The connection to the relay never breaks.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ltjax.types import one_line

JOIN_SECONDS = 300  # for process 0 to be there


@contextmanager
def between(gone: Callable[[], None]) -> Iterator[None]:
    """While JAX connects: give its client a relay instead of process 0. gone: called where process 0 hangs up."""
    from jax._src import distributed

    if not hasattr(getattr(distributed, "_jax", None), "get_distributed_runtime_client"):
        yield  # a later JAX: better a backtrace than no run
        return
    connect = distributed._jax.get_distributed_runtime_client

    def by_relay(address: str, process: int, *rest: Any, **settings: Any) -> Any:
        return connect(start(address, gone) if process else address, process, *rest, **settings)

    distributed._jax.get_distributed_runtime_client = by_relay
    try:
        yield
    finally:
        distributed._jax.get_distributed_runtime_client = connect


def start(address: str, gone: Callable[[], None]) -> str:
    """Address, HOST:PORT, of a new relay to `address`. gone: called once what is there has hung up.

    Raises: OSError where `address` does not answer for `JOIN_SECONDS`.
    """
    host, _, port = address.rpartition(":")
    there = host.strip("[]"), int(port)
    until = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection(there, timeout=10).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise OSError(f"process 0 does not answer at {address}: {one_line(error)}") from error
            time.sleep(0.2)
    listener = socket.create_server(("127.0.0.1", 0))
    here = listener.getsockname()
    passed_by = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    os.environ["no_grpc_proxy"] = f"{passed_by},{here[0]}".strip(",")  # a proxy cannot reach this machine's own address
    threading.Thread(target=_serve, args=(listener, there, gone), daemon=True).start()
    return f"{here[0]}:{here[1]}"


def _serve(listener: socket.socket, there: tuple[str, int], gone: Callable[[], None]) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(there)
        except OSError:
            near.close()  # the client tries again
            continue
        threading.Thread(target=_join, args=(near, far, gone), daemon=True).start()


def _join(near: socket.socket, far: socket.socket, gone: Callable[[], None]) -> None:
    left = threading.Event()  # the client itself has hung up

    def send() -> None:
        if _pass_on(near, far):
            left.set()
            _hang_up(far)

    threading.Thread(target=send, daemon=True).start()
    if _pass_on(far, near) and not left.is_set():
        gone()
    _hang_up(near)


def _pass_on(source: socket.socket, sink: socket.socket) -> bool:
    """Whether the source has come to its end, not the sink."""
    while True:
        try:
            chunk = source.recv(1 << 16)
        except OSError:
            chunk = b""
        if not chunk:
            return True
        try:
            sink.sendall(chunk)
        except OSError:
            return False


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
