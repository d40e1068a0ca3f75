"""The notebooks run from start to end with small settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def run(name, folder):
    """Run a notebook in `folder`; return what it printed and its number of pictures."""
    notebook = read(name)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "LTJAX_SMALL": "1",
        "LTJAX_IMAGES": "",
        "PYTHONPATH": str(ROOT),
    }
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "") + "\n"
        for output in outputs
    )
    pictures = sum("image/png" in output.data for output in outputs if output.output_type == "display_data")
    return printed, pictures


def shares(line):
    """Return the percentages of a printed line."""
    return [float(word.rstrip("%")) for word in line.split() if word.rstrip("%").replace(".", "", 1).isdigit()]


def test_quickstart_trains_compares_and_uses(tmp_path):
    printed, pictures = run("quickstart", tmp_path)
    assert pictures == 3
    results = json.loads((tmp_path / "runs" / "quickstart-seed0" / "results.json").read_text())
    few = [stage["accuracy"]["few"] for stage in results["stages"].values()]
    assert few[1] > few[0] + 0.1  # the second stage improves rare classes
    compared = printed[printed.index("last epoch, %") :]
    assert all(f"{100 * accuracy:.1f}" in compared for accuracy in few)


def test_the_losses_work_in_other_training_loops(tmp_path):
    printed, _ = run("losses_in_your_project", tmp_path)
    rows = {}
    for line in printed.splitlines():
        rows.setdefault(line[:30].strip(), shares(line[30:]))
    for title in ("cross-entropy", "label-aware smoothing", "cross-entropy, balanced", "with the DRO bound"):
        assert len(rows[title]) == 5 and 60 < rows[title][0] < 90
    assert rows["label-aware smoothing"][-1] < rows["cross-entropy"][-1]  # ECE


def test_lbgat_is_more_robust(tmp_path):
    printed, pictures = run("robustness", tmp_path)
    natural, robust = (line for line in printed.splitlines() if line.startswith(("natural", "LBGAT")))
    assert pictures == 1 and len(shares(natural)) == len(shares(robust)) == 5  # clean, after each of 4 attacks
    assert shares(robust) == sorted(shares(robust), reverse=True) and shares(robust)[-1] > shares(natural)[-1]


def test_a_folder_of_images_is_trained_on_calibrated_and_predicted(tmp_path):
    printed, pictures = run("your_own_images", tmp_path)
    summary = json.loads((tmp_path / "runs" / "your_own_images" / "temperature.json").read_text())
    assert pictures == 2 and summary["num_holdout"] == 20
    assert f"temperature {summary['replicas'][0]['temperature']:.2f}" in printed
    assert "classes circle, cross, square, triangle" in printed


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def test_the_configs_are_found_after_a_restart(tmp_path):
    (tmp_path / "ltjax-clone").mkdir()
    for name in ("ltjax", "configs"):
        (tmp_path / "ltjax-clone" / name).symlink_to(ROOT / name)
    first = next(cell.source for cell in read("quickstart").cells if cell.cell_type == "code")
    code = first + "\nprint(importlib.util.find_spec('configs').submodule_search_locations[0])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.strip() == str(tmp_path / "ltjax-clone" / "configs"), ran.stderr


def test_all_notebooks_have_the_same_first_cell():
    first = {next(cell.source for cell in read(name).cells if cell.cell_type == "code") for name in NAMES}
    assert len(NAMES) == 4 and len(first) == 1
