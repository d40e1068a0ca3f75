"""Several processes that train together: how they find each other, what they agree on, and how they end.

With one process, everything here does nothing. JAX watches the others: a process ends at most `--patience` seconds
after another one was lost, by an exception that `lost` recognises, or, if it waits for nothing, by JAX's own abort.
"""

import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ltjax.types import UserError, one_line

GONE = 75  # exit code of a process that stops because another one did: try again
OTHERS_SECONDS = 2.0  # that process 0 gives the others to end on their own; JAX aborts them when it is gone
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_SIGNS_OF_LOSS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "heartbeat",
    "coordination service",
    "unavailable",
    "barrier timed out",
)


def launcher(environment: Mapping[str, str]) -> str:
    """Name the launcher that started several processes: "SLURM", "Open MPI" or "TPU"; "" if there is none."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"
    return ""


def own_devices(environment: Mapping[str, str]) -> str:
    """Choose the GPUs of a process that SLURM or Open MPI started: "0,1" or "all"; "": leave the choice to JAX.

    The processes of a machine share its GPUs evenly. If the launcher shows fewer GPUs than there are processes, it has
    given each process its own, and each uses what it sees.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return ""
    if "SLURM_LOCALID" in environment and "SLURM_STEP_TASKS_PER_NODE" in environment:
        # "2(x3),1": two tasks on each of three machines, one on the fourth
        counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
        tasks = [int(number) for number, times in counts for _ in range(int(times or 1))]
        node = min(int(environment.get("SLURM_NODEID", 0)), len(tasks) - 1)
        num_processes, process = tasks[node], int(environment["SLURM_LOCALID"])
    elif "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        num_processes = int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
        process = int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    else:
        return ""
    visible = next((environment[name] for name in _VISIBLE_GPUS if name in environment), "")
    gpus = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", 0))
    if num_processes == 1 or 0 < gpus < num_processes:
        return "all"
    share = gpus // num_processes
    return ",".join(str(process * share + number) for number in range(share))


def join(coordinator: str, num_processes: int | None, process_id: int | None, patience: int = 60) -> None:
    """Connect to the other processes, before JAX starts.

    Args:
      coordinator: HOST:PORT of process 0; "auto": as JAX finds it; "": alone, unless a launcher started several;
        "none": alone.
      patience: Seconds without a heartbeat after which another process counts as lost.

    Raises:
      UserError: The flags do not go together, or the other processes cannot be reached.
    """
    explicit = coordinator not in ("", "auto", "none")
    if explicit != (num_processes is not None) or explicit != (process_id is not None):
        raise UserError(
            "several processes need all three flags, --coordinator=HOST:PORT --num_processes=N --process_id=I, or "
            "--coordinator=auto on SLURM, Open MPI and TPUs"
        )
    if explicit and not 0 <= (process_id or 0) < (num_processes or 0):
        raise UserError(f"--process_id={process_id}: from 0 to {num_processes} - 1, the number of processes")
    if coordinator == "none" or (not coordinator and not launcher(os.environ)):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    settings: dict[str, Any] = {}
    if explicit:
        settings = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
        settings["cluster_detection_method"] = "deactivate"  # it would take one GPU if SLURM started the process
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=patience)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({one_line(error)}): look at --coordinator, --num_processes, --process_id"
        ) from error
    if not explicit and (gpus := own_devices(os.environ)):
        for kind in ("cuda", "rocm"):  # `initialize` has set it to one GPU; no device is in use yet
            jax.config.update(f"jax_{kind}_visible_devices", gpus)


def agree(values: Mapping[str, str]) -> None:
    """Check that all processes were started alike. values: {flag: value}, with the same flags everywhere.

    Raises:
      UserError: In every process, naming the flag that differs.
    """
    if not several():
        return
    from jax.experimental import multihost_utils

    digests = np.asarray([zlib.crc32(value.encode()) for value in values.values()], np.uint32)
    of_processes = np.asarray(multihost_utils.process_allgather(digests)).reshape(-1, len(digests))
    for flag, column in zip(values, of_processes.T, strict=True):
        if len(set(column.tolist())) > 1:
            raise UserError(
                f"the {len(column)} processes of this job have different values of {flag}: start them with the same "
                "command; for independent runs, add --coordinator=none"
            )


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that prints, logs and writes."""
    return not several() or jax.process_index() == 0


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Whether any process has each flag. All processes have to call this."""
    if not several():
        return flags
    from jax.experimental import multihost_utils

    return tuple(bool(value) for value in multihost_utils.process_allgather(np.asarray(flags)).any(0))


def ask(flags: Callable[[], tuple[bool, ...]]) -> Callable[[], tuple[bool, ...]]:
    """Start `any_of` while the devices are busy, and return a function that waits for its answer.

    All processes have to call this, and then what it returns. With one process the returned function asks when it is
    called. It does so on CPUs, too, where two programs that run at once may wait for each other.
    """
    if not several() or jax.default_backend() == "cpu":
        return lambda: any_of(*flags())
    answer = _soon(*flags())
    return lambda: tuple(bool(value) for value in np.asarray(answer))


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
    """Run a function in process 0 alone. All processes return its answer as a float, or raise its UserError.

    The answer is None, a bool or a number.
    """
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
    """End this process without waiting for the others, who notice; process 0 lets them end first."""
    sys.stdout.flush()
    sys.stderr.flush()
    if several() and first():
        time.sleep(OTHERS_SECONDS)
    os._exit(code)


def leave_lost(what: str) -> None:
    """Print that another process is gone, and what to do, and end this one."""
    print(
        f"error: {what}; this process stops too. Run the same command again, on all machines: it goes on from the last "
        "checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    leave(GONE)


def lost(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, is what JAX raises when another process went away. JAX has no type for it."""
    while several() and error is not None:
        text = str(error).lower()
        if any(sign in text for sign in _SIGNS_OF_LOSS):
            return True
        error = error.__cause__ or error.__context__
    return False
