"""The comparison with PyTorch: the same network, timings of every program, and correct ratios."""

import sys

import jax
import numpy as np
import pytest

from benchmarks import cifar_step
from ltjax import models
from ltjax.interop.torch import export_state_dict
from ltjax.optim import flatten, unflatten
from ltjax.types import Variables
from tests.pytorch import pytorch

SIZE = dict(depth=8, width=4, num_classes=100, batch_size=4, eval_batch_size=4)


def test_the_pytorch_network_has_as_many_parameters_as_ours():
    pytorch()
    from benchmarks import torch_step

    assert sum(p.numel() for p in torch_step.ResNet(32).parameters()) == 470_004


def test_the_pytorch_network_with_our_weights_gives_our_logits():
    torch = pytorch()
    from benchmarks import torch_step

    random = np.random.default_rng(0)
    images = random.normal(size=(4, 32, 32, 3)).astype(np.float32)
    net = models.create("resnet_cifar", 100, depth=8)
    shapes = flatten(jax.eval_shape(net.init, jax.random.key(0), images))
    drawn = {path: random.normal(0.1, 0.2, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    made = unflatten({path: abs(x) + 0.5 if path.endswith("/var") else x for path, x in drawn.items()})
    state_dict = export_state_dict(Variables({"net": made["params"]}, {"net": made["batch_stats"]}, {}), net)
    theirs = torch_step.ResNet(8)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()})
    with torch.no_grad():
        actual = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(actual, net.apply(made, images, False).logits, rtol=1e-4, atol=1e-4 * abs(actual).max())


def test_every_pytorch_program_is_timed_in_a_separate_process():
    pytorch()
    with cifar_step.TorchProcess(sys.executable, SIZE) as torch:
        for way in torch.ways:
            for what, count in (("features", 2), ("classifier", 2), ("evaluation", 6)):
                assert torch.seconds(way, what, count) > 0
    assert torch.process.returncode == 0


def test_stage_2_trains_only_classifier_and_scale():
    torch = pytorch()
    from benchmarks import torch_step

    runner = torch_step.Runner(torch_step.WAYS["nchw_float32"], **SIZE)
    parameters = dict(runner.net.named_parameters(), scale=runner.scale)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    runner.classifier()
    changed = {name for name, value in parameters.items() if not torch.equal(value, before[name])}
    assert changed == {"linear.weight", "linear.bias", "scale"}
    assert runner.net.bn1.num_batches_tracked == 1
    assert [values.shape for values in runner.evaluate(6)] == 3 * [(6,)]


def test_ratios_are_to_pytorchs_nchw_float32_and_to_its_best():
    seconds = {
        "ltjax_float32": {"features": [0.002, 0.001, 0.004]},
        "torch_nchw_float32": {"features": [0.006, 0.008, 0.005]},
        "torch_channels_last_float32": {"features": [0.003, 0.003, 0.009]},
    }
    figures = cifar_step.with_ratios(seconds)
    ours = figures["ltjax_float32"]["features"]
    assert ours["seconds_per_image"] == seconds["ltjax_float32"]["features"]
    names = ("images_per_second", "over_torch_nchw_float32", "over_best_torch")
    assert [ours["median"][name] for name in names] == pytest.approx([500, 3, 1.5])
    assert [ours["minimum"][name] for name in names] == pytest.approx([1000, 5, 3])
    theirs = figures["torch_nchw_float32"]["features"]["median"]
    assert [theirs[name] for name in names] == pytest.approx([1 / 0.006, 1, 0.5])


def test_a_python_without_pytorch_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cifar_step.main([f"--torch={tmp_path / 'python'}"])
    *_, last = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'python'} has no PyTorch" in last and 'pip install -e ".[torch]"' in last
