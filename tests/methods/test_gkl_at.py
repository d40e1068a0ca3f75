"""GKL-AT, AT-BSL and RobustLT's radius against their authors' numbers (source: tests/golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ltjax import attacks, methods
from ltjax.methods import adversarial
from ltjax.models.layers import BatchNorm, Conv, LinearClassifier, pool
from ltjax.system import parallel
from ltjax.types import Batch, Outputs, UserError, Variables
from tests import stages

ALL = {"all": {"match": ".*", "rate": 1.0}}


class Small(nn.Module):
    """The authors' code ran on this network: two convolutions with batch norm and ReLU, and a classifier."""

    @nn.compact
    def __call__(self, images, train=False):
        x = BatchNorm(relu=True, name="bn1")(Conv(6, name="conv1")(images), train)
        x = BatchNorm(relu=True, name="bn2")(Conv(8, strides=2, name="conv2")(x), train)
        features = pool(x)
        return Outputs(LinearClassifier(5, name="fc")(features), features)


def variables_in(numbers, prefix):
    """Return parameters and statistics, from PyTorch's names and layouts."""
    params, stats = {"fc": {"kernel": numbers[f"{prefix}/fc.weight"].T, "bias": numbers[f"{prefix}/fc.bias"]}}, {}
    for n in (1, 2):
        params[f"conv{n}"] = {"kernel": numbers[f"{prefix}/conv{n}.weight"].transpose(2, 3, 1, 0)}
        params[f"bn{n}"] = {"scale": numbers[f"{prefix}/bn{n}.weight"], "bias": numbers[f"{prefix}/bn{n}.bias"]}
        running = (numbers[f"{prefix}/bn{n}.running_{what}"] for what in ("mean", "var"))
        stats[f"bn{n}"] = dict(zip(("mean", "var"), running, strict=True))
    return params, stats


def distance(ours, theirs, start):
    """Return |ours - theirs| / |theirs - start| over all arrays."""
    ours, theirs, start = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, theirs, start)
    )
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start)


@pytest.fixture
def starts(monkeypatch):
    """Return a list whose last entry is the noise of the next attack, in place of a random draw."""
    noise = []

    def start(rng, images, *, scale, **_):
        return images + scale * noise[-1]

    monkeypatch.setattr(adversarial.attacks, "random_start", start)
    return noise


@pytest.mark.parametrize("variant", ["plain", "awp"])
def test_gkl_at_trains_as_its_authors_over_two_epochs(golden, starts, monkeypatch, variant):
    """Epochs 100 and 101 of 200, so radii of 100 / 200 and 101 / 200 of 8/255, in 5 steps of half of them.

    Rounding flips the signs of tiny gradients: if at most 0.5 % of the pixels differ, it continues with their images.
    """
    theirs, pgd = [], attacks.pgd

    def as_theirs(*arguments, **settings):
        ours = pgd(*arguments, **settings)
        return jnp.where((jnp.abs(ours - theirs[-1]) > 1e-5).mean() <= 0.005, theirs[-1], ours)

    monkeypatch.setattr(adversarial.attacks, "pgd", as_theirs)
    numbers = golden("gkl_train")
    alpha, beta, gamma, temperature, awp = (float(x) for x in numbers[f"{variant}_settings"])
    params, stats = variables_in(numbers, "init")
    source = {key: jnp.asarray(numbers[key]) for key in ("images", "noise")}
    source["attacked"] = jnp.asarray(numbers[f"{variant}_adversarial"])
    source["labels"] = jnp.asarray(numbers["labels"], jnp.int32)
    state, actual = None, []
    for epoch in (0, 1):

        def draw(source, seed, step, rng, epoch=epoch):
            of_step = {key: value[epoch][step - 3 * epoch] for key, value in source.items()}
            starts.append(of_step["noise"])
            theirs.append(of_step["attacked"])
            return Batch(of_step["images"], of_step["labels"])

        radius = 8 / 255 * (100 + epoch) / 200
        weights = dict(alpha=alpha, beta=beta, gamma=gamma, weights_temperature=temperature)
        attack = dict(epsilon=radius, step_size=radius / 2, num_steps=5)
        method = methods.create("gkl_at", np.ones(5), **weights, attack=attack, awp=awp)
        compiled = stages.build(
            {"net": Small()},
            method,
            draw,
            {"net": params},
            groups=ALL,
            lr=0.2,
            factors=np.ones(2),
            steps_per_epoch=3,
            mesh=parallel.make_mesh(jax.devices()[:1]),
            image_shape=(8, 8, 3),
            momentum=0.9,
            weight_decay=5e-4,
        )
        if state is None:
            state = compiled.init(np.uint32(0), Variables({"net": params}, {"net": stats}, {}))
        state, metrics = compiled.run(compiled.refresh(state, None), source, 3)
        actual += metrics["loss"].tolist()
        means = method.refresh(state.variables.arrays, None)["class_means"]
        np.testing.assert_allclose(means, numbers[f"{variant}_class_means_after_epoch{epoch + 1}"], rtol=1e-4)
    np.testing.assert_allclose(actual, numbers[f"{variant}_losses"], rtol=1e-4)
    final = variables_in(numbers, f"{variant}_final")
    for ours, theirs, start in zip(state.variables[:2], final, (params, stats), strict=True):
        assert distance(ours["net"], theirs, start) < 1e-3


def apply_of(training_attack):
    """Return the small network in training mode; with `training_attack`, also in attacks, without new statistics."""
    net = Small()

    def apply(variables, images, *, bn=None):
        collections = {"params": variables.params["net"], "batch_stats": variables.stats["net"]}
        if bn == "eval" and not training_attack:
            return net.apply(collections, images, False), variables
        outputs, new = net.apply(collections, images, True, mutable=["batch_stats"])
        return outputs, variables if bn else variables._replace(stats={"net": new["batch_stats"]})

    return apply


CASES = {  # of RobustLT: share, ramp, epoch of 100
    "cifar10_epoch1": (0.3, 0.8, 1),
    "cifar10_epoch41": (0.3, 0.8, 41),
    "cifar10_epoch100": (0.3, 0.8, 100),
    "cifar100_epoch100": (0.4, 0.6, 100),
}


@pytest.mark.parametrize("case", ["atbsl", *CASES])
def test_the_loss_on_attacked_images_is_at_bsls_and_robustlts(golden, starts, case):
    """Attack RobustLT's network in training mode. Theirs also runs clean images, only for statistics."""
    numbers, seen = golden("robust_lt"), []
    params, stats = variables_in(numbers, "init")
    share, ramp, epoch = CASES.get(case, (0.0, 0.0, 1))
    attack = dict(epsilon="8/255", step_size="2/255", num_steps=10, radius_share=share, ramp=ramp)
    name = case if case == "atbsl" else f"robustlt_{case}"
    if case != "atbsl":
        attack |= dict(start="uniform", start_scale="8/255")
    starts.append(jnp.asarray(numbers["noise_normal" if case == "atbsl" else "noise_uniform"]))
    method = methods.create("pgd_at", numbers["class_counts"], loss=dict(name="balanced_softmax"), attack=attack)
    assert method.progress == (case != "atbsl")
    batch = Batch(jnp.asarray(numbers["images"]), jnp.asarray(numbers["labels"], jnp.int32))
    batch = batch._replace(progress=jnp.float32((epoch - 1) / 100))
    network = apply_of(training_attack=case != "atbsl")

    @jax.jit
    def loss_and_gradient(params, batch):
        def apply(variables, images, *, bn=None):
            if bn is None:
                seen[:] = [images]
            return network(variables, images, bn=bn)

        def loss(params):
            value, (after, _) = method.loss(apply, Variables({"net": params}, {"net": stats}, {}), batch, None)
            return value, (after.stats["net"], seen[0])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (after, attacked)), gradient = loss_and_gradient(params, batch)
    different = np.abs(attacked - numbers[f"{name}_adversarial"]) > 1e-5
    assert different.mean() <= 0.005
    np.testing.assert_allclose(value, numbers[f"{name}_loss"], rtol=1e-4)
    expected = {"fc": {"kernel": numbers[f"{name}_grad/fc.weight"].T, "bias": numbers[f"{name}_grad/fc.bias"]}}
    for n in (1, 2):
        expected[f"conv{n}"] = {"kernel": numbers[f"{name}_grad/conv{n}.weight"].transpose(2, 3, 1, 0)}
        expected[f"bn{n}"] = {"scale": numbers[f"{name}_grad/bn{n}.weight"], "bias": numbers[f"{name}_grad/bn{n}.bias"]}
    assert distance(gradient, expected, jax.tree.map(np.zeros_like, gradient)) < 1e-3
    if case == "atbsl":
        running = {
            f"bn{n}": {what: numbers[f"{name}_after/bn{n}.running_{what}"] for what in ("mean", "var")} for n in (1, 2)
        }
        assert distance(after, running, stats) < 1e-3
    radii = np.abs(np.asarray(attacked) - numbers["images"]).max((1, 2, 3))
    if case != "atbsl":
        assert (radii <= numbers[f"{name}_radius"][numbers["labels"]] + 1e-6).all()


IMAGES = np.full((4, 2, 2, 3), 0.5, np.float32)
LABELS = np.array([0, 1, 2, 0])
COUNTS = np.array([50, 10, 2])


def attacked_by(batch, counts=COUNTS, **attack):
    """Return images of an attack that always gains by brighter ones, in 3 steps of a third of the radius, 0.1."""
    seen = []

    def apply(variables, images, *, bn=None):
        seen.append(images)
        bright = images.mean((1, 2, 3))
        return Outputs(
            jnp.stack([-bright, bright, bright], -1) * jnp.where(batch.labels == 0, 1, -1)[:, None], images
        ), variables

    attack = dict(dict(epsilon=0.1, step_size=0.1 / 3, num_steps=3, start="none"), **attack)
    method = methods.create("pgd_at", counts, attack=attack)

    def run(batch):
        method.loss(apply, Variables({"net": {}}, {}, {}), batch, jax.random.key(0))
        return seen[-1]

    return np.asarray(jax.jit(run)(batch))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_radius_of_an_image_is_that_of_its_class(norm):
    batch = Batch(IMAGES, LABELS)
    moved = attacked_by(batch, norm=norm, radius_share=0.3) - IMAGES
    axes = (1, 2, 3)
    lengths = np.abs(moved).max(axes) if norm == "linf" else np.sqrt(np.square(moved).sum(axes))
    expected = attacks.radius_by_count(COUNTS, epsilon=0.1, share=0.3)
    np.testing.assert_allclose(lengths, np.asarray(expected)[LABELS], rtol=1e-5)


def test_a_mixed_image_has_the_mean_radius_of_both_labels():
    batch = Batch(IMAGES, LABELS, LABELS[::-1], jnp.float32(0.25))
    lengths = np.abs(attacked_by(batch, radius_share=0.3) - IMAGES).max((1, 2, 3))
    by_class = np.asarray(attacks.radius_by_count(COUNTS, epsilon=0.1, share=0.3))
    np.testing.assert_allclose(lengths, 0.25 * by_class[LABELS] + 0.75 * by_class[LABELS[::-1]], rtol=1e-5)


@pytest.mark.parametrize("progress, factor", [(0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (0.9, 1.0)])
def test_the_radius_rises_over_the_ramp(progress, factor):
    batch = Batch(IMAGES, LABELS, progress=jnp.float32(progress))
    lengths = np.abs(attacked_by(batch, ramp=0.4) - IMAGES).max((1, 2, 3))
    np.testing.assert_allclose(lengths, 0.1 * factor, rtol=1e-5)


def test_awp_begins_at_its_share_of_the_stage():
    """Compare the loss before that step with one without AWP, and after it with one with AWP."""
    numbers = np.random.default_rng(0)
    params = {"w": jnp.asarray(numbers.normal(size=(12, 3)), jnp.float32)}

    def apply(variables, images, *, bn=None):
        logits = images.reshape(len(images), -1) @ variables.params["net"]["w"]
        return Outputs(logits, logits), variables

    images = jnp.asarray(numbers.uniform(size=IMAGES.shape), jnp.float32)

    def loss(progress, **settings):
        method = methods.create("gkl_at", COUNTS, **settings)
        variables = Variables({"net": params}, {}, method.init(None)[1])
        batch = Batch(images, LABELS, progress=jnp.float32(progress))
        return jax.jit(lambda batch: method.loss(apply, variables, batch, jax.random.key(0))[0])(batch)

    without, always = loss(0.5, awp=0.0), loss(0.5, awp=0.05)
    assert not np.allclose(without, always, rtol=1e-4)
    np.testing.assert_allclose(loss(0.4, awp=0.05, awp_start=0.45), without, rtol=1e-6)
    np.testing.assert_allclose(loss(0.5, awp=0.05, awp_start=0.45), always, rtol=1e-6)


def test_only_methods_that_need_it_get_the_progress():
    made = [methods.create("pgd_at", COUNTS, attack=attack) for attack in ({}, dict(radius_share=0.2), dict(ramp=0.5))]
    assert [method.progress for method in made] == [False, False, True]
    gkl = [
        methods.create("gkl_at", COUNTS, awp=awp, awp_start=start) for awp, start in ((0, 0.1), (0.1, 0), (0.1, 0.1))
    ]
    assert [method.progress for method in gkl] == [False, False, True]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(attack=dict(radius_share=1.5)), "attack radius_share = 1.5, ramp = 0.0: shares from 0 to 1"),
        (dict(awp=0.1, awp_start=2.0), "awp_start = 2.0: a share of the stage, from 0 to 1"),
        (dict(gamma=-1.0), "gamma = -1.0"),
        (dict(weights_temperature=0.0), "weights_temperature = 0.0: above 0"),
    ],
)
def test_impossible_settings_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        methods.create("gkl_at", COUNTS, **settings)


def test_the_program_without_radius_and_ramp_has_one_radius():
    """Its text does not depend on the class counts."""

    def text(counts, **attack):
        method = methods.create("pgd_at", counts, attack=attack)
        apply = lambda variables, images, bn=None: (Outputs(images.mean((1, 2)), images), variables)  # noqa: E731
        run = lambda batch: method.loss(apply, Variables({"net": {}}, {}, {}), batch, jax.random.key(0))[0]  # noqa: E731
        return jax.jit(run).lower(Batch(IMAGES, LABELS)).as_text()

    assert text(COUNTS) == text(np.array([9, 9, 9]))
    assert text(COUNTS, radius_share=0.3) != text(np.array([9, 9, 9]), radius_share=0.3)
