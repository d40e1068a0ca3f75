"""The queue of full-length runs: its commands, its order, and resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import reproduce
from configs import cifar100_lt
from ltjax.config import parse

# A repository whose runs take a moment, save on SIGTERM, and resume.
PROGRAM = """
import json, os, pathlib, signal, sys, time
flags = dict(flag.lstrip("-").partition("=")[::2] for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text("{}")
def save(number, frame):
    (workdir / "saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
print("epoch 1/2  step 3/6", os.getpriority(os.PRIO_PROCESS, 0), sys.argv[1:], flush=True)
if "fails" in flags["config"]:
    sys.exit(2)
while "waits" in flags["config"] and not (workdir / "saved").exists():
    time.sleep(0.02)
(workdir / "results.json").write_text(json.dumps({"seconds": 10.0, **({"robustness": {}} if "mode" in flags else {})}))
"""
ARCHIVE = """
import pathlib, shutil, sys
workdir, folder = map(pathlib.Path, sys.argv[1:])
folder.mkdir(parents=True, exist_ok=True)
shutil.copyfile(workdir / "results.json", folder / "results.json")
(folder / "weights.safetensors").touch()
"""
DESCRIBE = """
import json, sys
asked = json.loads(sys.argv[2])
names = [f"{config.split('=')[1].split(',')[0]}-seed{seed}" for config, seed, *_ in asked]
print(json.dumps([[name, ["ce", "crt"], 100.0] for name in names]))
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Return a queue over a made-up repository, with this Python as its environment."""
    root = tmp_path / "repository"
    for file, text in {
        "run.py": PROGRAM,
        "ltjax/runs/archive.py": ARCHIVE,
        "benchmarks/reproduce.py": DESCRIBE,
        "pyproject.toml": "",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    commit(root, "init", "--quiet")
    commit(root, "add", ".")
    commit(root, "commit", "--quiet", "-m", "all")
    monkeypatch.setattr(reproduce, "ROOT", root)
    folder = tmp_path / "queue"
    python = folder / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (folder / "environment" / "made_for").write_text(
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of an empty pyproject.toml
    )
    return reproduce.Queue(folder, tmp_path / "results", "", sys.executable)


def commit(root, *arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(root), *name, *arguments], check=True)


def listed(tmp_path, *entries):
    """Return a list of runs of float32 by name: ("name", "more TOML lines")."""
    path = tmp_path / "list.toml"
    texts = [f'[[run]]\nconfig = "file:method={name}"\nprecision = "float32"\n{more}\n' for name, more in entries]
    path.write_text("\n".join(texts))
    return path


def test_every_listed_run_is_valid_and_named_once():
    runs = reproduce.read_list(reproduce.LIST)
    names = [reproduce.describe(run).name for run in runs]
    assert len(set(names)) == len(names) > 30
    known = [name.rpartition("-seed")[0] for name in names]
    for number, run in enumerate(runs):
        assert not run.begin or run.begin in known[:number], run


def test_the_list_starts_with_the_most_important_runs():
    runs = reproduce.read_list(reproduce.LIST)
    first = [run.config.split("method=")[1].split(",")[0] for run in runs[:5]]
    assert first == ["mislas", "reslt", "balanced_softmax", "ce", "drolt"]
    assert {run.config.rpartition("precision=")[2] for run in runs[:5]} == {"bf16"}


def test_a_later_stage_begins_with_the_archive_of_the_first():
    run = reproduce.Run("cifar100_lt:method=crt,imbalance=100", 1, begin="cifar100_lt-ce-if100")
    flags = reproduce.command(run, reproduce.describe(run))
    values = cifar100_lt.get_config("method=crt,imbalance=100")
    for flag in flags[1:]:
        key, value = flag.removeprefix("--").split("=", 1)
        if key.startswith("config."):
            kind = type(values[key.removeprefix("config.")]) if key.count(".") == 1 else str
            made = eval(value) if kind is tuple else kind(value)
            values.update_from_flattened_dict({key.removeprefix("config."): made})
    parsed = parse(values.to_dict())
    stages = parsed.stages
    assert (parsed.seed, parsed.weights, list(stages)) == (1, "results/cifar100_lt-ce-if100-seed1", ["crt"])
    assert stages["crt"].start_from == "scratch" and parsed.weights_parts == ("backbone", "classifier")


def test_a_run_counts_the_images_of_all_its_stages():
    """DRO-LT has 17,000 + 31,280 steps of the whole network, 7,820 of the classifier.

    TRADES has 11 passes a step, BCL 3 for 42 batches of 256 an epoch.
    """
    drolt = reproduce.describe(reproduce.Run("cifar100_lt:method=drolt", 0))
    assert drolt.work == pytest.approx(128 * (17_000 + 31_280 + reproduce.FROZEN * 7_820))
    trades, ce = (reproduce.describe(reproduce.Run(f"cifar10_lt:method={m}", 0)).work for m in ("trades", "ce"))
    assert trades == pytest.approx(11 * ce * 100 / 200)
    assert reproduce.describe(reproduce.Run("cifar100_lt:method=bcl", 0)).work == 3 * 200 * 42 * 256


def test_flags_change_the_name_and_the_length():
    flags = ["--config.epochs=30", "--config.name=cifar10_lt-mine"]
    run = reproduce.Run("cifar10_lt:method=trades", 2)
    short = reproduce.describe(run._replace(flags=flags))
    assert short.name == "cifar10_lt-mine-seed2"
    assert short.work == pytest.approx(0.3 * reproduce.describe(run).work)


def test_an_unknown_key_of_the_list_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'seedz'"):
        reproduce.read_list(listed(tmp_path, ("a", "seedz = [1]")))


def test_a_list_is_made_in_order_at_the_lowest_priority(queue, tmp_path):
    path = listed(tmp_path, ("a", "seeds = [0, 1]"), ("b", 'attack = ["--config.attack.num_images=5"]'))
    assert reproduce.work_through(queue, path, update=False) == 0
    assert sorted(folder.name for folder in queue.results.iterdir()) == ["a-seed0", "a-seed1", "b-seed0"]
    log = (queue.folder / "b-seed0.log").read_text()
    assert "step 3/6 19 " in log and "--mode=attack" in log and str(tmp_path) not in log
    assert "robustness" in json.loads((queue.results / "b-seed0" / "results.json").read_text())


AUTOGROUP = Path("/proc/self/autogroup")


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this system weighs processes, not sessions")
def test_a_run_has_the_lowest_priority_among_sessions(queue, tmp_path):
    output = tmp_path / "output"
    wait = f"""
import pathlib, time
own, until = pathlib.Path("/proc/self/autogroup"), time.monotonic() + 10
while "nice 19" not in own.read_text() and time.monotonic() < until:
    time.sleep(0.01)
pathlib.Path({str(output)!r}).write_text(own.read_text())
"""
    queue.folder.joinpath("log").touch()
    assert reproduce.child(queue, ["-c", wait], queue.folder / "log") == 0
    assert "nice 19" in output.read_text()


def test_a_finished_run_is_not_repeated(queue, tmp_path):
    path = listed(tmp_path, ("a", ""))
    for _ in range(2):
        reproduce.work_through(queue, path, update=False)
    assert (queue.folder / "a-seed0.log").read_text().count("$ python checkout/run.py") == 1


def test_a_failed_run_does_not_stop_the_others(queue, tmp_path, capsys):
    assert reproduce.work_through(queue, listed(tmp_path, ("fails", ""), ("a", "")), update=False) == 1
    assert [folder.name for folder in queue.results.iterdir()] == ["a-seed0"]
    assert f"failed, see {queue.folder}/fails-seed0.log" in capsys.readouterr().out


def test_a_run_waits_for_the_run_it_begins_with(queue, tmp_path, capsys):
    path = listed(tmp_path, ("a", 'begin = "b"'), ("b", ""))
    assert reproduce.work_through(queue, path, update=False) == 1
    assert "a-seed0: left out: it begins with b-seed0, which is not there" in capsys.readouterr().out
    assert reproduce.work_through(queue, path, update=False) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_run_saves_and_the_next_command_resumes(queue, tmp_path, number):
    path = listed(tmp_path, ("waits", ""))
    script = f"""
import sys
from pathlib import Path
from benchmarks import reproduce
from configs import cifar100_lt
reproduce.ROOT = Path({str(reproduce.ROOT)!r})
sys.exit(reproduce.main(["--folder={queue.folder}", "--runs={path}", "--results={queue.results}"]))
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    workdir = queue.folder / "runs" / "waits-seed0"
    deadline = time.monotonic() + 60
    while not (workdir / "config.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # until the run answers signals
    assert reproduce.running(queue) == "waits-seed0"
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "The same command continues." in out
    assert (workdir / "saved").exists() and not (queue.results / "waits-seed0").exists()
    assert reproduce.running(queue) == ""
    assert reproduce.work_through(queue, path, update=False) == 0
    assert (queue.results / "waits-seed0" / "results.json").exists()


def test_a_checkout_stays_at_its_commit_until_it_is_updated(queue, tmp_path):
    path = listed(tmp_path, ("a", ""))
    reproduce.work_through(queue, path, update=False)
    root = reproduce.ROOT
    (root / "run.py").write_text(PROGRAM.replace("step 3/6", "step 4/6"))
    commit(root, "commit", "--quiet", "-a", "-m", "new")
    path = listed(tmp_path, ("a", ""), ("b", ""))
    reproduce.work_through(queue, path, update=False)
    assert "step 3/6" in (queue.folder / "b-seed0.log").read_text()
    reproduce.work_through(queue, listed(tmp_path, ("b", ""), ("c", "")), update=True)
    assert "step 4/6" in (queue.folder / "c-seed0.log").read_text()


def test_an_update_waits_for_runs_under_way_and_comes_before_the_list_is_read(queue, tmp_path, capsys):
    root = reproduce.ROOT
    (root / "benchmarks" / "reproduce.py").write_text(DESCRIBE + "assert 'newer-seed0' not in names\n")
    commit(root, "commit", "--quiet", "-a", "-m", "old")
    reproduce.work_through(queue, listed(tmp_path, ("a", "")), update=False)
    (root / "benchmarks" / "reproduce.py").write_text(DESCRIBE)
    commit(root, "commit", "--quiet", "-a", "-m", "new")
    newer = listed(tmp_path, ("newer", ""))
    (queue.folder / "runs" / "begun-seed0").mkdir()
    (queue.folder / "runs" / "begun-seed0" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="cannot describe"):
        reproduce.work_through(queue, newer, update=True)
    assert "--update waits for begun-seed0" in capsys.readouterr().out
    (queue.folder / "runs" / "begun-seed0" / "config.json").unlink()
    assert reproduce.work_through(queue, newer, update=True) == 0
    assert (queue.results / "newer-seed0" / "results.json").exists()


def test_the_list_shows_finished_running_and_remaining_runs(queue, tmp_path, capsys):
    path = listed(tmp_path, ("a", ""), ("b", ""))
    reproduce.work_through(queue, path, update=False)
    path = listed(tmp_path, ("a", ""), ("b", ""), ("c", ""))
    runs = reproduce.read_list(path)
    capsys.readouterr()
    reproduce.show(queue, runs, reproduce.descriptions(queue, runs))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["done", "a-seed0"], ["done", "b-seed0"], ["left", "c-seed0,"]]
    assert lines[2].endswith("0.0 h, ends in about 0.0 h")  # 100 images at 10 a second


def test_a_second_queue_in_a_folder_is_refused(queue):
    with reproduce.locked(queue), pytest.raises(SystemExit, match="another queue runs"):
        reproduce.work_through(queue, reproduce.LIST, update=False)


def test_a_folder_inside_the_repository_is_refused(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--folder=build/queue"])
    assert "name a folder outside" in capsys.readouterr().err
