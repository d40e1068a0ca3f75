"""run.py: one line and exit code 2 for mistakes, and nothing is lost when it is stopped."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver

from ltjax import train
from ltjax.engine import feed
from ltjax.runs import workdir
from ltjax.system import parallel
from ltjax.types import UserError
from run import parse_flags

ROOT = pathlib.Path(__file__).parents[1]
# 105 images, 7 steps an epoch; stages of 2, 2 and 1 epochs
TINY = (
    "--config=configs/quickstart.py",
    "--config.data.max_count=20",
    "--config.data.imbalance=4.0",
    "--config.data.many_above=12",
    "--config.data.few_below=7",
    "--config.model.width=2",
    "--config.ce.lr=0.03",  # at 0.1, rounding errors grow tenfold in a step
    "--config.batch_size=16",
    "--config.epochs=2",
    "--config.classifier.epochs=1",
    "--config.eval_every=1",
    "--config.dispatch_steps=1",
)
CHANGES = {"ce.epochs": 1, "batch_size": 32}  # 4 steps in stage "ce", 8 in "features", 4 in "classifier"
SHORT = (*TINY, *(f"--config.{key}={value}" for key, value in CHANGES.items()))
OFTEN = "--config.checkpoint_seconds=0.0"  # save after every dispatch, not only at the end of a stage
LONG = ("--config.epochs=2000", "--config.stages=('ce',)", OFTEN)  # for runs that are stopped in the first stage


def tiny_config(**changes):
    """Return the config of `TINY` as nested dicts, with `changes` such as {"data.max_count": 10}."""
    sys.path.insert(0, str(ROOT))
    from configs import quickstart

    config = quickstart.get_config()
    for flag in TINY[1:]:
        key, value = flag.removeprefix("--config.").split("=")
        config.update_from_flattened_dict({key: type_of(config, key)(value)})
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def type_of(config, key):
    for part in key.split("."):
        config = config[part]
    return type(config)


def environment(devices=2):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def start(*arguments, devices=2, platforms="cpu", **options):
    command = [sys.executable, "run.py", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(devices), "JAX_PLATFORMS": platforms},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def wait_until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoint_saved(workdir, stage, at_least=1):
    """Whether there is a complete checkpoint of step `at_least` or later."""
    folder = workdir / "checkpoints" / stage
    steps = [p.parent.name for p in folder.glob("*/_CHECKPOINT_METADATA")] if folder.is_dir() else []
    return any(name.isdigit() and int(name) >= at_least for name in steps)


def final_arrays(workdir, stage="classifier"):
    """Return the newest checkpoint's step, and its arrays as nested dicts of NumPy arrays."""
    folder = workdir / "checkpoints" / stage
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        return step, jax.tree.map(np.asarray, checkpointer.restore(folder.absolute() / str(step) / "state"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the workdir and the output of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, out, error = run(*SHORT, f"--workdir={workdir}")
    assert code == 0, error
    return workdir, out


@pytest.fixture
def on_devices(monkeypatch):
    """Return `on_devices(2)`: runs in this process use that number of devices, and write no report."""
    make_mesh = parallel.make_mesh

    def limit(number):
        devices = jax.devices()[:number]
        monkeypatch.setattr(parallel, "make_mesh", lambda _=None, replicas=1: make_mesh(devices, replicas))
        monkeypatch.setattr(train, "write_report", lambda *_: None)

    return limit


def test_a_run_writes_its_results(finished):
    workdir, out = finished
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["stages"]) == ["ce", "features", "classifier"]
    for stage in (results, *results["stages"].values()):
        assert set(stage["accuracy"]) == {"all", "many", "medium", "few"}
        assert 0 <= stage["ece"] <= 1
        assert len(stage["per_class_accuracy"]) == 10
        assert np.isclose(np.mean(stage["per_class_accuracy"]), stage["accuracy"]["all"])
        assert stage["best_on_test"]["accuracy"] >= stage["accuracy"]["all"]
        assert stage["num_images"] == 1000  # every test image once
    for key in ("seconds", "images_per_second", "device", "num_devices", "versions", "git_commit", "command"):
        assert results[key], key
    split = json.loads((workdir / "split.json").read_text())
    assert split["class_counts"] == results["class_counts"]
    assert re.fullmatch("[0-9a-f]{64}", split["sha256"])
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 2
    assert list((workdir / "tensorboard").glob("events*"))
    assert "net/backbone/stage1_block1/conv1/kernel" in (workdir / "parameters.txt").read_text()
    assert (workdir / "report" / "summary.png").stat().st_size > 10_000
    assert "MiSLAS, stage 2" in (workdir / "report" / "index.html").read_text()
    assert "MiSLAS, stage 2" in out and "ECE" in out


def test_metrics_are_json_lines(finished):
    workdir, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"stage", "epoch", "step", "split", "values"} for line in lines)
    trained = [line["step"] for line in lines if line["stage"] == "features" and line["split"] == "train"]
    assert trained == list(range(1, 9))
    assert {line["epoch"] for line in lines if line["split"] == "test" and line["stage"] == "features"} == {1, 2}


def test_a_finished_run_prints_its_table_again(finished):
    workdir, _ = finished
    before = (workdir / "results.json").read_bytes()
    code, out, _ = run(*SHORT, f"--workdir={workdir}")
    assert code == 0
    assert "finished" in out and "MiSLAS, stage 2" in out
    assert (workdir / "results.json").read_bytes() == before


def test_eval_mode_repeats_the_figures(finished):
    workdir, _ = finished
    code, _, error = run(f"--workdir={workdir}", "--mode=eval", devices=1)
    assert code == 0, error
    trained, evaluated = (json.loads((workdir / f"{name}.json").read_text()) for name in ("results", "eval"))
    for name, stage in trained["stages"].items():
        assert evaluated["stages"][name]["accuracy"] == pytest.approx(stage["accuracy"], abs=2e-3)
        assert evaluated["stages"][name]["ece"] == pytest.approx(stage["ece"], abs=2e-3)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the workdir of a run after kill -9 in the second stage, resumed by the same command."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = start(*SHORT, OFTEN, f"--workdir={workdir}")
    wait_until(lambda: checkpoint_saved(workdir, "features", at_least=4), process)
    process.kill()
    process.communicate()
    assert not (workdir / "results.json").exists()
    code, _, error = run(*SHORT, OFTEN, f"--workdir={workdir}")
    assert code == 0, error
    return workdir


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(finished, killed):
    """The same command resumes to the same bits."""
    undisturbed, _ = finished
    for stage in ("ce", "features", "classifier"):
        step, expected = final_arrays(undisturbed, stage)
        resumed_step, arrays = final_arrays(killed, stage)
        assert resumed_step == step
        jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    assert (killed / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_prints_how_to_resume(tmp_path, number):
    workdir = tmp_path / "run"
    process = start(*TINY, *LONG, f"--workdir={workdir}")
    wait_until(lambda: checkpoint_saved(workdir, "ce"), process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "resume" in out and f"--workdir={workdir}" in out
    step, _ = final_arrays(workdir, "ce")
    logged = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert step == max(logged)  # no step is lost


def test_a_second_signal_stops_at_once(tmp_path):
    workdir = tmp_path / "run"
    process = start(*TINY, *LONG, "--config.dispatch_steps=0", f"--workdir={workdir}")
    wait_until(lambda: checkpoint_saved(workdir, "ce"), process)
    process.send_signal(signal.SIGSTOP)  # both signals arrive before the loop can act on the first
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "To resume" not in out


def damage(step_folder):
    """Flip one byte in the middle of the largest file, without changing its length."""
    largest = max((p for p in (step_folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_with_a_warning(finished, killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    (workdir / "results.json").unlink()
    folder = workdir / "checkpoints" / "classifier"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    assert steps == [3, 4]
    damage(folder / str(steps[-1]))
    code, _, error = run(*SHORT, OFTEN, f"--workdir={workdir}")
    assert code == 0, error
    assert "damaged" in error and f"step {steps[-1]}" in error
    assert (workdir / "checkpoints" / "damaged" / f"classifier-{steps[-1]}").is_dir()
    actual, expected = (final_arrays(folder)[1] for folder in (workdir, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path):
    """A limit on file sizes simulates the full disk: the first checkpoints fit, later writes fail."""
    workdir = tmp_path / "run"
    process = start(*TINY, *LONG, f"--workdir={workdir}")
    wait_until(lambda: checkpoint_saved(workdir, "ce"), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, 2000))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2, (out, error)
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("error: ") and str(workdir) in error
    step, _ = final_arrays(workdir, "ce")
    assert f"step {step}" in error


def test_a_run_on_other_devices_agrees(finished, tmp_path, on_devices):
    """One and two devices train on the same batches, so the losses agree to rounding."""
    workdir = tmp_path / "run"
    on_devices(1)
    train.train(tiny_config(**CHANGES, stages=("ce",)), workdir)
    losses = []
    for folder in (finished[0], workdir):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["values"]["loss"] for line in lines if line["stage"] == "ce"])
    assert len(losses[0]) == 5  # 4 steps, and the test images
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections on Python 3.11
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--config=configs/quickstart.py", "--config.epoch=3"), ["epoch"]),
        (("--config=configs/quickstart.py", "--config.epochs=many"), ["epochs"]),
        (("--config=configs/quickstart.py:method=ce",), ["method"]),
        (("--config=configs/cifar100_lt.py:metod=ce",), ["metod", "method, recipe, imbalance, profile, budget"]),
        (("--config=configs/cifar100_lt.py:method=misslas",), ["misslas", "mislas, ce"]),
        (("--config=configs/cifar100_lt.py:imbalance=lots",), ["imbalance=lots", "number"]),
        (("--config=configs/cifar10.py:method=lbgat,epsilon=8",), ["epsilon=8", "did you mean 8/255?"]),
        (("--config=configs/nothing.py",), ["nothing.py"]),
        (("--confg=configs/quickstart.py",), ["confg"]),
        (("--config=configs/quickstart.py", "extra"), ["extra"]),
        (("--config=configs/quickstart.py", "--mode=tain"), ["tain", "train", "eval"]),
        (("--config=configs/quickstart.py", "--mode=eval", "--dry_run"), ["--dry_run", "--mode=train"]),
        (("--mode=attack", "--config.attack.num_images=5"), ["--config.attack.num_images changes a config"]),
        (("--mode=eval",), ["holds no run", "--config"]),
        ((), ["--config"]),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(flags, words, tmp_path, monkeypatch, capfd):
    arguments = ["run.py", *flags, f"--workdir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
        parse_flags(arguments)
    out, error = capfd.readouterr()
    assert exit_.value.code == 2, (out, error)
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("error: ")
    for word in words:
        assert word in error


def test_the_home_folder_of_a_config_file_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(ROOT / "configs" / "quickstart.py", tmp_path / "c.py")
    code, _, error = run("--config=~/c.py", "--config.nothing=1")
    assert code == 2 and error.startswith("error: unknown config key config.nothing"), error


def test_a_mode_that_needs_a_run_asks_for_its_workdir():
    code, _, error = run("--mode=predict", "--images=photos")
    assert code == 2 and error == "error: --mode=predict needs the --workdir of a run, or a --config\n"


def test_a_run_does_not_resume_with_other_images(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    (workdir / "results.json").unlink()
    split = json.loads((workdir / "split.json").read_text())
    (workdir / "split.json").write_text(json.dumps({**split, "sha256": "5a"}))
    message = "began with other images than those at hand (different sha256 in split.json)"
    with pytest.raises(UserError, match=re.escape(message)):
        train.train(tiny_config(**CHANGES), workdir)
    assert json.loads((workdir / "split.json").read_text())["sha256"] == "5a"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.imbalance": 0.5}, ["imbalance = 0.5", "1 (balanced) or more"]),
        ({"data.max_count": 5000}, ["class 0", "1000 images", "5000", "data.max_count"]),
        ({"data.profile": "linear"}, ["'linear'", "exp, step"]),
        ({"data.name": "cifar1000"}, ["cifar1000", "known: cifar10"]),
        ({"model.name": "resnet_sifar"}, ["resnet_sifar", "known: resnet_cifar"]),
        ({"model.depth": 9}, ["depth = 9", "6 n + 2"]),
        ({"model.dtype": "float8"}, ["float8", "float32, bfloat16"]),
        ({"model.mean": (0.1, 0.2, 0.3), "model.std": (1.0, 1.0, 1.0)}, ["mean", "1 channels"]),
        ({"classifier.method.name": "mislass"}, ["mislass", "known: erm, mislas"]),
        ({"classifier.method.head": 2.0}, ["mislas", "head = 2.0"]),
        ({"classifier.method.shape": "convexx"}, ["convexx", "concave, linear, convex, exp"]),
        ({"classifier.augment.auto_augment": True}, ["RGB"]),
        ({"features.augment.mixup_alpha": -1.0}, ["mixup_alpha = -1.0"]),
        ({"features.schedule.warmup": 5.0}, ["warmup = 5.0", "shares of the run"]),
        ({"optimizer.momentum": 1.5}, ["momentum"]),
        ({"classifier.sampler.name": "random"}, ["'random'", "class_aware"]),
        ({"classifier.schedule.kind": "linear"}, ["'linear'", "cosine"]),
        ({"classifier.batch_norm": "off"}, ["'off'", "train, eval"]),
        ({"batch_size": 12}, ["batch_size = 12", "8 devices"]),
        ({"classifier.groups.logit_scale.match": "net/scale"}, ["net/logit_scale", "exactly one"]),
        ({"classifier.groups.logit_scale.match": "net/(logit_scale|classifier/bias)"}, ["'classifier', 'logit_scale'"]),
        ({"ce.groups.logit_scale.match": "net/head/.*"}, ["net/logit_scale"]),
        ({"classifier.start_from": "nowhere"}, ["start_from", "scratch, ce, features"]),
        ({"ce.epochs": 0}, ["epochs = 0"]),
        ({"data.holdout": 2000}, ["holdout = 2000"]),
    ],
)
def test_mistakes_in_a_config_are_named_before_training(changes, words, tmp_path):
    with pytest.raises(UserError) as error:
        train.train(tiny_config(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert [path.name for path in tmp_path.glob("run/*")] in (
        [],
        [".lock"],
    )  # so the corrected config is accepted


def test_a_missing_second_network_is_named(tmp_path):
    config = tiny_config()
    config["ce"]["method"]["net"] = "guide"
    with pytest.raises(UserError, match=r"needs a network 'guide': give its settings in config\.guide"):
        train.train(config, tmp_path / "run")


def test_missing_data_names_the_folder_and_the_command(tmp_path):
    code, _, error = run("--config=configs/cifar10_lt.py", f"--workdir={tmp_path / 'run'}", f"--data_dir={tmp_path}")
    assert code == 2
    assert str(tmp_path) in error and f"python -m ltjax.data.prepare cifar10 --data_dir={tmp_path}" in error
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused(finished):
    workdir, _ = finished
    code, _, error = run(*SHORT, "--config.ce.lr=0.2", "--config.seed=3", f"--workdir={workdir}")
    assert code == 2
    assert "ce.lr: 0.03 -> 0.2" in error and "seed: 0 -> 3" in error


def test_two_runs_cannot_share_a_workdir(tmp_path):
    with workdir.locked(tmp_path), pytest.raises(UserError, match="another process is at work in"):
        train.train(tiny_config(), tmp_path)


@pytest.mark.parametrize("content", ['{"name": "qui', "[1]"])
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_broken_file_in_the_workdir_is_named(tmp_path, name, content):
    train.write_json(tmp_path / "config.json", tiny_config())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        train.train(tiny_config(), tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write to .*metrics\.jsonl"):
        train.train(tiny_config(), tmp_path)


def test_unreadable_checkpoints_stop_the_run(finished, tmp_path):
    """If all checkpoints of a stage are damaged, it does not start from scratch, and nothing is moved."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "results.json").unlink()
    folders = [path for path in (workdir / "checkpoints" / "ce").iterdir() if path.name.isdigit()]
    for folder in folders:
        damage(folder)
    with pytest.raises(UserError, match=r"none of the checkpoints in .*ce can be read"):
        train.train(tiny_config(**CHANGES), workdir)
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    ("steps_per_epoch", "asked", "expected"),
    [(85, 16, 15), (97, 16, 14), (98, 16, 14), (39, 16, 13), (7, 50, 7), (5, 1, 1)],
)
def test_lengths_of_dispatches_are_close_to_dispatch_steps(steps_per_epoch, asked, expected):
    assert feed.dispatch_length(steps_per_epoch, asked) == expected


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        train.train(tiny_config(), tmp_path / "file" / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, on_devices):
    on_devices(2)
    with pytest.raises(UserError, match=r"stage 'ce', epoch \d+, step \d+; last good checkpoint .*ce\.lr"):
        train.train(tiny_config(**{"ce.lr": 1e30, "stages": ("ce",)}), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) <= 6  # stopped after a dispatch or two


def test_a_holdout_selects_without_the_test_set(tmp_path, on_devices):
    on_devices(2)
    changes = {"data.holdout": 2, "data.max_count": 18, "data.imbalance": 3.0, "ce.epochs": 2, "stages": ("ce",)}
    summary = train.train(tiny_config(**changes), tmp_path / "run")
    evaluations = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"split": "holdout"' in line
    ]
    assert len(evaluations) == 2
    by_step = {line["step"]: line["values"]["accuracy"]["all"] for line in evaluations}
    assert summary["best_on_holdout"]["holdout_accuracy"] == max(by_step.values())
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["num_holdout"] == 20
