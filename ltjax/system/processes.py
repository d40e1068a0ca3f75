"""Several processes that train together: how they find each other, what they agree on, and what they do if one is lost.

With one process, everything here does nothing.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ltjax.system import relay
from ltjax.types import UserError, one_line

GONE = 75  # exit code of processes that stop because another one did: try again
PULSE_SECONDS = 1.0
_KEY = "ltjax/pulse/{}"
_ended = threading.Event()
_saying = threading.Lock()
_SHOWN = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def launcher(environment: Mapping[str, str]) -> str:
    """Who has started several processes, if anybody: "SLURM", "Open MPI" or "TPU"; else an empty text."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"
    return ""


def own_devices(environment: Mapping[str, str]) -> str:
    """Which of its machine's GPUs a process of SLURM or Open MPI uses: "0,1" or "all"; "": what JAX takes, one.

    The processes of a machine share its GPUs evenly, so that one alone has them all. Where the launcher has given each
    its own already, it shows fewer GPUs than there are processes, and each uses what it sees.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return ""
    if "SLURM_LOCALID" in environment and "SLURM_STEP_TASKS_PER_NODE" in environment:
        # "2(x3),1": two tasks on each of three machines, one on the fourth
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
        tasks = [int(number) for number, times in found for _ in range(int(times or 1))]
        node = min(int(environment.get("SLURM_NODEID", 0)), len(tasks) - 1)
        count, own = tasks[node], int(environment["SLURM_LOCALID"])
    elif "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        count = int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
        own = int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    else:
        return ""
    shown = next((environment[name] for name in _SHOWN if name in environment), "")
    gpus = len(shown.split(",")) if shown else int(environment.get("SLURM_GPUS_ON_NODE", 0))
    if count == 1 or 0 < gpus < count:
        return "all"
    share = gpus // count
    return ",".join(str(own * share + number) for number in range(share))


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
        who["cluster_detection_method"] = "deactivate"  # which would take one GPU where SLURM has started the process
    try:
        with relay.between(_first_is_gone):
            jax.distributed.initialize(**who, heartbeat_timeout_seconds=max(100, 3 * patience))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({one_line(error)}): look at --coordinator, --num_processes, --process_id"
        ) from error
    if not explicit and (own := own_devices(os.environ)):
        for kind in ("cuda", "rocm"):  # `initialize` has made it one; no device is in use yet
            jax.config.update(f"jax_{kind}_visible_devices", own)
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


def ask(flags: Callable[[], tuple[bool, ...]]) -> Callable[[], tuple[bool, ...]]:
    """`any_of` while the devices are busy: its answer is waited for where it is wanted, behind what they do until then.

    All processes have to call this, and then what it returns. With one process, and on CPUs, where programs that are
    under way together may wait for each other, that asks when it is called.
    """
    if not several() or jax.default_backend() == "cpu":
        return lambda: any_of(*flags())
    found = _soon(*flags())
    return lambda: tuple(bool(value) for value in np.asarray(found))


def _soon(*flags: bool) -> jax.Array:
    """`any_of`, int32 [flags] on every device."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mine, mesh = np.asarray(flags, np.int32), Mesh(np.asarray(jax.devices()), "all")
    each, everywhere = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("all", None))
    # a row for each device
    rows = jax.make_array_from_callback((mesh.size, len(mine)), each, lambda index: mine[None])
    return jax.jit(_most, out_shardings=everywhere)(rows)


def _most(rows: jax.Array) -> jax.Array:
    return rows.max(0)


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


def lost(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, is what JAX raises where another process went away."""
    signs = (
        "gloo",
        "nccl",
        "connection closed",
        "connection reset",
        "heartbeat",
        "coordination service",
        "unavailable",
        "barrier timed out",
    )
    while several() and error is not None:
        text = str(error).lower()
        if any(sign in text for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave_lost(what: str) -> None:
    """Say once that another process is gone, and what to do, and end this one."""
    with _saying:  # until the end, so that threads which notice at the same time say it once
        print(
            f"error: {what}; this process stops too. Run the same command again, on all machines: it goes on from the "
            "last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        leave(GONE)


def _store() -> Any:
    from jax._src import distributed  # the one place of the processes' shared key-value store

    return distributed.global_state.client


def _first_is_gone() -> None:
    # Where all processes end for one reason, such as a mistake in the config, this one is about to say so itself.
    if not _ended.wait(PULSE_SECONDS):
        leave_lost("process 0 is gone")


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
    mine, began = jax.process_index(), time.monotonic()
    heard = {other: ("", began) for other in range(jax.process_count()) if other != mine}
    threading.Thread(target=_listen, args=(store, mine, heard), daemon=True).start()
    while not _ended.wait(PULSE_SECONDS):
        now = time.monotonic()
        # where process 0 is silent so is everybody, for the signs are kept there; it comes first
        silent = [other for other, (pulse, since) in heard.items() if pulse != "done" and now - since > patience]
        if silent:
            leave_lost(f"process {silent[0]} has shown no sign of life for {patience:g} s")


def _listen(store: Any, mine: int, heard: dict[int, tuple[str, float]]) -> None:
    """On a thread of its own, since asking a process that has stopped may take for ever."""
    beat = 0
    while not _ended.wait(PULSE_SECONDS):
        beat += 1
        try:
            store.key_value_set(_KEY.format(mine), str(beat), allow_overwrite=True)
            for other, (before, _) in list(heard.items()):
                if (pulse := _pulse(store, other)) != before:
                    heard[other] = pulse, time.monotonic()
        except jax.errors.JaxRuntimeError:
            pass  # nobody is heard, then
