"""How far a suite of attacks has come: told to whoever watches, and kept in a file that a kill cannot spoil."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Progress(NamedTuple):
    """Where a suite stands; handed to `progress` at the start of each attack and after each dispatch."""

    attack: str
    settled: int  # images that this attack is done with
    total: int  # images that it was given
    robust: int  # images that still stand
    num_images: int  # N
    evaluations: int  # of the model in this attack, of images that were not settled yet
    slots: int  # evaluations of all slots, idle ones included
    seconds: float  # in this attack


def show_progress(now: Progress) -> None:
    """One line on stderr: a bar that moves where it is a terminal, else the end of each attack."""
    ends, live = now.settled == now.total, sys.stderr.isatty()
    if not (ends or live):
        return
    share = now.settled / max(now.total, 1)
    bar = f"{'#' * int(20 * share):.<20}"
    time = f"{now.seconds * (1 / share - 1):.0f} s left" if 0 < share < 1 else f"{now.seconds:.0f} s"
    line = f"{now.attack:<8} [{bar}] {now.settled}/{now.total} images, {time}"
    line += f", robust accuracy so far {now.robust / now.num_images:.1%}"
    start, end = ("\r", "   \n" if ends else "   ") if live else ("", "\n")
    print(start + line, end=end, file=sys.stderr, flush=True)


class Found(NamedTuple):
    """What a suite knows so far, of N images. The arrays are written to."""

    adversarial: np.ndarray  # [N, H, W, channels]
    robust: np.ndarray  # bool [N]
    settled: np.ndarray  # bool [N], the attack under way has nothing more to do for these
    attack: str  # under way
    robust_after: dict[str, np.ndarray]  # of the attacks that are over


class ProgressFile:
    """`Found` as an npz, replaced as a whole: a kill leaves the old one or the new.

    Raises: ValueError where it is damaged, or of other images, labels, settings, or another model, told by its logits
      `clean` [N, C] on the images.
    """

    def __init__(self, path: Path, settings: str, images: np.ndarray, labels: np.ndarray, clean: np.ndarray):
        digest = hashlib.sha256(f"{settings} {images.shape} {images.dtype}".encode())
        digest.update(images.tobytes())
        digest.update(labels.astype(np.int64).tobytes())
        self.path, self.digest, self.clean = path, digest.hexdigest(), clean
        self.mend = f"delete {path}, or give another progress_file"

    def load(self, fresh: Found) -> Found:
        """What the file holds, or `fresh` where there is none."""
        if not self.path.exists():
            return fresh
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as arrays:  # closed if damaged, too
                kept = dict(arrays)
            digest, clean, robust = str(kept["digest"]), kept["clean"], kept["robust"]
            after = dict(zip(kept["names"].tolist(), kept["after"], strict=True))
            settled, attack, moved, index = kept["settled"], str(kept["attack"]), kept["adversarial"], kept["index"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"the progress file cannot be read ({error}): {self.mend}") from error
        if digest != self.digest:
            raise ValueError(f"the progress file is of other images, labels, random numbers or settings: {self.mend}")
        near = 0.01 * float(np.ptp(np.nan_to_num(self.clean, posinf=0, neginf=0)))  # another device rounds otherwise
        if clean.shape != self.clean.shape or not np.allclose(clean, self.clean, rtol=0, atol=near, equal_nan=True):
            raise ValueError(f"the progress file is of another model, whose clean logits differ: {self.mend}")
        fresh.adversarial[index] = moved.astype(fresh.adversarial.dtype)
        return Found(fresh.adversarial, robust, settled, attack, after)

    def save(self, found: Found, images: np.ndarray) -> None:
        """images: [N, H, W, channels], the clean ones; only what differs from them is written."""
        kept = np.promote_types(images.dtype, np.float32)  # of bfloat16, which NumPy's files do not know
        index = np.flatnonzero((found.adversarial != images).reshape(len(images), -1).any(1))
        arrays = dict(
            digest=np.asarray(self.digest),
            clean=self.clean,
            robust=found.robust,
            settled=found.settled,
            attack=np.asarray(found.attack),
            names=np.asarray(list(found.robust_after), dtype=str),
            after=np.asarray(list(found.robust_after.values()), bool).reshape(-1, len(images)),
            index=index,
            adversarial=found.adversarial[index].astype(kept),
        )
        part = self.path.with_name(self.path.name + f".{os.getpid()}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
