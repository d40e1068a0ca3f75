"""bfloat16 through the stage engine: the gradients point where those of float32 do, and only the body is bfloat16."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import cifar100_lt, quickstart
from ltjax import config as config_module
from ltjax import optim, problem

CIFAR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "cifar100"


def kernel_gradients(config):
    """{path: gradient of a convolution kernel} on the first batch of the first stage, without augmentation.

    A step of plain gradient descent at rate 1 takes it away from the kernel.
    """
    values = config.to_dict()
    first = values["stages"][0]
    values[first] |= dict(lr=1.0, schedule=dict(kind="constant"), augment={}, optimizer=dict(momentum=0.0))
    values["optimizer"] = dict(momentum=0.0, nesterov=False, weight_decay=0.0)
    values["stages"] = (first,)
    run, stages = config_module.parse(values)
    ready = problem.setup(run, None)
    built = problem.build_stage(run, first, stages[first], ready)
    state = built.init(problem.seeds(run), problem.initial_variables(run, first, ready))
    before = {path: np.asarray(value) for path, value in optim.flatten(state.variables.params).items()}
    state, metrics = built.run(state, ready.train_data, 1)
    kept = jax.tree.leaves((state.variables, state.opt_state, metrics))
    assert {x.dtype.name for x in kept} <= {"float32", "int32", "uint32"}
    after = optim.flatten(state.variables.params)
    return {path: before[path] - np.asarray(after[path]) for path in before if before[path].ndim == 4}


def cosines(read, **arguments):
    exact, rounded = (kernel_gradients(read(f"{arguments['of']},precision={kind}")) for kind in ("float32", "bf16"))
    return {
        path: float((g * rounded[path]).sum() / np.linalg.norm(g) / np.linalg.norm(rounded[path]))
        for path, g in exact.items()
    }


def test_gradients_on_the_quickstarts_images(optimised):
    found = cosines(quickstart.get_config, of="holdout=0")
    assert len(found) == 7
    assert min(found.values()) > 0.95, found


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-100 is not prepared")
def test_gradients_of_resnet32_on_cifar100(optimised):
    found = cosines(cifar100_lt.get_config, of="method=ce")
    assert len(found) == 31
    assert min(found.values()) > 0.95, sorted(found.items(), key=lambda item: item[1])[:5]
