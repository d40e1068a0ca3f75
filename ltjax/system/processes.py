"""Connect several processes that train together, check that they agree, and end them together.

With one process, everything here does nothing. JAX sends heartbeats between processes: a process ends at most
`--patience` seconds after another one was lost. It ends by an exception that `lost` recognises or, if it waits for no
other process, by JAX's own abort.
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

from ltjax.system.wording import one_line
from ltjax.types import UserError

GONE = 75  # exit code (EX_TEMPFAIL, "try again") of a process that stops because another one did
OTHERS_SECONDS = 2.0  # process 0 waits so long for the others to end by themselves; JAX aborts them when it is gone
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_SIGNS_OF_LOSS = re.compile(
    "gloo|nccl|connection closed|connection reset|heartbeat|coordination service|unavailable|barrier timed out",
    re.IGNORECASE,
)


def launcher(environment: Mapping[str, str]) -> str:
    """Return the launcher that started several processes: "SLURM", "Open MPI" or "TPU"; "" if there is none."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"
    return ""


def own_devices(environment: Mapping[str, str]) -> str:
    """Choose the GPUs of a process that SLURM or Open MPI started: "0,1" or "all"; "" leaves the choice to JAX.

    The processes of a machine share its GPUs evenly. If a process sees fewer GPUs than there are processes, the
    launcher has shared them out already, and the process uses all that it sees.
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
      coordinator: HOST:PORT of process 0. "auto": JAX finds it. "": run alone, unless a launcher started several
        processes. "none": run alone.
      patience: Seconds without a heartbeat after which another process counts as lost.

    Raises:
      UserError: A flag is missing or wrong, or the other processes cannot be reached.
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
        settings["cluster_detection_method"] = "deactivate"  # under SLURM, detection would choose a single GPU
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
    """Check that all processes have the same values.

    Raise UserError in every process, naming the flag, if a value differs.

    Args:
      values: {flag: value}. All processes pass the same flags.
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
    """Return whether this process is the one that prints, logs and writes."""
    return not several() or jax.process_index() == 0


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Return, for each flag, whether it is set in any process. All processes have to call this."""
    if not several():
        return flags
    from jax.experimental import multihost_utils

    return tuple(bool(value) for value in multihost_utils.process_allgather(np.asarray(flags)).any(0))


def ask(flags: Callable[[], tuple[bool, ...]]) -> Callable[[], tuple[bool, ...]]:
    """Start `any_of` while the devices are busy, and return a function that waits for the result.

    All processes have to call this, and then the returned function. With one process, `any_of` runs when the returned
    function is called. On CPUs it also waits until then, because two programs with collectives can deadlock.
    """
    if not several() or jax.default_backend() == "cpu":
        return lambda: any_of(*flags())
    answer = _soon(*flags())
    return lambda: tuple(bool(value) for value in np.asarray(answer))


def _soon(*flags: bool) -> jax.Array:
    """Compute `any_of` on the devices: int32 [flags], on every device."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    row, mesh = np.asarray(flags, np.int32), Mesh(np.asarray(jax.devices()), "all")
    one_a_device, everywhere = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("all", None))
    rows = jax.make_array_from_callback((mesh.size, len(row)), one_a_device, lambda index: row[None])
    return jax.jit(_maximum, out_shardings=everywhere)(rows)


def _maximum(rows: jax.Array) -> jax.Array:  # a function of the module, so that `jax.jit` compiles it once
    return rows.max(0)


def on_first(function: Callable[[], Any]) -> Any:
    """Run a function in process 0 alone. All processes return its result as a float, or raise its UserError.

    The result is None, a bool or a number.
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
    """End this process. The others notice; process 0 gives them `OTHERS_SECONDS` to end first."""
    sys.stdout.flush()
    sys.stderr.flush()
    if several() and first():
        time.sleep(OTHERS_SECONDS)
    os._exit(code)


def leave_lost(reason: str) -> None:
    """Print that another process is gone and what to do, and end this process."""
    print(
        f"error: {reason}; this process stops too. Run the same command again, on all machines: it resumes from the "
        "last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    leave(GONE)


def lost(error: BaseException | None) -> bool:
    """Return whether an exception or its cause means a lost process. JAX has no exception type for this."""
    while several() and error is not None:
        if _SIGNS_OF_LOSS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
