"""The worked examples of docs/extend.md, applied to a copy of the repository, work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extend.md"
BLOCK = re.compile(r'^```(python|diff) title="(.*?)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def patched(text, diff):
    """Apply a diff whose context occurs exactly once in the text."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    assert text.count(before) == 1, f"docs/extend.md: this context occurs {text.count(before)} times:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Copy the repository, apply the page's code, and add a few random images."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("ltjax", "configs"):
        shutil.copytree(ROOT / name, root / name)  # with compiled modules, valid for those that the page leaves alone
    (root / "tests" / "methods").mkdir(parents=True)
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for kind, name, code in BLOCK.findall(PAGE.read_text()):
        path = root / name
        if kind == "python":
            assert not path.exists(), f"docs/extend.md adds {name}, which exists already"
            path.write_text(code)
        else:
            path.write_text(patched(path.read_text(), code))
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), (16, 8, 4))
    np.savez(
        root / "plankton.npz",
        train_images=rng.integers(0, 256, (28, 8, 8), np.uint8),
        train_labels=labels,
        test_images=rng.integers(0, 256, (6, 8, 8), np.uint8),
        test_labels=np.repeat(np.arange(3), (3, 2, 1)),
        class_names=np.array(["diatom", "krill", "jelly"]),
    )
    return root


def run(copy, *command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(copy)}
    ran = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def train(copy, workdir, arguments, *flags):
    """Train for an epoch with the added config; return what the run printed and its folder."""
    small = ("epochs=1", "batch_size=8", "model.width=2", "data.many_above=10", "data.few_below=6", *flags)
    settings = [f"--config.{setting}" for setting in small]
    config = f"--config=configs/plankton.py:{arguments},model=resnet8,budget=short"
    printed = run(copy, "run.py", config, *settings, "--data_dir=.", f"--workdir={workdir}")
    return printed, copy / workdir


@pytest.fixture(scope="module")
def centre(copy):
    """Train the added method; return what the run prints, its results and its report."""
    printed, folder = train(copy, "run", "method=centre")
    return printed, json.loads((folder / "results.json").read_text()), (folder / "report" / "index.html").read_text()


def test_the_added_method_trains_on_the_added_data_set(centre):
    printed, *_ = centre
    assert "Centre loss" in printed


def test_the_added_metric_is_in_the_table(centre):
    printed, results, _ = centre
    assert "worst" in printed
    assert results["worst_class"] == min(results["per_class_accuracy"])


def test_the_added_metric_is_logged_after_every_epoch(copy, centre):
    _, results, _ = centre
    lines = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["values"]["worst_class"] for line in lines if line["split"] == "test"]
    assert logged == [each["worst_class"] for each in results["stages"]["centre"]["evaluations"]]


def test_the_added_metric_is_in_a_comparison_of_runs(copy, centre):
    _, results, page = centre
    table = run(copy, "-m", "ltjax.compare", "run", "--format=markdown").splitlines()
    cells = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in (table[0], table[-1]))
    assert dict(zip(*cells, strict=True))["worst class"] == f"{100 * results['worst_class']:.1f}"
    assert "worst class" in page


def test_balanced_accuracy_is_the_mean_of_the_classes_accuracies(centre):
    printed, results, _ = centre
    assert "balanced" in printed
    assert results["balanced_accuracy"] == pytest.approx(np.mean(results["per_class_accuracy"]))


def test_the_added_section_is_in_the_report(centre):
    _, results, page = centre
    largest = max(results["per_class_accuracy"]) - min(results["per_class_accuracy"])
    section = page[page.index('<h2 id="gaps">Gap to the best class</h2>') :]
    assert "<svg" in section and f"<td>{100 * largest:.1f}</td>" in section


def test_the_added_loss_trains_the_added_network(copy):
    printed, folder = train(copy, "other", "method=poly", "model.name=plain", "model.depth=2")
    assert "PolyLoss" in printed
    assert "layer2/conv/kernel" in (folder / "parameters.txt").read_text()


FORMULA = """
import jax.numpy as jnp
import numpy as np
import pytest
from ltjax.methods import criteria
from ltjax.types import Batch

def test_the_loss_is_the_formula():
    batch = Batch(jnp.zeros((1, 1, 1, 1)), jnp.array([0]))
    loss = criteria.create((4, 2), {"name": "poly", "weight": 3.0})
    value = float(loss(jnp.log(jnp.array([[0.25, 0.75]])), batch))
    assert value == pytest.approx(np.log(4) + 3 * 0.75, rel=1e-5)
"""


def test_the_added_loss_is_the_formula_and_the_added_tests_pass(copy):
    (copy / "tests" / "methods" / "test_poly.py").write_text(FORMULA)
    files = ("tests/methods/test_poly.py", "tests/methods/test_centre.py")
    assert "4 passed" in run(copy, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files)
