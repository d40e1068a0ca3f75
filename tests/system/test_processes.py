"""Several processes on one machine: equal losses, one log, and a lost process ends the others."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from jax.experimental import multihost_utils

import run
from ltjax import train
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs.checkpoint import Checkpoints, complete_steps
from ltjax.runs.weights import save_weights
from ltjax.system import parallel, processes
from ltjax.types import UserError, Variables
from tests.system import processes_config
from tests.test_run import TINY, tiny_config

ROOT = Path(__file__).parents[2]
PATIENCE = 8  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make images of three classes: 18, 9 and 5 for training, two each for validation."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, counts in (("train", (18, 9, 5)), ("validation", (2, 2, 2))):
        for label, count in enumerate(counts):
            (root / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = (rng.integers(0, 100, (20, 24, 3)) + 70 * label).astype(np.uint8)
                cv2.imwrite(str(root / part / f"class{label}" / f"{number}.png"), pixels)
    return root


def config_of(folder):
    return (f"--config=tests/system/processes_config.py:{folder}",)


TWO = ("features", "classifier")  # stages
ONLY_TWO = f"--config.stages={TWO}"
SELDOM = "--config.checkpoint_seconds=600.0"  # only the end of a stage is saved, not every step


class Launched:
    """A command started as one or several processes. own: more flags of each process."""

    def __init__(self, folder, workdir, *, count, devices, flags=(), own=((), ())):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        flags = flags or config_of(folder)
        command = [sys.executable, "run.py", *flags, f"--workdir={workdir}"]
        if count > 1:
            command += [f"--coordinator={address}", f"--num_processes={count}", f"--patience={PATIENCE}"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
        }
        self.processes = [
            subprocess.Popen(
                [*command, *([f"--process_id={number}"] if count > 1 else []), *own[number]],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(count)
        ]

    def finish(self, timeout=240):
        """Wait for the processes, and return exit codes and outputs."""
        outputs = []
        try:
            for process in self.processes:
                outputs.append(process.communicate(timeout=timeout)[0])
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], outputs


def losses(workdir):
    """{stage: [loss of each step]}"""
    losses_of = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == "train":
            losses_of.setdefault(entry["stage"], []).append((entry["step"], entry["values"]["loss"]))
    for stage, steps in losses_of.items():
        assert [step for step, _ in steps] == list(range(1, len(steps) + 1)), f"{stage}: {steps}"
    return {stage: [loss for _, loss in steps] for stage, steps in losses_of.items()}


def train_here(config, workdir, devices):
    """Train in this process on some of its devices. Only the 2nd step and the end of a stage are saved, no report."""
    make_mesh = parallel.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", lambda _=None, replicas=1: make_mesh(jax.devices()[:devices], replicas))
        patch.setattr(train.StageTrainer, "stop_or_save", lambda trainer: (False, trainer.step == 2))
        patch.setattr(train, "write_report", lambda *_: None)
        train.train(config, workdir)


@pytest.fixture(scope="module")
def config(folder):
    """Return the config of `config_of` as nested dicts."""
    return processes_config.get_config(str(folder)).to_dict()


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Return the workdir of a run in one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train_here(config, workdir, devices=1)
    return workdir


def assert_same(workdir, alone, stages=("features", "classifier", "residual")):
    actual, expected = losses(workdir), losses(alone)
    assert set(actual) >= set(stages)
    for stage in stages:
        np.testing.assert_allclose(actual[stage], expected[stage], rtol=2e-4, err_msg=stage)


def test_one_process_with_four_devices_has_the_losses_of_one_device(config, alone, tmp_path):
    train_here(config, tmp_path, devices=4)
    assert_same(tmp_path, alone)


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    """Run two processes with two devices each; return the workdir and the output of each."""
    workdir = tmp_path_factory.mktemp("together")
    codes, outputs = Launched(folder, workdir, count=2, devices=2, flags=(*config_of(folder), SELDOM)).finish()
    assert codes == [0, 0], outputs
    return workdir, outputs


def test_two_processes_of_two_devices_have_the_losses_of_one_device(together, alone):
    assert_same(together[0], alone)


def test_only_the_first_process_prints_and_logs(together):
    workdir, (first, second) = together
    assert "test accuracy and calibration" in first and "epoch 1/2" in first
    assert "epoch" not in second and "accuracy" not in second
    assert json.loads((workdir / "results.json").read_text())["num_devices"] == 4
    assert (workdir / "report" / "index.html").exists() and "No report" not in first


REPLICAS = (*TINY, "--config.stages=('ce',)", "--config.epochs=1", "--config.replicas=2")


@pytest.fixture(scope="module")
def apart(folder, tmp_path_factory):
    """Run two replicas in two processes; return the workdir and the output of each."""
    workdir = tmp_path_factory.mktemp("apart")
    codes, outputs = Launched(folder, workdir, count=2, devices=1, flags=REPLICAS).finish()
    assert codes == [0, 0], outputs
    return workdir, outputs


def losses_of_replicas(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["values"]["loss_of_replicas"] for line in lines if line["split"] == "train"]


def test_replicas_in_two_processes_have_the_losses_of_one_process(apart, tmp_path):
    train_here(tiny_config(stages=("ce",), epochs=1, replicas=2), tmp_path, devices=2)
    expected = losses_of_replicas(tmp_path)
    assert len(expected) == 7 and all(first != second for first, second in expected)
    np.testing.assert_allclose(losses_of_replicas(apart[0]), expected, rtol=2e-4)


def test_one_process_can_read_the_checkpoints_of_replicas_in_two(apart):
    workdir, (first, _) = apart
    assert (workdir / "report" / "index.html").exists() and "No report" not in first
    trained = json.loads((workdir / "results.json").read_text())
    evaluated = evaluate_workdir(json.loads((workdir / "config.json").read_text()), workdir)
    for again, replica in zip(evaluated["replicas"], trained["replicas"], strict=True):
        assert again["seed"] == replica["seed"]
        assert again["loss"] == pytest.approx(replica["loss"], rel=1e-4)


ASKING = """
import sys
import jax, numpy as np
from ltjax.system import processes
process = int(sys.argv[2])
processes.join(sys.argv[1], 2, process)
print(np.asarray(processes._soon(False, process == 1, True)).tolist(), flush=True)
"""


def test_a_flag_of_any_process_reaches_all():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", ASKING, address]
    both = [
        subprocess.Popen([*command, str(process)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for process in (0, 1)
    ]
    assert ["[0, 1, 1]" in process.communicate(timeout=120)[0] for process in both] == [True, True]


def assert_the_other_ends_in_time(launched, victim, saved, step=1):
    """Kill one of two processes when `saved` has a checkpoint from `step` on. Check that the other one ends in time."""
    until = time.monotonic() + 200
    while not any(done >= step for done in complete_steps(saved)) and time.monotonic() < until:
        assert launched.processes[victim].poll() is None
        time.sleep(0.05)
    launched.processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, outputs = launched.finish(timeout=PATIENCE + 30)
    assert time.monotonic() - began < PATIENCE + 25
    assert codes[victim] == -signal.SIGKILL
    if codes[1 - victim] == -signal.SIGABRT:  # JAX noticed first: by a heartbeat, and not by a collective that failed
        return
    assert codes[1 - victim] == processes.GONE, outputs
    errors = [line for line in outputs[1 - victim].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Run the same command again" in errors[0], outputs[1 - victim]


def test_a_killed_process_ends_the_first_and_a_single_process_resumes(folder, config, alone, tmp_path, capsys):
    launched = Launched(folder, tmp_path, count=2, devices=2, flags=(*config_of(folder), ONLY_TWO))
    assert_the_other_ends_in_time(launched, 1, tmp_path / "checkpoints" / "features")
    train_here({**config, "stages": TWO}, tmp_path, devices=4)
    assert "Resuming" in capsys.readouterr().out
    assert_same(tmp_path, alone, TWO)


def test_two_processes_resume_a_run_of_one_and_end_if_the_first_dies(folder, alone, tmp_path):
    later = shutil.ignore_patterns("config.json", "results.json", "classifier", "residual")
    shutil.copytree(alone, tmp_path, ignore=later, dirs_exist_ok=True)
    features = tmp_path / "checkpoints" / "features"
    assert complete_steps(features) == [2, 4]
    shutil.rmtree(features / "4")  # back to the middle of the stage
    launched = Launched(folder, tmp_path, count=2, devices=2, flags=(*config_of(folder), ONLY_TWO, SELDOM))
    assert_the_other_ends_in_time(launched, 0, features, step=4)
    assert_same(tmp_path, alone, ["features"])


@pytest.fixture
def one_of_several(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


GLOO = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")


def test_a_process_lost_while_saving_is_no_full_disk(tmp_path, monkeypatch, one_of_several):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", raises(GLOO))
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoints.save(1, {"x": np.zeros(2)}, {})
        monkeypatch.setattr(checkpoints._manager, "save", raises(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            checkpoints.save(1, {"x": np.zeros(2)}, {})


def test_a_process_lost_while_restoring_damages_no_checkpoint(tmp_path, monkeypatch, one_of_several):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "all_steps", lambda: [1, 2])
        monkeypatch.setattr(checkpoints, "restore_step", raises(GLOO))
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoints.restore({"x": np.zeros(2)})


def test_a_lost_process_is_recognised_by_the_cause_of_an_error(one_of_several):
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = GLOO
    assert processes.lost(wrapped) and not processes.lost(RuntimeError("save failed"))


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ""),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "TPU"),
    ],
)
def test_launchers_are_recognised_by_their_environment(environment, expected):
    assert processes.launcher(environment) == expected


def test_processes_with_different_commands_name_the_flag_that_differs(monkeypatch, one_of_several):
    values = {"--mode": "train", "config.seed": "0"}

    def gathered(digests):  # of this process, and of one with another seed
        return np.stack([digests, [digests[0], digests[1] + 1]])

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    with pytest.raises(UserError, match=r"2 processes of this job have different values of config\.seed: .*none"):
        processes.agree(values)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda digests: np.stack([digests, digests]))
    processes.agree(values)


def test_processes_that_differ_in_a_flag_end_and_name_it(folder, tmp_path):
    codes, outputs = Launched(folder, tmp_path, count=2, devices=1, own=((), ("--dry_run",))).finish()
    assert codes == [2, 2], outputs
    assert all("different values of --dry_run: " in text for text in outputs), outputs
    assert not any("Traceback" in text for text in outputs)
    assert not (tmp_path / "config.json").exists()


@pytest.fixture
def start(folder, monkeypatch, one_of_several):
    """Return `start(*flags, others=())`: start run.py here; `others` are the flags of a second process."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # those of this process

    def started(flags, gathered):
        arguments = ["run.py", *config_of(folder), *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
        with flagsaver.flagsaver():
            run.parse_flags(arguments)
            run.start(run.run_config())

    def start(*flags, others=()):
        sent = []
        started(others, lambda digests: sent.append(digests) or np.stack([digests, digests]))
        others_digests = iter(sent)
        started(flags, lambda digests: np.stack([digests, next(others_digests)]))

    return start


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections on Python 3.11
@pytest.mark.parametrize(
    "common, flag, name",
    [
        ((), "--dry_run", "--dry_run"),
        ((), "--calibrate", "--calibrate"),
        ((), "--mode=eval", "--mode"),
        ((), "--config.batch_size=4", "config.batch_size"),
        (("--mode=predict",), "--target_prior=uniform", "--target_prior"),
    ],
)
def test_flags_that_decide_what_a_run_does_have_to_agree(common, flag, name, start):
    start(*common, others=common)
    with pytest.raises(UserError, match=rf"different values of {re.escape(name)}: "):
        start(*common, flag, others=common)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections on Python 3.11
def test_weights_have_to_agree_and_their_folders_need_not(start, tmp_path):
    settings = {"name": "resnet_cifar", "depth": 8, "width": 2}
    for name, value in (("first", 0), ("copy", 0), ("other", 1)):
        array = {"backbone": {"conv": {"kernel": np.full((3, 3, 3, 2), value, np.float32)}}}
        save_weights(tmp_path / name, Variables({"net": array}, {}, {}), settings, num_classes=0)
    first, copy, other = (f"--config.weights={tmp_path / name}" for name in ("first", "copy", "other"))
    start(copy, others=[first])
    with pytest.raises(UserError, match=r"different values of config\.weights: "):
        start(other, others=[first])


def test_a_process_may_stay_alone_under_a_launcher(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(jax.distributed, "initialize", raises(AssertionError("it joined")))
    processes.join("none", None, None)


SLURM = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ""),
        (SLURM, "all"),
        ({**SLURM, **EIGHT}, "all"),
        ({**SLURM, **EIGHT, "SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "3"}, "3"),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3"}, "3"),
        ({**SLURM, **EIGHT, "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_LOCALID": "1"}, "4,5,6,7"),
        # the second node has one task, the first four
        ({**SLURM, **EIGHT, "SLURM_STEP_TASKS_PER_NODE": "4,1", "SLURM_NODEID": "1"}, "all"),
        # SLURM has given each task one GPU
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3"}, "all"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8"}, ""),  # the number of GPUs is unknown
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "2"}, ""),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "all"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **EIGHT}, "2,3"),
    ],
)
def test_processes_of_a_machine_share_its_devices(environment, expected):
    assert processes.own_devices(environment) == expected


@pytest.fixture
def gpus_of(monkeypatch):
    """Return `gpus_of(*flags, **environment)`: JAX's visible GPUs after `join`, and the settings of `initialize`."""

    def join(*flags, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls = []

        def initialize(**settings):
            calls.append(settings)
            if settings.get("cluster_detection_method") != "deactivate":  # as JAX does under SLURM
                jax.config.update("jax_cuda_visible_devices", environment["SLURM_LOCALID"])

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        processes.join(*flags)
        return jax.config._read("jax_cuda_visible_devices"), calls[0]

    before = {name: jax.config._read(name) for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices")}
    collectives = jax.config._read("jax_cpu_collectives_implementation")
    yield join
    for name, value in {**before, "jax_cpu_collectives_implementation": collectives}.items():
        jax.config.update(name, value)


def test_one_task_a_node_uses_all_its_gpus(gpus_of):
    assert gpus_of("auto", None, None, SLURM_STEP_NUM_TASKS="4", **SLURM)[0] == "all"


def test_explicit_flags_have_priority_over_slurm(gpus_of):
    devices, settings = gpus_of("host:1", 4, 2, SLURM_STEP_NUM_TASKS="4", **SLURM)
    assert devices == "all"
    assert (settings["coordinator_address"], settings["num_processes"], settings["process_id"]) == ("host:1", 4, 2)


@pytest.mark.parametrize("flags", [("host:1", None, 0), ("host:1", 2, None), ("", 2, 0), ("auto", 2, None)])
def test_all_three_flags_are_needed(flags):
    with pytest.raises(UserError, match="all three flags"):
        processes.join(*flags)


def test_a_process_outside_the_range_is_named():
    with pytest.raises(UserError, match="--process_id=2: from 0 to 2 - 1"):
        processes.join("host:1", 2, 2)
