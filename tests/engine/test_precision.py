"""Gradients of bfloat16 training point in the direction of those of float32."""

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
    return {path: kernel["cosine"] for path, kernel in gradients.compare(exact, rounded).items()}


def test_gradients_on_the_images_of_quickstart(optimised):
    cosine_of = cosines(quickstart.get_config, of="holdout=0")
    assert len(cosine_of) == 7
    assert min(cosine_of.values()) > 0.95, cosine_of


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-100 is not prepared")
def test_gradients_of_resnet32_on_cifar100(optimised):
    cosine_of = cosines(cifar100_lt.get_config, of="method=ce")
    assert len(cosine_of) == 31
    assert min(cosine_of.values()) > 0.95, sorted(cosine_of.items(), key=lambda item: item[1])[:5]
