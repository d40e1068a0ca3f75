"""The same command under several processes, on loopback: same losses, one log, and what happens when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from ltjax import processes
from ltjax.types import UserError
from tests.conftest import CACHE

ROOT = Path(__file__).parents[1]
PATIENCE = 8  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, 18, 9 and 5 to train on, and two each for validation."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, counts in (("train", (18, 9, 5)), ("validation", (2, 2, 2))):
        for label, count in enumerate(counts):
            (root / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = (rng.integers(0, 100, (20, 24, 3)) + 70 * label).astype(np.uint8)
                cv2.imwrite(str(root / part / f"class{label}" / f"{number}.png"), pixels)
    return root


class Launched:
    """One command as several processes, or as one."""

    def __init__(self, folder, workdir, *, count, devices):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        command = [sys.executable, "run.py", f"--config=tests/processes_config.py:{folder}", f"--workdir={workdir}"]
        if count > 1:
            command += [f"--coordinator={address}", f"--num_processes={count}", f"--patience={PATIENCE}"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.processes = [
            subprocess.Popen(
                command + ([f"--process_id={number}"] if count > 1 else []),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(count)
        ]

    def finish(self, timeout=240):
        """Exit codes and outputs."""
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
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == "train":
            found.setdefault(entry["stage"], []).append((entry["step"], entry["values"]["loss"]))
    for stage, steps in found.items():
        assert [step for step, _ in steps] == list(range(1, len(steps) + 1)), f"{stage}: {steps}"
    return {stage: [loss for _, loss in steps] for stage, steps in found.items()}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The losses of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    codes, outputs = Launched(folder, workdir, count=1, devices=1).finish()
    assert codes == [0], outputs
    return losses(workdir)


def assert_same(found, expected):
    assert set(found) == set(expected) == {"features", "classifier", "residual"}
    for stage in expected:
        np.testing.assert_allclose(found[stage], expected[stage], rtol=2e-4, err_msg=stage)


def test_one_process_with_four_devices_has_the_losses_of_one_device(folder, alone, tmp_path):
    codes, outputs = Launched(folder, tmp_path, count=1, devices=4).finish()
    assert codes == [0], outputs
    assert_same(losses(tmp_path), alone)


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    """Two processes with two devices each: the workdir and what each of them printed."""
    workdir = tmp_path_factory.mktemp("together")
    codes, outputs = Launched(folder, workdir, count=2, devices=2).finish()
    assert codes == [0, 0], outputs
    return workdir, outputs


def test_two_processes_with_two_devices_each_have_the_losses_of_one_device(together, alone):
    assert_same(losses(together[0]), alone)


def test_only_the_first_process_prints_and_logs(together):
    workdir, (first, second) = together
    assert "test accuracy and calibration" in first and "epoch 1/2" in first
    assert "epoch" not in second and "accuracy" not in second
    assert json.loads((workdir / "results.json").read_text())["num_devices"] == 4
    assert (workdir / "report" / "index.html").exists() and "No report" not in first


def test_a_killed_process_stops_the_other_one_which_says_what_to_do_and_one_process_goes_on(folder, alone, tmp_path):
    launched = Launched(folder, tmp_path, count=2, devices=2)
    saved = tmp_path / "checkpoints" / "features"
    until = time.monotonic() + 200
    while not any(path.name.isdigit() for path in saved.glob("*")) and time.monotonic() < until:
        assert launched.processes[1].poll() is None
        time.sleep(0.05)
    launched.processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, outputs = launched.finish(timeout=PATIENCE + 30)
    assert time.monotonic() - began < PATIENCE + 25
    assert codes == [processes.GONE, -signal.SIGKILL], outputs
    assert "Run the same command again" in outputs[0], outputs[0]

    codes, outputs = Launched(folder, tmp_path, count=1, devices=4).finish()
    assert codes == [0], outputs
    assert "Resuming" in outputs[0]
    assert_same(losses(tmp_path), alone)


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
def test_launchers_are_known_by_their_environment(environment, expected):
    assert processes.launcher(environment) == expected


@pytest.mark.parametrize("flags", [("host:1", None, 0), ("host:1", 2, None), ("", 2, 0), ("auto", 2, None)])
def test_flags_go_together(flags):
    with pytest.raises(UserError, match="all three flags"):
        processes.join(*flags)


def test_a_process_outside_the_range_is_named():
    with pytest.raises(UserError, match="--process_id=2: from 0 to 2 - 1"):
        processes.join("host:1", 2, 2)
