"""Checkpoints of one stage: saved in the background, the two latest kept, damage found and passed over."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ltjax.hashing import fingerprint
from ltjax.system import processes
from ltjax.system.paths import check_checkpoints
from ltjax.types import UserError, one_line

log = logging.getLogger(__name__)
MEND_DISK = "free some space or mend the permissions, then run the same command again to resume"


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Checkpoints:
    """The checkpoints below one directory, each a pytree of arrays (`state`) with a JSON record beside it.

    A state carries a fingerprint: Orbax finds files that are cut short, not ones with a flipped bit.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()
        check_checkpoints(self.directory)
        options = ocp.CheckpointManagerOptions(preservation_policy=policies.LatestN(2), create=True)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.directory}: {error.strerror or error}") from error

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Save in the background what the next steps may go on changing, in the place of what is there of this step.

        Raises: UserError where this save cannot start or the one before it failed; what was saved earlier survives.
          JAX's own error where another process went away (`processes.lost`), here and below.
        """
        if step in self._manager.all_steps():
            self._guard(lambda: self._manager.delete(step))
        state = _copied(state)  # the next step is given the original's memory
        record = {**record, "fingerprint": int(fingerprint(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Until everything is on disk. Raises: UserError where it could not be written."""
        self._guard(self._manager.wait_until_finished)

    def _guard(self, write) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore pass a full disk on as many types
            if processes.lost(error):
                raise
            raise cannot_save(error, self.directory) from error

    def restore(self, target: Any, *, move_damaged: bool = True) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged (state, record), or None where there is no checkpoint at all.

        target: arrays, or `jax.ShapeDtypeStruct`s with a sharding, in the shape of the state.
        A damaged checkpoint is stepped over with a warning and, once an older one is found whole, moved to `damaged/`.
        Raises: UserError where there are checkpoints and none can be read.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore_step(step, target)
            except (MemoryError, PermissionError):
                raise
            except Exception as error:  # any kind of damage: the next older one may be whole
                if processes.lost(error):
                    raise
                damaged[step] = one_line(error)
                continue
            for number, reason in damaged.items():
                log.warning(
                    "checkpoint of step %d in %s is damaged (%s): falling back to step %d%s",
                    *(number, self.directory, reason, step),
                    f", the damaged one is now {self._set_aside(number)}" if move_damaged else "",
                )
            return restored
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read ({damaged[max(damaged)]}): "
                "move that folder away to train this stage from its start"
            )
        return None

    def restore_step(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        expected, found = restored["record"].pop("fingerprint"), int(fingerprint(restored["state"]))
        if found != expected:
            raise ValueError(f"fingerprint {found:08x}, saved as {expected:08x}")
        return restored["state"], restored["record"]

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
                raise  # else the error that ended the block says more


def like(state: Any) -> Any:
    """Shapes and shardings of a state, for restoring one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def complete_steps(directory: Path) -> list[int]:
    """Steps whose checkpoint is whole on disk; a manager's own list counts one that failed half-way."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def cannot_save(error: Exception, directory: Path) -> UserError:
    """What to say where the disk takes no more. directory: of the stage's checkpoints."""
    steps = complete_steps(directory)
    last = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
    return UserError(f"cannot write to {directory}: {one_line(error)} ({last}); {MEND_DISK}")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises: UserError naming the file where it is something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): delete it, or use another --workdir") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold what ltjax writes there: delete it, or use another --workdir")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader finds the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
