"""Training steps lowered for TPU and GPU on a CPU, and split over eight devices."""

import jax
import numpy as np
import pytest
from jax import export

from configs import cifar10
from ltjax import data
from ltjax.config import parse
from ltjax.engine import experiment as experiments
from ltjax.engine import stage
from ltjax.engine.experiment import fresh_shapes
from tests.modes import test_attack
from tests.test_run import tiny_config

PLATFORM_MODEL = {"tpu": "tpu", "cuda": "gpu"}


def build(monkeypatch, name, *, devices, platform=None, **changes):
    monkeypatch.setattr(stage.jax, "devices", lambda: jax.local_devices(backend="cpu")[:devices])
    run = parse(tiny_config(batch_size=16, **changes))
    run = run._replace(model={**run.model, "platform": platform})
    experiment = experiments.set_up(run, None)
    assert experiment.mesh.devices.size == devices
    compiled = experiments.build_stage(experiment, run.stages[name])
    return (
        compiled,
        experiment,
        compiled.init(experiments.seeds(run), experiments.starting_variables(experiment, run.stages["features"])),
    )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["features", "classifier"])
def test_both_stages_lower_for_accelerators(monkeypatch, platform, name):
    changes = {"features.augment.auto_augment": False, "features.augment.cutout_size": 8, "model.dtype": "bfloat16"}
    compiled, experiment, state = build(monkeypatch, name, devices=8, platform=PLATFORM_MODEL[platform], **changes)
    exported = export.export(compiled.run.jitted(), platforms=[platform])(state, experiment.train_data, 3)
    assert exported.platforms == (platform,)
    assert exported.nr_devices == 8
    assert "stablehlo.convolution" in exported.mlir_module()


@pytest.mark.parametrize("name", ["features", "classifier"])
def test_eight_devices_agree_with_one(monkeypatch, name):
    outcomes = []
    for devices in (1, 8):
        compiled, experiment, state = build(monkeypatch, name, devices=devices)
        state, values = compiled.run(state, experiment.train_data, 3)
        outcomes.append((values["loss"], state.variables))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=1e-4)
    for on_one, on_eight in zip(*(jax.tree.leaves(variables) for _, variables in outcomes), strict=True):
        np.testing.assert_allclose(on_one, on_eight, rtol=1e-3, atol=1e-3)


def test_frozen_parameters_have_no_backward_pass(monkeypatch):
    """Stage 2 differentiates only the classifier: its program has no convolutions except the forward ones."""
    convolutions = {}
    for name in ("features", "classifier"):
        compiled, experiment, state = build(monkeypatch, name, devices=1, platform="gpu")
        text = compiled.run.lower(state, experiment.train_data, 1).as_text()
        convolutions[name] = text.count("stablehlo.convolution")
    assert convolutions["classifier"] == 7  # depth 8: the first convolution, and two in each of three blocks
    assert convolutions["features"] == 3 * 7  # XLA drops the gradient to the image


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_lbgat_step_lowers_for_accelerators(monkeypatch, platform):
    """Two networks, and an attack of ten steps inside the scanned step."""
    monkeypatch.setattr(data, "load", test_attack.made_up_images)
    values = cifar10.get_config("method=lbgat,beta=6,model=wrn10_1,guide=resnet8")
    values.update(batch_size=16)
    for net in (values.model, values.guide):
        net.update(platform=PLATFORM_MODEL[platform])
    run = parse(values.to_dict())
    experiment = experiments.set_up(run, None)
    compiled = experiments.build_stage(experiment, run.stages["lbgat"])
    state = jax.eval_shape(compiled.init, experiments.seeds(run), fresh_shapes(experiment))
    exported = export.export(compiled.run.jitted(), platforms=[platform])(
        state, jax.eval_shape(lambda: experiment.train_data), 3
    )
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text and text.count("stablehlo.while") >= 2
