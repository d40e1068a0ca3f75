"""Several processes that train together: how they find each other, what they agree on, and what they do if one is lost.

With one process, everything here does nothing.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ltjax.types import UserError, one_line

GONE = 75  # exit code of processes that stop because another one did: try again
PULSE_SECONDS = 1.0
_KEY = "ltjax/pulse/{}"
_ended = threading.Event()


def launcher(environment: Mapping[str, str]) -> str:
    """Who has started several processes, if anybody: "SLURM", "Open MPI" or "TPU"; else an empty text."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"
    return ""


def join(coordinator: str, num_processes: int | None, process_id: int | None, patience: int = 60) -> None:
    """Connect to the other processes, before JAX starts: by address, number and own number, or as JAX finds them out.

    coordinator: HOST:PORT of process 0, or "auto"; "": of one process alone, unless a launcher says otherwise.
    patience: seconds without a sign of life after which another process counts as lost.
    Raises: UserError where the flags do not go together, or the others cannot be reached.
    """
    explicit = coordinator not in ("", "auto")
    if explicit != (num_processes is not None) or explicit != (process_id is not None):
        raise UserError(
            "several processes need all three flags, --coordinator=HOST:PORT --num_processes=N --process_id=I, or "
            "--coordinator=auto on SLURM, Open MPI and TPUs"
        )
    if explicit and not 0 <= (process_id or 0) < (num_processes or 0):
        raise UserError(f"--process_id={process_id}: from 0 to {num_processes} - 1, the number of processes")
    if not coordinator and not launcher(os.environ):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who: dict[str, Any] = {}
    if explicit:
        who = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    try:
        jax.distributed.initialize(**who, heartbeat_timeout_seconds=max(100, 3 * patience))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({one_line(error)}): look at --coordinator, --num_processes, --process_id"
        ) from error
    if several():
        threading.Thread(target=_watch, args=(_store(), patience), daemon=True).start()


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that prints, logs and writes."""
    return not several() or jax.process_index() == 0


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Each flag, as soon as one process has it. All processes have to call this."""
    if not several():
        return flags
    from jax.experimental import multihost_utils

    return tuple(bool(value) for value in multihost_utils.process_allgather(np.asarray(flags)).any(0))


def on_first(function: Callable[[], Any]) -> Any:
    """Run by process 0 alone; its answer (None, a bool or a number) is everybody's, and so is its UserError."""
    if not several():
        return function()
    from jax.experimental import multihost_utils

    message, value = "", None
    if first():
        try:
            value = function()
        except UserError as error:
            message = str(error)
    encoded = np.zeros(1024, np.uint8)
    text = message.encode()[:1024]
    encoded[: len(text)] = np.frombuffer(text, np.uint8)
    sent = encoded, np.asarray(float(value or 0), np.float32)
    encoded, number = multihost_utils.broadcast_one_to_all(sent)
    if message := bytes(np.asarray(encoded)).rstrip(b"\0").decode(errors="ignore"):
        raise UserError(message)
    return float(number)


def leave(code: int) -> None:
    """End this process at once, without waiting for the others, which will notice."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish() -> None:
    """Say to the others that this process ends well."""
    if several():
        _ended.set()
        _store().key_value_set(_KEY.format(jax.process_index()), "done", allow_overwrite=True)


def lost(error: BaseException) -> bool:
    """Whether an exception is what JAX raises where another process went away."""
    text = str(error).lower()
    signs = (
        "gloo",
        "nccl",
        "connection closed",
        "connection reset",
        "heartbeat",
        "coordination service",
        "unavailable",
    )
    return several() and any(sign in text for sign in signs)


def say_lost(what: str) -> None:
    print(
        f"error: {what}; this process stops too. Run the same command again, on all machines: it goes on from the last "
        "checkpoint.",
        file=sys.stderr,
        flush=True,
    )


def _store() -> Any:
    from jax._src import distributed  # the one place of the processes' shared key-value store

    return distributed.global_state.client


def _pulse(store: Any, process: int) -> str:
    try:
        return store.key_value_try_get(_KEY.format(process))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return ""  # it has just begun
        raise


def _watch(store: Any, patience: float) -> None:
    """Write this process's pulse and read the others'; without one for too long, say so and stop.

    A collective operation waits for lost processes, on some machines for ever, and JAX's own watch ends in a backtrace.
    """
    mine, reached, beat = jax.process_index(), time.monotonic(), 0
    heard = {other: ("", reached) for other in range(jax.process_count()) if other != mine}
    while not _ended.wait(PULSE_SECONDS):
        beat, now = beat + 1, time.monotonic()
        try:
            store.key_value_set(_KEY.format(mine), str(beat), allow_overwrite=True)
            pulses = {other: _pulse(store, other) for other in heard}
            reached = now
        except jax.errors.JaxRuntimeError:
            pulses = {}
        for other, pulse in pulses.items():
            if pulse != heard[other][0]:
                heard[other] = pulse, now
        silent = [other for other, (pulse, since) in heard.items() if pulse != "done" and now - since > patience]
        if now - reached > patience:
            silent = [0]  # the others' signs are kept there
        if silent:
            say_lost(f"process {silent[0]} has shown no sign of life for {patience:g} s")
            leave(GONE)
