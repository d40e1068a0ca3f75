"""ResNet-50 and ResNeXt-50 against the same networks written here in PyTorch, with the same random weights."""

import jax
import numpy as np
import pytest

from ltjax import models
from ltjax.interop.torch import import_state_dict
from ltjax.optim import flatten
from tests.pytorch import pytorch

torch = pytorch()

CLASSES = 7
SETTINGS = {"resnet50": dict(groups=1, group_width=64), "resnext50": dict(groups=32, group_width=4)}
IMAGES = np.random.default_rng(0).uniform(size=(4, 64, 64, 3)).astype(np.float32)


class Bottleneck(torch.nn.Module):
    def __init__(self, came, planes, stride, groups, group_width):
        super().__init__()
        inner = planes * group_width // 64 * groups
        self.conv1 = torch.nn.Conv2d(came, inner, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(inner)
        self.conv2 = torch.nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(inner)
        self.conv3 = torch.nn.Conv2d(inner, 4 * planes, 1, bias=False)
        self.bn3 = torch.nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride != 1 or came != 4 * planes:
            convolution = torch.nn.Conv2d(came, 4 * planes, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet50(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        came = 64
        for stage, number in enumerate((3, 4, 6, 3)):
            blocks, planes = [], 64 * 2**stage
            for block in range(number):
                blocks.append(Bottleneck(came, planes, 2 if stage and not block else 1, **settings))
                came = 4 * planes
            setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(came, CLASSES)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module", params=SETTINGS)
def weights(request):
    """Return the name, and a state_dict of random weights, scales, biases and running statistics."""
    torch.manual_seed(0)
    module = ResNet50(**SETTINGS[request.param])
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, 0, 0.2)
            torch.nn.init.normal_(layer.running_mean, 0, 0.2)
    return request.param, {name: value.double() for name, value in module.state_dict().items()}


def both(weights, train, dtype):
    """Return logits and running statistics after a forward pass: PyTorch's, and ours by path."""
    name, state_dict = weights
    module = ResNet50(**SETTINGS[name]).to(getattr(torch, dtype))
    module.load_state_dict(state_dict)
    module.train(train)
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2)).to(getattr(torch, dtype)))

    def given(values):
        return {key: value.numpy().astype(dtype) for key, value in values.items()}

    with jax.enable_x64(dtype == "float64"):
        net = models.create("resnet", CLASSES, depth=50, stem="large", dtype=dtype, **SETTINGS[name])
        start, after = (import_state_dict(given(values), net) for values in (state_dict, module.state_dict()))
        variables = {"params": start.params["net"], "batch_stats": start.stats["net"]}
        apply = jax.jit(lambda variables, images: net.apply(variables, images, train, mutable=["batch_stats"]))
        compiled = apply.lower(variables, IMAGES.astype(dtype)).compile({"xla_backend_optimization_level": "0"})
        outputs, new = compiled(variables, IMAGES.astype(dtype))
        statistics = flatten(after.stats["net"]), flatten(new["batch_stats"])
        return (expected.numpy(), np.asarray(outputs.logits)), jax.tree.map(np.asarray, statistics)


# In float32, training differs by 5e-5: 53 batch norms pass rounding on, the last with 16 numbers a channel.
@pytest.mark.parametrize("train, dtype, tolerance", [(False, "float32", 1e-5), (True, "float64", 1e-10)])
def test_logits_and_running_statistics_are_pytorchs(weights, train, dtype, tolerance):
    (expected, actual), (statistics, ours) = both(weights, train, dtype)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert statistics.keys() == ours.keys()
    for path, value in statistics.items():
        np.testing.assert_allclose(ours[path], value, rtol=tolerance, atol=tolerance, err_msg=path)
