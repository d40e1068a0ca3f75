"""Floating-point operations of a training step: counted by hand, and by XLA. Used by cifar_step and adversarial_step.

A multiplication and an addition are two operations. As in XLA's count, products with the zeros of padding, and with
those between the pixels of a strided convolution's input gradient, do not count. The count by hand has convolutions and
the classifier only; XLA's also has batch norm, the loss, the optimizer, drawing and augmenting the batch.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax

from ltjax import attacks, models
from ltjax.config import RunConfig, StageConfig
from ltjax.engine.experiment import Experiment, build_stage, fresh_shapes, seeds
from ltjax.models import resnet
from ltjax.system import parallel


class Convolution(NamedTuple):
    """Padded by (kernel - 1) / 2 pixels on each side."""

    came: int  # channels in
    out: int
    size: int  # pixels along a side that come in
    kernel: int = 3
    strides: int = 1

    @property
    def size_out(self) -> int:
        return -(-self.size // self.strides)

    @property
    def operations(self) -> int:
        """Of one image, forward; the gradient to the kernel, and that to the input, takes as many."""
        padding = (self.kernel - 1) // 2  # along one axis, pairs of an output and a tap that meet a pixel:
        pixels = [self.strides * y + tap - padding for y in range(self.size_out) for tap in range(self.kernel)]
        return 2 * sum(0 <= pixel < self.size for pixel in pixels) ** 2 * self.came * self.out


class Network(NamedTuple):
    """Operations for one image."""

    forward: int
    first: int  # the first convolution's part of it
    classifier: int

    @property
    def ascent(self) -> int:
        """A step of an attack: forward, and the gradient to the image."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Forward and both gradients of every layer, but no gradient to the image."""
        return 3 * self.forward - self.first


def network(model: Mapping[str, Any], num_classes: int, *, size: int = 32, channels: int = 3) -> Network:
    """model: as in a config: name (any of `ltjax.models.MODELS`), depth, width and what else there is.

    Raises: ValueError for bottlenecks and the stem for large images, which are not counted here.
    """
    if model.get("stem", "small") != "small" or (model["name"] == "resnet" and model["depth"] >= 50):
        raise ValueError(f"no count by hand for {dict(model)}: basic blocks and the small stem alone")
    layers = convolutions(size=size, channels=channels, **{key: model[key] for key in ("name", "depth", "width")})
    classifier = 2 * layers[-1].out * num_classes
    return Network(sum(layer.operations for layer in layers) + classifier, layers[0].operations, classifier)


def convolutions(*, name: str, depth: int, width: int, size: int = 32, channels: int = 3) -> list[Convolution]:
    """Those of a network of `ltjax.models` with its default strides, the first one first and one of the last last."""
    projects = name != "resnet_cifar"  # a 1x1 convolution where a shortcut changes the shape
    if name in ("resnet_cifar", "wide_resnet"):
        stem, features = (width, width) if name == "resnet_cifar" else (16, 16 * width)
        blocks, strides = 3 * [(depth - (2 if name == "resnet_cifar" else 4)) // 6], (1, 2, 2)
    else:
        stem = features = width
        blocks, strides = resnet.BLOCKS[depth], (1, 1, 2, 2) if name == "resnet" else (1, 2, 2, 2)
    layers = [Convolution(channels, stem, size)]
    for stage, (num_blocks, stride) in enumerate(zip(blocks, strides, strict=True)):
        for block in range(num_blocks):
            before, out, step = layers[-1], features * 2**stage, stride if block == 0 else 1
            if projects and (step != 1 or before.out != out):
                layers.append(Convolution(before.out, out, before.size_out, 1, step))
            layers.append(Convolution(before.out, out, before.size_out, 3, step))
            layers.append(Convolution(out, out, layers[-1].size_out))
    return layers


def by_hand(depth: int, *, width: int, num_classes: int, backbone_trains: bool = True, **shape: int) -> int:
    """Operations for one image of a step of `ltjax.models.resnet_cifar`.

    backbone_trains: every convolution also has a gradient for its kernel and, but for the first, for its input: as many
    products again, each. Frozen: the backbone runs forward only, and only the classifier's own weights have a gradient.
    """
    net = network(dict(name="resnet_cifar", depth=depth, width=width), num_classes, **shape)
    return net.training if backbone_trains else net.forward + net.classifier


def of_step(method: str, net: Network, guide: Network | None, *, num_steps: int, beta: float = 0.0) -> int:
    """The least operations for one image of a step of "pgd" (the attack alone, on the KL), "pgd_at" or "lbgat".

    The natural prediction is one forward pass, an attack's step a forward pass and a gradient to the image. LBGAT at
    beta = 0 needs of the clean images no more than the batch norms' statistics: a forward pass without the classifier.
    """
    attack = num_steps * net.ascent
    if method == "pgd_at":
        return attack + net.training
    if method == "pgd":
        return net.forward + attack
    assert guide is not None
    clean = net.training if beta else net.forward - net.classifier
    return net.forward + attack + net.training + clean + guide.training


def by_xla(experiment: Experiment, stage: StageConfig) -> float:
    """Operations for one image of a stage's step as XLA counts them."""
    return operations(step_program(experiment, stage)) / experiment.config.batch_size


def operations(program: jax.stages.Compiled) -> float:
    return dict(program.cost_analysis() or {})["flops"]


def with_attack(count: Callable[[int], float], num_steps: int) -> float:
    """XLA's count of a program with an attack of `num_steps` steps. count: of one with so many steps -> its operations.

    XLA counts a loop's body once, however often it runs. So programs of one and of two steps are written out, and each
    further step takes as many operations as the second.
    """
    with written_out():
        if num_steps <= 2:
            return count(num_steps)
        one = count(1)
        return one + (num_steps - 1) * (count(2) - one)


@contextlib.contextmanager
def written_out():
    """What is traced in here has attacks without a loop."""
    looped = attacks.pgd

    def unrolled(*given: Any, **how: Any) -> Any:
        how["unroll"] = True
        return looped(*given, **how)

    with mock.patch.object(attacks, "pgd", unrolled):
        yield


def plain_nets(run: RunConfig, num_classes: int) -> dict[str, Any]:
    """A run's networks with the convolution of accelerators: ours for CPU writes zeros out and multiplies with them."""
    nets = {}
    for name, settings in (("net", run.model), ("guide", run.guide)):
        if settings:
            model = dict(settings)
            nets[name] = models.create(model.pop("name"), num_classes, **model, platform="gpu")
    return nets


def step_program(experiment: Experiment, stage: StageConfig, num_steps: int = 1) -> jax.stages.Compiled:
    """A stage's step with the plain convolution of accelerators, compiled for one CPU device and not run.

    One step, because XLA counts a loop's body once; of a scan of one step it makes the step alone.
    """
    cpu = jax.devices("cpu")[0]
    nets = plain_nets(experiment.config, len(experiment.class_names))
    experiment = experiment._replace(nets=nets, mesh=parallel.make_mesh([cpu]))
    with jax.default_device(cpu):
        compiled = build_stage(experiment, stage)
        state = jax.eval_shape(compiled.init, seeds(experiment.config), fresh_shapes(experiment))
        source = jax.eval_shape(lambda: experiment.train_data)
        return compile_to_count(compiled.run.lower(state, source, num_steps))


def compile_to_count(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """All that XLA does to the operations, and little of what comes after, since nothing is run."""
    return lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
