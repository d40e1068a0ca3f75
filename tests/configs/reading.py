"""Read configs for several tests."""

import runpy
from pathlib import Path

from ltjax import config, optim
from ltjax.system import registry

ROOT = Path(__file__).parents[2]


def read(name, argument=None):
    """Return the ConfigDict of a file: `read("cifar10_lt", "imbalance=50")`."""
    arguments = () if argument is None else (argument,)
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](*arguments)


def parsed(name, argument=None):
    """Return the run and its stages, checked."""
    run = config.parse(read(name, argument).to_dict())
    return run, run.stages


def rates_of(stage):
    return {name: group["rate"] for name, group in stage.groups.items()}


def factors_of(stage):
    return registry.bind("schedule", optim.schedule_table, stage.schedule)(stage.epochs)
