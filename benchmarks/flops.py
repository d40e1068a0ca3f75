"""Floating-point operations of a training step of a CIFAR ResNet: counted by hand, and by XLA. Used by cifar_step.py.

A multiplication and an addition are two operations. As in XLA's count, products with the zeros of padding, and with
those between the pixels of a strided convolution's input gradient, do not count. The count by hand has convolutions and
the classifier only; XLA's also has batch norm, the loss, the optimizer, drawing and augmenting the batch.
"""

import jax

from ltjax import config as config_module
from ltjax import models, parallel, train


def by_hand(
    depth: int, *, width: int, num_classes: int, size: int = 32, channels: int = 3, backbone_trains: bool = True
) -> int:
    """Operations for one image [size, size, channels] of a step of `ltjax.models.resnet_cifar`.

    backbone_trains: every convolution also has a gradient for its kernel and, but for the first, for its input: as many
    products again, each. Frozen: the backbone runs forward only, and only the classifier's own weights have a gradient.
    """
    layers = [(channels, width, size, 1)]  # (channels in, channels out, size in, strides) of each 3x3 convolution
    for number in range(3):
        for block in range((depth - 2) // 6):
            strides = 2 if number > 0 and block == 0 else 1
            out, came = width * 2**number, layers[-1][1]
            layers.append((came, out, size, strides))
            size = -(-size // strides)
            layers.append((out, out, size, 1))
    convolutions = [2 * _products(size, strides) ** 2 * came * out for came, out, size, strides in layers]
    classifier = 2 * 4 * width * num_classes
    if backbone_trains:
        return 3 * (sum(convolutions) + classifier) - convolutions[0]
    return sum(convolutions) + 2 * classifier


def _products(size: int, strides: int) -> int:
    """Along one axis: pairs of an output and a tap of 3 that meet a pixel, with one pixel of padding."""
    return sum(0 <= strides * out + tap - 1 < size for out in range(-(-size // strides)) for tap in range(3))


def by_xla(run: config_module.Run, name: str, settings: config_module.Stage, problem: train.Problem) -> float:
    """Operations for one image of a stage's step as XLA counts them."""
    return dict(compiled(run, name, settings, problem).cost_analysis() or {})["flops"] / run.batch_size


def compiled(
    run: config_module.Run, name: str, settings: config_module.Stage, problem: train.Problem, num_steps: int = 1
) -> jax.stages.Compiled:
    """A stage's step with the plain convolution of accelerators, compiled for one CPU device and not run.

    Our own convolution for CPU writes zeros out and multiplies with them. One step, because XLA counts a loop's body
    once, however often it runs; of a scan of one step it makes the step alone.
    """
    cpu = jax.devices("cpu")[0]
    model = dict(run.model)
    plain = models.create(model.pop("name"), len(problem.images.class_names), **model, platform="gpu")
    problem = problem._replace(nets={"net": plain}, mesh=parallel.make_mesh([cpu]))
    with jax.default_device(cpu):
        built = train.build_stage(run, name, settings, problem)
        variables = jax.eval_shape(lambda: train.fresh_variables(run, name, problem))
        state = jax.eval_shape(built.init, train.seeds(run), variables)
        source = jax.eval_shape(lambda: problem.train_data)
        return built.run.lower(state, source, num_steps).compile()
