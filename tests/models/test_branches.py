"""ResLT's branches: against the authors' numbers, against NumPy, and in the network around them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ltjax import models
from ltjax.interop.torch import import_state_dict
from ltjax.models.branches import ConvBranches, NormBranches
from ltjax.optim import flatten, unflatten
from ltjax.types import UserError

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
KINDS = models.BRANCH_KINDS


def make(**settings):
    return models.create("resnet_cifar", 10, **{"depth": 8, "width": 4, "branches": 3, **settings})


def some_variables(module, *inputs):
    """Return arbitrary weights and statistics, variances above 0, and nothing at its initial value."""
    random = np.random.default_rng(1)
    like = flatten(jax.eval_shape(lambda rng: module.init(rng, *inputs, train=False), jax.random.key(0)))
    draw = {path: random.normal(0.3, 0.5, leaf.shape).astype(np.float32) for path, leaf in like.items()}
    return unflatten({path: np.abs(value) + 0.1 if path.endswith("/var") else value for path, value in draw.items()})


def num_parameters(num_classes=10, **settings):
    net = models.create("resnet_cifar", num_classes, **settings)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), IMAGES)["params"]))


def test_three_norms_add_two_numbers_a_channel_to_resnet_32():
    assert num_parameters(100, depth=32, branches=3) == 470_004 + 3 * 2 * 64


@pytest.mark.parametrize("branches", [2, 3])
def test_one_convolution_adds_the_squared_width_for_each_branch(branches):
    plain, branched = (num_parameters(depth=8, branches=r, branch_kind="conv") for r in (0, branches))
    assert branched - plain == branches * (64 * 64 + 2 * 64)


@pytest.fixture(scope="module")
def authors(golden):
    """Return the numbers of the authors' training, our network and its variables before."""
    numbers = golden("reslt_train")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    net = models.create("resnet_cifar", 100, depth=8, branches=3, mean=mean, std=std)
    initial = {key.removeprefix("init/"): value for key, value in numbers.items() if key.startswith("init/")}
    start = import_state_dict(initial, net)
    return numbers, net, {"params": start.params["net"], "batch_stats": start.stats["net"]}


def test_branch_logits_in_evaluation_are_the_authors(authors):
    numbers, net, variables = authors
    outputs = jax.jit(net.apply)(variables, numbers["eval_images"].astype(np.float32) / 255)
    np.testing.assert_allclose(outputs.branches, numbers["eval_branch_logits"], rtol=1e-4, atol=1e-4)


def test_branch_logits_in_training_give_the_authors_first_loss(authors):
    """Initially every norm is the identity in evaluation, so only training tests the layers after it."""
    numbers, net, variables = authors
    train = jax.jit(lambda v, images: net.apply(v, images, True, mutable=["batch_stats"])[0])
    logits = np.float64(train(variables, numbers["images"][0].astype(np.float32) / 255).branches)
    labels = numbers["labels"][0]

    def cross_entropy(logits):
        return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[:, None], -1)[:, 0]

    starts = (0, numbers["medium_start"], numbers["tail_start"])  # classes are in order of their counts
    member = np.stack([labels >= start for start in starts])  # [3, B]
    each = (member * np.stack([cross_entropy(branch) for branch in logits])).sum() / member.sum()
    loss = numbers["beta"] * each + (1 - numbers["beta"]) * cross_entropy(logits.sum(0)).mean()
    np.testing.assert_allclose(loss, numbers["losses"][0], rtol=1e-4)


X = np.random.default_rng(2).normal(size=(5, 3, 2, 4)).astype(np.float32)  # [B, h, w, D]


def batch_norm(x, params, stats, train):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def run_branches(module, train):
    """Return the variables as [params, statistics], and the output."""
    variables = some_variables(module, X)
    features, _ = jax.jit(lambda variables: module.apply(variables, X, train, mutable=["batch_stats"]))(variables)
    return variables["params"], variables["batch_stats"], features


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("num_branches", [2, 3])
def test_norm_branches_are_batch_norms_and_a_mean(num_branches, train):
    params, stats, features = run_branches(NormBranches(num_branches), train)
    names = [f"norm{r + 1}" for r in range(num_branches)]
    expected = [batch_norm(np.float64(X), params[name], stats[name], train).mean((1, 2)) for name in names]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("num_branches", [2, 3])
def test_conv_branches_pool_last_in_training_and_first_in_evaluation(num_branches, train):
    params, stats, features = run_branches(ConvBranches(num_branches), train)
    x = np.float64(X if train else X.mean((1, 2), keepdims=True))
    y = np.maximum(batch_norm(x @ params["conv"]["kernel"][0, 0], params["norm"], stats["norm"], train), 0)
    expected = np.split(y.mean((1, 2)), num_branches, axis=-1)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_pooled_branches_pool_first_in_training_too(train):
    params, stats, features = run_branches(ConvBranches(3, pool_first=True), train)
    x = np.float64(X.mean((1, 2), keepdims=True))
    y = np.maximum(batch_norm(x @ params["conv"]["kernel"][0, 0], params["norm"], stats["norm"], train), 0)
    np.testing.assert_allclose(features, np.split(y[:, 0, 0], 3, axis=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_branches", [2, 3])
def test_the_convolution_of_branches_begins_with_the_variance_of_three(num_branches):
    x, module = np.zeros((1, 1, 1, 256), np.float32), ConvBranches(num_branches)
    kernel = jax.jit(lambda key: module.init(key, x, False)["params"]["conv"]["kernel"])(jax.random.key(0))
    assert float(kernel.std()) == pytest.approx((2 / (3 * 256)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_every_statistic(kind):
    net = make(branch_kind=kind)
    variables = some_variables(net, IMAGES)
    _, after = jax.jit(lambda v: net.apply(v, IMAGES, True, mutable=["batch_stats"]))(variables)
    before, after = (flatten(v["batch_stats"]["branches"]) for v in (variables, after))
    assert not [path for path in before if np.any(before[path] == after[path])]


def run(net, variables):
    return jax.jit(net.apply)(variables, IMAGES)


@pytest.fixture(scope="module")
def outcomes():
    """Return {kind: (variables, outputs)} of evaluation."""
    nets = {kind: make(branch_kind=kind) for kind in KINDS}
    variables = {kind: some_variables(net, IMAGES) for kind, net in nets.items()}
    return {kind: (variables[kind], run(net, variables[kind])) for kind, net in nets.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_is_the_sum_of_the_branches(outcomes, kind):
    outputs = outcomes[kind][1]
    assert outputs.branches.shape == (3, 4, 10)
    np.testing.assert_allclose(outputs.logits, np.sum(outputs.branches, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_network_without_branches(outcomes, kind):
    variables, outputs = outcomes[kind]
    plain = {name: {k: v for k, v in tree.items() if k != "branches"} for name, tree in variables.items()}
    np.testing.assert_allclose(outputs.features, run(make(branches=0), plain).features, rtol=1e-5, atol=1e-5)


def branch_features(variables, features):
    """Compute norm branches [3, B, D] in evaluation, where batch norm and the mean over space commute."""
    params, stats = variables["params"]["branches"], variables["batch_stats"]["branches"]
    names = ("norm1", "norm2", "norm3")
    return np.stack([batch_norm(np.float64(features), params[name], stats[name], False) for name in names])


def test_one_linear_classifier_serves_every_branch(outcomes):
    variables, outputs = outcomes["norm"]
    head = variables["params"]["classifier"]
    expected = branch_features(variables, outputs.features) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs.branches, expected, rtol=1e-4, atol=1e-4)


def test_one_cosine_classifier_serves_every_branch():
    net = make(classifier="cosine", cosine_scale=16.0)
    variables = some_variables(net, IMAGES)
    outputs, kernel = run(net, variables), variables["params"]["classifier"]["kernel"]
    features = branch_features(variables, outputs.features)
    lengths = np.linalg.norm(features, axis=-1, keepdims=True) * np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(outputs.branches, 16 * (features @ kernel) / lengths, rtol=1e-4, atol=1e-4)


def test_the_logit_scale_multiplies_the_logits_of_every_branch(outcomes):
    variables, outputs = outcomes["norm"]
    scale = np.random.default_rng(3).uniform(0.5, 2, 10).astype(np.float32)
    scaled = run(
        make(logit_scale=True), {**variables, "params": {**variables["params"], "logit_scale": jnp.asarray(scale)}}
    )
    np.testing.assert_allclose(scaled.branches, scale * outputs.branches, rtol=1e-4, atol=1e-4)


def branch_gradients(kind, train, objective):
    """Return {path: gradient} of the branches' parameters. objective: Outputs -> scalar."""
    net = make(branch_kind=kind)
    variables = some_variables(net, IMAGES)

    def loss(params):
        return objective(net.apply({**variables, "params": params}, IMAGES, train, mutable=["batch_stats"])[0])

    return flatten(jax.jit(jax.grad(loss))(variables["params"])["branches"])


def test_the_prediction_has_a_gradient_to_every_norm():
    gradients = branch_gradients("norm", True, lambda outputs: jnp.square(outputs.logits).sum())
    assert len(gradients) == 3 * 2
    assert not [path for path, gradient in gradients.items() if not np.any(gradient)]


def test_the_prediction_has_a_gradient_to_every_branchs_kernels():
    gradients = branch_gradients("conv", True, lambda outputs: jnp.square(outputs.logits).sum())
    shares = np.split(gradients["conv/kernel"], 3, axis=-1)
    assert all(np.any(share) for share in shares)


def test_a_branchs_logits_depend_only_on_its_norm():
    gradients = branch_gradients("norm", True, lambda outputs: jnp.square(outputs.branches[1]).sum())
    reached = {path.split("/")[0] for path, gradient in gradients.items() if np.any(gradient)}
    assert reached == {"norm2"}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_computes_alike(outcomes, kind):
    variables, whole = outcomes[kind]
    half = run(make(branch_kind=kind, dtype="bfloat16"), variables).branches
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(whole.branches - half) / np.linalg.norm(whole.branches) < 0.02


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_lower_for_accelerators(kind, platform):
    net = make(branch_kind=kind, dtype="bfloat16", platform={"tpu": "tpu", "cuda": "gpu"}[platform])
    variables = some_variables(net, IMAGES)
    train = jax.jit(lambda variables: net.apply(variables, IMAGES, True, mutable=["batch_stats"])[0])
    assert export.export(train, platforms=[platform])(variables).platforms == (platform,)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(branches=1), "model branches = 1: take 0 for none, or 2 or 3"),
        (dict(branches=4), "model branches = 4: take 0 for none, or 2 or 3"),
        (dict(branches=2.0), "model: branches = 2.0: int expected"),
        (dict(branches="3"), "model: branches = '3': int expected"),
        (dict(branch_kind="lora"), "unknown model branch_kind 'lora'; known: norm, conv, pooled_conv"),
    ],
)
def test_other_branches_are_errors_that_name_the_known(settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make(**settings)
