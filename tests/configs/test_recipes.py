"""The long-tail recipes of the configs follow the papers and their authors' scripts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from ltjax import config, losses, methods
from ltjax.data import splits
from ltjax.engine import experiment
from ltjax.types import Batch
from tests.configs.reading import factors_of, parsed, rates_of

CROSS_ENTROPY = {"name": "erm", "loss": {"name": "cross_entropy"}}


# MiSLAS's table: (classes, imbalance) -> smoothing of head and tail, factor on the classifier's rate, batch norm
RECIPES = {
    (100, 10): (0.2, 0.0, 0.1, "train"),
    (100, 50): (0.3, 0.0, 0.1, "train"),
    (100, 100): (0.4, 0.1, 0.2, "train"),
    (10, 10): (0.1, 0.0, 0.2, "eval"),
    (10, 50): (0.2, 0.0, 0.2, "eval"),
    (10, 100): (0.3, 0.0, 0.5, "eval"),
}
each_recipe = pytest.mark.parametrize("classes, imbalance", RECIPES)


@each_recipe
def test_the_second_stage_of_mislas_follows_the_paper(classes, imbalance):
    _, stages = parsed(f"cifar{classes}_lt", f"method=mislas,imbalance={imbalance}")
    stage, (head, tail, factor, batch_norm) = stages["classifier"], RECIPES[classes, imbalance]
    assert stage.method == {"name": "mislas", "head": head, "tail": tail, "shape": "concave"}
    assert (stage.epochs, stage.lr, stage.start_from, stage.batch_norm) == (10, 0.1, "features", batch_norm)
    assert rates_of(stage) == {"backbone": 0.0, "classifier": factor, "logit_scale": 1.0}
    assert stage.schedule == {"kind": "cosine"}
    assert stage.sampler == {"name": "class_aware", "in_a_row": 4}
    assert stage.augment.get("mixup_alpha", 0.0) == 0.0


@each_recipe
def test_the_first_stage_of_mislas_follows_the_paper(classes, imbalance):
    run, stages = parsed(f"cifar{classes}_lt", f"method=mislas,imbalance={imbalance}")
    stage = stages["features"]
    assert (run.data.name, run.data.imbalance, run.data.profile) == (f"cifar{classes}", imbalance, "exp")
    assert (run.model["name"], run.model["depth"], run.model["width"]) == ("resnet_cifar", 32, 16)
    assert (run.model["mean"], run.model["std"]) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (run.batch_size, run.optimizer) == (128, config.OptimizerConfig(0.9, False, 2e-4))
    assert (stage.method, stage.epochs, stage.lr) == (CROSS_ENTROPY, 200, 0.1)
    assert stage.sampler == {"name": "instance_balanced"}
    assert (stage.augment["mixup_alpha"], stage.augment["crop_padding"], stage.augment["flip"]) == (1.0, 4, True)
    factors = factors_of(stage)
    np.testing.assert_allclose(factors[[0, 4, 5, 159, 160, 179, 180, 199]], [0.2, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("classes, ranges", [(100, (36, 71)), (10, (3, 7))])
def test_mislas_groups_by_class_number_need_one_flag(classes, ranges):
    run, _ = parsed(f"cifar{classes}_lt")
    assert (run.data.groups, run.data.ranges) == ("counts", ranges)
    assert (run.data.many_above, run.data.few_below) == (100, 20)


def test_cross_entropy_is_mislas_stage_1_without_mixup_and_logit_scale():
    baseline = parsed("cifar100_lt", "method=ce")[1]["ce"]
    features = parsed("cifar100_lt", "method=mislas")[1]["features"]
    changed = {field for field in config.StageConfig._fields if getattr(baseline, field) != getattr(features, field)}
    assert changed == {"name", "title", "augment", "groups"}
    assert {**baseline.augment, "mixup_alpha": 1.0} == features.augment


@pytest.mark.parametrize("imbalance, nearest", [(1, 10), (20, 10), (25, 50), (75, 100), (200, 100)])
def test_another_imbalance_uses_the_recipe_of_the_nearest_one(imbalance, nearest):
    stage, expected = (parsed("cifar100_lt", f"imbalance={i}")[1]["classifier"] for i in (imbalance, nearest))
    assert (stage.method, stage.groups) == (expected.method, expected.groups)


def test_the_short_budget_has_12_and_2_epochs():
    stages = parsed("cifar100_lt", "budget=short")[1]
    assert [stage.epochs for stage in stages.values()] == [12, 2]
    np.testing.assert_allclose(factors_of(stages["features"]), [0.5, *[1] * 9, 0.1, 0.01])


# ResLT, its authors' CIFAR scripts: (classes, imbalance) -> beta
BETAS = {(100, 100): 0.995, (100, 50): 0.99, (100, 10): 0.72, (10, 100): 0.998, (10, 50): 0.998, (10, 10): 0.96}


@pytest.mark.parametrize("classes, imbalance", BETAS)
def test_the_branches_of_reslt_follow_the_paper(classes, imbalance):
    run, stages = parsed(f"cifar{classes}_lt", f"method=reslt,imbalance={imbalance}")
    ranks = {100: dict(medium_start=35, tail_start=70), 10: dict(medium_start=2, tail_start=4)}[classes]
    assert stages["reslt"].method == {"name": "reslt", "beta": BETAS[classes, imbalance], **ranks}
    assert (run.model["branches"], run.model["classifier"], run.model["logit_scale"]) == (3, "linear", False)


def test_the_training_of_reslt_follows_the_paper():
    run, stages = parsed("cifar100_lt", "method=reslt")
    stage = stages["reslt"]
    assert stage.optimizer == {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    assert (run.batch_size, stage.lr, stage.epochs, stage.drop_last) == (128, 0.1, 200, True)
    assert rates_of(stage) == {"backbone": 1.0, "branches": 1.0, "classifier": 1.0}
    factors = factors_of(stage)
    np.testing.assert_allclose(factors[:5], 1 / 3 + 2 / 3 * np.arange(1, 6) / 5)
    np.testing.assert_allclose(factors[[4, 5, 159, 160, 179, 180, 199]], [1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert run.model["classifier_init"] == "torch"


@pytest.mark.parametrize("classes", [10, 100])
def test_the_stages_of_drolt_follow_the_paper(classes):
    _, stages = parsed(f"cifar{classes}_lt", "method=drolt")
    assert [(name, stage.epochs, stage.lr) for name, stage in stages.items()] == [
        ("ce", 200, 0.1),
        ("dro", 80, 0.005),
        ("ce_classifier", 20, 0.01),
    ]
    later = [stages["dro"], stages["ce_classifier"]]
    assert all(stage.optimizer["weight_decay"] == 1e-4 for stage in stages.values())
    assert all(stage.sampler == {"name": "class_aware", "in_a_row": 4} for stage in later)
    assert all((factors_of(stage) == 1).all() and stage.nearest_mean for stage in later)
    assert rates_of(stages["dro"]) == {"backbone": 1.0, "classifier": 0.0, "margins": 1.0}
    assert rates_of(stages["ce_classifier"]) == {"backbone": 0.0, "classifier": 1.0}
    assert (stages["dro"].batch_norm, stages["ce_classifier"].batch_norm) == ("train", "eval")
    assert stages["ce_classifier"].method == CROSS_ENTROPY
    np.testing.assert_allclose(factors_of(stages["ce"])[[159, 160, 180]], [1, 1e-2, 1e-4])


@pytest.mark.parametrize("imbalance, images", [(100, 10_847), (10, 19_573)])
def test_later_stages_of_drolt_have_balanced_epochs(imbalance, images):
    _, stages = parsed("cifar100_lt", f"method=drolt,imbalance={imbalance}")
    counts = splits.class_counts(100, 500, imbalance=imbalance)
    assert counts.sum() == images
    steps = {name: stage.epochs * experiment.steps_per_epoch(stage, counts, 128) for name, stage in stages.items()}
    assert steps == dict(ce=200 * -(-images // 128), dro=31_280, ce_classifier=7_820)


@pytest.mark.parametrize("config, images, epochs", [("cifar100_lt", 10_847, 591), ("cifar10_lt", 12_406, 520)])
def test_balms_follows_its_authors(config, images, epochs):
    """13,000 steps of 512 images, 800 of them warm-up, make the epochs; an epoch's last, smaller batch is dropped."""
    run, stages = parsed(config, "method=balms")
    stage, per_epoch = stages["balms"], -(-images // 512)
    assert (run.batch_size, stage.epochs, stage.lr, stage.drop_last) == (512, -(-13_000 // per_epoch), 0.1, True)
    assert stage.epochs == epochs
    assert stage.optimizer == {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}
    warm = -(-800 // per_epoch)
    np.testing.assert_allclose(factors_of(stage)[:warm], np.linspace(0.5, 1, warm))
    after = np.arange(stage.epochs - warm)
    np.testing.assert_allclose(factors_of(stage)[warm - 1 : -1], (1 + np.cos(np.pi * after / (len(after) + 1))) / 2)
    assert (stage.augment["auto_augment"], stage.augment["cutout_size"]) == (True, 16)
    assert stage.method == {"name": "erm", "loss": {"name": "balanced_softmax"}}
    assert run.model["classifier_init"] == "torch"


def test_the_loss_of_drolt_follows_the_paper():
    """Margins 2 e begin at 1, T = 1, and its cross-entropy is weighted by n_c / n_max."""
    method = dict(parsed("cifar10_lt", "method=drolt")[1]["dro"].method)
    extra, _ = methods.create(method.pop("name"), np.array([30, 20, 10]), **method).init(jax.random.key(0))
    np.testing.assert_array_equal(extra["margins"], np.ones((1, 3)))
    assert (method["temperature"], method["robust_weight"], method["layers"]) == (1.0, 1.0, ())
    assert method["loss"] == {"name": "cross_entropy", "class_weights": {"kind": "count"}}


def test_drw_continues_ldam_with_effective_numbers():
    run, stages = parsed("cifar100_lt", "method=ldam_drw")
    first, second = stages["ldam"], stages["drw"]
    weights = second.method["loss"]["class_weights"]
    assert weights == {"kind": "effective_number", "beta": 0.9999}
    assert {**first.method["loss"], "class_weights": weights} == second.method["loss"]
    assert [(s.epochs, s.lr, s.keep_optimizer) for s in stages.values()] == [(160, 0.1, False), (40, 0.001, True)]
    np.testing.assert_allclose(factors_of(first), [0.2, 0.4, 0.6, 0.8, *[1] * 156])
    np.testing.assert_allclose(factors_of(second), [1] * 20 + [0.01] * 20)
    assert (run.model["classifier"], run.model["cosine_scale"]) == ("cosine", 30.0)
    same = ("groups", "augment", "sampler", "batch_norm", "optimizer")
    assert all(getattr(first, field) == getattr(second, field) for field in same)


def test_ldam_decays_to_a_hundredth():
    factors = factors_of(parsed("cifar10_lt", "method=ldam")[1]["ldam"])
    np.testing.assert_allclose(factors[[159, 160, 179, 180]], [1, 0.01, 0.01, 1e-4])


def test_margins_on_scaled_logits_equal_the_papers_on_cosines():
    run, stages = parsed("cifar10_lt", "method=ldam")
    counts, labels = np.array([500, 50, 5]), np.array([0, 1, 2, 2])
    cosines = np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32)
    criterion = methods.criteria.create(counts, stages["ldam"].method["loss"])
    scaled = run.model["cosine_scale"] * jnp.asarray(cosines)
    expected = losses.ldam(jnp.asarray(cosines), jnp.asarray(labels), class_counts=counts, max_margin=0.5, scale=30.0)
    loss = criterion(scaled, Batch(jnp.zeros((4, 1, 1, 3)), jnp.asarray(labels)))
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("name, trained", [("crt", "classifier"), ("lws", "logit_scale")])
def test_crt_and_lws_train_their_part_on_class_balanced_batches(name, trained):
    run, stages = parsed("cifar100_lt", f"method={name}")
    stage = stages[name]
    assert stage.sampler == {"name": "class_balanced"}
    assert {part for part, rate in rates_of(stage).items() if rate} == {trained}
    assert (stage.epochs, stage.schedule, stage.method) == (10, {"kind": "cosine"}, CROSS_ENTROPY)
    assert stage.surgery == ({"name": "new_head"} if name == "crt" else {})
    assert run.model["logit_scale"] == (name == "lws")


@pytest.mark.parametrize(
    "method, surgery",
    [
        ("tau_norm", {"name": "tau_norm", "taus": tuple(np.round(np.arange(0, 2.01, 0.1), 1).tolist())}),
        ("ncm", {"name": "nearest_mean", "metric": "cosine"}),
        ("logit_adjustment_posthoc", {"name": "logit_shift", "tau": 1.0}),
    ],
)
def test_post_hoc_methods_only_change_the_classifier_of_cross_entropy(method, surgery):
    _, stages = parsed("cifar100_lt", f"method={method}")
    first, last = stages.values()
    assert first.method == CROSS_ENTROPY
    assert (last.epochs, last.groups, last.surgery) == (0, {}, surgery)


LOSSES = {
    "ce": dict(name="cross_entropy"),
    "focal": dict(name="focal", gamma=1.0),
    "cb_ce": dict(name="cross_entropy", class_weights=dict(kind="effective_number", beta=0.9999)),
    "balanced_softmax": dict(name="balanced_softmax"),
    "logit_adjustment": dict(name="logit_adjusted", tau=1.0),
}


@pytest.mark.parametrize("method", LOSSES)
def test_baselines_differ_from_cross_entropy_only_in_the_loss(method):
    (baseline,), (stage,) = (parsed("cifar10_lt", f"method={name}")[1].values() for name in ("ce", method))
    assert stage.method == {"name": "erm", "loss": LOSSES[method]}
    assert stage._replace(name=baseline.name, method=baseline.method, title=baseline.title) == baseline


def test_nearest_compares_ratios():
    table = {10: "a", 50: "b", 100: "c"}
    entries = [common.nearest(table, imbalance) for imbalance in (1, 22, 23, 70, 71, 1000)]
    assert entries == ["a", "a", "b", "b", "c", "c"]
