"""The folder that holds a run: check it, lock it, and report errors of its disk."""

import contextlib
import errno
import os
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from ltjax.config import differences, with_defaults
from ltjax.runs.checkpoint import FIX_DISK
from ltjax.system import locks
from ltjax.system.files import holding, read_json
from ltjax.system.paths import check_checkpoints
from ltjax.system.wording import form_only, some
from ltjax.types import UserError

SPLIT_KEYS = ("class_names", "class_counts", "sha256", "holdout_sha256")  # keys of split.json that must match
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)


def prepare_workdir(workdir: Path, config: Mapping[str, Any], *, needs_run: bool = False) -> None:
    """Make the folder, or check that it can be written and holds a run of the same config. UserError if not.

    Args:
      needs_run: Raise UserError if the folder holds no run.
    """
    if needs_run and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run: train first, with --mode=train and the same --workdir")
    check_workdir(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unusable(workdir, error) from error


def no_checkpoint(workdir: Path) -> UserError:
    return UserError(f"{workdir} holds no checkpoint yet: train first, with --mode=train")


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Do the checks of `prepare_workdir`, without writing anything."""
    check_checkpoints(workdir)
    try:
        existing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            error = errno.EACCES if existing.is_dir() else errno.ENOTDIR
            raise OSError(error, os.strerror(error), str(existing))
        if (workdir / "config.json").exists():
            check_same_config(workdir, config)
        elif (workdir / "results.json").exists():
            raise UserError(f"{workdir} holds results without a config.json: use another --workdir")
    except OSError as error:
        raise _unusable(workdir, error) from error


def _unusable(workdir: Path, error: OSError) -> UserError:
    return UserError(f"cannot use workdir {workdir}: {error}; give another --workdir")


def check_same_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError if the folder holds a run of another config. Settings of `attack`, and locations, may differ."""
    path = workdir / "config.json"
    if not path.exists():
        return
    now = {**with_defaults(config), "attack": None}
    with holding(path):
        before = {**with_defaults(read_json(path)), "attack": None}
    split = workdir / "split.json"
    if before["weights"] and now["weights"] and split.exists() and "weights_sha256" in read_json(split):
        now["weights"] = before["weights"]  # a location: `check_same_images` compares the contents
    changed = differences(before, now)
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}{more}): "
            "use another --workdir, or the old settings to resume"
        )


def check_same_images(workdir: Path, described: Mapping[str, Any]) -> None:
    """Raise UserError if the run in the folder began with other images.

    Args:
      described: What split.json would hold for the images at hand.
    """
    path = workdir / "split.json"
    saved = read_json(path) if path.exists() else described
    if "images" not in saved:
        print(f"note: an older ltjax wrote {path}, which does not identify the images by content", file=sys.stderr)
    with holding(path):
        changes = _changes(saved, described)
    if changes:
        raise UserError(
            f"{workdir} holds a run that began with other images than those at hand ({'; '.join(changes)} in "
            "split.json): use another --workdir, or the images that the run began with"
        )


def _changes(saved: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    """List how the images of two split.json differ, in words."""
    changes = [f"different {key}" for key in SPLIT_KEYS if key in saved and saved[key] != described[key]]
    weights = [each["weights_sha256"] for each in (saved, described) if "weights_sha256" in each]
    if len(set(weights)) > 1:
        changes.append("different weights_sha256, of config.weights")
    if "different class_names" in changes:
        changes[0] += form_only(saved["class_names"], described["class_names"])
    else:
        for part, before in saved.get("images", {}).items():
            changed = [
                _count_change(name, saved["class_counts"][c], described["class_counts"][c], part)
                for c, name in enumerate(described["class_names"])
                if before[c] != described["images"][part][c]
            ]
            if changed:
                changes.append(f"other {part} images of {some(changed)}")
    return changes


def _count_change(name: str, before: int, now: int, part: str) -> str:
    return f"{name} ({before} then, {now} now)" if part == "train" and before != now else name


@contextlib.contextmanager
def named_disk_errors(workdir: Path) -> Generator[None]:
    """Raise UserError for a full disk or a file that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"cannot write to {workdir}: {error}; {FIX_DISK}") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Generator[None]:
    """Lock the folder during the block; a kill ends the lock, too. UserError if another process holds it."""
    busy = f"another process is at work in {workdir}: wait for it, or use another --workdir"
    with named_disk_errors(workdir):
        (workdir / ".lock").touch()
        with locks.locked(workdir / ".lock", busy):
            try:
                yield
            except UserError:
                with contextlib.suppress(OSError):
                    if [path.name for path in workdir.iterdir()] == [".lock"]:  # leave no empty folder behind
                        (workdir / ".lock").unlink()
                        workdir.rmdir()
                raise
