"""Observe a stage for the report: the outcome of each test image, and the values of each class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import metrics
from ltjax.config import StageConfig
from ltjax.engine import class_means, evaluate, feed
from ltjax.engine import stage as stages
from ltjax.engine.experiment import Experiment
from ltjax.runs.evaluated import as_evaluated
from ltjax.types import Method, Variables

SAMPLED = 20_000  # approximate number of training images for class means if they must be decoded
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
            self._means = class_means.make(stages.make_apply(experiment.nets, "eval"), some, mesh)

    def observe(self, stage: StageConfig, variables: Variables) -> list[dict[str, np.ndarray]]:
        """Evaluate the test images, for each replica.

        Returns:
          For each replica, {"predictions", "confidences", "own", "wrong": [N], "gaps": [C, bins]}. "own" and "wrong"
          are Euclidean distances of the image's features: to the mean training features of its class, and to those of
          the nearest other class. They are absent if the stage evaluates the guide. "gaps": see
          `ltjax.metrics.classwise_gaps`.
        """
        experiment, net = self._experiment, stage.evaluate_net
        replicas, test_set = experiment.config.replicas, experiment.test_set
        if net not in self._compiled:
            self._compiled[net] = evaluate.over_batches(
                experiment.nets, experiment.mesh, _figures, replicas=replicas, net=net
            )
        variables = as_evaluated(variables, stage.eval_classifier)
        parts = self._compiled[net](variables, test_set, self._means(variables) if net == "net" else None)
        gaps = np.sum([np.asarray(part.pop("gaps"), np.float64).sum(-3) for part in parts], axis=0)
        observed = {**evaluate.joined(parts, test_set.size, replicas), "gaps": gaps}
        if replicas == 1:
            return [observed]
        return [{name: values[replica] for name, values in observed.items()} for replica in range(replicas)]


def _figures(outputs: Any, labels: jax.Array, means: jax.Array | None) -> dict[str, jax.Array]:
    """Compute what `Observer.observe` returns of a batch."""
    figures = evaluate.outcome(outputs.logits, labels)
    del figures["losses"]
    if means is not None:
        figures["own"], figures["wrong"] = distances(outputs.features, labels, means)
    return {**figures, "gaps": metrics.classwise_gaps(jax.nn.softmax(outputs.logits), labels)}


def distances(features: jax.Array, labels: jax.Array, means: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances [B] of features [B, D] to the mean of their class, and [B] to the nearest other mean; means [C, D]."""
    closeness = evaluate.closeness(features, means)  # [B, C]
    nearest = jnp.where(jnp.arange(means.shape[0]) == labels[:, None], -jnp.inf, closeness).argmax(-1)

    def distance(centre: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(features - centre).sum(-1))

    return distance(means[labels]), distance(means[nearest])


def class_values(stage: StageConfig, method: Method, variables: Variables, num_classes: int) -> dict[str, np.ndarray]:
    """Collect the values that differ between classes: {title: [C]}, means over replicas.

    These are the learned logit scales, the norms of the classifier's weight vectors, and `Method.per_class`, some of
    which are learned and some set by the classes' counts.
    """
    per_class: dict[str, Any] = {}
    net = as_evaluated(variables, stage.eval_classifier).params.get(stage.evaluate_net, {})
    if "logit_scale" in net:
        per_class["Logit scale"] = net["logit_scale"]
    if "classifier" in net:
        norms = np.linalg.norm(np.asarray(net["classifier"]["kernel"]), axis=-2)
        per_class["Length of the classifier's weights"] = norms
    per_class |= method.per_class(variables.params.get("method", {}))  # {title: [..., C]}
    means = {title: np.asarray(values).reshape(-1, num_classes).mean(0) for title, values in per_class.items()}
    return {title: values for title, values in means.items() if np.ptp(values) > 0}
