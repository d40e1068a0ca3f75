"""Which room may import which, read off the imports themselves; and what a user of one loss has to load."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ltjax").rglob("*.py"))
}
# What lies at the top and may be imported from everywhere, with the packages that each needs.
TOP = {
    "ltjax.types": {"jax"},
    "ltjax.hashing": {"jax", "numpy"},
    "ltjax.losses": {"jax", "numpy"},
    "ltjax.metrics": {"jax", "numpy"},
    "ltjax.calibration": {"jax"},
    "ltjax.registry": set(),
    "ltjax.optim": {"jax", "numpy", "optax", "flax"},
    "ltjax.config": set(),
    "ltjax.surgery": {"jax", "numpy"},
}
# What the modules of a room may import of ltjax besides TOP and the room itself.
ROOMS = {
    "ltjax.system": set(),
    "ltjax.attacks": {"ltjax.system"},
    "ltjax.models": {"ltjax.system"},
    "ltjax.data": {"ltjax.system"},
    "ltjax.runs": {"ltjax.system"},
    "ltjax.methods": {"ltjax.attacks", "ltjax.models"},  # layers of their own
    "ltjax.report": {"ltjax.runs", "ltjax.system"},
    "ltjax.interop": {"ltjax.data", "ltjax.models", "ltjax.runs", "ltjax.system"},
    "ltjax.archive": {"ltjax.runs", "ltjax.system"},
    "ltjax.compare": {"ltjax.report", "ltjax.runs", "ltjax.system"},
    "ltjax.predictor": {"ltjax.data", "ltjax.methods", "ltjax.models", "ltjax.runs", "ltjax.system"},
    "ltjax.engine": {"ltjax.data", "ltjax.methods", "ltjax.models", "ltjax.runs", "ltjax.system"},
    "ltjax.modes": {"ltjax.attacks", "ltjax.data", "ltjax.engine", "ltjax.predictor"}
    | {"ltjax.report", "ltjax.runs", "ltjax.system"},
    "ltjax.train": {"ltjax.engine", "ltjax.modes", "ltjax.runs", "ltjax.system"},
    "ltjax": {"ltjax.predictor"},
}


def inside(name, package):
    return name == package or name.startswith(package + ".")


def imports(path):
    """Names of all that a file imports, wherever in the file: `from ltjax import losses` is `ltjax.losses`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not follow"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module for name in below}
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def room(module):
    """The entry of ROOMS or TOP that a module belongs to."""
    return next(name for name in (*TOP, *ROOMS) if inside(module, name))


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_the_rooms_that_its_own_may(module):
    own = room(module)
    allowed = {own, *TOP, *ROOMS.get(own, ())}
    found = {name for name in imports(FILES[module]) if inside(name, "ltjax")}
    foreign = sorted(name for name in found if not any(inside(name, package) for package in allowed - {"ltjax"}))
    assert not foreign, f"{module} imports {foreign}; its room may import {sorted(allowed)}"


@pytest.mark.parametrize("module", TOP)
def test_a_module_at_the_top_needs_few_packages(module):
    files = [path for name, path in FILES.items() if inside(name, module)]
    found = {name.partition(".")[0] for path in files for name in imports(path)} - {"ltjax"}
    assert found <= TOP[module]


def folder(module):
    """The folder of ltjax that a module lies in, or the file at the top."""
    return ".".join(module.split(".")[:2])


def circle(files):
    """Return folders that import each other in a circle, such as [a, b, a]; [] if there are none."""
    graph = {folder(module): set() for module in files}
    for module, path in files.items():
        graph[folder(module)] |= {folder(name) for name in imports(path) if inside(name, "ltjax")} - {folder(module)}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_folders_import_each_other_in_a_circle():
    assert circle(FILES) == []


def test_a_circle_of_folders_is_found(tmp_path):
    (tmp_path / "a.py").write_text("from ltjax.models.vit import Vit")
    (tmp_path / "b.py").write_text("def late():\n    import ltjax.attacks.pgd")
    found = circle({"ltjax.attacks.pgd": tmp_path / "a.py", "ltjax.models.vit": tmp_path / "b.py"})
    assert sorted(set(found)) == ["ltjax.attacks", "ltjax.models"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_data(path):
    others = {name for name in imports(path) if name.partition(".")[0] not in ("ml_collections", "configs")}
    assert others <= (
        {"ltjax.interop.pretrained"} if path.stem == "backbones" else set()
    )  # the weights say what their network is


@pytest.mark.parametrize("package", ["methods", "models", "data"])
def test_what_a_config_chooses_by_name_lies_in_its_package(package):
    tables = {"methods": "METHODS", "models": "MODELS", "data": "SOURCES"}
    table = getattr(__import__(f"ltjax.{package}", fromlist=[package]), tables[package])
    assert set(table.values()) <= {module for module in FILES if inside(module, f"ltjax.{package}")}


def loaded_by(statement):
    """Top-level packages in a fresh interpreter after one statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_ltjax_alone_loads_nothing():
    assert not loaded_by("import ltjax") & {"jax", "numpy", "flax", "optax"}


@pytest.mark.parametrize("module", ["losses", "metrics", "calibration", "hashing", "attacks"])
def test_a_loss_costs_jax_alone(module):
    loaded = loaded_by(f"import ltjax.{module}")
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "tensorflow_datasets", "tensorflow", "cv2", "rich", "clu"}


def test_weights_without_pytorch_need_no_pytorch():
    assert "torch" not in loaded_by("import ltjax.interop.torch, ltjax.interop.export")


def test_training_loads_neither_tensorflow_nor_its_datasets():
    assert not loaded_by("import ltjax.train") & {"tensorflow", "tensorflow_datasets"}
