"""Gradients of bfloat16 training point in the direction of those of float32.

What is rounded stands in the program before LLVM compiles it, so the cosines are those of an optimised program to the
third digit.
"""

import functools
import os
from pathlib import Path

import jax
import pytest

from benchmarks import gradients
from configs import cifar100_lt, quickstart
from ltjax import data
from ltjax.engine import experiment as experiments
from ltjax.system import parallel

CIFAR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "cifar100"


@pytest.fixture(autouse=True)
def one_device_and_what_both_runs_share(monkeypatch):
    """Read the images once, and compute the initial weights, which are float32 in both runs, once."""
    make_mesh, initial, made = parallel.make_mesh, experiments.starting_variables, []
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:1], replicas))
    monkeypatch.setattr(data, "load", functools.cache(data.load))
    monkeypatch.setattr(
        experiments, "starting_variables", lambda *run: made[0] if made else made.append(initial(*run)) or made[0]
    )


def cosines(read, **arguments):
    exact, rounded = (
        gradients.kernel_gradients(read(f"{arguments['of']},precision={kind}").to_dict())
        for kind in ("float32", "bf16")
    )
    return {path: kernel["cosine"] for path, kernel in gradients.compare(exact, rounded).items()}


def test_gradients_on_the_images_of_quickstart():
    cosine_of = cosines(quickstart.get_config, of="holdout=0")
    assert len(cosine_of) == 7
    assert min(cosine_of.values()) > 0.95, cosine_of


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-100 is not prepared")
def test_gradients_of_resnet32_on_cifar100():
    cosine_of = cosines(cifar100_lt.get_config, of="method=ce")
    assert len(cosine_of) == 31
    assert min(cosine_of.values()) > 0.95, sorted(cosine_of.items(), key=lambda item: item[1])[:5]
