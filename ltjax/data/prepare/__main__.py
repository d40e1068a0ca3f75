"""Write a data set to disk once, in the format of TensorFlow Datasets, without TensorFlow.

    python -m ltjax.data.prepare cifar100                                # downloads the official archive
    python -m ltjax.data.prepare cifar100 --source=cifar-100-binary.tar.gz --data_dir=/data
    python -m ltjax.data.prepare tiny_imagenet
    python -m ltjax.data.prepare inat18 --source=FOLDER                  # also imagenet_lt and places_lt

Both `ltjax.data` and `tfds.builder_from_directory` read the result, `<data_dir>/<name>/<version>`.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ltjax.data.prepare import cifar, imagenet_lt, inat18, one_pass, places_lt, tiny_imagenet
from ltjax.data.source import resolve_data_dir
from ltjax.system.command_line import Parser, exit_code
from ltjax.system.paths import local
from ltjax.types import UserError

# Data sets that fit in memory: `(data_dir, source) -> the line to print`.
SMALL: dict[str, Callable[[Path, Path | None], str]] = {
    "cifar10": functools.partial(cifar.prepare, cifar.CIFAR10),
    "cifar100": functools.partial(cifar.prepare, cifar.CIFAR100),
    "tiny_imagenet": tiny_imagenet.prepare,
}
# Data sets that neither fit in memory nor can be downloaded: modules with NAME, PIECES and `read_spec`.
LARGE: dict[str, ModuleType] = {
    "imagenet_lt": imagenet_lt,
    "places_lt": places_lt,
    "inat18": inat18,
    "i_naturalist2018": inat18,
}


def prepare(dataset: str, data_dir: Path, source: Path | None, skip_damaged: bool) -> str:
    """Prepare a data set; return the line to print."""
    if dataset in LARGE:
        module = LARGE[dataset]
        return one_pass.prepare(module.NAME, data_dir, source, module.read_spec, module.PIECES, skip_damaged)
    if dataset not in SMALL:
        raise UserError(f"unknown data set {dataset!r}: choose one of {', '.join([*SMALL, *LARGE])}")
    if skip_damaged:
        raise UserError(f"--skip_damaged is for {', '.join(LARGE)}: leave it out for {dataset}")
    return SMALL[dataset](data_dir, source)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 after one line `error: ...` on stderr, 130 after Ctrl-C."""
    parser = Parser(prog="python -m ltjax.data.prepare", description="Writes a data set to disk, once.")
    parser.add_argument("dataset", metavar="DATASET", help=", ".join([*SMALL, *LARGE]))
    parser.add_argument(
        "--source",
        metavar="ARCHIVE",
        help=(
            "an archive on disk instead of a download (for tiny_imagenet also the folder it unpacks to); "
            f"for {', '.join(LARGE)} the folder that holds the lists and the official archives or unpacked folders"
        ),
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where to write (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )
    parser.add_argument(
        "--skip_damaged",
        action="store_true",
        help=f"for {', '.join(LARGE)}: leave out missing and damaged images, and list them in skipped.txt",
    )

    def write() -> None:
        args = parser.parse_args(argv)
        source = local(args.source) if args.source else None
        print(prepare(args.dataset, resolve_data_dir(args.data_dir), source, args.skip_damaged))

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
