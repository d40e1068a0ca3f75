"""Compute what the report shows of a stage: each test image's outcome, and the values that each class has learned."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import metrics, surgery
from ltjax.config import StageConfig
from ltjax.data.augment import as_float
from ltjax.engine import feed
from ltjax.engine import stage as stages
from ltjax.engine.experiment import Experiment
from ltjax.system import parallel, xla
from ltjax.types import Method, Variables

SAMPLED = 20_000  # about so many training images give the class means if they have to be decoded
LEAST_SAMPLED = 4  # images of each class


class Observer:
    """Evaluates the test images at the end of each stage. Stages that evaluate the same network share a program."""

    def __init__(self, experiment: Experiment):
        self._experiment, self._compiled = experiment, {}
        self._means = experiment.class_means
        if experiment.streamed:  # decoding a whole epoch would take too long
            run, mesh = experiment.config, experiment.mesh
            most = max(LEAST_SAMPLED, SAMPLED // len(experiment.class_names))
            some = feed.some_of_each_class(run, experiment.data, experiment.split, mesh, most)
            self._means = feed.class_means(stages.make_apply(experiment.nets, "eval"), some, mesh)

    def observe(self, stage: StageConfig, variables: Variables) -> list[dict[str, np.ndarray]]:
        """Evaluate the test images, for each replica.

        Returns:
          For each replica, {"predictions", "confidences", "own", "wrong": [N], "gaps": [C, bins]}. "own" and "wrong"
          are Euclidean distances of the image's features: to the mean training features of its class, and to those of
          the nearest other class. They are absent if the stage evaluates the guide. "gaps": see
          `ltjax.metrics.classwise_gaps`.
        """
        net = stage.evaluate_net
        variables = surgery.as_evaluated(variables, stage.eval_classifier)
        means = self._means(variables) if net == "net" else None
        if net not in self._compiled:
            self._compiled[net] = self._compile(net)
        test_set, replicas = self._experiment.test_set, self._experiment.config.replicas
        everywhere, outcomes, first = parallel.replicated(self._experiment.mesh), [], 0
        for images, labels in test_set.parts():
            starts = first + labels.shape[1] * np.arange(labels.shape[0], dtype=np.int32)
            part = images, labels, parallel.put(starts, everywhere)
            outcomes.append(self._compiled[net]((variables, means), part))
            jax.block_until_ready(outcomes[-2:-1])  # at most two batches on the devices
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

        def observe(
            per_replica: tuple[Variables, jax.Array | None], batches: tuple[jax.Array, jax.Array, jax.Array]
        ) -> dict[str, jax.Array]:
            variables, means = per_replica

            def of_batch(batch):
                images, labels, start = batch
                with xla.float32_products(platform):
                    outputs, _ = apply(variables, as_float(images), net=net)
                probabilities = jax.nn.softmax(outputs.logits)  # [B, C]
                counted = jnp.where(start + jnp.arange(labels.shape[0]) < size, labels, -1)  # without padding
                outcome = {"predictions": outputs.logits.argmax(-1), "confidences": probabilities.max(-1)}
                if means is not None:
                    outcome["own"], outcome["wrong"] = distances(outputs.features, labels, means)
                return {**outcome, "gaps": metrics.classwise_gaps(probabilities, counted)}

            return jax.lax.map(of_batch, batches)

        mesh = self._experiment.mesh
        function = parallel.over_replicas(observe, replicas=self._experiment.config.replicas, mesh=mesh)
        return xla.jit(function, out_shardings=parallel.replicated(mesh))


def _joined(outcomes: list[dict[str, Any]], size: int) -> dict[str, np.ndarray]:
    """Join the outcomes of batches to those of `size` images. Sum the gaps."""
    gaps = np.sum([np.asarray(part["gaps"], np.float64).sum(0) for part in outcomes], axis=0)
    names = [name for name in outcomes[0] if name != "gaps"]
    joined = {name: np.concatenate([np.asarray(part[name]).reshape(-1) for part in outcomes]) for name in names}
    return {"gaps": gaps, **{name: values[:size] for name, values in joined.items()}}


def distances(features: jax.Array, labels: jax.Array, means: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances [B] of features [B, D] to the mean of their class, and [B] to the nearest other mean; means [C, D]."""
    product = jnp.matmul(features, means.T, precision="highest")
    closeness = product - jnp.square(means).sum(-1) / 2  # [B, C]: -|z - m|^2 / 2, without |z|^2, which is constant
    nearest = jnp.where(jnp.arange(means.shape[0]) == labels[:, None], -jnp.inf, closeness).argmax(-1)

    def distance(centre: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(features - centre).sum(-1))

    return distance(means[labels]), distance(means[nearest])


def learned(stage: StageConfig, method: Method, variables: Variables, num_classes: int) -> dict[str, np.ndarray]:
    """Collect the values that differ between classes: {title: [C]}, means over replicas.

    These are the learned logit scales, the norms of the classifier's weight vectors, and `Method.per_class`.
    """
    per_class: dict[str, Any] = {}
    net = surgery.as_evaluated(variables, stage.eval_classifier).params.get(stage.evaluate_net, {})
    if "logit_scale" in net:
        per_class["Logit scale"] = net["logit_scale"]
    if "classifier" in net:
        norms = np.linalg.norm(np.asarray(net["classifier"]["kernel"]), axis=-2)
        per_class["Length of the classifier's weights"] = norms
    per_class |= method.per_class(variables.params.get("method", {}))  # {title: [..., C]}
    means = {title: np.asarray(values).reshape(-1, num_classes).mean(0) for title, values in per_class.items()}
    return {title: values for title, values in means.items() if np.ptp(values) > 0}
