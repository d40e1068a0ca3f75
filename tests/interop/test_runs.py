"""Runs and imported weights: exported from a run, imported into another, evaluated without one."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import config, models, surgery, train
from ltjax.engine import experiment as experiments
from ltjax.engine.stage import TrainState
from ltjax.interop import export, torch
from ltjax.modes import attack
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs.checkpoint import Checkpoints
from ltjax.runs.weights import load_weights, save_weights
from ltjax.system.files import write_json
from ltjax.types import UserError
from tests.test_run import tiny_config

pytestmark = pytest.mark.usefixtures("one_device", "no_reports")


def quick(**changes):
    """Return one epoch of cross-entropy with a ResNet-8 on long-tailed Fashion-MNIST."""
    return tiny_config(**{"stages": ("ce",), "epochs": 1, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, train.train(quick(), workdir)


@pytest.fixture(scope="module")
def weights(trained):
    folder = trained[0].with_name("weights")
    assert export.main([str(trained[0]), "--format=weights", f"--out={folder}"]) == 0
    return folder


FIGURES = ("accuracy", "ece", "loss", "per_class_accuracy")


def test_imported_weights_have_the_figures_of_their_run(trained, weights, tmp_path, capsys):
    actual = evaluate_workdir(quick(weights=str(weights)), tmp_path / "new")
    assert {key: actual[key] for key in FIGURES} == {key: trained[1][key] for key in FIGURES}
    written = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert written["weights"] == str(weights)
    assert "Imported weights" in capsys.readouterr().out


def test_a_trip_through_pytorchs_names_changes_no_figure(trained, tmp_path):
    file = tmp_path / "net.safetensors"
    assert export.main([str(trained[0]), "--format=safetensors", f"--out={file}"]) == 0
    command = [str(file), "--model=resnet_cifar,depth=8,width=2,mean=(0.286,),std=(0.353,)"]
    assert torch.main([*command, f"--out={tmp_path / 'w'}"]) == 0
    actual = evaluate_workdir(quick(weights=str(tmp_path / "w")), tmp_path / "new")
    assert actual["per_class_accuracy"] == trained[1]["per_class_accuracy"]


def test_weights_in_another_order_of_classes_have_the_same_figures(trained, weights, tmp_path):
    order = np.random.default_rng(0).permutation(10)
    file, imported = tmp_path / "net.safetensors", load_weights(weights)
    theirs = imported.variables.params["net"]["classifier"]
    theirs |= {"kernel": theirs["kernel"][:, order], "bias": theirs["bias"][order]}
    save_weights(file.with_suffix(""), imported.variables, imported.settings, num_classes=10)
    assert export.main([str(file.with_suffix("")), "--format=safetensors", f"--out={file}"]) == 0
    (tmp_path / "order.json").write_text(json.dumps(order.tolist()))
    command = [str(file), "--model=resnet_cifar,depth=8,width=2,mean=(0.286,),std=(0.353,)", f"--out={tmp_path / 'w'}"]
    assert torch.main([*command, f"--class_order={tmp_path / 'order.json'}"]) == 0
    assert load_weights(tmp_path / "w").class_order == tuple(order)
    actual = evaluate_workdir(quick(weights=str(tmp_path / "w")), tmp_path / "new")
    assert actual["per_class_accuracy"] == trained[1]["per_class_accuracy"]


def test_imported_weights_are_attacked(trained, weights, tmp_path):
    settings = {"tests": ("pgd-1",), "num_images": 20, "batch_size": 20}
    values = {**quick(weights=str(weights)), "attack": settings}
    actual = attack.attack_workdir(values, tmp_path)
    same = attack.attack_workdir({**quick(), "attack": settings}, trained[0])
    assert actual["stage"] == "imported"
    for test in ("clean", "pgd-1"):
        assert actual["tests"][test]["accuracy"] == same["tests"][test]["accuracy"]
    assert json.loads((tmp_path / "attack.json").read_text())["weights"] == str(weights)


def test_training_starts_from_imported_weights(trained, weights):
    run = config.parse(quick(weights=str(weights)))
    start = experiments.starting_variables(experiments.set_up(run, None), run.stages["ce"])
    for tree, name in ((start.params, "params"), (start.stats, "stats")):
        given = getattr(load_weights(weights).variables, name)["net"]
        jax.tree.map(np.testing.assert_array_equal, tree["net"], given)


def test_a_new_head_of_surgery_is_not_the_imported_one(weights):
    run = config.parse(quick(weights=str(weights)))
    experiment = experiments.set_up(run, None)
    stage = run.stages["ce"]._replace(surgery={"name": next(iter(surgery.SURGERIES))})
    assert stage.surgery["name"] == "new_head"
    start = experiments.starting_variables(experiment, run.stages["ce"])
    changed, _ = experiments.apply_surgery(experiment, stage, start)
    ours, theirs = (np.asarray(v.params["net"]["classifier"]["kernel"]) for v in (changed, start))
    assert not np.allclose(ours, theirs)


def test_a_run_of_another_network_takes_the_parts_that_fit(weights):
    values = quick(**{"weights": str(weights), "weights_parts": ("backbone",), "model.logit_scale": False})
    run = config.parse(values)
    experiment = experiments.set_up(run, None)
    start = experiments.starting_variables(experiment, run.stages["ce"])
    theirs = load_weights(weights).variables.params["net"]
    np.testing.assert_array_equal(
        start.params["net"]["backbone"]["conv"]["kernel"], theirs["backbone"]["conv"]["kernel"]
    )
    assert not np.allclose(start.params["net"]["classifier"]["kernel"], theirs["classifier"]["kernel"])
    with pytest.raises(
        UserError,
        match=r"logit_scale \(weights \(10,\), network none.*config\.weights_parts=\('backbone', 'classifier'\)",
    ):
        experiments.starting_variables(experiment._replace(config=run._replace(weights_parts=())), run.stages["ce"])


def test_weights_of_another_network_are_evaluated_with_their_network(trained, weights, tmp_path):
    values = quick(**{"weights": str(weights), "model.width": 4, "model.logit_scale": False})
    actual = evaluate_workdir(values, tmp_path)
    assert actual["per_class_accuracy"] == trained[1]["per_class_accuracy"]


def test_weights_for_other_classes_are_refused(weights, tmp_path):
    imported = load_weights(weights)
    classifier = imported.variables.params["net"]["classifier"]
    classifier |= {key: value[..., :7] for key, value in classifier.items()}
    save_weights(tmp_path / "w", imported.variables, imported.settings, num_classes=7)
    with pytest.raises(UserError, match=r"classifier/bias \(weights \(7,\), network \(10,\)\)"):
        evaluate_workdir(quick(weights=str(tmp_path / "w")), tmp_path / "new")


def test_without_weights_an_empty_workdir_says_to_train(tmp_path):
    with pytest.raises(UserError, match="train first"):
        evaluate_workdir(quick(), tmp_path)


def test_stablehlo_of_a_run_has_the_logits_of_its_network(trained, weights, tmp_path):
    file = tmp_path / "net"
    assert export.main([str(trained[0]), "--format=stablehlo", "--image_size=28", f"--out={file}"]) == 0
    images = np.random.default_rng(0).uniform(size=(2, 28, 28, 1)).astype(np.float32)
    imported = load_weights(weights)
    settings = dict(imported.settings)
    model = models.create(settings.pop("name"), 10, **settings)
    collections = {"params": imported.variables.params["net"], "batch_stats": imported.variables.stats["net"]}
    expected = jax.jit(lambda x: model.apply(collections, x).logits)(images)
    actual = jax.export.deserialize(bytearray(file.read_bytes())).call(images)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_each_replica_of_a_run_can_be_taken_out(tmp_path, variables_of, same):
    model = models.create("resnet_cifar", 10, depth=8, width=2)
    each = [variables_of(model, seed=seed) for seed in (0, 1)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    step = jnp.zeros(2, jnp.int32)
    with Checkpoints(tmp_path / "checkpoints" / "ce") as checkpoints:
        checkpoints.save(7, TrainState(step, step.astype(jnp.uint32), both, {}), {})
        checkpoints.wait()
    write_json(tmp_path / "config.json", quick(**{"replicas": 2, "model.logit_scale": False}))
    for replica in (0, 1):
        same(export.read(tmp_path, replica=replica).variables, each[replica])
    with pytest.raises(UserError, match="the run has 2"):
        export.read(tmp_path, replica=2)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints" / "ce" / "7" / "state").mkdir(parents=True)
    write_json(tmp_path / "config.json", quick())
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*ce/7/state"):
        export.read(tmp_path)
