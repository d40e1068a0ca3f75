"""Adversarial training in the configs follows LBGAT's recipe."""

import numpy as np
import pytest

from ltjax import attacks, config
from tests.configs.reading import factors_of, parsed, rates_of

PAPERS_ATTACK = dict(epsilon=0.031, step_size=0.007, num_steps=10, norm="linf", start="gaussian", start_scale=0.001)
PAPERS_ATTACK |= dict(radius_share=0.0, ramp=0.0)
OWN = dict(attack=PAPERS_ATTACK, awp=0.0)
PLAIN = {"name": "cross_entropy"}
ROBUST_METHODS = {
    "pgd_at": [dict(name="pgd_at", loss=PLAIN, **OWN)],
    "trades": [dict(name="trades", beta=6.0, loss=PLAIN, **OWN)],
    "alp": [dict(name="alp", pairing_weight=0.5, loss=PLAIN, **OWN)],
    "bgat": [dict(name="erm", net="guide", loss=PLAIN), dict(name="bgat", beta=0.0, **OWN)],
    "lbgat": [dict(name="lbgat", beta=0.0, guide_loss=PLAIN, **OWN)],
}
PIXELS = dict(mean=(0.0,), std=(1.0,), dtype="float32", classifier="linear")
RESNET18 = dict(name="resnet", depth=18, width=64, init="torch", classifier_init="torch")


@pytest.mark.parametrize("file", ["cifar10", "cifar100", "tiny_imagenet", "cifar10_lt", "cifar100_lt"])
@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_adversarial_methods_follow_the_papers(file, name):
    assert [stage.method for stage in parsed(file, f"method={name}")[1].values()] == ROBUST_METHODS[name]


@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_adversarial_training_has_the_schedule_of_lbgat(name):
    run, stages = parsed("cifar100", f"method={name}")
    assert (run.batch_size, run.epochs, run.optimizer) == (128, 100, config.OptimizerConfig(0.9, False, 2e-4))
    for stage in stages.values():
        assert (stage.epochs, stage.lr, stage.batch_norm) == (100, 0.1, "train")
        assert (stage.augment["crop_padding"], stage.augment["flip"], stage.augment["auto_augment"]) == (4, True, False)
        counted_from_1 = 0.1 * np.array([0, *factors_of(stage)])
        rates = counted_from_1[[1, 2, 75, 76, 90, 91, 100]]
        np.testing.assert_allclose(rates, [0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_trades_on_cifar10_has_its_authors_schedule():
    run, stages = parsed("cifar10", "method=trades")
    rates = 0.1 * factors_of(stages["trades"])
    assert run.epochs == 76
    np.testing.assert_allclose(rates, [0.1] * 74 + [0.01] * 2)


def test_the_usual_resnet18_has_its_own_strides():
    run, _ = parsed("cifar10_lt", "method=pgd_at,model=resnet18_4x4")
    expected = dict(name="resnet", depth=18, width=64, strides=(1, 2, 2, 2), init="torch")
    assert {key: run.model[key] for key in expected} == expected


@pytest.mark.parametrize("name", ROBUST_METHODS)
def test_adversarial_networks_are_those_of_lbgat_and_normalise_nothing(name):
    run, _ = parsed("cifar100", f"method={name}")
    assert {key: run.model[key] for key in ("name", "depth", "width")} == dict(name="wide_resnet", depth=34, width=10)
    assert {key: run.model[key] for key in PIXELS} == PIXELS
    assert run.model["classifier_init"] == "torch_no_bias"
    assert run.guide == ({**RESNET18, **PIXELS} if name in ("bgat", "lbgat") else {})


def test_cross_entropy_on_balanced_data_normalises():
    assert [parsed(name, "method=ce")[0].model["mean"] for name in ("cifar10", "tiny_imagenet")] == [
        (0.4914, 0.4822, 0.4465),
        (0.4802, 0.4481, 0.3975),
    ]


def test_balanced_data_is_used_whole():
    for name in ("cifar10", "cifar100", "tiny_imagenet"):
        run, _ = parsed(name)
        assert (run.data.name, run.data.imbalance, run.data.max_count, run.data.holdout) == (name, 1.0, 0, 0)
        assert (run.data.groups, tuple(run.stages)) == ("counts", ("lbgat",))


def test_each_method_trains_its_networks():
    rates = {name: [rates_of(s) for s in parsed("cifar10", f"method={name}")[1].values()] for name in ROBUST_METHODS}
    whole_net = dict(backbone=1.0, classifier=1.0)
    assert rates["pgd_at"] == rates["trades"] == rates["alp"] == [whole_net]
    assert rates["lbgat"] == [dict(whole_net, guide=1.0)]
    assert rates["bgat"] == [dict(backbone=0.0, classifier=0.0, guide=1.0), dict(whole_net, guide=0.0)]


def test_the_natural_stage_of_bgat_evaluates_its_guide():
    run, stages = parsed("cifar10", "method=bgat")
    assert tuple(run.stages) == ("natural", "bgat")
    actual = [(s.start_from, s.evaluate_net, s.title) for s in stages.values()]
    assert actual == [("scratch", "guide", "BGAT, stage 1"), ("natural", "net", "BGAT, stage 2")]


@pytest.mark.parametrize("classes, head, tail", [(10, 0.3, 0.0), (100, 0.4, 0.1)])
def test_label_aware_smoothing_has_the_settings_of_mislas(classes, head, tail):
    _, stages = parsed(f"cifar{classes}_lt", "method=trades,loss=label_aware_smoothing")
    assert stages["trades"].method["loss"] == dict(name="label_aware_smoothing", head=head, tail=tail)


@pytest.mark.parametrize(
    "name, stage, key", [("lbgat", "lbgat", "guide_loss"), ("bgat", "natural", "loss"), ("pgd_at", "pgd_at", "loss")]
)
def test_the_loss_goes_to_the_network_that_sees_labels(name, stage, key):
    _, stages = parsed("cifar10_lt", f"method={name},loss=logit_adjusted")
    assert stages[stage].method[key] == {"name": "logit_adjusted"}


def test_beta_and_awp_reach_the_method():
    actual = parsed("cifar100", "method=lbgat,beta=6,awp=true")[1]["lbgat"].method
    assert (actual["beta"], actual["awp"]) == (6.0, 0.005)
    assert parsed("cifar10", "method=pgd_at,awp=true")[1]["pgd_at"].method["awp"] == 0.01  # AT-AWP's
    assert parsed("cifar100", "method=trades,beta=0")[1]["trades"].method["beta"] == 0.0


@pytest.mark.parametrize("epsilon", ["0.031", "0.0310", "3.1e-2"])
def test_the_papers_epsilon_has_the_papers_step_in_any_notation(epsilon):
    attack = parsed("cifar100", f"method=lbgat,epsilon={epsilon}")[1]["lbgat"].method["attack"]
    assert (attack["epsilon"], attack["step_size"]) == (0.031, 0.007)


@pytest.mark.parametrize("epsilon, number", [("8/255", 8 / 255), ("0.05", 0.05), ("1", 1.0)])
def test_another_epsilon_sets_the_steps_and_the_final_attack(epsilon, number):
    run, stages = parsed("cifar100", f"method=lbgat,epsilon={epsilon}")
    attack = stages["lbgat"].method["attack"]
    assert attack == {**PAPERS_ATTACK, "epsilon": number, "step_size": number / 4}
    assert run.attack.epsilon == epsilon


@pytest.mark.parametrize("epsilon", ["8/255", "2.5/255", "0.03", "1e-2"])
def test_training_and_attack_mode_read_the_same_epsilon(epsilon):
    run, stages = parsed("cifar100", f"method=lbgat,epsilon={epsilon}")
    assert attacks.radius(run.attack.epsilon) == stages["lbgat"].method["attack"]["epsilon"]


@pytest.mark.parametrize("epsilon", ["8/", "/255", "1/2/3", "8/0", "nan", "-1/255"])
def test_training_and_attack_mode_refuse_the_same_epsilon(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        parsed("cifar100", f"method=lbgat,epsilon={epsilon}")
    with pytest.raises(ValueError, match="epsilon"):
        attacks.radius(epsilon)


def test_the_final_attack_follows_the_papers():
    tests, radii = ("pgd-20", "cw-20", "autoattack"), (0.25, 0.5, 2.0, 4.0)
    assert parsed("cifar100")[0].attack == config.AttackConfig("0.031", "linf", 0, tests, "2/255", radii=radii)


SAMPLERS = {
    "instance_balanced": dict(name="instance_balanced"),
    "class_balanced": dict(name="class_balanced"),
    "class_aware": dict(name="class_aware", in_a_row=4),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sampler_argument_sets_the_first_part(sampler):
    _, stages = parsed("cifar10_lt", f"recipe=natural+bgat+crt,sampler={sampler}")
    actual = [stage.sampler for stage in stages.values()]
    assert actual == [SAMPLERS[sampler], SAMPLERS[sampler], dict(name="class_balanced")]


def test_short_adversarial_training_is_2_epochs_of_tiny_networks():
    run, stages = parsed("cifar10", "method=lbgat,budget=short")
    tiny = dict(name="wide_resnet", depth=10, width=1)
    assert all({key: net[key] for key in tiny} == tiny for net in (run.model, run.guide))
    attack = stages["lbgat"].method["attack"]
    assert (attack["num_steps"], attack["step_size"], attack["epsilon"]) == (3, 0.014, 0.031)
    np.testing.assert_allclose(factors_of(stages["lbgat"]), [1, 0.1])


MODELS = {
    "resnet32": dict(name="resnet_cifar", depth=32, width=16),
    "resnet18": RESNET18,
    "resnet34": dict(name="resnet", depth=34, width=64),
    "preact18": dict(name="preact_resnet", depth=18, width=64),
    "wrn28_10": dict(name="wide_resnet", depth=28, width=10),
    "wrn10_1": dict(name="wide_resnet", depth=10, width=1),
    "efficientnet_lite0": dict(name="efficientnet_lite0"),
}


@pytest.mark.parametrize("text", MODELS)
def test_networks_have_short_names(text):
    run, _ = parsed("cifar10", f"method=lbgat,model={text},guide={text}")
    for net in (run.model, run.guide):
        assert {key: net[key] for key in MODELS[text]} == MODELS[text]


def test_robust_classifier_trains_only_the_classifier_on_attacked_images():
    _, stages = parsed("cifar10_lt", "recipe=lbgat+robust_classifier,awp=true,loss=balanced_softmax")
    stage = stages["robust_classifier"]
    assert stage.method == dict(name="pgd_at", loss={"name": "balanced_softmax"}, **OWN)
    assert (stage.epochs, stage.lr, stage.start_from, stage.batch_norm) == (10, 0.01, "lbgat", "eval")
    assert rates_of(stage) == {"backbone": 0.0, "classifier": 1.0, "guide": 0.0}
    assert stage.sampler == dict(name="class_balanced")


def test_a_stage_that_trains_the_guide_has_no_nearest_mean():
    _, stages = parsed("cifar10_lt", "recipe=natural+bgat+dro")
    assert [stage.nearest_mean for stage in stages.values()] == [False, True, True]


RESNET18_4X4 = dict(name="resnet", depth=18, strides=(1, 2, 2, 2), init="torch", mean=(0.0,), std=(1.0,))


def test_gkl_at_has_its_authors_recipe():
    run, stages = parsed("cifar100", "method=gkl_at")
    stage = stages["gkl_at"]
    attack = dict(PAPERS_ATTACK, epsilon=8 / 255, step_size=4 / 255, num_steps=5, ramp=1.0)
    weights = dict(alpha=4.0, beta=20.0, gamma=1.0, weights_temperature=4.0, attack_beta=1.0)
    assert stage.method == dict(name="gkl_at", loss=PLAIN, **weights, attack=attack, awp=0.005, awp_start=0.05)
    assert (run.epochs, run.batch_size, run.attack.epsilon) == (200, 128, "8/255")
    assert (stage.lr, stage.optimizer["weight_decay"], stage.ema) == (0.2, 5e-4, {"decay": 0.9997})
    np.testing.assert_allclose(factors_of(stage), 0.5 * (1 + np.cos(np.pi * np.arange(200) / 200)))
    assert {key: run.model[key] for key in ("name", "depth", "width")} == dict(name="wide_resnet", depth=34, width=10)


def test_at_bsl_has_its_authors_recipe():
    run, stages = parsed("cifar10_lt", "method=at_bsl,imbalance=50")
    stage = stages["at_bsl"]
    attack = dict(PAPERS_ATTACK, epsilon=8 / 255, step_size=2 / 255)
    assert stage.method == dict(name="pgd_at", loss={"name": "balanced_softmax"}, attack=attack, awp=0.0)
    assert (stage.augment["rand_augment"], stage.augment["auto_augment"]) == ((2, 2.7), False)
    rates = stage.lr * np.array([0, *factors_of(stage)])[[1, 74, 75, 89, 90, 100]]  # epochs counted from 1
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (stage.optimizer["weight_decay"], stage.ema) == (5e-4, {})
    assert {key: run.model[key] for key in RESNET18_4X4} == RESNET18_4X4


def test_best_robust_adds_the_radius_of_robustlt_awp_and_an_average():
    run, stages = parsed("cifar10_lt", "method=best_robust,imbalance=50")
    first, other = stages["best_robust"], parsed("cifar10_lt", "method=at_bsl,imbalance=50")[1]["at_bsl"]
    attack = dict(other.method["attack"], radius_share=0.3, ramp=0.5)
    weights = dict(alpha=4.0, beta=5.0, gamma=0.2, weights_temperature=1.0, attack_beta=1.0)
    loss = {"name": "balanced_softmax"}
    assert first.method == dict(name="gkl_at", loss=loss, **weights, attack=attack, awp=0.005, awp_start=0.1)
    assert first.ema == {"decay": 0.999}
    same = ("augment", "schedule", "lr", "optimizer", "epochs", "sampler")
    assert all(getattr(first, field) == getattr(other, field) for field in same)
    assert {key: run.model[key] for key in RESNET18_4X4} == RESNET18_4X4


@pytest.mark.parametrize("method", ["gkl_at", "at_bsl", "best_robust"])
def test_arguments_override_a_methods_settings(method):
    arguments = f"method={method},epsilon=4/255,loss=logit_adjusted,awp=false,augment=auto,model=preact18"
    run, stages = parsed("cifar10_lt", arguments)
    stage = stages[method]
    assert stage.method["attack"]["epsilon"] == pytest.approx(4 / 255) and run.attack.epsilon == "4/255"
    assert (stage.method["loss"], stage.method["awp"]) == ({"name": "logit_adjusted"}, 0.0)
    assert stage.augment["auto_augment"] and not stage.augment.get("rand_augment")
    assert run.model["name"] == "preact_resnet"
