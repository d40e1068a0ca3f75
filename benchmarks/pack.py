"""Packs what a machine without internet lacks, to run `benchmarks/accelerator.py` there. Here, with internet:

    python -m benchmarks.pack --out=build/pack --python=3.12 --have=packages-there.txt

`packages-there.txt` is what `pip freeze` prints there, or just names. Afterwards `build/pack` holds

    wheels/      packages that ltjax needs and that are not there, for that Python and platform
    images.npz   CIFAR-100: the training images kept at imbalance 100 (exponential profile, data seed 0), 10 to hold
                 out of each class, and all test images, without loss
    pack.json    the commit, and a digest of the code, by which a copy without .git knows what it is

and the command fails if the folder and the checkout together pass `--limit_mb`. There, with both copied
(accelerator.py does this by itself, with --pack):

    python -m benchmarks.pack --unpack=build/pack --to=runs/unpacked

makes `runs/unpacked/site`, for PYTHONPATH, and `runs/unpacked/data/cifar100.npz`, for `run.py --data_dir`. That file
has all 50,000 positions of the training set, so that a split is the same as with all of CIFAR-100, down to its SHA-256;
but images that imbalance 100 never shows are black: it is for that, with 10 images of each class held out or none.
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
from ltjax.types import UserError, one_line

ROOT = Path(__file__).parents[1]
CODE = ("run.py", "configs/*.py", "ltjax/**/*.py", "benchmarks/*.py")
KEPT = {"imbalance": 100.0, "profile": "exp", "seed": 0}
HOLDOUT = 10  # images of each class that may be held out of it: tau is chosen there
NOT_NEEDED = ("tensorflow-datasets", "importlib-resources")  # the images come decoded


def code_digest() -> str:
    """SHA-256 of this checkout's code, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def commit(pack: Path | None) -> str | None:
    """The checkout's commit, "-dirty" where files differ from it.

    In a copy without .git it is the pack's, and "-changed" where the code is no longer that.
    """
    from ltjax.runs import results  # here, because unpacking does without its packages

    found = results.git_commit()
    if found is None and pack is not None:
        packed = read_pack(pack)
        found = packed["commit"] + ("" if packed["code_sha256"] == code_digest() else "-changed")
    return found


def read_pack(pack: Path) -> dict[str, Any]:
    """What pack.json says. Raises: UserError where the folder holds no finished pack."""
    try:
        return json.loads((pack / "pack.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{pack} holds no finished pack: make one with `python -m benchmarks.pack --out={pack}`"
        ) from error


# Images: green, red - green and blue - green, each less what its left and upper neighbours predict, then xz. CIFAR's
# PNGs take 2.3 KB an image; this takes 1.7, and needs numpy alone.


def compress_images(images: np.ndarray) -> bytes:
    """uint8 [N, H, W, 3], without loss."""
    red, green, blue = (images[..., channel] for channel in range(3))
    planes = np.stack([green, red - green + np.uint8(128), blue - green + np.uint8(128)], axis=1)  # modulo 256
    padded = np.pad(planes.astype(np.int16), ((0, 0), (0, 0), (1, 0), (1, 0)))
    predicted = _predict(padded[..., 1:, :-1], padded[..., :-1, 1:], padded[..., :-1, :-1])
    error = (planes - predicted.astype(np.uint8)).view(np.int8).astype(np.int16)  # -128 .. 127
    folded = np.where(error < 0, -2 * error - 1, 2 * error).astype(np.uint8)  # small errors of either sign are small
    return lzma.compress(folded.tobytes(), filters=[_XZ])


def decompress_images(data: bytes, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The images [N, H, W, 3] that `compress_images` took."""
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
    """The median of left, up and their plane through the corner: JPEG-LS's predictor."""
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
    """The packed images, black at the positions that were left out.

    Raises: UserError where a pixel differs from what was packed, or the split is another one than then.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as packed:
            kept, class_names = packed["kept"], tuple(packed["class_names"].tolist())
            labels, test_labels = (packed[name].astype(np.int32) for name in ("train_labels", "test_labels"))
            shape = (len(kept) + len(test_labels), 32, 32, 3)
            pixels = decompress_images(packed["pixels"].tobytes(), shape)
            pixels_sha256, split_sha256 = str(packed["pixels_sha256"]), str(packed["split_sha256"])
        found = hashlib.sha256(pixels.tobytes()).hexdigest()
        if found != pixels_sha256:
            raise ValueError(f"its pixels have the SHA-256 {found}, not {pixels_sha256}")
    except (OSError, ValueError, KeyError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or incomplete ({one_line(error)}): copy or pack it anew") from error
    split = splits.long_tailed_split(labels, len(class_names), **KEPT)
    found = splits.describe(split, seed=KEPT["seed"], groups={})["sha256"]
    if found != split_sha256 or not np.isin(split.train, kept).all():
        raise UserError(f"{path} was packed for another split (SHA-256 {split_sha256}, here {found}): pack it anew")
    train_images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    train_images[kept] = pixels[: len(kept)]
    return Images(train_images, labels, pixels[len(kept) :], test_labels, class_names)


def parse_have(text: str) -> dict[str, str | None]:
    """{normalised name: version or None} from a file of `pip freeze`, or a list of names."""
    if "," not in text and Path(text).is_file():  # a long list would be no name of a file
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
    """Download what ltjax needs and `have` lacks, with what that needs in turn -> names of the files.

    carry: names to take along even if they are there. A package of unknown version counts as new enough.
    Raises: UserError where there is no wheel, or two packages want different versions of one.
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
        text, wanted_by, extras = asked.pop(0)
        requirement = Requirement(text)
        name = _normalised(requirement.name)
        if name in NOT_NEEDED:
            continue
        if requirement.marker and not any(requirement.marker.evaluate({**target, "extra": e}) for e in extras):
            continue
        if name in taken:
            if not requirement.specifier.contains(taken[name], prereleases=True):
                raise UserError(
                    f"{wanted_by} needs {requirement}, but {name} {taken[name]} was taken for another package"
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
        print(f"{metadata['Name']} {metadata['Version']}, needed by {wanted_by}{why}")
        needs = metadata.get_all("Requires-Dist") or []
        asked += [(need, metadata["Name"], ("", *requirement.extras)) for need in needs]
    return sorted(path.name for path in folder.iterdir())


def _download(requirement: str, folder: Path, *, python: str, platform: str) -> Path:
    """One wheel, without what it needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", f"--dest={folder}"]
    command += [f"--platform={tag}" for tag in _platforms(platform)]
    before = set(folder.iterdir())
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    new = set(folder.iterdir()) - before
    if done.returncode or len(new) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise UserError(f"pip finds no wheel of {requirement} for Python {python} on {platform}: {reason[0]}")
    return new.pop()


def _platforms(platform: str) -> list[str]:
    """A platform tag and the older ones that it runs as well: pip takes each only where it is named."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if not match:
        return [platform]
    newest, machine = int(match[1]), match[2]
    return [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)] + [f"manylinux2014_{machine}"]


def pack(args: argparse.Namespace) -> None:
    out: Path = args.out
    if out.exists() and any(out.iterdir()) and not (out / "wheels").is_dir():
        raise UserError(f"{out} is not empty and no pack: name another folder")
    found = commit(None)
    if found is None:
        raise UserError("no git checkout here: a pack is made where the commit is known")
    shutil.rmtree(out, ignore_errors=True)
    have = parse_have(args.have)
    carry = tuple(_normalised(name) for name in args.carry.split(",") if name)
    wheels = fetch_wheels(have, out / "wheels", python=args.python, platform=args.platform, carry=carry)
    pack_images(cifar.load("cifar100", args.data_dir), out / "images.npz")
    unpack_images(out / "images.npz")

    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
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
    about = {"commit": found, "code_sha256": code_digest(), "python": args.python, "platform": args.platform}
    about |= {"wheels": wheels, "bytes": sizes, "split": KEPT}
    (out / "pack.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"packed {found} into {out}")


def unpack(pack: Path, to: Path) -> None:
    """Install the wheels below `to/site` and write `to/data/cifar100.npz`, unless that was done before."""
    about = read_pack(pack)
    marker = to / "pack.json"
    if marker.exists() and json.loads(marker.read_text()) == about:
        return
    here = "{}.{}".format(*sys.version_info)
    if here != about["python"]:
        raise UserError(f"{pack} is for Python {about['python']}, this is {here}: pack it anew with --python={here}")
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
        "--platform", default="manylinux_2_28_x86_64", help="there, or an older one (default: %(default)s)"
    )
    parser.add_argument("--have", default="", help="packages there: a file of `pip freeze`, or names with commas")
    parser.add_argument("--carry", default="", help="names to take along even if they are there, for a newer version")
    parser.add_argument("--data_dir", help="prepared data sets (default: $TFDS_DATA_DIR)")
    parser.add_argument(
        "--limit_mb", type=float, default=64.0, help="of pack and checkout together (default: %(default)g)"
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
