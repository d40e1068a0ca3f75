"""Pretrained backbones by name: shipped ones, repositories of the Hugging Face Hub, files and folders.

    python -m ltjax.interop.pretrained                                   lists the shipped backbones
    python -m ltjax.interop.pretrained hub:timm/resnet50.a1_in1k         fetches, for a machine without a network

A config's argument `pretrained=NAME` takes the same names. `hub:REPOSITORY@REVISION` names a branch, a tag or a commit;
without one, the commit that this machine has already, or else the newest. A download needs the extra `[hub]`; files in
the Hub's cache are found without it.
"""

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ltjax import models
from ltjax.interop import torch, vit
from ltjax.runs.weights import HUB, described, folder_of, hash_weights, is_weights, load_weights, save_weights, shipped
from ltjax.system.command_line import Parser, exit_code
from ltjax.system.devices import start_devices
from ltjax.system.files import file_sha256
from ltjax.system.paths import cache_folder, local
from ltjax.system.wording import one_line
from ltjax.types import UserError

FILES = ("model.safetensors", "open_clip_model.safetensors")  # of a repository, in this order
FORMS = f"a name ({{}}), {HUB}REPOSITORY[@REVISION], FILE.safetensors, a folder, or none"


class Backbone(NamedTuple):
    """A backbone that was trained elsewhere.

    Attributes:
      weights: For `config.weights`: a name, a repository at a commit, or a folder.
      sha256: Of its arrays, see `ltjax.runs.weights.hash_weights`.
      settings: Arguments of `ltjax.models.create`: `name`, `mean`, `std` and others.
      images: See `ltjax.runs.weights.Weights`; `size` and `crop` are known.
      licence: An SPDX identifier, or what the source says. "" if it says nothing.
    """

    weights: str
    sha256: str
    settings: dict[str, Any]
    images: dict[str, Any]
    licence: str

    def __str__(self) -> str:
        images, network = self.images, {k: v for k, v in self.settings.items() if k not in ("mean", "std")}
        mean, std = (tuple(round(x, 4) for x in self.settings[key]) for key in ("mean", "std"))
        return (
            f"{self.weights}: {described(network, 0)}, images of {images['size']} pixels, {images['crop']:g} of the "
            f"shorter side, mean {mean}, std {std}; licence {self.licence or 'unknown'}"
        )


def find(name: str) -> Backbone:
    """Find a backbone, and fetch and convert it if it is new to this machine.

    Args:
      name: Of `shipped`; "hub:REPOSITORY" or "hub:REPOSITORY@REVISION"; a file of weights, with timm's or open_clip's
        JSON beside it; or a folder that holds such a file, or that `ltjax.interop.torch` has written.

    Raises:
      UserError: There is none of that name; it cannot be fetched or read; its network, or the mean and standard
        deviation of its images, are unknown.

    Examples:
      >>> backbone = pretrained.find("efficientnet_lite0")
      >>> backbone.settings["name"], backbone.images["size"], backbone.licence
      ('efficientnet_lite0', 224, 'Apache-2.0')
    """
    if name.startswith(HUB):
        return _of_hub(name)
    if is_weights(name):
        return _read(name)
    path = local(name)
    file = next((path / each for each in FILES if (path / each).is_file()), path)
    if not file.is_file():
        raise UserError(f"pretrained={name}: {FORMS.format(', '.join(shipped()))}")
    digest = file_sha256(file)
    beside = vit.config_beside(file)
    key = hashlib.sha256(f"{digest} {sorted(_images(beside).items())}".encode()).hexdigest()
    folder = _converted(key[:32])
    if not is_weights(folder):
        _convert(file, folder, digest)
    return _read(str(folder))


def _read(name: str) -> Backbone:
    """Describe a folder of weights."""
    weights = load_weights(name)
    unknown = [key for key in ("mean", "std") if key not in weights.settings]
    if unknown:
        raise UserError(
            f"pretrained={name} does not say with which mean and standard deviation its images are normalised: convert "
            "it again with normalise= in --model of `python -m ltjax.interop.torch`"
        )
    images = {"size": 224, "crop": 0.875, **weights.images}
    of_head = set(inspect.signature(models.create).parameters) - {"name", "mean", "std"}
    settings = {key: value for key, value in weights.settings.items() if key not in of_head}
    return Backbone(name, hash_weights(name), settings, images, weights.licence)


def _converted(name: str) -> Path:
    """Return the folder of a converted file in ltjax's cache."""
    cache = cache_folder()
    if cache is None:
        raise UserError("there is no folder for converted weights: set XDG_CACHE_HOME, or HOME")
    return cache / "weights" / name


def _convert(file: Path, folder: Path, digest: str, licence: str = "") -> None:
    """Convert a file of weights, with what its folder says about it, to a folder of `ltjax.runs.weights`."""
    beside = vit.config_beside(file)
    if beside.get("architecture") in OTHER_NETWORKS:
        raise UserError(f"{file} is timm's {beside['architecture']}: {OTHER_NETWORKS[beside['architecture']]}")
    known = _images(beside)
    normalisation = {key: known[key] for key in ("mean", "std") if key in known}
    weights, _, _, notes = torch.read_checkpoint(file, normalisation, backbone=True, config=beside)
    if "mean" not in weights.settings:
        raise UserError(
            f"{file}: nothing says how its images are normalised (timm's config.json beside it would): convert it with "
            f"`python -m ltjax.interop.torch {file} --model={weights.settings['name']},normalise=imagenet --out=DIR`, "
            f"where imagenet is one of {', '.join(torch.NORMALISE)}, and give pretrained=DIR"
        )
    for note in notes:
        print(f"note: {file}: {note}", file=sys.stderr)
    images = {key: value for key, value in known.items() if key not in ("mean", "std", "licence")}
    source, licence = {"file": file.name, "sha256": digest}, licence or known.get("licence", "")
    about = dict(source=source, images=images, licence=licence)
    save_weights(folder, weights.variables, weights.settings, num_classes=0, **about)


# timm's networks with the arrays of ours, which compute something else
OTHER_NETWORKS = {
    f"efficientnet_lite{n}": "its padding and epsilon are others than those of tf_efficientnet_lite0" for n in range(5)
}


def _images(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm or open_clip say about images: `mean`, `std`, `size`, `crop`, `interpolation`, `licence`."""
    model, images = config.get("model_cfg"), config.get("preprocess_cfg")
    if isinstance(model, Mapping):  # open_clip's; its images are not cropped
        vision = model.get("vision_cfg")
        said = dict(images) if isinstance(images, Mapping) else {}
        said.update(size=vision.get("image_size") if isinstance(vision, Mapping) else None, crop=1.0)
    else:
        pretrained = config.get("pretrained_cfg", config)
        said = dict(pretrained) if isinstance(pretrained, Mapping) else {}
        size = said.get("input_size")
        said.update(size=size[-1] if isinstance(size, list) and size else None)
        said.update(crop=said.get("crop_pct"), licence=said.get("license"))
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        value = said.get(key)
        if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(x, int | float) for x in value):
            found[key] = tuple(map(float, value))
    if isinstance(said.get("size"), int) and said["size"] > 0:
        found["size"] = said["size"]
    if isinstance(said.get("crop"), int | float) and 0 < said["crop"] <= 1:
        found["crop"] = float(said["crop"])
    for key in ("interpolation", "licence"):
        if isinstance(said.get(key), str):
            found[key] = said[key]
    return found


# The Hugging Face Hub. Its cache is documented at https://huggingface.co/docs/hub/local-cache.


def _of_hub(name: str) -> Backbone:
    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository) or not re.fullmatch(r"(?!.*\.\.)[\w./-]*", revision):
        raise UserError(f"pretrained={name}: {HUB}OWNER/NAME, or {HUB}OWNER/NAME@REVISION")
    if re.fullmatch("[0-9a-f]{40}", revision) and is_weights(name):
        return _read(name)
    snapshot = _cached(repository, revision or "main") or _download(repository, revision or "main")
    pinned = f"{HUB}{repository}@{snapshot.name}"
    if not is_weights(pinned):
        file = next(snapshot / each for each in FILES if (snapshot / each).is_file())
        _convert(file, folder_of(pinned), file_sha256(file), _licence(snapshot / "README.md"))
    return _read(pinned)


def _cached(repository: str, revision: str) -> Path | None:
    """Return the folder of a commit in the Hub's cache, if it holds weights."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    folder = cache / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    snapshot = folder / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    return snapshot if any((snapshot / file).is_file() for file in FILES) else None


def _download(repository: str, revision: str) -> Path:
    """Download a repository's weights, and what it says about them. Its licence is printed first."""
    try:
        from huggingface_hub import hf_hub_download  # pyrefly: ignore[missing-import]
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(
            f"{HUB}{repository}@{revision} is not in the Hub's cache, and a download needs huggingface_hub: "
            "`pip install ltjax[hub]`, or give a file or folder that you have downloaded"
        ) from error

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, revision=revision))
        except GatedRepoError as error:
            raise UserError(
                f"{repository} is gated: accept its terms on https://huggingface.co/{repository}, then `hf auth login`"
            ) from error
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # neither on the Hub, as far as is known, nor in the cache
                raise UserError(f"{repository}@{revision} is not in the Hub's cache, and the Hub is offline") from error
            return None
        except Exception as error:  # of the network, the disk or the Hub
            raise UserError(f"cannot fetch {file} of {repository}@{revision}: {one_line(error)}") from error

    card = fetch("README.md")
    print(f"note: fetching {repository}, licence {_licence(card) or 'unknown'}", file=sys.stderr)
    for file in vit.CONFIGS:
        fetch(file)
    for file in FILES:
        if path := fetch(file):
            return path.parent
    raise UserError(f"{repository}@{revision} has none of {', '.join(FILES)}: only safetensors are read from the Hub")


def _licence(card: Path | None) -> str:
    """Return the licence in the head of a model's card."""
    if card is None or not card.is_file():
        return ""
    head = card.read_text("utf-8", "replace").partition("\n---")[0]
    match = re.search(r"^license: *['\"]?([\w.+-]+)", head, re.MULTILINE)
    return match[1] if match else ""


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(prog="python -m ltjax.interop.pretrained", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", metavar="NAME", nargs="*", help="as in pretrained=NAME; default: list those of ltjax")

    def show() -> None:
        names = parser.parse_args(argv).names or list(shipped())
        start_devices()
        for name in names:
            print(find(name))

    return exit_code(show)


if __name__ == "__main__":
    sys.exit(main())
