"""The examples in docstrings give what they say, and every public function has one."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import attacks, calibration, losses, methods, metrics, models, optim, predictor, surgery
from ltjax.data import samplers, splits
from ltjax.interop import export, torch
from ltjax.interop.weights import Weights
from ltjax.types import Variables

# what docs/api/index.md says that the examples begin with
PRELUDE = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(attacks, calibration, losses, methods, metrics, models, optim, predictor, surgery),
        *(samplers, splits, export, torch),
    )
}
PRELUDE |= {"jax": jax, "jnp": jnp, "np": np, "Variables": Variables, "Weights": Weights}
MODULES = (
    "ltjax.losses",
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
    "ltjax.optim",
    "ltjax.predictor",
    "ltjax.interop.torch",
    "ltjax.interop.export",
)
OF_THEIR_HOUSE = {
    "ltjax.attacks.ball": ("radius",),
    "ltjax.surgery": ("tau_normalised", "nearest_mean", "logit_shifted"),
    "ltjax.optim": ("schedule_table",),
    "ltjax.predictor": (),  # `Model` has one
    "ltjax.interop.torch": ("import_state_dict", "export_state_dict"),
    "ltjax.interop.export": ("stablehlo",),
}


def examples():
    finder = doctest.DocTestFinder()
    for name in MODULES:
        for found in finder.find(importlib.import_module(name), globs=dict(PRELUDE)):
            if found.examples:
                yield found


@pytest.mark.parametrize("example", [*examples()], ids=lambda example: example.name)
def test_an_example_gives_what_it_says(example):
    said = []
    with np.printoptions(precision=3, suppress=True):
        outcome = doctest.DocTestRunner().run(example, out=said.append)
    assert outcome.attempted and not outcome.failed, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_an_example(name):
    module = importlib.import_module(name)
    own = {
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == name and not isinstance(value, type)
    }
    public = OF_THEIR_HOUSE.get(name, {key for key in own if key[0] != "_"})
    lacking = [key for key in public if ">>>" not in (getattr(module, key).__doc__ or "")]
    assert own.issuperset(public) and not lacking, f"{name} has functions without an example: {lacking}"


def test_an_example_that_is_wrong_is_noticed():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(example, out=lambda text: None).failed == 1
