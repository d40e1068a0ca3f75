"""The examples in docstrings print what they show, and every public function has one."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import attacks, calibration, losses, methods, metrics, models, optim, predictor, surgery
from ltjax.data import samplers, splits
from ltjax.interop import export, pretrained, torch, weights
from ltjax.interop.weights import Weights
from ltjax.methods import criteria
from ltjax.predictor import priors
from ltjax.types import Variables

# the imports that docs/api/index.md lists for the examples
PRELUDE = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(attacks, calibration, losses, methods, metrics, models, optim, predictor, surgery),
        *(samplers, splits, export, pretrained, torch, weights, criteria, priors),
    )
}
PRELUDE |= {"jax": jax, "jnp": jnp, "np": np, "Variables": Variables, "Weights": Weights}
MODULES = (
    "ltjax.losses.labels",
    "ltjax.losses.divergences",
    "ltjax.losses.features",
    "ltjax.losses.contrast",
    "ltjax.metrics",
    "ltjax.calibration",
    "ltjax.surgery",
    "ltjax.attacks.ball",
    "ltjax.attacks.pgd",
    "ltjax.attacks.autoattack",
    "ltjax.data.samplers",
    "ltjax.data.splits",
    "ltjax.models",
    "ltjax.methods",
    "ltjax.methods.criteria",
    "ltjax.optim",
    "ltjax.predictor",
    "ltjax.predictor.model",
    "ltjax.predictor.priors",
    "ltjax.interop.torch",
    "ltjax.interop.export",
    "ltjax.interop.pretrained",
    "ltjax.runs.weights",
)
PUBLIC = {  # of modules whose other functions need no example
    "ltjax.attacks.ball": ("radius", "radius_by_count"),
    "ltjax.surgery": ("tau_normalised", "nearest_mean", "logit_shifted"),
    "ltjax.optim": ("schedule_table",),
    "ltjax.methods.criteria": ("weights_by_name",),
    "ltjax.predictor.priors": ("shift",),
    "ltjax.predictor": (),
    "ltjax.predictor.model": (),  # `Model` has an example
    "ltjax.interop.torch": ("import_state_dict", "export_state_dict"),
    "ltjax.interop.export": ("stablehlo",),
    "ltjax.interop.pretrained": ("find",),
    "ltjax.runs.weights": ("shipped",),
}


def examples():
    finder = doctest.DocTestFinder()
    for name in MODULES:
        for example in finder.find(importlib.import_module(name), globs=dict(PRELUDE)):
            if example.examples:
                yield example


@pytest.mark.parametrize("example", [*examples()], ids=lambda example: example.name)
def test_an_example_prints_what_it_shows(example):
    printed = []
    with np.printoptions(precision=3, suppress=True):
        outcome = doctest.DocTestRunner().run(example, out=printed.append)
    assert outcome.attempted and not outcome.failed, "".join(printed)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_an_example(name):
    module = importlib.import_module(name)
    functions = {
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == name and not isinstance(value, type)
    }
    public = PUBLIC.get(name, {key for key in functions if key[0] != "_"})
    without = [key for key in public if ">>>" not in (getattr(module, key).__doc__ or "")]
    assert functions.issuperset(public) and not without, f"{name} has functions without an example: {without}"


def test_a_wrong_example_fails():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(example, out=lambda text: None).failed == 1
