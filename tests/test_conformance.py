"""Every method of the CIFAR-LT configs trains a few small steps on two devices and made-up images."""

import functools
import itertools
import json
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import cifar10_lt, cifar100_lt, recipes
from ltjax import data, optim, train
from ltjax.config import differences, parse
from ltjax.data.source import Images
from ltjax.engine import observe
from ltjax.modes import report
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs.archive import archive
from ltjax.system import parallel
from ltjax.system.signals import Interrupted

FILES = {"cifar10_lt": cifar10_lt, "cifar100_lt": cifar100_lt}
# All methods of cifar10_lt (LBGAT with a second stage), those of cifar100_lt that differ in more than the numbers of
# `test_the_files_differ_only_in_numbers`, and recipes that no method uses.
LBGAT = "cifar10_lt:recipe=lbgat+robust_classifier,beta=6,awp=true,sampler=class_aware"
VIT = "cifar10_lt:method=crt,model=vit_ti16"
RUNS = (
    *(f"cifar10_lt:method={name}" for name in recipes.WITHOUT_PRETRAINED if name != "lbgat"),
    LBGAT,
    *(f"cifar100_lt:method={name}" for name in ("mislas", "reslt")),
    "cifar10_lt:recipe=reslt+dro+smoothing",
    "cifar10_lt:recipe=mixup+dro+lws",
    "cifar10_lt:recipe=ce+drw",
    "cifar10_lt:recipe=ce+balanced_softmax_classifier",
    "cifar10_lt:recipe=ldam+crt",
    VIT,
)
IDS = [name.replace(":", "-").replace("=", "-") for name in RUNS]
every_run = pytest.mark.parametrize("name", RUNS, ids=IDS)
# (a run, the stage in which it is stopped): all ways in which a stage continues from an earlier one
STOPPED = (
    ("cifar10_lt:method=mislas", "classifier"),
    ("cifar10_lt:method=drolt", "dro"),
    ("cifar10_lt:method=tau_norm", "ce"),
    ("cifar10_lt:recipe=ldam+crt", "crt"),
    ("cifar10_lt:method=proco", "proco"),
    ("cifar10_lt:method=best_robust", "best_robust"),
    ("cifar10_lt:recipe=reslt+dro+smoothing", "reslt"),
    (LBGAT, "lbgat"),
    (VIT, "crt"),
    ("cifar10_lt:method=ldam_drw", "ldam"),
    ("cifar10_lt:method=ldam_drw", "drw"),
)
ARCHIVED = ("cifar10_lt:method=drolt", "cifar10_lt:method=reslt", "cifar10_lt:method=tau_norm", LBGAT, VIT)
# 629 images: 40 steps an epoch in dispatches of 10, or without the last batch 39 in dispatches of 13.
TINY = {
    "data.max_count": 115,
    "data.imbalance": 4.0,
    "data.many_above": 80,
    "data.few_below": 45,
    "model.depth": 8,
    "model.width": 4,
    "batch_size": 16,
    "epochs": 2,
    "dispatch_steps": 13,
    "eval_batch_size": 64,
}


def made_up_images(num_classes=10, size=8):
    """Make a colour for each class, with noise: 125 training and 6 test images of each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (num_classes, 1, 1, 3))

    def labelled(count):
        labels = np.tile(np.arange(num_classes, dtype=np.int32), count)
        noise = rng.normal(0, 2.5 * size, (len(labels), size, size, 3))  # of the mean colour: 2.5 for any size
        return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels

    return Images(*labelled(125), *labelled(6), tuple(f"class {c}" for c in range(num_classes)))


def tiny_config(name):
    """Shrink the config of "FILE:ARGUMENTS", and return it as nested dicts."""
    file, _, argument = name.partition(":")
    values = FILES[file].get_config(argument)
    values.update_from_flattened_dict(TINY)
    values.data.holdout = 5 if values.data.holdout else 0
    for net in ("model", "guide"):
        if values.get(net) and values[net].name == "vit":
            values[net].update(depth=2, width=8, heads=2, patch=2, grid=2)
        elif values.get(net) and values[net].name != "resnet_cifar":  # networks of adversarial training; one stays wide
            common = {key: value for key, value in values[net].items() if key not in ("init", "strides")}
            wide = {"name": "wide_resnet", "depth": 10, "width": 1}
            values[net] = {**common, **(wide if name == LBGAT else {"name": "resnet_cifar", "depth": 8, "width": 4})}
        elif values.get(net):
            values[net].update(depth=TINY["model.depth"], width=TINY["model.width"])
    for stage in values.stages:
        settings = values[stage]
        if settings.start_from != "scratch" and settings.epochs:
            settings.epochs = 2
        if "attack" in settings.method:
            settings.method.attack.num_steps = 2
            settings.method.attack.ramp *= 0.05  # while the radius rises, so does the loss
        if settings.get("augment"):
            settings.augment.crop_padding = 1
            settings.augment.cutout_size = settings.augment.cutout_size and 3
        if settings.method.name == "drolt" or stage == "drw":
            settings.lr = 0.05  # the papers' rates are for more steps
        if settings.method.name in ("proco", "bcl"):
            settings.lr = 0.05  # for batches of 16
        if settings.method.name == "bgat":
            settings.lr = 0.02  # its guide has learned little, and has large logits
        if settings.method.name == "reslt":  # there are fewer classes than in CIFAR-100
            settings.method.update(medium_start=2, tail_start=4)
    return values.to_dict()


@pytest.fixture(scope="module", autouse=True)
def two_devices_and_made_up_images():
    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: made_up_images(size=4))
        patch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:2], replicas))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name): train a run once, and return its workdir.

    trained.starts[name][stage]: initial parameters. trained.again(name): sets the run up, compiled if it was the last.
    """
    folder, networks = tmp_path_factory.mktemp("runs"), []
    starting_variables, set_up = train.starting_variables, train.set_up_with_stages

    def with_known_programs(experiment, compiled):
        """Initialise and evaluate equal networks by the same programs, which are the same for all methods."""
        images = experiment.description["images"]
        same = [each for each in networks if (each[0].nets, each[0].description["images"]) == (experiment.nets, images)]
        if not same:
            same = [(experiment, observe.Observer(experiment))]
            networks.extend(same)
        ((known, trained.observer),) = same
        programs = {key: getattr(known, key) for key in ("initialise", "evaluators", "class_means")}
        return experiment._replace(**programs), compiled

    def trained(name):
        workdir = folder / name.replace(":", "-")
        if not (workdir / "results.json").exists():
            starts = trained.starts.setdefault(name, {})

            def started(experiment, stage):
                variables = starting_variables(experiment, stage)
                starts[stage.name] = jax.tree.map(np.array, variables.params)
                return variables

            def prepared(*arguments):
                # Those of all runs would exhaust the process's memory maps.
                trained.prepared = {name: with_known_programs(*set_up(*arguments))}
                return trained.prepared[name]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "starting_variables", started)
                patch.setattr(train, "set_up_with_stages", prepared)
                patch.setattr(report, "Observer", lambda _: trained.observer)
                if name not in ARCHIVED:  # the picture shows numbers that every method has
                    patch.setattr(report.figures, "write_summary", lambda *_: None)
                train.train(tiny_config(name), workdir)
        return workdir

    trained.starts, trained.prepared = {}, {}
    trained.again = lambda name: lambda *arguments: trained.prepared.get(name) or set_up(*arguments)
    return trained


def steps_of(workdir, stage):
    return sorted(int(path.name) for path in (workdir / "checkpoints" / stage).iterdir() if path.name.isdigit())


@functools.cache
def saved(workdir, stage):
    """Return the newest checkpoint's state, as nested dicts of NumPy arrays. The run must have ended."""
    step = steps_of(workdir, stage)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((workdir / "checkpoints" / stage / str(step) / "state").absolute())
    return jax.tree.map(np.asarray, state)


def stages_of(name):
    return parse(tiny_config(name)).stages


@pytest.mark.parametrize("name, stage", STOPPED, ids=[f"{name.split('=')[1]}-{stage}" for name, stage in STOPPED])
def test_a_run_stopped_within_an_epoch_ends_with_the_same_bits(trained, tmp_path, monkeypatch, name, stage):
    undisturbed, stages = trained(name), list(stages_of(name))
    workdir = rewound(undisturbed, tmp_path, stage, stages)

    def stop_here(state, stop):
        stop.requested = signal.SIGTERM

    monkeypatch.setattr(train, "write_report", lambda *_: None)  # tested elsewhere
    monkeypatch.setattr(train, "set_up_with_stages", trained.again(name))  # test_run.py compiles again
    with pytest.MonkeyPatch.context() as patch:
        before_dispatch(patch, stage, 1, stop_here)
        with pytest.raises(Interrupted):
            train.train(tiny_config(name), workdir)
    assert steps_of(workdir, stage) == [{"reslt": 26, "proco": 26, "dro": 24}.get(stage, 20)]
    train.train(tiny_config(name), workdir)
    for later in stages[stages.index(stage) :]:
        assert steps_of(workdir, later)[-1] == steps_of(undisturbed, later)[-1]
        jax.tree.map(np.testing.assert_array_equal, saved(workdir, later), saved(undisturbed, later))
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


def test_deferred_reweighting_continues_with_the_momentum(trained, tmp_path, monkeypatch):
    name, seen = "cifar10_lt:method=ldam_drw", {}
    undisturbed = trained(name)
    workdir = rewound(undisturbed, tmp_path, "drw", list(stages_of(name)))

    def look(state, stop):
        seen["leaves"] = [np.array(x) for x in jax.tree.leaves(state.opt_state)]
        raise Reached

    monkeypatch.setattr(train, "set_up_with_stages", trained.again(name))
    before_dispatch(monkeypatch, "drw", 0, look)
    with pytest.raises(Reached):
        train.train(tiny_config(name), workdir)
    momentum = [x for x in jax.tree.leaves(saved(undisturbed, "ldam")["opt_state"]) if x.ndim]
    continued = [x for x in seen["leaves"] if x.ndim]
    assert len(continued) == len(momentum) > 10
    for actual, expected in zip(sorted(continued, key=order), sorted(momentum, key=order), strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert expected.any()
    assert {x.item() for x in seen["leaves"] if not x.ndim} == {0}  # the schedule starts at 0


def order(array):
    return array.shape, array.ravel().tolist()


@pytest.mark.parametrize("name", ARCHIVED, ids=[IDS[RUNS.index(name)] for name in ARCHIVED])
def test_an_archive_reproduces_the_figures_of_its_run_exactly(trained, tmp_path, name):
    """Also with the method's margins, an eval_classifier, surgery, and a guide that is left out."""
    workdir = trained(name)
    archive(workdir, tmp_path / "archive")
    expected, actual = (
        results["stages"][results["final_stage"]]
        for results in (
            json.loads((workdir / "results.json").read_text()),
            evaluate_workdir(tiny_config(name), tmp_path / "archive"),
        )
    )
    for key in ("accuracy", "ece", "loss", "per_class_accuracy", "nearest_mean"):
        assert actual.get(key) == expected.get(key), key


def logged(workdir, stage, split="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and line["split"] == split]


def paths(tree):
    return optim.flatten(tree)


@every_run
def test_the_loss_falls_in_every_stage(trained, name):
    workdir = trained(name)
    for stage in stages_of(name).values():
        if stage.epochs:
            losses = [line["values"]["loss"] for line in logged(workdir, stage.name)]
            half = len(losses) // 2
            assert np.mean(losses[half:]) < np.mean(losses[:half]), (stage.name, losses)


@every_run
def test_the_number_of_steps_in_an_epoch(trained, name):
    workdir = trained(name)
    for stage in stages_of(name).values():
        steps = 72 if stage.epoch_size == "balanced" else 39 if stage.drop_last else 40  # 1,150 of 16
        assert steps_of(workdir, stage.name)[-1] == stage.epochs * steps, stage.name


@every_run
def test_only_parameters_with_a_rate_change(trained, name):
    workdir = trained(name)
    for stage in stages_of(name).values():
        if not stage.epochs or stage.surgery.get("name") == "teacher":  # which changes both networks
            continue
        last = paths(saved(workdir, stage.name)["variables"]["params"])
        last = {path: value for path, value in last.items() if not path.startswith("ema/")}
        if stage.start_from == "scratch":
            start = paths(trained.starts[name][stage.name])
        else:
            start = paths(saved(workdir, stage.start_from)["variables"]["params"])
        for path, group in optim.assign_groups(list(last), stage.groups).items():
            # a method's parameters start with the stage; those of DRO-LT have a test below
            stays = not path.startswith("method/") and np.array_equal(last[path], start[path])
            assert stays == (stage.groups[group]["rate"] == 0), (stage.name, path)


@every_run
def test_surgery_without_training_changes_only_the_classifier(trained, name):
    workdir = trained(name)
    for stage in stages_of(name).values():
        if stage.epochs:
            continue
        before, after = (paths(saved(workdir, s)["variables"]["params"]) for s in (stage.start_from, stage.name))
        changed = {path for path in after if not np.array_equal(after[path], before[path])}
        assert changed and changed <= {"net/classifier/kernel", "net/classifier/bias"}, stage.name


@every_run
def test_batch_norm_statistics_change_only_in_train_mode(trained, name):
    workdir = trained(name)
    for stage in stages_of(name).values():
        if stage.start_from == "scratch":
            continue
        before, after = (paths(saved(workdir, s)["variables"]["stats"]) for s in (stage.start_from, stage.name))
        frozen = "guide/" if stage.method["name"] == "bgat" else "none"
        for path, value in after.items():
            moved = not np.array_equal(value, before[path])
            assert moved == (stage.batch_norm == "train" and not path.startswith(frozen)), (stage.name, path)


@every_run
def test_the_results_are_complete(trained, name):
    workdir = trained(name)
    results = json.loads((workdir / "results.json").read_text())
    stages = stages_of(name)
    assert list(results["stages"]) == list(stages)
    for stage in stages.values():
        summary = results["stages"][stage.name]
        assert set(summary["accuracy"]) == {"all", "many", "medium", "few"}
        assert summary["seconds"] > 0
        if stage.surgery.get("name") == "nearest_mean":
            assert summary["ece"] is None  # its logits have no scale
        else:
            assert 0 <= summary["ece"] <= 1
        assert len(summary["per_class_accuracy"]) == 10
        assert np.mean(summary["per_class_accuracy"]) == pytest.approx(summary["accuracy"]["all"])
        assert summary["best_on_test"]["accuracy"] >= summary["accuracy"]["all"]
        assert ("nearest_mean" in summary) == stage.nearest_mean
        assert summary.get("surgery", {}).get("name") == stage.surgery.get("name")
        assert ("best_on_holdout" in summary) == ("tau_norm" in stages)
    assert (workdir / "report" / "index.html").exists()
    if name in ARCHIVED:
        assert (workdir / "report" / "summary.png").exists()


def test_tau_is_the_best_on_the_holdout(trained):
    results = json.loads((trained("cifar10_lt:method=tau_norm") / "results.json").read_text())
    note = results["stages"]["tau_norm"]["surgery"]
    accuracy = note["holdout_accuracy"]
    assert list(accuracy) == [f"{k / 10:g}" for k in range(21)]
    assert accuracy[f"{note['tau']:g}"] == max(accuracy.values())
    assert min(accuracy.values()) < max(accuracy.values())  # tau matters


def test_the_margins_of_drolt_are_trained_and_end_with_its_stage(trained):
    workdir = trained("cifar10_lt:method=drolt")
    (margins,) = saved(workdir, "dro")["variables"]["params"]["method"]["margins"]
    assert margins.shape == (10,) and (margins != 1).all()
    assert set(saved(workdir, "ce_classifier")["variables"]["params"]) == {"net"}


class Reached(Exception):
    pass


def before_dispatch(patch, stage, number, act):
    """Call `act(state, stop)` before dispatch `number` of a stage, counted from 0."""
    start = train.StageTrainer.start

    def watched(trainer, before):
        start(trainer, before)
        run, count = trainer.compiled.run, itertools.count()

        def counted(state, *arguments):
            if next(count) == number:
                act(state, trainer.stop)
            return run(state, *arguments)

        if trainer.stage.name == stage:
            trainer.compiled = trainer.compiled._replace(run=counted)

    patch.setattr(train.StageTrainer, "start", watched)


def rewound(workdir, folder, stage, stages):
    """Copy a finished run in the state before `stage` began."""
    copy = shutil.copytree(workdir, folder / "run")
    (copy / "results.json").unlink()
    for later in stages[stages.index(stage) :]:
        shutil.rmtree(copy / "checkpoints" / later)
    return copy


def test_the_files_differ_only_in_numbers():
    """So this module trains the methods of one file, and of the other only the two whose numbers differ."""
    for name in recipes.WITHOUT_PRETRAINED:
        first, second = (tiny_config(f"{file}:method={name}") for file in FILES)
        expected = {"name", "data.name", "data.ranges"}
        expected |= {"reslt.method.beta"} if name == "reslt" else set()
        classifier = ("method.head", "method.tail", "groups.classifier.rate", "batch_norm")
        expected |= {f"classifier.{key}" for key in classifier} if name == "mislas" else set()
        differing = {line.partition(":")[0] for line in differences(first, second)}
        assert differing <= expected, name
