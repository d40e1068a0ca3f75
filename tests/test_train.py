"""When the training loop evaluates, saves, reads metrics and stops, on a small stage of DRO-LT."""

import functools
import inspect
import json
import signal
from importlib import import_module

import jax
import numpy as np
import pytest

from ltjax import config, data, methods, train
from ltjax.engine import class_means, evaluate, feed
from ltjax.engine import experiment as experiments
from ltjax.runs import checkpoint
from ltjax.system.signals import Interrupted
from tests.engine.test_streamed import both, settings
from tests.test_conformance import Reached, before_dispatch, saved, steps_of

STEPS, EPOCHS = 5, 3  # 38 images in batches of 8: 5 steps an epoch, in dispatches of 3 and 2


def small(**changes):
    config = settings(dispatch_steps=3)
    config["dro"]["epochs"] = EPOCHS
    return {**config, **changes}


@pytest.fixture(scope="module", autouse=True)
def one_experiment(one_device, no_reports):
    """Let all runs share one experiment on made-up images, which is compiled once."""
    before = train.set_up_with_stages
    set_up = functools.cache(lambda: before(config.parse(small()), None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: both()[0])
        patch.setattr(train, "set_up_with_stages", lambda run, *_: (set_up()[0]._replace(config=run), set_up()[1]))
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the workdir and the results of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train.train(small(), workdir)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request, monkeypatch):
    """Return whether steps are dispatched before the metrics of the last ones are read, as on accelerators."""
    monkeypatch.setattr(train, "runs_ahead", lambda: request.param)
    return request.param


def assert_same(workdir, summary, undisturbed):
    """Compare weights bit by bit, every line of the log, and every figure except times."""
    expected_workdir, expected = undisturbed
    jax.tree.map(np.testing.assert_array_equal, saved(workdir, "dro"), saved(expected_workdir, "dro"))
    assert (workdir / "metrics.jsonl").read_text() == (expected_workdir / "metrics.jsonl").read_text()
    for key in ("accuracy", "ece", "loss", "nearest_mean", "per_class_accuracy", "best_on_test"):
        assert summary[key] == expected[key], key
    assert summary["stages"]["dro"]["evaluations"] == expected["stages"]["dro"]["evaluations"]


def evaluated_epochs(epochs, every):
    return [epoch for epoch in range(1, epochs + 1) if train.evaluation_follows(epoch, epochs, every)]


@pytest.mark.parametrize("every, expected", [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (9, [7])])
def test_eval_every_counts_epochs_and_includes_the_last(every, expected):
    assert evaluated_epochs(7, every) == expected


def test_eval_every_0_means_every_fifth_epoch_and_the_last_20():
    assert evaluated_epochs(200, 0) == [*range(5, 181, 5), *range(181, 201)]
    assert evaluated_epochs(12, 0) == list(range(1, 13))


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_with_an_attack_set_attacks(name):
    create = import_module(f"ltjax.methods.{name}").create
    needed = {
        "mislas": dict(head=0.3, tail=0.0, shape="concave"),
        "reslt": dict(medium_start=1, tail_start=2, beta=0.9),
    }
    method = methods.create(name, np.array([9, 5, 2]), 4, **needed.get(name, {}))
    assert method.attacks == ("attack" in inspect.signature(create).parameters)


@pytest.mark.parametrize("backend, most, most_attacked", [("gpu", 100, 20), ("tpu", 100, 20), ("cpu", 16, 3)])
def test_a_dispatch_is_short_enough_to_be_stopped(monkeypatch, backend, most, most_attacked):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for steps in (7, 85, 97, 352, 391, 10_009):
        for attacks, limit in ((False, most), (True, most_attacked)):
            plain, several, streamed = (
                feed.dispatch_length(steps, 0, attacks=attacks, **how)
                for how in ({}, {"replicas": 4}, {"streamed": True})
            )
            assert min(steps, limit) // 2 <= plain <= min(steps, limit)
            assert 1 <= several <= max(1, limit // 4)
            assert 1 <= streamed <= min(4, limit)


def test_a_short_stage_is_saved_only_at_its_end(undisturbed):
    assert steps_of(undisturbed[0], "dro") == [EPOCHS * STEPS]


def test_a_stage_is_saved_every_checkpoint_seconds(tmp_path, monkeypatch, ahead):
    steps, save = [], checkpoint.Checkpoints.save

    def watched(self, step, *arguments):
        steps.append(step)
        save(self, step, *arguments)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", watched)
    train.train(small(checkpoint_seconds=0.0), tmp_path)
    assert len(steps) > EPOCHS and steps == sorted(set(steps)) and steps[-1] == EPOCHS * STEPS
    assert steps_of(tmp_path, "dro") == steps[-2:]


def test_running_ahead_changes_no_result(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(train, "runs_ahead", lambda: True)
    assert_same(tmp_path, train.train(small(), tmp_path), undisturbed)


def test_steps_are_dispatched_before_the_last_metrics_are_read(tmp_path, monkeypatch, ahead):
    """The exceptions are the end of an epoch, which needs the state, and a new length, which is compiled first."""
    events, take, write = [], feed.Feed.take, train.logs.RunLog.write

    def given(self, step, num_steps, *arguments):
        events.append(("given", step + num_steps))
        return take(self, step, num_steps, *arguments)

    def read(self, stage, epoch, step, split, values):
        events.append(("read", step) if split == "train" else ("evaluated", step))
        write(self, stage, epoch, step, split, values)

    monkeypatch.setattr(feed.Feed, "take", given)
    monkeypatch.setattr(train.logs.RunLog, "write", read)
    train.train(small(), tmp_path)
    in_turn = [("given", 3), ("read", 3), ("given", 5), ("read", 5), ("evaluated", 5)]
    assert events[:5] == in_turn
    second = [(what, step + STEPS) for what, step in in_turn]
    if ahead:
        second[1:3] = second[2:0:-1]
    assert events[5:10] == second


@pytest.mark.parametrize("number, in_turn, one_ahead", [(0, 3, 3), (1, 5, 5), (2, 8, 10), (3, 10, 10)])
def test_at_most_two_dispatches_finish_after_a_signal(tmp_path, undisturbed, ahead, number, in_turn, one_ahead):
    """The signal comes before dispatch `number`; `in_turn` and `one_ahead` are the saved steps."""
    with pytest.MonkeyPatch.context() as patch:
        before_dispatch(patch, "dro", number, lambda state, stop: setattr(stop, "requested", signal.SIGTERM))
        with pytest.raises(Interrupted):
            train.train(small(), tmp_path)
    assert steps_of(tmp_path, "dro") == [one_ahead if ahead else in_turn]
    assert_same(tmp_path, train.train(small(), tmp_path), undisturbed)


@pytest.mark.parametrize("epoch", [1, EPOCHS])
def test_a_signal_interrupts_an_evaluation(tmp_path, undisturbed, monkeypatch, epoch):
    """The state is saved without its figures; the resumed run evaluates it."""
    signals, stop_signals, evaluate_set, count = [], train.StopSignals, train.evaluate_set, [0]

    def watched():
        signals.append(stop_signals())
        return signals[-1]

    def signalled(*arguments):
        count[0] += 1
        if count[0] == epoch:
            signals[0].requested = signal.SIGTERM
        return evaluate_set(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "StopSignals", watched)
        patch.setattr(train, "evaluate_set", signalled)
        with pytest.raises(Interrupted):
            train.train(small(), tmp_path)
    assert steps_of(tmp_path, "dro") == [epoch * STEPS] and count == [epoch]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "test"] == [STEPS * n for n in range(1, epoch)]
    assert_same(tmp_path, train.train(small(), tmp_path), undisturbed)
    record = json.loads((tmp_path / f"checkpoints/dro/{EPOCHS * STEPS}/record/metadata").read_text())
    assert [evaluation["epoch"] for evaluation in record["evaluations"]] == list(range(1, EPOCHS + 1))


def test_evaluations_after_the_last_checkpoint_are_repeated(tmp_path, undisturbed, ahead):
    """The run is killed in the third epoch; its only checkpoint is from the first."""
    save, write = checkpoint.Checkpoints.save, train.logs.RunLog.write

    def once(self, step, *arguments):
        if not self.steps():
            save(self, step, *arguments)

    def killed(self, stage, epoch, step, split, values):
        if epoch == EPOCHS:
            raise Reached
        write(self, stage, epoch, step, split, values)

    often = small(checkpoint_seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", once)
        patch.setattr(train.logs.RunLog, "write", killed)
        with pytest.raises(Reached):
            train.train(often, tmp_path)
    assert steps_of(tmp_path, "dro")[-1] < STEPS
    assert_same(tmp_path, train.train(often, tmp_path), undisturbed)


def test_evaluation_and_refresh_share_the_class_means(tmp_path, monkeypatch):
    """They are computed before the first epoch and after each epoch."""
    experiment, compiled = train.set_up_with_stages(config.parse(small()), None)
    calls = []

    def class_means(variables, layers, check_stop):
        calls.append(layers)
        return experiment.class_means(variables, layers, check_stop)

    monkeypatch.setattr(
        train, "set_up_with_stages", lambda *_: (experiment._replace(class_means=class_means), compiled)
    )
    train.train(small(), tmp_path)
    assert calls == [()] * (1 + EPOCHS)


@pytest.mark.parametrize("needing", ["evaluation", "surgery"])
def test_class_means_stop_after_a_signal(needing):
    def interrupted():
        raise Interrupted(signal.SIGTERM)

    run = config.parse(small())
    experiment, stage = experiments.set_up(run, None), run.stages["dro"]
    stage = stage._replace(surgery={"name": "nearest_mean"})
    compute = {"evaluation": experiments.class_means_for, "surgery": experiments.apply_surgery}[needing]
    with pytest.raises(Interrupted):
        compute(experiment, stage, experiments.fresh_variables(experiment, stage), interrupted)


def test_class_means_use_the_batch_size_of_evaluation(monkeypatch):
    """`config.eval_batch_size`, adjusted by `shared_batch`."""
    run, asked, taken = config.parse(small(eval_batch_size=24)), [], []
    monkeypatch.setattr(evaluate, "shared_batch", lambda size, *_: asked.append(size) or 20)
    of_resident = class_means.of_resident
    monkeypatch.setattr(class_means, "of_resident", lambda *args: taken.append(args[-1]) or of_resident(*args))
    experiment = experiments.set_up(run, None)
    experiment.class_means(experiments.fresh_variables(experiment, run.stages["dro"]))
    assert set(asked) == {24} and taken == [20]
