"""Every method of the CIFAR-LT configs, trained for a few small steps over two devices on made-up images."""

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
from ltjax.archive import archive
from ltjax.config import differences, parse
from ltjax.data.source import Images
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.system import parallel
from ltjax.system.signals import Interrupted

FILES = {"cifar10_lt": cifar10_lt, "cifar100_lt": cifar100_lt}
# What `test_the_files_differ_only_in_numbers` leaves of cifar100_lt, and recipes that no method has.
# instead of method=lbgat, which is its first stage
LBGAT = "cifar10_lt:recipe=lbgat+robust_classifier,beta=6,awp=true,sampler=class_aware"
RUNS = (
    *(f"cifar10_lt:method={name}" for name in recipes.METHODS if name != "lbgat"),
    LBGAT,
    *(f"cifar100_lt:method={name}" for name in ("mislas", "reslt")),
    "cifar10_lt:recipe=reslt+dro+smoothing",
    "cifar10_lt:recipe=mixup+dro+lws",
    "cifar10_lt:recipe=ce+drw",
    "cifar10_lt:recipe=ce+balanced_softmax_classifier",
    "cifar10_lt:recipe=ldam+crt",
)
IDS = [name.replace(":", "-").replace("=", "-") for name in RUNS]
every_run = pytest.mark.parametrize("name", RUNS, ids=IDS)
# (a run, the stage it is stopped in): every kind of thing that a stage may take over from the one before
STOPPED = (
    ("cifar10_lt:method=mislas", "classifier"),
    ("cifar10_lt:method=ldam_drw", "ldam"),
    ("cifar10_lt:method=ldam_drw", "drw"),
    ("cifar10_lt:method=drolt", "dro"),
    ("cifar10_lt:method=tau_norm", "ce"),
    ("cifar10_lt:recipe=ldam+crt", "crt"),
    ("cifar10_lt:recipe=reslt+dro+smoothing", "reslt"),
    (LBGAT, "lbgat"),
)
# 629 images: 40 steps an epoch in dispatches of 10, or without the last batch 39 in dispatches of 13.
TINY = {
    "data.max_count": 115,
    "data.imbalance": 4.0,
    "data.many_above": 80,
    "data.few_below": 45,
    "model.depth": 8,
    "model.width": 4,
    "batch_size": 16,
    "epochs": 3,
    "dispatch_steps": 13,
    "eval_batch_size": 64,
}


def made_up_images(num_classes=10, size=8):
    """A colour for each class, with noise: 125 training and 6 test images of each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (num_classes, 1, 1, 3))

    def some(count):
        labels = np.tile(np.arange(num_classes, dtype=np.int32), count)
        noise = rng.normal(0, 20, (len(labels), size, size, 3))
        return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels

    return Images(*some(125), *some(6), tuple(f"class {c}" for c in range(num_classes)))


def tiny_config(name):
    """The config of "FILE:ARGUMENTS" made tiny, as nested dicts."""
    file, _, argument = name.partition(":")
    values = FILES[file].get_config(argument)
    values.update_from_flattened_dict(TINY)
    values.data.holdout = 5 if values.data.holdout else 0
    for net in ("model", "guide"):
        if values.get(net) and values[net].name != "resnet_cifar":  # adversarial training's
            own = {key: value for key, value in values[net].items() if key != "init"}  # of another network
            values[net] = {**own, "name": "wide_resnet", "depth": 10, "width": 1}
    for stage in values.stages:
        settings = values[stage]
        if settings.start_from != "scratch" and settings.epochs:
            settings.epochs = 2
        if "attack" in settings.method:
            settings.method.attack.num_steps = 2
        if settings.get("augment"):
            settings.augment.crop_padding = 1
            settings.augment.cutout_size = settings.augment.cutout_size and 3
        if settings.method.name == "drolt" or stage == "drw":
            settings.lr = 0.05  # the papers' are for more steps
        if settings.method.name == "bgat":
            settings.lr = 0.02  # its guide has learned little, and with large logits
        if settings.method.name == "reslt":  # there are fewer classes than in CIFAR-100
            settings.method.update(medium_start=2, tail_start=4)
    return values.to_dict()


@pytest.fixture(scope="module", autouse=True)
def two_devices_and_made_up_images():
    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, data_dir=None: made_up_images())
        patch.setattr(parallel, "make_mesh", lambda devices=None, replicas=1: make_mesh(jax.devices()[:2], replicas))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name): the workdir of a run, trained once.

    trained.starts[name][stage]: new networks' parameters. trained.prepared[name]: what it trained with, compiled.
    """
    folder = tmp_path_factory.mktemp("runs")
    initial_variables, prepare = train.initial_variables, train.prepare

    def trained(name):
        workdir = folder / name.replace(":", "-")
        if not (workdir / "results.json").exists():
            starts = trained.starts.setdefault(name, {})

            def started(experiment, stage):
                variables = initial_variables(experiment, stage)
                starts[stage.name] = jax.tree.map(np.array, variables.params)
                return variables

            def prepared(*arguments):
                trained.prepared[name] = prepare(*arguments)
                return trained.prepared[name]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "initial_variables", started)
                patch.setattr(train, "prepare", prepared)
                train.train(tiny_config(name), workdir)
        return workdir

    trained.starts, trained.prepared = {}, {}
    return trained


def steps_of(workdir, stage):
    return sorted(int(path.name) for path in (workdir / "checkpoints" / stage).iterdir() if path.name.isdigit())


def saved(workdir, stage):
    """The newest checkpoint's state, as nested dicts of NumPy arrays."""
    step = steps_of(workdir, stage)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((workdir / "checkpoints" / stage / str(step) / "state").absolute())
    return jax.tree.map(np.asarray, state)


def stages_of(name):
    return parse(tiny_config(name)).stages


ARCHIVED = ("cifar10_lt:method=drolt", "cifar10_lt:method=reslt", "cifar10_lt:method=tau_norm", LBGAT)


@pytest.mark.parametrize("name", ARCHIVED, ids=[IDS[RUNS.index(name)] for name in ARCHIVED])
def test_an_archive_has_the_figures_of_its_run_to_the_last_digit(trained, tmp_path, name):
    """With margins of the method, a classifier changed for evaluation, surgery, and a guide that is not kept."""
    workdir = trained(name)
    archive(workdir, tmp_path / "kept")
    trained_to, found = (
        results["stages"][results["final_stage"]]
        for results in (
            json.loads((workdir / "results.json").read_text()),
            evaluate_workdir(tiny_config(name), tmp_path / "kept"),
        )
    )
    for key in ("accuracy", "ece", "loss", "per_class_accuracy", "nearest_mean"):
        assert found.get(key) == trained_to.get(key), key


def logged(workdir, stage, split="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and line["split"] == split]


def paths(tree):
    return optim.flatten(tree)


@every_run
def test_the_loss_falls_in_every_stage(trained, name):
    workdir = trained(name)
    for stage, settings in stages_of(name).items():
        if settings.epochs:
            losses = [line["values"]["loss"] for line in logged(workdir, stage)]
            half = len(losses) // 2
            assert np.mean(losses[half:]) < np.mean(losses[:half]), (stage, losses)


@every_run
def test_an_epoch_is_every_image_once_or_whole_batches_or_as_many_as_of_equal_classes(trained, name):
    workdir = trained(name)
    for stage, settings in stages_of(name).items():
        steps = 72 if settings.epoch_size == "balanced" else 39 if settings.drop_last else 40  # 1,150 of 16
        assert steps_of(workdir, stage)[-1] == settings.epochs * steps, stage


@every_run
def test_only_the_parameters_of_a_stages_groups_move(trained, name):
    workdir = trained(name)
    for stage, settings in stages_of(name).items():
        if not settings.epochs:
            continue
        last = paths(saved(workdir, stage)["variables"]["params"])
        if settings.start_from == "scratch":
            start = paths(trained.starts[name][stage])
        else:
            start = paths(saved(workdir, settings.start_from)["variables"]["params"])
        for path, group in optim.assign_groups(list(last), settings.groups).items():
            # the method's own parameters begin with the stage: DRO-LT's margins, whose test is below
            stays = not path.startswith("method/") and np.array_equal(last[path], start[path])
            assert stays == (settings.groups[group]["rate"] == 0), (stage, path)


@every_run
def test_surgery_alone_changes_the_classifier_alone(trained, name):
    workdir = trained(name)
    for stage, settings in stages_of(name).items():
        if settings.epochs:
            continue
        before, after = (paths(saved(workdir, s)["variables"]["params"]) for s in (settings.start_from, stage))
        changed = {path for path in after if not np.array_equal(after[path], before[path])}
        assert changed and changed <= {"net/classifier/kernel", "net/classifier/bias"}, stage


@every_run
def test_batch_norm_statistics_move_as_the_stage_says(trained, name):
    workdir = trained(name)
    for stage, settings in stages_of(name).items():
        if settings.start_from == "scratch":
            continue
        before, after = (paths(saved(workdir, s)["variables"]["stats"]) for s in (settings.start_from, stage))
        frozen = "guide/" if settings.method["name"] == "bgat" else "none"
        for path, value in after.items():
            moved = not np.array_equal(value, before[path])
            assert moved == (settings.batch_norm == "train" and not path.startswith(frozen)), (stage, path)


@every_run
def test_the_results_are_complete(trained, name):
    workdir = trained(name)
    results = json.loads((workdir / "results.json").read_text())
    stages = stages_of(name)
    assert list(results["stages"]) == list(stages)
    for stage, settings in stages.items():
        found = results["stages"][stage]
        assert set(found["accuracy"]) == {"all", "many", "medium", "few"}
        assert found["seconds"] > 0
        if settings.surgery.get("name") == "nearest_mean":
            assert found["ece"] is None  # the size of its logits means nothing
        else:
            assert 0 <= found["ece"] <= 1
        assert len(found["per_class_accuracy"]) == 10
        assert np.mean(found["per_class_accuracy"]) == pytest.approx(found["accuracy"]["all"])
        assert found["best_on_test"]["accuracy"] >= found["accuracy"]["all"]
        assert ("nearest_mean" in found) == settings.nearest_mean
        assert found.get("surgery", {}).get("name") == settings.surgery.get("name")
        assert ("best_on_holdout" in found) == ("tau_norm" in stages)
    assert (workdir / "report" / "summary.png").exists()


def test_tau_is_the_best_on_the_holdout(trained):
    results = json.loads((trained("cifar10_lt:method=tau_norm") / "results.json").read_text())
    note = results["stages"]["tau_norm"]["surgery"]
    accuracy = note["holdout_accuracy"]
    assert list(accuracy) == [f"{k / 10:g}" for k in range(21)]
    assert accuracy[f"{note['tau']:g}"] == max(accuracy.values())
    assert min(accuracy.values()) < max(accuracy.values())  # so that there was something to choose


def test_the_margins_of_drolt_are_trained_and_stay_in_its_stage(trained):
    workdir = trained("cifar10_lt:method=drolt")
    (margins,) = saved(workdir, "dro")["variables"]["params"]["method"]["margins"]
    assert margins.shape == (10,) and (margins != 1).all()
    assert set(saved(workdir, "ce_classifier")["variables"]["params"]) == {"net"}


class Reached(Exception):
    pass


def before_dispatch(patch, stage, number, act):
    """Have `act(state, stop)` called before a stage's dispatch of this number, counted from 0."""
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
    """A copy of a finished run, as it was before `stage` began."""
    copy = shutil.copytree(workdir, folder / "run")
    (copy / "results.json").unlink()
    for later in stages[stages.index(stage) :]:
        shutil.rmtree(copy / "checkpoints" / later)
    return copy


def test_deferred_reweighting_goes_on_with_the_momentum(trained, tmp_path, monkeypatch):
    name, seen = "cifar10_lt:method=ldam_drw", {}
    undisturbed = trained(name)
    workdir = rewound(undisturbed, tmp_path, "drw", list(stages_of(name)))

    def look(state, stop):
        seen["leaves"] = [np.array(x) for x in jax.tree.leaves(state.opt_state)]
        raise Reached

    monkeypatch.setattr(train, "prepare", lambda *_: trained.prepared[name])
    before_dispatch(monkeypatch, "drw", 0, look)
    with pytest.raises(Reached):
        train.train(tiny_config(name), workdir)
    momentum = [x for x in jax.tree.leaves(saved(undisturbed, "ldam")["opt_state"]) if x.ndim]
    kept = [x for x in seen["leaves"] if x.ndim]
    assert len(kept) == len(momentum) > 10
    for found, expected in zip(sorted(kept, key=order), sorted(momentum, key=order), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert expected.any()
    assert {x.item() for x in seen["leaves"] if not x.ndim} == {0}  # its schedule starts anew


def order(array):
    return array.shape, array.ravel().tolist()


@pytest.mark.parametrize("name, stage", STOPPED, ids=[f"{name.split('=')[1]}-{stage}" for name, stage in STOPPED])
def test_a_run_stopped_within_an_epoch_ends_with_the_same_bits(trained, tmp_path, monkeypatch, name, stage):
    undisturbed, stages = trained(name), list(stages_of(name))
    workdir = rewound(undisturbed, tmp_path, stage, stages)

    def stop_here(state, stop):
        stop.requested = signal.SIGTERM

    monkeypatch.setattr(train, "write_report", lambda *_: None)  # which is looked at elsewhere
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", lambda *_: trained.prepared[name])  # what is resumed makes its own
        before_dispatch(patch, stage, 1, stop_here)
        with pytest.raises(Interrupted):
            train.train(tiny_config(name), workdir)
    assert steps_of(workdir, stage) == [{"reslt": 26, "dro": 24}.get(stage, 20)]
    train.train(tiny_config(name), workdir)
    for each in stages[stages.index(stage) :]:
        assert steps_of(workdir, each)[-1] == steps_of(undisturbed, each)[-1]
        jax.tree.map(np.testing.assert_array_equal, saved(workdir, each), saved(undisturbed, each))
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


def test_the_files_differ_only_in_numbers():
    """So that training the methods of one file, and the two whose numbers differ, trains those of the other."""
    for name in recipes.METHODS:
        first, second = (tiny_config(f"{file}:method={name}") for file in FILES)
        expected = {"name", "data.name", "data.ranges"}
        expected |= {"reslt.method.beta"} if name == "reslt" else set()
        classifier = ("method.head", "method.tail", "groups.classifier.rate", "batch_norm")
        expected |= {f"classifier.{key}" for key in classifier} if name == "mislas" else set()
        found = {line.partition(":")[0] for line in differences(first, second)}
        assert found <= expected, name
