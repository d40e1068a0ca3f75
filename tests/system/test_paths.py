"""Paths of users: ~ is a home folder; addresses and patterns are refused early."""

from pathlib import Path

import pytest

from ltjax import compare, predictor, train
from ltjax.data.source import resolve_data_dir
from ltjax.interop import export
from ltjax.modes import dry_run, predict
from ltjax.modes.evaluate import evaluate_workdir
from ltjax.runs import archive
from ltjax.runs.weights import load_weights
from ltjax.system import paths
from ltjax.types import UserError
from tests.test_run import run, tiny_config


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_is_the_home_folder(home):
    assert paths.local("~/runs/a") == home / "runs" / "a"
    assert paths.local("runs/~a") == Path("runs/~a")
    assert resolve_data_dir("~/data") == home / "data"
    assert predict.kind_of("~/out.csv") == ".csv"


@pytest.fixture
def no_home(monkeypatch):
    """Simulate a user without HOME and without an entry in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))


def test_without_a_home_folder_a_tilde_is_an_error(no_home):
    with pytest.raises(UserError, match="no home folder is known for that"):
        paths.local("~/runs")


def test_without_a_home_folder_there_is_no_cache(no_home):
    assert paths.cache_folder() is None


TAKES = {  # functions that take a path from a user
    "train": lambda path: train.train(tiny_config(), path),
    "eval": lambda path: evaluate_workdir(tiny_config(), path),
    "dry run": lambda path: dry_run.dry_run(tiny_config(), path),
    "data": resolve_data_dir,
    "compare": lambda path: compare.compare([path]),
    "weights": load_weights,
    "load": predictor.load,
    "export": export.read,
    "archive": lambda path: archive.archive(path, "folder"),
    "images": predict.find,
}


@pytest.mark.parametrize("what", TAKES)
def test_every_function_refuses_an_address(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://bucket/run is an address"):
        TAKES[what]("gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["runs[a]", "a*", "what?", "back\\slash", "up[/run"])
def test_a_workdir_named_like_a_pattern_is_refused_before_training(name, tmp_path):
    with pytest.raises(UserError, match=r"cannot keep checkpoints in .* for the . in it: name another folder"):
        train.train(tiny_config(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_takes_a_tilde(home):
    code, out, error = run("--config=configs/quickstart.py", "--workdir=~/runs/a", "--dry_run")
    assert code == 0, error
    assert str(home / "runs" / "a") in out
