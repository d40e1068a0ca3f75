"""Checkpoints of one stage: saved in the background, read back, the two latest kept, damaged ones skipped."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ltjax.system import processes
from ltjax.system.hashing import fingerprint
from ltjax.system.paths import check_checkpoints
from ltjax.system.wording import one_line
from ltjax.types import UserError

log = logging.getLogger(__name__)
FIX_DISK = "free some space or fix the permissions, then run the same command again to resume"

_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class StageRecord(TypedDict):
    """The JSON that a checkpoint stores with the state of a stage. Times are seconds."""

    seconds: float  # of the stage, with evaluations
    train_seconds: float  # of `train_steps` steps, those whose dispatch compiled nothing
    train_steps: int
    wait_seconds: NotRequired[float]  # part of `train_seconds` that the devices waited for data
    evaluations: list[dict[str, Any]]  # {"epoch", "step", "holdout" and "test": figures}
    surgery: NotRequired[dict[str, Any]]  # what the stage's surgery returned


class Checkpoints:
    """The checkpoints in one directory: each is a pytree of arrays, the state, with a JSON record.

    The record holds a fingerprint of the state, because Orbax detects truncated files but not flipped bits. Every
    checkpoint is read back: before the next one is saved, or in `wait`.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        check_checkpoints(self.directory)
        options = ocp.CheckpointManagerOptions(preservation_policy=policies.LatestN(2), create=True)
        # One device writes a replicated array. Orbax's default, a part by each device, compiles a program for each
        # shape and part: with 8 devices the first save of a ResNet-32 took 6.5 s instead of 0.2 s.
        one_writer = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        arrays = ocp.type_handlers.create_type_handler_registry((jax.Array, one_writer))
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=arrays),
            "record": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.directory}: {error.strerror or error}") from error
        self._unread: tuple[int, Any] | None = None  # step of the last save, and what `restore_step` needs to read it

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Save a state in the background. Replace the checkpoint of this step if there is one.

        Raises:
          UserError: This save cannot start, or the one before it failed or cannot be read. Earlier checkpoints are
            intact. If another process went away, this and the other methods raise JAX's error instead, see
            `processes.lost`.
        """
        self.wait()
        if step in self._manager.all_steps():
            self._guard(lambda: self._manager.delete(step))
        state = _copied(state)  # the next step takes over the original's memory
        record = {**record, "fingerprint": int(fingerprint(state))}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
        self._guard(lambda: self._manager.save(step, args=items))
        self._unread = step, like(state)

    def wait(self) -> None:
        """Wait until the last save is on disk, and read it back. UserError if either fails."""
        self._guard(self._manager.wait_until_finished)
        if self._unread is None:
            return
        (step, target), self._unread = self._unread, None
        try:
            self.restore_step(step, target)
        except MemoryError:
            raise
        except Exception as error:  # damage has many exception types
            if processes.lost(error):
                raise
            raise UserError(
                f"the checkpoint of step {step} was written to {self.directory} and cannot be read "
                f"({one_line(error)}): use a --workdir on another disk"
            ) from error

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore report a full disk by many exception types
            if processes.lost(error):
                raise
            raise cannot_save(error, self.directory) from error

    def restore(self, target: Any, *, move_damaged: bool = True) -> tuple[Any, Any] | None:
        """Read the newest undamaged checkpoint.

        Skip damaged ones with a warning. If an older one can be read, move them to `damaged/`.

        Args:
          target: Arrays, or `jax.ShapeDtypeStruct`s with a sharding, in the structure of the state.

        Returns:
          (state, record); None if there are no checkpoints.

        Raises:
          UserError: There are checkpoints, and none of them can be read.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore_step(step, target)
            except (MemoryError, PermissionError):
                raise
            except Exception as error:  # damage has many exception types
                if processes.lost(error):
                    raise
                damaged[step] = one_line(error)
                continue
            for damaged_step, reason in damaged.items():
                log.warning(
                    "checkpoint of step %d in %s is damaged (%s): falling back to step %d%s",
                    *(damaged_step, self.directory, reason, step),
                    f", the damaged one is now {self._set_aside(damaged_step)}" if move_damaged else "",
                )
            return restored
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read ({damaged[max(damaged)]}): "
                "move that folder away to train this stage from its start"
            )
        return None

    def restore_step(self, step: int, target: Any) -> tuple[Any, Any]:
        """Read one checkpoint: (state, record). ValueError if the state's fingerprint has changed."""
        shardings = ocp.checkpoint_utils.construct_restore_args(target)
        read_state = ocp.args.PyTreeRestore(target, restore_args=shardings)
        items = ocp.args.Composite(state=read_state, record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        state, record = restored["state"], restored["record"]
        saved, actual = record.pop("fingerprint"), int(fingerprint(state))
        if actual != saved:
            raise ValueError(f"fingerprint {actual:08x}, saved as {saved:08x}")
        return state, record

    def _set_aside(self, step: int) -> Path:
        aside = self.directory.parent / "damaged" / f"{self.directory.name}-{step}"
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.move(self.directory / str(step), aside)
        self._manager.reload()
        return aside

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self._manager.close()
        except Exception:
            if kind is None:
                raise  # otherwise the exception that ended the block matters more


def like(state: Any) -> Any:
    """Return the shapes and shardings of a state, as the target of `Checkpoints.restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def complete_steps(directory: Path) -> list[int]:
    """List the steps with a complete checkpoint on disk. Orbax's own list includes failed saves."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def cannot_save(error: Exception, directory: Path) -> UserError:
    """Make the UserError for a failed save. directory: the stage's checkpoints."""
    steps = complete_steps(directory)
    last = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
    return UserError(f"cannot write to {directory}: {one_line(error)} ({last}); {FIX_DISK}")
