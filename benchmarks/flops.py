"""Count a training step's floating-point operations, by hand and by XLA, for cifar_step and adversarial_step.

A multiplication and an addition are two operations. As in XLA's count, products with the zeros of padding, and with
those between the pixels of a strided convolution's input gradient, do not count. The count by hand has only
convolutions and the classifier; XLA's also has batch norm, the loss, the optimizer, sampling and augmentation.
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
from ltjax.system import parallel, xla


class Convolution(NamedTuple):
    """A convolution, padded by (kernel - 1) / 2 pixels on each side."""

    channels_in: int
    out: int
    size: int  # pixels along a side of the input
    kernel: int = 3
    strides: int = 1

    @property
    def size_out(self) -> int:
        return -(-self.size // self.strides)

    @property
    def operations(self) -> int:
        """Count operations of a forward pass of one image; each of the two gradients takes as many."""
        padding = (self.kernel - 1) // 2  # along one axis, count pairs of an output and a tap on a pixel:
        pixels = [self.strides * y + tap - padding for y in range(self.size_out) for tap in range(self.kernel)]
        return 2 * sum(0 <= pixel < self.size for pixel in pixels) ** 2 * self.channels_in * self.out


class Network(NamedTuple):
    """Operations for one image."""

    forward: int
    first: int  # those of the first convolution
    classifier: int

    @property
    def ascent(self) -> int:
        """Count a step of an attack: forward, and the gradient to the image."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Count forward and both gradients of every layer, but no gradient to the image."""
        return 3 * self.forward - self.first


def network(model: Mapping[str, Any], num_classes: int, *, size: int = 32, channels: int = 3) -> Network:
    """Count the operations of a network, given its settings `config.model`.

    Raises:
        ValueError: For bottlenecks and the stem for large images, which are not counted here.
    """
    if model.get("stem", "small") != "small" or (model["name"] == "resnet" and model["depth"] >= 50):
        raise ValueError(f"no count by hand for {dict(model)}: only basic blocks and the small stem are counted")
    layers = convolutions(size=size, channels=channels, **{key: model[key] for key in ("name", "depth", "width")})
    classifier = 2 * layers[-1].out * num_classes
    return Network(sum(layer.operations for layer in layers) + classifier, layers[0].operations, classifier)


def convolutions(*, name: str, depth: int, width: int, size: int = 32, channels: int = 3) -> list[Convolution]:
    """List a network's convolutions with its default strides; the first is first, one of the last stage is last."""
    projects = name != "resnet_cifar"  # a 1x1 convolution if a shortcut changes the shape
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
    """Count operations for one image of a step of `ltjax.models.resnet_cifar`.

    If the backbone trains, each convolution has two gradients (the first has one), with as many products each. If it is
    frozen, it only runs forward, and only the classifier's weights have a gradient.
    """
    net = network(dict(name="resnet_cifar", depth=depth, width=width), num_classes, **shape)
    return net.training if backbone_trains else net.forward + net.classifier


def of_step(method: str, net: Network, guide: Network | None, *, num_steps: int, beta: float = 0.0) -> int:
    """Count the minimum of operations for one image of a step of "pgd" (the attack alone), "pgd_at" or "lbgat".

    The natural prediction is one forward pass, and an attack's step a forward pass and a gradient to the image. With
    beta = 0, LBGAT needs only the batch norms' statistics of clean images: a forward pass without the classifier.
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
    """Count operations for one image of a stage's step by XLA."""
    return operations(step_program(experiment, stage)) / experiment.config.batch_size


def operations(program: jax.stages.Compiled) -> float:
    return dict(program.cost_analysis() or {})["flops"]


def with_attack(count: Callable[[int], float], num_steps: int) -> float:
    """Count, by XLA, a program with an attack of `num_steps` steps; `count` does so for unrolled attacks.

    XLA counts a loop's body once. So programs of one and of two steps are unrolled and counted, and each further step
    takes as many operations as the second.
    """
    with unrolled():
        if num_steps <= 2:
            return count(num_steps)
        one = count(1)
        return one + (num_steps - 1) * (count(2) - one)


@contextlib.contextmanager
def unrolled():
    """Trace attacks inside the block without a loop."""
    looped = attacks.pgd

    def pgd(*args: Any, **settings: Any) -> Any:
        settings["unroll"] = True
        return looped(*args, **settings)

    with mock.patch.object(attacks, "pgd", pgd):
        yield


def plain_nets(run: RunConfig, num_classes: int) -> dict[str, Any]:
    """Return a run's networks with the convolutions of accelerators; those for CPUs multiply with zeros."""
    nets = {}
    for name, settings in (("net", run.model), ("guide", run.guide)):
        if settings:
            model = dict(settings)
            nets[name] = models.create(model.pop("name"), num_classes, **model, platform="gpu")
    return nets


def step_program(experiment: Experiment, stage: StageConfig, num_steps: int = 1) -> jax.stages.Compiled:
    """Compile a stage's step for one CPU device, with the convolutions of accelerators.

    There is one step, because XLA counts a loop's body once; XLA compiles a scan of one step as the step.
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
    """Compile with XLA's passes on operations, but with few later ones, since the program never runs.

    Leave out oneDNN, because XLA does not count the operations of a call.
    """
    options: dict[str, bool | str] = {"xla_backend_optimization_level": "0"}
    if xla.has_onednn():
        options[xla.ONEDNN] = False
    return lowered.compile(compiler_options=options)
