"""Who may import whom, read off the imports themselves; and what a user of one loss has to load."""

import ast
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

# What the modules below a name may import beside the standard library. A name stands for all that lies below it.
ALLOWED = {
    "ltjax.types": {"jax"},
    "ltjax.losses": {"jax", "numpy"},
    "ltjax.metrics": {"jax", "numpy"},
    "ltjax.calibration": {"jax"},
    "ltjax.hashing": {"jax", "numpy"},
    "ltjax.registry": {"ltjax.types"},
    "ltjax.paths": {"ltjax.types"},
    "ltjax.config": {"ltjax.types"},
    "ltjax.usage": set(),
    "ltjax.cores": set(),
    "ltjax.results": {"rich"},
    "ltjax.tables": {"rich"},
    "ltjax.compare": {"rich", "ltjax.config", "ltjax.paths", "ltjax.results", "ltjax.tables", "ltjax.types"}
    | {"ltjax.report.compared"},
    "ltjax.report.charts": {"numpy", "markupsafe"},
    "ltjax.report.panels": {"numpy"},
    "ltjax.report.plots": {"numpy", "markupsafe", "ltjax.results", "ltjax.report"},
    "ltjax.report.sections": {"numpy", "markupsafe", "ltjax.results", "ltjax.report"},
    "ltjax.report.analysis": {"numpy", "ltjax.metrics"},
    "ltjax.attacks": {"jax", "numpy", "ltjax.attacks", "ltjax.cores", "ltjax.xla"},
    "ltjax.xla": {"jax", "ltjax.registry"},
    "ltjax.parallel": {"jax", "numpy"},
    "ltjax.surgery": {"jax", "numpy", "ltjax.types", "ltjax.losses", "ltjax.registry"},
    "ltjax.methods": {
        "jax",
        "numpy",
        "ltjax.types",
        "ltjax.registry",
        "ltjax.losses",
        "ltjax.attacks",
        "ltjax.methods",
    },
    "ltjax.models": {"jax", "flax", "ltjax.types", "ltjax.registry", "ltjax.xla", "ltjax.models"},
    "ltjax.interop.weights": {"jax", "numpy", "safetensors", "ltjax.types", "ltjax.optim", "ltjax.paths"},
    "ltjax.interop.checkpoints": {"numpy", "safetensors", "torch", "ltjax.types", "ltjax.interop.names"},
    "ltjax.interop.names": {"numpy", "flax"},
    "ltjax.interop.torch": {"jax", "numpy", "flax", "ltjax.types", "ltjax.optim", "ltjax.models", "ltjax.interop"}
    | {"ltjax.paths"},
    "ltjax.data": {"jax", "numpy", "tensorflow_datasets", "cv2", "simplejpeg", "array_record", "rich"}
    | {"ltjax.types", "ltjax.registry", "ltjax.hashing", "ltjax.cores", "ltjax.paths", "ltjax.data"},
}
SEES_EVERYTHING = ("ltjax.train", "ltjax.problem", "ltjax.evaluate", "ltjax.feed")
SEES_MODELS = ("ltjax.interop", "ltjax.predictor")  # whose weights come in and go out, and are used
SEES_DATA = ("ltjax.predictor", "ltjax.prediction")  # what is predicted becomes of files what test images become


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


def allowed(module):
    """The entry of `ALLOWED` for a module, or None where the table leaves it free."""
    if f"{module}.__init__" in ALLOWED:
        return ALLOWED[f"{module}.__init__"]
    return next((names for package, names in ALLOWED.items() if inside(module, package)), None)


@pytest.mark.parametrize("module", [module for module in FILES if allowed(module) is not None])
def test_a_module_imports_only_what_its_layer_may(module):
    found = imports(FILES[module])
    foreign = sorted(name for name in found if not any(inside(name, package) for package in allowed(module)))
    assert not foreign, f"{module} imports {foreign}; its layer may import {sorted(allowed(module))}"


@pytest.mark.parametrize("module", [module for module in FILES if module not in SEES_EVERYTHING])
def test_only_the_training_loop_brings_methods_models_and_data_together(module):
    packages = ("ltjax.methods", "ltjax.models", "ltjax.data")
    own = {package for package in packages if inside(module, package)}
    own |= {"ltjax.models"} if any(inside(module, package) for package in SEES_MODELS) else set()
    own |= {"ltjax.data"} if module in SEES_DATA else set()
    found = {package for package in packages for name in imports(FILES[module]) if inside(name, package)}
    assert found <= own


@pytest.mark.parametrize("module", FILES)
def test_nothing_in_the_library_imports_the_training_loop(module):
    assert not [name for name in imports(FILES[module]) if inside(name, "ltjax.train")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_data(path):
    assert {name.partition(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}


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
