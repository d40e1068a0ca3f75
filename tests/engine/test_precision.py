"""bfloat16 through the stage engine: the gradients point where those of float32 do, and only the body is bfloat16."""

import functools
import os
from pathlib import Path

import jax
import pytest

from benchmarks import gradients
from configs import cifar100_lt, quickstart
from ltjax import data
from ltjax.system import parallel

CIFAR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "cifar100"


@pytest.fixture(autouse=True)
def two_devices_and_images_read_once(monkeypatch):
    make_mesh = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:2], replicas))
    monkeypatch.setattr(data, "load", functools.cache(data.load))


def cosines(read, **arguments):
    exact, rounded = (
        gradients.kernel_gradients(read(f"{arguments['of']},precision={kind}").to_dict())
        for kind in ("float32", "bf16")
    )
    return {path: each["cosine"] for path, each in gradients.compare(exact, rounded).items()}


def test_gradients_on_the_quickstarts_images(optimised):
    found = cosines(quickstart.get_config, of="holdout=0")
    assert len(found) == 7
    assert min(found.values()) > 0.95, found


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-100 is not prepared")
def test_gradients_of_resnet32_on_cifar100(optimised):
    found = cosines(cifar100_lt.get_config, of="method=ce")
    assert len(found) == 31
    assert min(found.values()) > 0.95, sorted(found.items(), key=lambda item: item[1])[:5]
