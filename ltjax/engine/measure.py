"""What the report needs to know of a stage beyond its table: one more look at the test images, and its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltjax import metrics, surgery
from ltjax.config import Run, Stage
from ltjax.engine import feed, stage
from ltjax.engine.problem import Problem
from ltjax.system import parallel, xla
from ltjax.types import Method, Variables

SAMPLED = 20_000  # training images, about, of which class means are made where images are decoded for it
LEAST_SAMPLED = 4  # of each class


class Observer:
    """Compiled once for all stages of a run that are judged by the same network."""

    def __init__(self, run: Run, problem: Problem):
        self._run, self._problem, self._compiled = run, problem, {}
        self._means = problem.class_means
        if problem.streamed:  # an epoch of decoding would be too much for a picture
            most = max(LEAST_SAMPLED, SAMPLED // len(problem.class_names))
            some = feed.some_of_each_class(run, problem.data, problem.split, problem.mesh, most)
            self._means = feed.class_means(stage.make_apply(problem.nets, "eval"), some, problem.mesh)

    def observe(self, settings: Stage, variables: Variables) -> list[dict[str, np.ndarray]]:
        """What the stage's evaluation makes of the test images, of each replica:
        {"predictions", "confidences", "own", "wrong": [N], "gaps": [C, bins] of `ltjax.metrics.classwise_gaps`}.

        own, wrong: Euclidean distance of a test feature to the mean training feature of its class, and to the nearest
        one of another class; absent where the stage trains the guide.
        """
        net = settings.evaluate_net
        means = self._means(variables) if net == "net" else None
        if net not in self._compiled:
            self._compiled[net] = self._compile(net)
        held, found, first = self._problem.test_set, [], 0
        everywhere = parallel.replicated(self._problem.mesh)
        for images, labels in held.parts():
            starts = first + labels.shape[1] * np.arange(labels.shape[0], dtype=np.int32)
            part = images, labels, parallel.put(starts, everywhere)
            found.append(self._compiled[net]((surgery.as_evaluated(variables, settings.eval_classifier), means), part))
            jax.block_until_ready(found[-2:-1])
            first += labels.size
        each = []
        for replica in range(self._run.replicas):
            own = [{key: x[replica] if self._run.replicas > 1 else x for key, x in one.items()} for one in found]
            gaps = np.sum([np.asarray(one.pop("gaps"), np.float64).sum(0) for one in own], axis=0)
            joined = {key: np.concatenate([np.asarray(one[key]).reshape(-1) for one in own]) for key in own[0]}
            each.append({"gaps": gaps, **{key: values[: held.size] for key, values in joined.items()}})
        return each

    def _compile(self, net: str) -> Any:
        apply, size = stage.make_apply(self._problem.nets, "eval"), self._problem.test_set.size
        platform = self._problem.mesh.devices.flat[0].platform

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

        mesh = self._problem.mesh
        function = parallel.over_replicas(see, replicas=self._run.replicas, mesh=mesh)
        return xla.jit(function, out_shardings=parallel.replicated(mesh))


def distances(features: jax.Array, labels: jax.Array, means: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of features [B, D] to their own class's mean and to the nearest other one, [B] each; means [C, D]."""
    product = jnp.matmul(features, means.T, precision="highest")
    closeness = product - jnp.square(means).sum(-1) / 2  # [B, C]: -|z - m|^2 / 2 but for |z|^2, which all share
    nearest = jnp.where(jnp.arange(means.shape[0]) == labels[:, None], -jnp.inf, closeness).argmax(-1)

    def to(centre: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(features - centre).sum(-1))

    return to(means[labels]), to(means[nearest])


def learned(settings: Stage, method: Method, variables: Variables, num_classes: int) -> dict[str, np.ndarray]:
    """What the classes have of their own: {title: [C]}, of several replicas the mean.

    Learned logit scales and the lengths of the classifier's weight vectors; and what the stage's method has.
    """
    found: dict[str, Any] = {}
    net = surgery.as_evaluated(variables, settings.eval_classifier).params.get(settings.evaluate_net, {})
    if "logit_scale" in net:
        found["Logit scale"] = net["logit_scale"]
    if "classifier" in net:
        found["Length of the classifier's weights"] = np.linalg.norm(np.asarray(net["classifier"]["kernel"]), axis=-2)
    found |= method.per_class(variables.params.get("method", {}))  # [..., C], each
    means = {title: np.asarray(values).reshape(-1, num_classes).mean(0) for title, values in found.items()}
    return {title: values for title, values in means.items() if np.ptp(values) > 0}  # equal for all: nothing to see
