"""Pack the wheels and images that `benchmarks/accelerator.py` needs on a machine without internet. With internet:

    python -m benchmarks.pack --out=build/pack --python=3.12 --have=packages-there.txt

`packages-there.txt` is the output of `pip freeze` there, or a list of names. The command makes, in `build/pack`,

    wheels/      missing packages, for that Python and platform
    images.npz   CIFAR-100, lossless: the training images kept at imbalance 100 (exponential profile, data seed 0), 10
                 to hold out of each class, and all test images
    pack.json    the commit, and a digest of the code, which identify a copy without .git

Copy the folder and the checkout, whose `results/` is not needed there. The command fails if both together exceed
`--limit_mb`. Then run (accelerator.py --pack does):

    python -m benchmarks.pack --unpack=build/pack --to=runs/unpacked

This makes `runs/unpacked/site`, for PYTHONPATH, and `runs/unpacked/data/cifar100.npz`, for `run.py --data_dir`. The
file has all 50,000 positions of the training set, so a split and its SHA-256 equal those of CIFAR-100. All images that
imbalance 100 does not use are black, so use no other imbalance, and hold out 10 images of each class or none.
"""

import argparse
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import numpy as np

from ltjax.data import cifar, splits
from ltjax.data.source import Images
from ltjax.system.wording import one_line
from ltjax.types import UserError

ROOT = Path(__file__).parents[1]
CODE = ("run.py", "configs/*.py", "ltjax/**/*.py", "benchmarks/*.py")
KEPT = {"imbalance": 100.0, "profile": "exp", "seed": 0}
HOLDOUT = 10  # images of each class that may be held out, to choose tau on
NOT_NEEDED = ("tensorflow-datasets", "importlib-resources")  # the packed images are decoded


def code_digest() -> str:
    """Return the SHA-256 of this checkout's code, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def commit(pack: Path | None) -> str | None:
    """Return the checkout's commit, with "-dirty" if files differ from it.

    In a copy without .git, return the pack's commit, with "-changed" if the code differs from it.
    """
    from ltjax.runs import results  # imported here, because unpacking does not need it

    name = results.git_commit()
    if name is None and pack is not None:
        packed = read_pack(pack)
        name = packed["commit"] + ("" if packed["code_sha256"] == code_digest() else "-changed")
    return name


def read_pack(pack: Path) -> dict[str, Any]:
    """Read pack.json. Raise UserError if the folder holds no finished pack."""
    try:
        return json.loads((pack / "pack.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{pack} holds no finished pack: make one with `python -m benchmarks.pack --out={pack}`"
        ) from error


# Images are stored as green, red - green and blue - green, minus their prediction from the left and upper neighbours,
# with xz. This takes 1.7 KB an image (CIFAR's PNGs 2.3), and needs only numpy.


def compress_images(images: np.ndarray) -> bytes:
    """Compress images, uint8 [N, H, W, 3], without loss."""
    red, green, blue = (images[..., channel] for channel in range(3))
    planes = np.stack([green, red - green + np.uint8(128), blue - green + np.uint8(128)], axis=1)  # modulo 256
    padded = np.pad(planes.astype(np.int16), ((0, 0), (0, 0), (1, 0), (1, 0)))
    predicted = _predict(padded[..., 1:, :-1], padded[..., :-1, 1:], padded[..., :-1, :-1])
    error = (planes - predicted.astype(np.uint8)).view(np.int8).astype(np.int16)  # -128 .. 127
    folded = np.where(error < 0, -2 * error - 1, 2 * error).astype(np.uint8)  # small errors of either sign are small
    return lzma.compress(folded.tobytes(), filters=[_XZ])


def decompress_images(data: bytes, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Restore the images [N, H, W, 3] that `compress_images` compressed."""
    count, height, width, _ = shape
    folded = np.frombuffer(lzma.decompress(data), np.uint8).reshape(count, 3, height, width)
    error = (folded >> 1) ^ -(folded & 1)  # modulo 256
    padded = np.zeros((height + 1, width + 1, count, 3), np.int16)
    for y in range(height):
        for x in range(width):
            predicted = _predict(padded[y + 1, x], padded[y, x + 1], padded[y, x])
            padded[y + 1, x + 1] = predicted.astype(np.uint8) + error[:, :, y, x]
    green, red, blue = np.moveaxis(padded[1:, 1:].astype(np.uint8), (2, 3), (1, 0))  # each [N, H, W]
    return np.stack([red + green - np.uint8(128), green, blue + green - np.uint8(128)], axis=-1)


def _predict(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Return the median of left, up, and left + up - corner: JPEG-LS's predictor."""
    return np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))


_XZ = {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0}


def pack_images(images: Images, path: Path) -> None:
    """Write the images that a long-tailed split keeps or may hold out, the test images, and all labels."""
    split = splits.long_tailed_split(images.train_labels, len(images.class_names), **KEPT)
    kept = np.union1d(split.train, _held_out(images.train_labels, len(images.class_names)))
    pixels = np.concatenate([images.train_images[kept], images.test_images])
    np.savez(
        path,
        pixels=np.frombuffer(compress_images(pixels), np.uint8),
        pixels_sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        kept=kept,
        split_sha256=splits.describe(split, seed=KEPT["seed"], groups={})["sha256"],
        train_labels=images.train_labels.astype(np.uint8),
        test_labels=images.test_labels.astype(np.uint8),
        class_names=np.array(images.class_names),
    )


def _held_out(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return splits.long_tailed_split(labels, num_classes, imbalance=1.0, seed=KEPT["seed"], holdout=HOLDOUT).holdout


def unpack_images(path: Path) -> Images:
    """Return the packed images, black at all other positions.

    Raises:
        UserError: If a pixel or the split differs from the packed one.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as packed:
            kept, class_names = packed["kept"], tuple(packed["class_names"].tolist())
            labels, test_labels = (packed[name].astype(np.int32) for name in ("train_labels", "test_labels"))
            shape = (len(kept) + len(test_labels), 32, 32, 3)
            pixels = decompress_images(packed["pixels"].tobytes(), shape)
            pixels_sha256, split_sha256 = str(packed["pixels_sha256"]), str(packed["split_sha256"])
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest != pixels_sha256:
            raise ValueError(f"its pixels have the SHA-256 {digest}, not {pixels_sha256}")
    except (OSError, ValueError, KeyError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or incomplete ({one_line(error)}): copy or pack it again") from error
    split = splits.long_tailed_split(labels, len(class_names), **KEPT)
    digest = splits.describe(split, seed=KEPT["seed"], groups={})["sha256"]
    if digest != split_sha256 or not np.isin(split.train, kept).all():
        raise UserError(f"{path} was packed for another split (SHA-256 {split_sha256}, here {digest}): pack it again")
    train_images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    train_images[kept] = pixels[: len(kept)]
    return Images(train_images, labels, pixels[len(kept) :], test_labels, class_names)


def parse_have(text: str) -> dict[str, str | None]:
    """Read a file of `pip freeze`, or a list of names: {normalised name: version or None}."""
    if "," not in text and Path(text).is_file():  # a list is no file name
        text = Path(text).read_text()
    have = {}
    for entry in filter(None, re.split(r"[,\s]+", text)):
        name, _, version = entry.partition("==")
        have[_normalised(name)] = version or None
    return have


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def fetch_wheels(
    have: dict[str, str | None], folder: Path, *, python: str, platform: str, carry: tuple[str, ...]
) -> list[str]:
    """Download the dependencies of ltjax that `have` lacks, with their dependencies; return the file names.

    `carry` names packages to download even if they are there. A package of unknown version counts as new enough.

    Raises:
        UserError: If there is no wheel, or two packages need different versions of a third.
    """
    from packaging.requirements import Requirement

    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": platform.partition("_")[2].lstrip("0123456789_") or "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [(text, "ltjax", ("",)) for text in [*project["dependencies"], "pytest"]]
    taken: dict[str, str] = {}
    folder.mkdir(parents=True)
    while asked:
        text, needed_by, extras = asked.pop(0)
        requirement = Requirement(text)
        name = _normalised(requirement.name)
        if name in NOT_NEEDED:
            continue
        if requirement.marker and not any(requirement.marker.evaluate({**target, "extra": e}) for e in extras):
            continue
        if name in taken:
            if not requirement.specifier.contains(taken[name], prereleases=True):
                raise UserError(
                    f"{needed_by} needs {requirement}, but {name} {taken[name]} was taken for another package"
                )
            continue
        version = have.get(name)
        fits = version is None or requirement.specifier.contains(version, prereleases=True)
        if name in have and name not in carry and fits:
            continue
        wheel = _download(f"{requirement.name}{requirement.specifier}", folder, python=python, platform=platform)
        with zipfile.ZipFile(wheel) as archive:
            inside = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            metadata = message_from_bytes(archive.read(inside))
        taken[name] = metadata["Version"]
        why = "" if name not in have else " (asked for)" if name in carry else f" (there: {version})"
        print(f"{metadata['Name']} {metadata['Version']}, needed by {needed_by}{why}")
        needs = metadata.get_all("Requires-Dist") or []
        asked += [(need, metadata["Name"], ("", *requirement.extras)) for need in needs]
    return sorted(path.name for path in folder.iterdir())


def _download(requirement: str, folder: Path, *, python: str, platform: str) -> Path:
    """Download one wheel, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", f"--dest={folder}"]
    command += [f"--platform={tag}" for tag in _platforms(platform)]
    before = set(folder.iterdir())
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    new = set(folder.iterdir()) - before
    if done.returncode or len(new) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip printed nothing"]
        raise UserError(f"pip finds no wheel of {requirement} for Python {python} on {platform}: {reason[0]}")
    return new.pop()


def _platforms(platform: str) -> list[str]:
    """List a platform tag and the compatible older ones, because pip takes only tags that are named."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if not match:
        return [platform]
    newest, machine = int(match[1]), match[2]
    return [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)] + [f"manylinux2014_{machine}"]


def pack(args: argparse.Namespace) -> None:
    out: Path = args.out
    if out.exists() and any(out.iterdir()) and not (out / "wheels").is_dir():
        raise UserError(f"{out} is not empty and is not a pack: name another folder")
    name = commit(None)
    if name is None:
        raise UserError("no git checkout here: make the pack in a clone, whose commit is known")
    shutil.rmtree(out, ignore_errors=True)
    have = parse_have(args.have)
    carry = tuple(_normalised(name) for name in args.carry.split(",") if name)
    wheels = fetch_wheels(have, out / "wheels", python=args.python, platform=args.platform, carry=carry)
    pack_images(cifar.load("cifar100", args.data_dir), out / "images.npz")
    unpack_images(out / "images.npz")

    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed += ["--", ".", ":(exclude)results"]
    files = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    sizes = {
        "wheels": sum(path.stat().st_size for path in (out / "wheels").iterdir()),
        "images": (out / "images.npz").stat().st_size,
        "checkout": sum((ROOT / name).stat().st_size for name in files if name and (ROOT / name).is_file()),
    }
    total = sum(sizes.values()) / 1e6
    print(", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()) + f": {total:.2f} MB")
    if total > args.limit_mb:
        raise UserError(f"{total:.2f} MB in all, above --limit_mb={args.limit_mb:g}: the pack in {out} is not finished")
    about = {"commit": name, "code_sha256": code_digest(), "python": args.python, "platform": args.platform}
    about |= {"wheels": wheels, "bytes": sizes, "split": KEPT}
    (out / "pack.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"packed {name} into {out}")


def unpack(pack: Path, to: Path) -> None:
    """Install the wheels in `to/site` and write `to/data/cifar100.npz`, unless they are there already."""
    about = read_pack(pack)
    marker = to / "pack.json"
    if marker.exists() and json.loads(marker.read_text()) == about:
        return
    here = "{}.{}".format(*sys.version_info)
    if here != about["python"]:
        raise UserError(f"{pack} is for Python {about['python']}, this is {here}: pack it again with --python={here}")
    shutil.rmtree(to, ignore_errors=True)
    (to / "data").mkdir(parents=True)
    (to / "site").mkdir()
    if about["wheels"]:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        install += ["--disable-pip-version-check", f"--target={to / 'site'}"]
        done = subprocess.run([*install, *(str(pack / "wheels" / name) for name in about["wheels"])])
        if done.returncode:
            raise UserError(f"pip could not install the wheels of {pack} (exit code {done.returncode})")
    np.savez(to / "data" / "cifar100.npz", **unpack_images(pack / "images.npz")._asdict())
    marker.write_text(json.dumps(about))
    print(f"unpacked {about['commit']} into {to}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pack", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/pack"), help="folder to make (default: build/pack)")
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="version there (default: this one)")
    parser.add_argument(
        "--platform", default="manylinux_2_28_x86_64", help="platform tag there, or an older one (default: %(default)s)"
    )
    parser.add_argument("--have", default="", help="packages there: a file of `pip freeze`, or names with commas")
    parser.add_argument("--carry", default="", help="packages to download even if they are there, for a newer version")
    parser.add_argument("--data_dir", help="prepared data sets (default: $TFDS_DATA_DIR)")
    parser.add_argument(
        "--limit_mb", type=float, default=64.0, help="limit of pack and checkout, less results/ (default: %(default)g)"
    )
    parser.add_argument("--unpack", type=Path, metavar="PACK", help="unpack this folder instead")
    parser.add_argument("--to", type=Path, help="where to unpack")
    args = parser.parse_args(argv)
    try:
        if args.unpack and not args.to:
            raise UserError("--unpack needs --to=FOLDER")
        if args.unpack:
            unpack(args.unpack, args.to)
        else:
            pack(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
