"""State and progress of a suite of attacks, and a file that keeps the state if the process is killed."""

import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ltjax.system import npz
from ltjax.system.files import replacing


class Progress(NamedTuple):
    """Progress of a suite, passed to `progress` at the start of each attack and after each dispatch.

    Attributes:
      attack: Name of the running attack.
      settled: Images that this attack has finished.
      total: Images that it attacks.
      robust: Images that are still robust.
      num_images: N.
      evaluations: Model evaluations of unsettled images in this attack.
      slots: Model evaluations of all slots, including idle ones.
      seconds: Duration of this attack so far.
    """

    attack: str
    settled: int
    total: int
    robust: int
    num_images: int
    evaluations: int
    slots: int
    seconds: float


def show_progress(now: Progress) -> None:
    """Print one line on stderr: a live bar on a terminal, otherwise only the end of each attack."""
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


@dataclass
class Suite:
    """State of a suite on N images.

    Attributes:
      adversarial: [N, H, W, channels].
      robust: bool [N].
      settled: bool [N], images that the running attack has finished.
      attack: Name of the running attack.
      robust_after: {attack: bool [N]} of the finished attacks.
    """

    adversarial: np.ndarray
    robust: np.ndarray
    settled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    attack: str = ""
    robust_after: dict[str, np.ndarray] = field(default_factory=dict)

    def begin(self, attack: str) -> np.ndarray:
        """Begin an attack, or continue it after loading, and return the images that it must attack, int [K]."""
        if self.attack != attack:
            self.attack, self.settled = attack, ~self.robust
        return np.flatnonzero(self.robust & ~self.settled)


class ProgressFile:
    """A `Suite` as an npz file, which is replaced atomically.

    `clean`, the logits [N, C] of the clean images, identifies the model.
    """

    def __init__(self, path: Path, settings: str, images: np.ndarray, labels: np.ndarray, clean: np.ndarray):
        digest = hashlib.sha256(f"{settings} {images.shape} {images.dtype}".encode())
        digest.update(images.tobytes())
        digest.update(labels.astype(np.int64).tobytes())
        self.path, self.digest, self.clean = path, digest.hexdigest(), clean
        self.hint = f"delete {path}, or give another progress_file"

    def load(self, suite: Suite) -> None:
        """Load the file into a new suite, if it exists. ValueError if it is damaged, or of another attack or model."""
        if not self.path.exists():
            return
        try:
            saved = npz.read(self.path)
            digest, clean, robust = str(saved["digest"]), saved["clean"], saved["robust"]
            after = dict(zip(saved["names"].tolist(), saved["after"], strict=True))
            settled, attack, index, moved = saved["settled"], str(saved["attack"]), saved["index"], saved["adversarial"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"the progress file cannot be read ({error}): {self.hint}") from error
        if digest != self.digest:
            raise ValueError(f"the progress file is of other images, labels, random numbers or settings: {self.hint}")
        atol = 0.01 * float(np.ptp(np.nan_to_num(self.clean, posinf=0, neginf=0)))  # devices round differently
        if clean.shape != self.clean.shape or not np.allclose(clean, self.clean, rtol=0, atol=atol, equal_nan=True):
            raise ValueError(f"the progress file is of another model, whose clean logits differ: {self.hint}")
        suite.adversarial[index] = moved.astype(suite.adversarial.dtype)
        suite.robust, suite.settled, suite.attack, suite.robust_after = robust, settled, attack, after

    def save(self, suite: Suite, images: np.ndarray) -> None:
        """Write the suite. images: the clean ones [N, H, W, channels]; only those that have changed are written."""
        dtype = np.promote_types(images.dtype, np.float32)  # npz files have no bfloat16
        index = np.flatnonzero((suite.adversarial != images).reshape(len(images), -1).any(1))
        arrays = dict(
            digest=np.asarray(self.digest),
            clean=self.clean,
            robust=suite.robust,
            settled=suite.settled,
            attack=np.asarray(suite.attack),
            names=np.asarray(list(suite.robust_after), dtype=str),
            after=np.asarray(list(suite.robust_after.values()), bool).reshape(-1, len(images)),
            index=index,
            adversarial=suite.adversarial[index].astype(dtype),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
