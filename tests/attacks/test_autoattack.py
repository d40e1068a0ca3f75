"""The whole suite, on a net of two layers with small budgets, and against the authors' numbers."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ltjax import attacks
from ltjax.attacks import slots
from ltjax.models.convolution import convolution_for

ROOT = Path(__file__).parents[2]
CLASSES, NUM = 4, 20
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
WEIGHTS = [RNG.normal(size=(48, 16)).astype(np.float32) / 5, RNG.normal(size=(16, CLASSES)).astype(np.float32)]
IMAGES = RNG.random((NUM, 4, 4, 3), dtype=np.float32)


def apply(weights, images):
    return jax.nn.relu(images.reshape(len(images), -1) @ weights[0]) @ weights[1]


def net(images):
    return apply(WEIGHTS, images)


PREDICT = Partial(apply, WEIGHTS)
LABELS = np.array(net(IMAGES).argmax(-1))
LABELS[:2] = (LABELS[:2] + 1) % CLASSES  # two are misclassified


def attack(predict=PREDICT, images=IMAGES, labels=LABELS, rng=KEY, **changes):
    how = dict(epsilon=0.05, batch_size=8, num_steps=10, num_targets=2, num_queries=120, progress=None)
    return attacks.autoattack(predict, images, labels, rng, **{**how, "devices": jax.devices()[:1], **changes})


@pytest.fixture(scope="module", autouse=True)
def reports_that_no_clock_decides():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "DISPATCH_SECONDS", 0.0)  # one step per dispatch, after the first
        yield


@pytest.fixture(scope="module")
def whole():
    """Return the standard suite without interruption, and its progress."""
    updates = []
    return attack(progress=updates.append), updates


def test_the_result_has_three_fields(whole):
    assert whole[0]._fields == ("adversarial", "robust", "robust_after")
    assert whole[0].adversarial.shape == IMAGES.shape and whole[0].adversarial.dtype == np.float32
    assert whole[0].robust.shape == (NUM,) and whole[0].robust.dtype == bool


def test_an_attack_fools_only_images_that_were_robust(whole):
    after = whole[0].robust_after
    assert tuple(after) == attacks.STANDARD
    standing = net(IMAGES).argmax(-1) == LABELS
    for robust in after.values():
        assert not (robust & ~standing).any()
        standing = robust
    np.testing.assert_array_equal(standing, whole[0].robust)
    assert 0 < standing.sum() < NUM - 2


def test_fooled_images_are_misclassified_inside_the_ball(whole):
    adversarial, robust = whole[0].adversarial, whole[0].robust
    assert (np.asarray(net(adversarial).argmax(-1)) == LABELS)[robust].all()
    assert (np.asarray(net(adversarial).argmax(-1)) != LABELS)[~robust].all()
    assert np.abs(adversarial - IMAGES).max() <= 0.05 + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1


def test_robust_and_wrong_images_are_unchanged(whole):
    untouched = whole[0].robust.copy()
    untouched[:2] = True
    np.testing.assert_array_equal(whole[0].adversarial[untouched], IMAGES[untouched])


def test_progress_adds_up(whole):
    result, updates = whole
    standing = NUM - 2
    for name in attacks.STANDARD:
        reports = [now for now in updates if now.attack == name]
        first, last = reports[0], reports[-1]
        assert (first.settled, first.total, first.robust, first.evaluations) == (0, standing, standing, 0)
        assert last.settled == last.total and last.num_images == NUM
        assert 0 < last.evaluations <= last.slots
        for earlier, later in itertools.pairwise(reports):
            assert earlier.settled <= later.settled and earlier.robust >= later.robust
            assert earlier.evaluations <= later.evaluations and earlier.seconds <= later.seconds
        standing = int(result.robust_after[name].sum())
        assert last.robust == standing


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_one_attack_alone(name, whole):
    result = attack(attacks=(name,))
    assert list(result.robust_after) == [name]
    assert result.robust.sum() < NUM - 2
    if name in whole[0].robust_after:
        np.testing.assert_array_equal(result.robust, whole[0].robust_after[name])


@pytest.mark.parametrize("calls", [2, 5, 9, 13])
def test_an_interrupted_suite_has_the_same_result(whole, tmp_path, calls):
    updates = []

    def stop(now):
        updates.append(now)
        if len(updates) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(progress=stop, progress_file=tmp_path / "run.npz")
    updates.clear()
    again = attack(progress=lambda now: updates.append(now), progress_file=tmp_path / "run.npz")
    np.testing.assert_array_equal(again.robust, whole[0].robust)
    np.testing.assert_array_equal(again.adversarial, whole[0].adversarial)
    for name, robust in whole[0].robust_after.items():
        np.testing.assert_array_equal(again.robust_after[name], robust)
    assert len(updates) < len(whole[1])


def test_a_killed_suite_has_the_same_result(whole, tmp_path):
    script = f"""
import os, signal
import tests.conftest
from tests.attacks.test_autoattack import attack
updates = []
def die(now):
    updates.append(now)
    if now.attack == "apgd-t" and now.settled:
        os.kill(os.getpid(), signal.SIGKILL)
attack(progress=die, progress_file={str(tmp_path / "run.npz")!r}, save_seconds=0)
"""
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    updates = []
    again = attack(progress=updates.append, progress_file=tmp_path / "run.npz")
    assert updates[0].attack == "apgd-t"
    np.testing.assert_array_equal(again.robust, whole[0].robust)
    np.testing.assert_array_equal(again.adversarial, whole[0].adversarial)


def test_a_finished_suite_is_read_from_its_file(tmp_path):
    how = dict(attacks=("apgd-ce",), progress_file=tmp_path / "run.npz")
    first, updates = attack(**how), []
    again = attack(**how, progress=updates.append)
    assert not updates
    np.testing.assert_array_equal(again.adversarial, first.adversarial)
    np.testing.assert_array_equal(again.robust, first.robust)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(predict=Partial(apply, [WEIGHTS[0], WEIGHTS[1] * np.float32(1.1)])), "of another model"),
        (dict(images=IMAGES[::-1].copy()), "of other images"),
        (dict(labels=np.roll(LABELS, 1)), "of other images, labels"),
        (dict(epsilon=0.06), "or settings"),
        (dict(rng=jax.random.key(1)), "random numbers"),
        (dict(num_steps=11), "or settings"),
        (dict(damage=100), "cannot be read"),
        (dict(damage=0), "cannot be read"),
    ],
)
def test_a_foreign_progress_file_is_refused(tmp_path, changes, message):
    file, changes = tmp_path / "run.npz", dict(changes)

    def stop(now):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(attacks=("apgd-ce",), progress_file=file, progress=stop)
    if (size := changes.pop("damage", None)) is not None:
        file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{message}.*delete .*run.npz, or give another progress_file"):
        attack(attacks=("apgd-ce",), progress_file=file, **changes)


def test_eight_devices_and_another_batch_size_give_the_same_result(whole):
    weights = jax.device_put(WEIGHTS, jax.devices()[1])  # committed to one device
    rng = jax.device_put(KEY, jax.devices()[2])
    result = attack(Partial(apply, weights), rng=rng, attacks=("apgd-ce",), batch_size=16, devices=None)
    np.testing.assert_array_equal(result.robust, whole[0].robust_after["apgd-ce"])


def test_another_checkpoint_compiles_nothing():
    compiled = []

    def listen(event, seconds, **more):
        if "backend_compile" in event:
            compiled.append(event)

    how = dict(attacks=("apgd-ce",), num_steps=9)  # in no other test
    jax.monitoring.register_event_duration_secs_listener(listen)
    attack(**how)
    assert compiled
    compiled.clear()
    attack(Partial(apply, [WEIGHTS[0], -WEIGHTS[1]]), labels=LABELS, **how)
    attack(Partial(apply, [WEIGHTS[0], WEIGHTS[1] * np.float32(0.9)]), **how)
    assert not compiled


def test_a_batch_of_one():
    result = attack(images=IMAGES[2:3], labels=LABELS[2:3], attacks=("square",))
    assert result.robust.shape == (1,) and result.adversarial.shape == (1, 4, 4, 3)


def test_radius_0_gives_clean_accuracy():
    result = attack(epsilon=0, num_steps=2, num_queries=3, attacks=("apgd-ce", "square"))
    np.testing.assert_array_equal(result.robust, net(IMAGES).argmax(-1) == LABELS)
    np.testing.assert_array_equal(result.adversarial, IMAGES)


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_two_classes_and_a_thousand(num_classes):
    weights = np.random.default_rng(2).normal(size=(48, num_classes)).astype(np.float32)

    def linear(weights, images):
        return images.reshape(len(images), -1) @ weights

    labels = np.asarray(linear(weights, IMAGES).argmax(-1))
    result = attack(Partial(linear, weights), labels=labels, attacks=("apgd-t",), epsilon=0.2)
    others = np.asarray(linear(weights, result.adversarial).argmax(-1))
    assert not result.robust.all()
    np.testing.assert_array_equal(others == labels, result.robust)


def test_saturating_logits_are_not_a_defence(whole):
    """Cross-entropy of such logits is 0 in float32 for most images; its log-odds are not."""
    with pytest.warns(RuntimeWarning, match="cross-entropy has vanishing gradients"):
        result = attack(Partial(apply, [WEIGHTS[0], WEIGHTS[1] * np.float32(1e4)]), attacks=("apgd-ce",))
    assert abs(int(result.robust.sum()) - int(whole[0].robust_after["apgd-ce"].sum())) <= 1


def test_logits_with_a_nan_count_as_wrong():
    weights = [WEIGHTS[0], WEIGHTS[1].copy()]
    weights[1][:, 0] = np.nan
    some = pytest.warns(RuntimeWarning, match="gradient of exactly 0")
    with some, pytest.warns(RuntimeWarning, match="not finite for 20 of 20"):
        assert not attack(Partial(apply, weights), attacks=(), labels=np.zeros(NUM, int)).robust.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: net(x) + np.random.default_rng().normal(), "predict is random"),
        (lambda x: net(x) + np.random.default_rng().normal(size=CLASSES).astype(np.float32), "predict is random"),
        (lambda x: net(x) + noise_of_the_host(x), "predict is random"),
        (lambda x: net(x) - 3 * net(x).mean(0) * jnp.arange(4.0, dtype=jnp.float32), "the rest of the batch"),
        (lambda x: net(jnp.round(x)), "20 of 20 images have a gradient of exactly 0"),
        (lambda x: jax.nn.softmax(net(x)), "probabilities"),
    ],
)
def test_misleading_models_are_warned_of(change, message):
    with pytest.warns(RuntimeWarning, match=message):
        attack(change, attacks=())


def noise_of_the_host(x):
    shape = jax.ShapeDtypeStruct((len(x), CLASSES), jnp.float32)

    def draw(seen):
        return np.random.default_rng().normal(size=(len(seen), CLASSES)).astype(np.float32)

    return jax.lax.stop_gradient(jax.pure_callback(draw, shape, jax.lax.stop_gradient(x)))


@jax.custom_vjp
def square(x):
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: net(square(x)),
        lambda x: jax.checkpoint(net)(x),
        lambda x: net(x) + jax.random.normal(jax.random.key(0), (1, CLASSES)),
        lambda x: net(x) + jnp.nan_to_num(jnp.asarray(np.float32([np.nan, 0, 0, 0]))),  # made at each trace
    ],
)
def test_a_model_that_only_looks_random_is_not_warned_of(change):
    attack(change, attacks=())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(epsilon=8), "did you mean 8/255"),
        (dict(epsilon=8, norm="l2"), "further apart in l2 than 6.93; did you mean 8/255"),
        (dict(images=IMAGES * 255), "images run from .* divide by 255"),
        (dict(images=IMAGES * 2 - 1), "undo the normalisation"),
        (dict(images=np.nextafter(IMAGES.clip(1), np.float32(2))), r"to 1.00000011.*; .*images.clip\(0, 1\)"),
        (dict(images=IMAGES.reshape(NUM, -1)), "square needs .N, H, W, channels."),
        (dict(images=IMAGES[:5]), "N at least 1"),
        (dict(images=IMAGES[:0], labels=LABELS[:0]), "N at least 1"),
        (dict(images=(IMAGES * 255).astype(np.uint8)), "images are uint8"),
        (dict(labels=LABELS + 1), "labels run up to 4, but predict returns logits of 4 classes"),
        (dict(labels=LABELS - 1), "integers from 0"),
        (dict(labels=LABELS.astype(np.float32)), "labels are float32"),
        (dict(predict=lambda x: net(x)[:, 0]), r"predict returns \[8\] for 8 images: logits \[8, C\] wanted"),
        (dict(predict=lambda x: net(x)[:1]), r"predict returns \[1, 4\]"),
        (dict(predict=lambda x: (net(x), x)), "predict returns no array"),
        (dict(predict=lambda x: net(x)[:, :1]), "C at least 2"),
        (dict(attacks=("pgd",)), "unknown attack 'pgd'; known: apgd-ce"),
        (dict(attacks="square"), r"a tuple of names, such as \('square',\)"),
        (dict(norm="l1"), "unknown norm"),
        (dict(rng=0), "rng = 0: a random key, such as jax.random.key"),
        (dict(num_queries=0), "at least 1 each"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        attack(**changes)


def test_float64_images_and_raw_keys_are_accepted(whole):
    result = attack(images=IMAGES.astype(np.float64), rng=jax.random.PRNGKey(0), attacks=("apgd-ce",))
    assert result.adversarial.dtype == np.float32
    np.testing.assert_array_equal(result.robust, whole[0].robust_after["apgd-ce"])


@pytest.mark.parametrize("given, chosen", [(np.float64, attacks.STANDARD), (np.float32, ("apgd-ce",))])
def test_attacks_run_with_x64(whole, given, chosen):
    """Check that computations are in float64 if the images or the logits are."""
    with jax.enable_x64(True):
        predict = Partial(apply, [weights.astype(np.float64) for weights in WEIGHTS])
        result = attack(lambda x: predict(x.astype(jnp.float64)), images=IMAGES.astype(given), attacks=chosen)
    assert result.adversarial.dtype == given
    assert (result.robust != whole[0].robust_after[chosen[-1]]).sum() <= 1


def test_a_suite_on_bfloat16_images_is_resumed(tmp_path):
    how = dict(images=IMAGES.astype(jnp.bfloat16), attacks=("apgd-ce",), progress_file=tmp_path / "run.npz")
    predict = Partial(lambda weights, x: apply(weights, x.astype(jnp.float32)), WEIGHTS)
    first = attack(predict, **how)
    again = attack(predict, **how, progress=None)
    assert again.adversarial.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.adversarial, first.adversarial)


def test_an_image_does_not_depend_on_the_others_with_any_kind_of_key():
    """JAX draws from the first key of a batch of "rbg" keys, so images could depend on each other."""
    rng, labels = jax.random.key(0, impl="unsafe_rbg"), LABELS.copy()
    labels[2:12] = (labels[2:12] + 1) % CLASSES  # wrong already: these are not attacked
    some, every = (attack(rng=rng, labels=chosen, attacks=("apgd-ce",)) for chosen in (labels, LABELS))
    np.testing.assert_array_equal(some.adversarial[12:], every.adversarial[12:])


def test_attacks_by_gradient_accept_inputs_of_any_shape(whole):
    flat = attack(images=IMAGES.reshape(NUM, -1), attacks=("apgd-ce",))
    np.testing.assert_array_equal(flat.robust, whole[0].robust_after["apgd-ce"])


def test_silent_without_progress(capfd):
    attack(attacks=("apgd-ce",))
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_the_robust_accuracy(capfd):
    result = attack(attacks=("apgd-ce",), progress=attacks.show_progress)
    line = capfd.readouterr().err
    assert f"18/18 images, 0 s, robust accuracy so far {result.robust.mean():.1%}\n" in line.replace("1 s,", "0 s,")
    assert line.count("\n") == 1


def cnn(weights, x):
    """Return the model of tests/golden/autoattack.npz, see its README."""
    conv = convolution_for(None)
    for layer, stride in ((0, 1), (2, 2), (4, 2)):
        how = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = conv(x, weights[f"{layer}.weight"], (stride, stride), ((1, 1), (1, 1)), **how)
        x = jax.nn.relu(x + weights[f"{layer}.bias"])
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["7.weight"] + weights["7.bias"])
    return x @ weights["9.weight"] + weights["9.bias"]


# The last one withstands their suite; the others fall to each of their attacks, but for 14 to Square, 131 to APGD-CE.
OF_THE_AUTHORS = np.array([3, 7, 14, 20, 131, 0])


@pytest.mark.parametrize("chosen", [attacks.STANDARD, *((name,) for name in attacks.STANDARD[1:])], ids="+".join)
def test_the_authors_numbers(golden, monkeypatch, chosen):
    """Source: `autoattack.npz`. The full budget; the suite, which begins with APGD-CE, and each other attack alone.

    In the suite, the last image withstands every attack with the random numbers of the attack alone, so only the suite
    has it. The batch size is 1, because it takes all the steps, in a batch with the slots of all others.
    """
    monkeypatch.setattr(slots, "DISPATCH_SECONDS", 5.0)  # the default
    z, suite = golden("autoattack"), len(chosen) > 1
    axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # of PyTorch
    weights = {k[8:]: jnp.asarray(v.transpose(axes[v.ndim])) for k, v in z.items() if k.startswith("weights/")}
    index = OF_THE_AUTHORS if suite else OF_THE_AUTHORS[:-1]
    images, labels = (z["images"][index] / 255).astype(np.float32), z["labels"][index]
    how = dict(epsilon="8/255", attacks=chosen, batch_size=1, progress=None, devices=jax.devices()[:1])
    ours = attacks.autoattack(Partial(cnn, weights), images, labels, KEY, **how)
    compared = {"standard": ours.robust, "apgd-ce": ours.robust_after["apgd-ce"]} if suite else ours.robust_after
    for name, robust in compared.items():
        theirs = z[f"robust_{name.replace('-', '_')}"][index]
        assert (robust != theirs).sum() <= 1
        assert robust.sum() <= 1 + theirs.sum()
    assert not suite or ours.robust[-1]
