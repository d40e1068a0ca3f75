"""Distillation as a method: its losses, its teacher's fixed weights, and the class means of GKL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import losses, methods, train
from ltjax.config import parse
from ltjax.engine import experiment as experiments
from ltjax.engine.experiment import set_up
from ltjax.engine.restore import restore
from ltjax.types import Batch, Outputs, UserError, Variables
from tests.test_run import tiny_config

pytestmark = pytest.mark.usefixtures("one_device", "no_reports")

COUNTS = np.array([50, 20, 5])
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(6, 3)).astype(np.float32) for _ in range(2))
BATCH = Batch(np.zeros((6, 2, 2, 3), np.float32), np.array([0, 1, 2, 0, 1, 0]))
labelled = jax.jit(lambda labels: losses.cross_entropy(STUDENT, labels).mean())


def apply(variables, images, *, net="net", bn=None):
    assert (net, bn) in (("net", None), ("guide", "eval"))
    logits = variables.params["logits"] if net == "net" else TEACHER
    return Outputs(logits, logits), variables


def loss_of(method, batch=BATCH, student=STUDENT, arrays=None):
    arrays = method.init(jax.random.key(0))[1] if arrays is None else arrays

    @jax.jit
    def total_arrays_and_metrics(student, arrays, batch):
        total, (variables, metrics) = method.loss(apply, Variables({"logits": student}, {}, arrays), batch, None)
        return total, variables.arrays, metrics

    return total_arrays_and_metrics(student, arrays, batch)


def test_kl_is_that_of_dive(golden):
    numbers = golden("dive")
    student, teacher = (jnp.asarray(numbers[f"logits_{who}"]) for who in ("student", "teacher"))
    loss = dict(name="balanced_softmax")
    method = methods.create("distil", numbers["class_counts"], loss=loss, temperature=2.0, share=0.5, power=0.5)

    def of_golden(variables, images, *, net="net", bn=None):
        logits = variables.params["logits"] if net == "net" else teacher
        return Outputs(logits, logits), variables

    batch = Batch(jnp.zeros(18), jnp.asarray(numbers["labels"], jnp.int32))
    total = lambda student: method.loss(of_golden, Variables({"logits": student}, {}, {}), batch, None)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(student)
    np.testing.assert_allclose(value, numbers["cifar100_loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, numbers["cifar100_grad_student"], atol=1e-6)


def test_mixed_images_count_both_labels():
    method = methods.create("distil", COUNTS, share=0.0)
    mixed = BATCH._replace(partner_labels=BATCH.labels[::-1], lam=jnp.float32(0.3))
    expected = 0.3 * labelled(BATCH.labels) + 0.7 * labelled(BATCH.labels[::-1])
    np.testing.assert_allclose(loss_of(method, mixed)[0], expected, rtol=1e-6)


def test_gkl_starts_with_uniform_weights_then_uses_the_last_epochs_means():
    method = methods.create("distil", COUNTS, kind="gkl", weights_temperature=2.0)
    settings = dict(alpha=1.0, beta=4.0, gamma=0.1, temperature=2.0)
    gkl = jax.jit(lambda weights: losses.gkl(STUDENT, TEACHER, weights=weights, **settings))
    first, arrays, _ = loss_of(method)
    uniform = gkl(np.full((6, 3), 1 / 3, np.float32))
    np.testing.assert_allclose(first, labelled(BATCH.labels) + uniform, rtol=1e-5)

    arrays = method.refresh(arrays, None)
    softmax = np.asarray(jax.nn.softmax(TEACHER / 2.0))
    means = np.stack([softmax[np.asarray(BATCH.labels) == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(arrays["class_means"], means, rtol=1e-5)
    second, _, _ = loss_of(method, arrays=arrays)
    np.testing.assert_allclose(second, labelled(BATCH.labels) + gkl(means[BATCH.labels]), rtol=1e-5)


def test_a_class_that_an_epoch_does_not_show_keeps_its_weights():
    method = methods.create("distil", COUNTS, kind="gkl")
    _, arrays, _ = loss_of(method, BATCH._replace(labels=jnp.array([0, 1, 0, 0, 1, 0])))
    np.testing.assert_allclose(method.refresh(arrays, None)["class_means"][2], 1 / 3, rtol=1e-6)


def test_the_distance_ramps_up():
    method = methods.create("distil", COUNTS, kind="gkl", warmup=0.1)
    assert method.progress
    totals = [loss_of(method, BATCH._replace(progress=jnp.float32(p)))[0] for p in (0.0, 0.05, 0.1, 0.5)]
    near = labelled(BATCH.labels)
    apart = totals[2] - near
    np.testing.assert_allclose(totals, [near, near + apart / 2, totals[2], totals[2]], rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="mse"), r"kind = 'mse'; allowed: kl, gkl"),
        (dict(weights="batch"), r"weights = 'batch'; allowed: class, image"),
        (dict(share=1.5), r"share = 1.5, warmup = 0.0: from 0 to 1"),
    ],
)
def test_impossible_settings_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        methods.create("distil", COUNTS, **settings)


def config(**changes):
    """Return a network, and a second one that learns from it."""
    made = tiny_config(stages=("ce", "student"), epochs=1)
    guide = {**made["model"]}
    groups = {**made["ce"]["groups"], "guide": dict(match="guide/.*", rate=0.0)}
    made["ce"] = {**made["ce"], "groups": groups}
    method = dict(name="distil", kind="kl", power=0.5)
    made["student"] = {**made["ce"], "method": method, "start_from": "ce", "surgery": dict(name="teacher")}
    return {**made, "guide": guide, **changes}


def test_the_teacher_is_the_first_stages_network_and_stays(tmp_path):
    made = config()
    train.train(made, tmp_path / "run")
    experiment = set_up(parse(made), None)
    teacher, student = (
        restore(experiment, experiment.config.stages[name], tmp_path / "run").state.variables for name in made["stages"]
    )
    for part in ("params", "stats"):
        before, after = getattr(teacher, part)["net"], getattr(student, part)["guide"]
        jax.tree.map(np.testing.assert_array_equal, before, after)
    kernels = [v.params["net"]["classifier"]["kernel"] for v in (teacher, student)]
    assert not np.allclose(*kernels)


def test_a_teacher_of_another_shape_is_refused(monkeypatch):
    made = config()
    made["guide"] = {**made["guide"], "width": 4}
    experiment = set_up(parse(made), None)
    monkeypatch.setattr(experiments, "fresh_variables", lambda *_: experiment.shapes)
    with pytest.raises(UserError, match=r"surgery 'teacher' copies the network to the guide: config.guide has to be"):
        experiments.apply_surgery(experiment, experiment.config.stages["student"], experiment.shapes)
