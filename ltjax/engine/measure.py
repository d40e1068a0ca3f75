"""What the report needs to know of a stage beyond its table: one more look at the test images, and its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import metrics, surgery
from ltjax.config import StageConfig
from ltjax.engine import feed
from ltjax.engine import stage as stages
from ltjax.engine.experiment import Experiment
from ltjax.system import parallel, xla
from ltjax.types import Method, Variables

SAMPLED = 20_000  # training images, about, of which class means are made where images are decoded for it
LEAST_SAMPLED = 4  # of each class


class Observer:
    """Looks at the test images through a run's stages. Stages that evaluate the same network share a program."""

    def __init__(self, experiment: Experiment):
        self._experiment, self._compiled = experiment, {}
        self._means = experiment.class_means
        if experiment.streamed:  # an epoch of decoding would be too much for a picture
            run, mesh = experiment.config, experiment.mesh
            most = max(LEAST_SAMPLED, SAMPLED // len(experiment.class_names))
            some = feed.some_of_each_class(run, experiment.data, experiment.split, mesh, most)
            self._means = feed.class_means(stages.make_apply(experiment.nets, "eval"), some, mesh)

    def observe(self, stage: StageConfig, variables: Variables) -> list[dict[str, np.ndarray]]:
        """Evaluate the test images, for each replica.

        Returns: {"predictions", "confidences", "own", "wrong": [N], "gaps": [C, bins]}. "own" and "wrong" are the
        Euclidean distances of a test image's features to the mean training features of its class, and of the nearest
        other class; absent if the stage trains the guide. "gaps": see `ltjax.metrics.classwise_gaps`.
        """
        net = stage.evaluate_net
        means = self._means(variables) if net == "net" else None
        if net not in self._compiled:
            self._compiled[net] = self._compile(net)
        test_set, replicas = self._experiment.test_set, self._experiment.config.replicas
        variables = surgery.as_evaluated(variables, stage.eval_classifier)
        everywhere, outcomes, first = parallel.replicated(self._experiment.mesh), [], 0
        for images, labels in test_set.parts():
            starts = first + labels.shape[1] * np.arange(labels.shape[0], dtype=np.int32)
            part = images, labels, parallel.put(starts, everywhere)
            outcomes.append(self._compiled[net]((variables, means), part))
            jax.block_until_ready(outcomes[-2:-1])  # one batch runs, one waits, and no more
            first += labels.size
        if replicas == 1:
            return [_joined(outcomes, test_set.size)]
        return [
            _joined([jax.tree.map(lambda x, r=replica: x[r], part) for part in outcomes], test_set.size)
            for replica in range(replicas)
        ]

    def _compile(self, net: str) -> Any:
        apply, size = stages.make_apply(self._experiment.nets, "eval"), self._experiment.test_set.size
        platform = self._experiment.mesh.devices.flat[0].platform

        def see(own: tuple[Variables, jax.Array | None], shared: tuple[jax.Array, jax.Array, jax.Array]):
            variables, means = own

            def batch(part):
                images, labels, start = part
                with xla.float32_products(platform):
                    outputs, _ = apply(variables, images.astype(jnp.float32) / 255, net=net)
                shares = jax.nn.softmax(outputs.logits)  # [B, C]
                counted = jnp.where(start + jnp.arange(labels.shape[0]) < size, labels, -1)  # without padding
                found = {"predictions": outputs.logits.argmax(-1), "confidences": shares.max(-1)}
                if means is not None:
                    found["own"], found["wrong"] = distances(outputs.features, labels, means)
                return {**found, "gaps": metrics.classwise_gaps(shares, counted)}

            return jax.lax.map(batch, shared)

        mesh = self._experiment.mesh
        function = parallel.over_replicas(see, replicas=self._experiment.config.replicas, mesh=mesh)
        return xla.jit(function, out_shardings=parallel.replicated(mesh))


def _joined(outcomes: list[dict[str, Any]], size: int) -> dict[str, np.ndarray]:
    """Outcomes of batches as those of `size` images; gaps are summed."""
    gaps = np.sum([np.asarray(part["gaps"], np.float64).sum(0) for part in outcomes], axis=0)
    names = [name for name in outcomes[0] if name != "gaps"]
    joined = {name: np.concatenate([np.asarray(part[name]).reshape(-1) for part in outcomes]) for name in names}
    return {"gaps": gaps, **{name: values[:size] for name, values in joined.items()}}


def distances(features: jax.Array, labels: jax.Array, means: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of features [B, D] to their own class's mean and to the nearest other one, [B] each; means [C, D]."""
    product = jnp.matmul(features, means.T, precision="highest")
    closeness = product - jnp.square(means).sum(-1) / 2  # [B, C]: -|z - m|^2 / 2 but for |z|^2, which all share
    nearest = jnp.where(jnp.arange(means.shape[0]) == labels[:, None], -jnp.inf, closeness).argmax(-1)

    def to(centre: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(features - centre).sum(-1))

    return to(means[labels]), to(means[nearest])


def learned(stage: StageConfig, method: Method, variables: Variables, num_classes: int) -> dict[str, np.ndarray]:
    """What the classes have of their own: {title: [C]}, of several replicas the mean.

    Learned logit scales and the lengths of the classifier's weight vectors; and what the stage's method has.
    """
    found: dict[str, Any] = {}
    net = surgery.as_evaluated(variables, stage.eval_classifier).params.get(stage.evaluate_net, {})
    if "logit_scale" in net:
        found["Logit scale"] = net["logit_scale"]
    if "classifier" in net:
        found["Length of the classifier's weights"] = np.linalg.norm(np.asarray(net["classifier"]["kernel"]), axis=-2)
    found |= method.per_class(variables.params.get("method", {}))  # [..., C], each
    means = {title: np.asarray(values).reshape(-1, num_classes).mean(0) for title, values in found.items()}
    return {title: values for title, values in means.items() if np.ptp(values) > 0}  # equal for all: nothing to see
