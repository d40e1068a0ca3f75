"""The imports that each folder may have, and the modules that a loss loads."""

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
# Modules that all others may import, with the packages that each needs.
TOP = {
    "ltjax.types": {"jax"},
    "ltjax.system.hashing": {"jax", "numpy"},
    "ltjax.losses": {"jax", "numpy"},
    "ltjax.metrics": {"jax", "numpy"},
    "ltjax.calibration": {"jax"},
    "ltjax.system.registry": set(),
    "ltjax.system.wording": set(),
    "ltjax.optim": {"jax", "numpy", "optax", "flax"},
    "ltjax.config": set(),
    "ltjax.surgery": {"jax", "numpy"},
}
# The parts of ltjax that a folder's modules may import, besides TOP and the folder.
ROOMS = {
    "ltjax.system": set(),
    "ltjax.attacks": {"ltjax.system"},
    "ltjax.models": {"ltjax.system"},
    "ltjax.data": {"ltjax.system"},
    "ltjax.runs": {"ltjax.system"},
    "ltjax.methods": {"ltjax.attacks", "ltjax.models"},  # layers of their own
    "ltjax.report": {"ltjax.runs", "ltjax.system"},
    "ltjax.interop": {"ltjax.data", "ltjax.models", "ltjax.runs", "ltjax.system"},
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
    """Return the names of all imports anywhere in a file: `from ltjax import losses` is `ltjax.losses`."""
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
    """Return the entry of ROOMS or TOP that a module belongs to."""
    return next(name for name in (*TOP, *ROOMS) if inside(module, name))


def test_a_module_imports_only_the_allowed_folders():
    wrong = []
    for module, path in FILES.items():
        folder = room(module)
        allowed = {folder, *TOP, *ROOMS.get(folder, ())} - {"ltjax"}
        imported = {name for name in imports(path) if inside(name, "ltjax")}
        foreign = sorted(name for name in imported if not any(inside(name, package) for package in allowed))
        if foreign:
            wrong.append(f"{module} imports {foreign}; its folder may import {sorted(allowed)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", TOP)
def test_a_module_for_all_needs_few_packages(module):
    files = [path for name, path in FILES.items() if inside(name, module)]
    packages = {name.partition(".")[0] for path in files for name in imports(path)} - {"ltjax"}
    assert packages <= TOP[module]


def folder(module):
    """Return a module's folder of ltjax, or the file at the top."""
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
    actual = circle({"ltjax.attacks.pgd": tmp_path / "a.py", "ltjax.models.vit": tmp_path / "b.py"})
    assert sorted(set(actual)) == ["ltjax.attacks", "ltjax.models"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_data(path):
    others = {name for name in imports(path) if name.partition(".")[0] not in ("ml_collections", "configs")}
    assert others <= (
        {"ltjax.interop.pretrained"} if path.stem == "backbones" else set()
    )  # weights determine their network


@pytest.mark.parametrize("package", ["methods", "models", "data"])
def test_modules_chosen_by_name_are_in_their_package(package):
    tables = {"methods": "METHODS", "models": "MODELS", "data": "SOURCES"}
    table = getattr(__import__(f"ltjax.{package}", fromlist=[package]), tables[package])
    assert set(table.values()) <= {module for module in FILES if inside(module, f"ltjax.{package}")}


def loaded_by(statement):
    """Return top-level packages in a fresh interpreter after one statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_importing_ltjax_loads_no_library():
    assert not loaded_by("import ltjax") & {"jax", "numpy", "flax", "optax"}


@pytest.mark.parametrize("module", ["losses", "metrics", "calibration", "system.hashing", "attacks"])
def test_a_loss_loads_only_jax(module):
    loaded = loaded_by(f"import ltjax.{module}")
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "tensorflow_datasets", "tensorflow", "cv2", "rich", "clu"}


def test_weights_without_pytorch_need_no_pytorch():
    assert "torch" not in loaded_by("import ltjax.interop.torch, ltjax.interop.export")


def test_training_loads_neither_tensorflow_nor_its_datasets():
    assert not loaded_by("import ltjax.train") & {"tensorflow", "tensorflow_datasets"}
