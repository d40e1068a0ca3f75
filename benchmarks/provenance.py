"""Write a benchmark's JSON file, with device, versions, commit and command."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ltjax.runs import results
from ltjax.system.files import write_json


def of(benchmark: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe device, versions, commit and command. Call it before measuring, because the commit may change."""
    arguments, device = sys.argv[1:] if arguments is None else arguments, jax.devices()[0]
    return {
        "benchmark": benchmark,
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": jax.device_count(),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
    }


def write(out: Path | None, numbers: Mapping[str, Any]) -> None:
    """Write a JSON file, unless `out` is None."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, json.loads(json.dumps(numbers)))
