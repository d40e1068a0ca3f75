"""`--mode=attack` on a small trained run: its results, stopping and resuming, and its errors."""

import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import cifar10_lt
from ltjax import attacks, data, train
from ltjax.config import parse
from ltjax.data.source import Images
from ltjax.engine.experiment import set_up
from ltjax.modes import attack as attack_mode
from ltjax.runs import logs
from ltjax.system import parallel
from ltjax.system.signals import Interrupted
from ltjax.types import UserError

TESTS = ("pgd-3", "cw-3", "autoattack")


def made_up_images(name, data_dir=None, labels=""):
    """Return a colour for each of 10 classes, with noise: 20 training and 4 test images of each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 1, 1, 3))

    def labelled(count):
        labels = np.tile(np.arange(10, dtype=np.int32), count)
        noise = rng.normal(0, 20, (len(labels), 8, 8, 3))
        return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels

    return Images(*labelled(20), *labelled(4), tuple(f"class {c}" for c in range(10)))


def config(**changes):
    values = cifar10_lt.get_config("method=trades,imbalance=5,model=resnet8")
    values.update_from_flattened_dict(
        {
            "model.width": 4,
            "epochs": 4,
            "batch_size": 16,
            "eval_batch_size": 16,
            "data.many_above": 12,
            "data.few_below": 6,
            "trades.method.attack.num_steps": 1,
            "trades.augment.crop_padding": 1,
            "attack.tests": TESTS,
            "attack.radii": (),
            "attack.batch_size": 16,
            "attack.epsilon": "32/255",
            "attack.step_size": "16/255",
            **changes,
        }
    )
    return values.to_dict()


@pytest.fixture(scope="module", autouse=True)
def small():
    """Use made-up images, two devices, and AutoAttack with a small budget."""
    two, make_mesh = jax.devices()[:2], parallel.make_mesh
    budget = dict(num_steps=4, num_targets=2, num_queries=8, save_seconds=0, devices=two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", made_up_images)
        patch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(two, replicas))
        patch.setattr(attack_mode.attacks, "autoattack", functools.partial(attacks.autoattack, **budget))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "trades"
    train.train(config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def attacked(trained):
    return attack_mode.attack_workdir(config(), trained)


@pytest.fixture
def copy(trained, tmp_path):
    """Return a copy of the trained run, without results of attacks."""
    return shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("attack*"))


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key not in ("seconds", "command")}
    return value


def test_every_test_has_accuracy_by_group_and_class_and_calibration(attacked):
    assert list(attacked["tests"]) == ["clean", *TESTS]
    for figures in attacked["tests"].values():
        assert set(figures["accuracy"]) == {"all", "many", "medium", "few"}
        assert len(figures["per_class_accuracy"]) == 10
        assert 0 <= figures["ece"] <= 1
        assert figures["num_images"] == 40
    assert attacked["epsilon"] == pytest.approx(32 / 255)


@pytest.mark.parametrize("most, counts", [(3, (1, 1, 1)), (7, (3, 3, 1)), (10, (5, 4, 1)), (2, None), (0, (9, 4, 1))])
def test_images_to_attack_are_spread_over_the_classes(most, counts):
    """Check it also if the test set is sorted by class."""
    labels = np.repeat(np.arange(3), (9, 4, 1)).astype(np.int32)
    chosen = attack_mode.choose(labels, most, seed=0)
    assert len(set(chosen.tolist())) == len(chosen) == (most or 14) and (np.diff(chosen) > 0).all()
    actual = np.bincount(labels[chosen], minlength=3)
    if counts is None:
        assert actual.max() == 1
    else:
        assert sorted(actual, reverse=True) == list(counts)


def test_the_seed_chooses_the_images_to_attack():
    labels = np.repeat(np.arange(10), 50).astype(np.int32)
    first, again, other = (attack_mode.choose(labels, 30, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first[:5].tolist() == [16, 36, 43, 50, 59]


def test_a_part_of_the_test_set_has_the_images_of_its_labels(trained):
    experiment = set_up(parse(config(**{"attack.num_images": 10})), None, trained)
    images, chosen = attack_mode.test_images(experiment, experiment.config.attack)
    every, _ = attack_mode.test_images(experiment, experiment.config.attack._replace(num_images=0))
    np.testing.assert_array_equal(images, every[chosen])
    assert sorted(experiment.test_set.host_labels[chosen].tolist()) == list(range(10))


def test_autoattack_lists_the_accuracy_after_each_attack(attacked):
    clean, pgd, _, suite = (figures["accuracy"]["all"] for figures in attacked["tests"].values())
    assert clean > 0.3  # it has learned something
    assert pgd < clean
    after = list(attacked["tests"]["autoattack"]["robust_after"].values())
    assert [clean, *after] == sorted([clean, *after], reverse=True)
    assert after[-1] == pytest.approx(suite)


def test_clean_figures_equal_those_of_training(attacked, trained):
    results = json.loads((trained / "results.json").read_text())
    assert attacked["tests"]["clean"]["accuracy"] == results["accuracy"]
    assert attacked["tests"]["clean"]["ece"] == pytest.approx(results["ece"], abs=1e-6)


def test_figures_are_added_to_the_results_with_a_picture(attacked, trained):
    assert json.loads((trained / "results.json").read_text())["robustness"] == json.loads(json.dumps(attacked))
    assert json.loads((trained / "attack.json").read_text()) == json.loads(json.dumps(attacked))
    assert (trained / "report" / "attack.png").read_bytes().startswith(b"\x89PNG")
    assert not list((trained / "attack").iterdir())  # progress is deleted at the end


@pytest.mark.parametrize("when", [2, 5])
def test_an_attack_stopped_by_a_signal_resumes_to_the_same_figures(attacked, copy, when, monkeypatch):
    calls = []

    def show(self, attack, *rest):
        calls.append(attack)
        if attack in attacks.ATTACKS and sum(name in attacks.ATTACKS for name in calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(logs.AttackProgress, "show", show)
        with pytest.raises(Interrupted):
            attack_mode.attack_workdir(config(), copy)
    assert len(list((copy / "attack").iterdir())) == 1
    assert not (copy / "attack.json").exists()
    again = attack_mode.attack_workdir(config(), copy)
    assert without_seconds(again["tests"]) == without_seconds(attacked["tests"])


def test_an_attack_stopped_after_autoattack_reuses_its_result(copy, monkeypatch):
    changes = {"attack.tests": ("apgd-ce",), "attack.num_images": 20}

    def stopped(*_):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(attack_mode, "curve", stopped)
        with pytest.raises(Interrupted):
            attack_mode.attack_workdir(config(**changes), copy)
    assert len(list((copy / "attack").iterdir())) == 1
    shown = []
    monkeypatch.setattr(logs.AttackProgress, "show", lambda self, *progress: shown.append(progress))
    attack_mode.attack_workdir(config(**changes), copy)
    assert not shown and not list((copy / "attack").iterdir())


def test_attack_settings_may_differ_from_those_of_training(attacked, trained, copy):
    changes = {"attack.epsilon": "0", "attack.tests": ("pgd-1", "apgd-ce"), "attack.num_images": 7}
    tests = attack_mode.attack_workdir(config(**changes), copy)["tests"]
    assert tests["apgd-ce"]["num_images"] == 7
    assert tests["pgd-1"]["accuracy"] == tests["apgd-ce"]["accuracy"] == tests["clean"]["accuracy"]


def test_radii_give_a_falling_curve_that_the_page_shows(attacked, copy):
    changes = {"attack.tests": ("pgd-20",), "attack.radii": (0.5, 4.0, 9.0), "attack.num_images": 20}
    summary = attack_mode.attack_workdir(config(**changes), copy)  # 9 times epsilon is above 1
    assert [point["epsilon"] for point in summary["curve"]] == pytest.approx([0, 16 / 255, 32 / 255, 128 / 255])
    accuracies = [point["accuracy"]["all"] for point in summary["curve"]]
    assert accuracies[0] == summary["tests"]["clean"]["accuracy"]["all"]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < accuracies[0]
    page = (copy / "report" / "index.html").read_text()
    assert 'id="robust-curve-t"' in page and "data:image/jpeg" in page


def test_l2_attacks_lower_the_accuracy(copy):
    ball = {"attack.epsilon": "1.5", "attack.norm": "l2", "attack.step_size": "0.5"}
    tests = attack_mode.attack_workdir(config(**ball, **{"attack.tests": ("pgd-2", "square")}), copy)["tests"]
    assert tests["pgd-2"]["accuracy"]["all"] <= tests["clean"]["accuracy"]["all"]
    assert tests["square"]["accuracy"]["all"] <= tests["clean"]["accuracy"]["all"]


def test_each_replica_is_attacked(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_report", lambda *_: None)  # tested elsewhere
    values = config(**{"replicas": 2, "attack.tests": ("pgd-1",), "epochs": 1})
    train.train(values, tmp_path)
    pgd = attack_mode.attack_workdir(values, tmp_path)["tests"]["pgd-1"]
    accuracies = [replica["accuracy"]["all"] for replica in pgd["replicas"]]
    assert [replica["seed"] for replica in pgd["replicas"]] == [0, 1]
    assert pgd["accuracy"]["all"] == pytest.approx(np.mean(accuracies))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attack.epsilon": "8"}, "did you mean 8/255"),
        ({"attack.epsilon": "eight"}, "'eight'"),
        ({"attack.norm": "l1"}, "known: linf, l2"),
        ({"attack.tests": ("pgd",)}, "pgd-N, cw-N"),
        ({"attack.num_images": -1}, "num_images"),
        ({"attack.batch_size": 0}, "batch_size"),
        ({"attack.radii": (0.0,)}, "multiples of epsilon"),
    ],
)
def test_a_mistake_in_the_settings_is_named(trained, change, message):
    with pytest.raises(UserError, match=message):
        attack_mode.attack_workdir(config(**change), trained)


def test_a_workdir_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="train first"):
        attack_mode.attack_workdir(config(), tmp_path)
