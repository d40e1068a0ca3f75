"""All that is worth doing on a machine with an accelerator and no internet, piece by piece, as far as the time goes:

    python -m benchmarks.accelerator --pack=build/pack                  # from the root of the copied checkout
    python -m benchmarks.accelerator --list                             # what is done, what is left
    python -m benchmarks.accelerator --tiny                             # the same pieces, tiny, on any machine

The same command again does the next pieces. A run that the time ends is stopped by SIGTERM, saves itself, and goes on
next time, as long as `--workdir` is still there. The pieces, in order: a report of the machine; the tests that run on a
device; the benchmarks; full-length runs on CIFAR-100-LT with imbalance 100: every long-tail method with three seeds in
one program; after the first of these adversarial training with one seed, each run followed by attacks on it. `--pack`
is the folder that `benchmarks/pack.py` made; without it the packages are those of this Python, and the images those of
`--data_dir`.

Each piece that is done leaves `<out>/<device>/<piece>.json`: status, device, versions, commit, command, when it ran,
and its result. What a piece printed is in `<workdir>/<piece>/log.txt`. Exit code 1: a piece failed; next time it is
tried again.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
REPLICAS = 3
METHODS = (  # the first ones matter most
    *("mislas", "ce", "balanced_softmax", "drolt", "reslt", "ldam_drw", "crt", "lws", "logit_adjustment"),
    *("tau_norm", "focal", "cb_ce", "ldam", "logit_adjustment_posthoc", "ncm", "mixup"),
)
ROBUST = {  # name: arguments of configs/cifar100_lt.py; after the first three of METHODS
    "lbgat-balanced_softmax": "method=lbgat,beta=6,loss=balanced_softmax,guide=resnet18",
    "trades-balanced_softmax": "method=trades,loss=balanced_softmax",
    "pgd_at-balanced_softmax": "method=pgd_at,loss=balanced_softmax",
    "lbgat": "method=lbgat,beta=6,guide=resnet18",
}
SAVING = 60.0  # seconds that a stopped run gets to finish what the device does, and save
LEAST = 20.0  # seconds; with less left, no piece is begun


class Piece(NamedTuple):
    name: str
    command: list[str]  # after `python`
    result: Path  # what the command leaves, when it is done: JSON, or pytest's XML
    environment: Mapping[str, str] = MappingProxyType({})
    after: str = ""  # a piece that has to be done first


def pieces(workdir: Path, data_dir: Path | None, platform_name: str, tiny: bool) -> list[Piece]:
    """What there is to do, in order. platform_name: JAX's, such as "gpu"."""
    platforms = {"gpu": "cuda,cpu", "cpu": "cpu"}.get(platform_name, f"{platform_name},cpu")
    xml = workdir / "tests" / "junit.xml"
    tests = ["tests/gpu"] if tiny else ["tests/gpu", "tests/test_golden_training.py"]
    # float32 is compared with float32, not with TensorFloat-32; what is resumed has to repeat itself bit for bit
    found = [
        Piece(
            "tests",
            ["-m", "pytest", *tests, "-W", "default", "-p", "no:cacheprovider", f"--junitxml={xml}"],
            xml,
            {
                "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", platforms),
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip(),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            },
        )
    ]
    small = ["--depth=8", "--width=8", "--batch_size=32", "--max_count=24", "--repeats=2"] if tiny else []
    steps = {"float32": [], "bfloat16": ["--dtype=bfloat16", "--no_flops"]}
    if platform_name == "gpu":
        steps |= {f"graphs-{kind}": [f"--gpu_graphs={kind}", "--no_flops"] for kind in ("step", "dispatch")}
    for step, more in steps.items():
        out = workdir / f"step-{step}" / "step.json"
        found.append(Piece(f"step-{step}", ["-m", "benchmarks.cifar_step", f"--out={out}", *small, *more], out))
    small = ["--num_classes", "100", "--dim=64", "--batch_size=32", "--repeats=2"] if tiny else []
    out = workdir / "dro-loss" / "dro_loss.json"
    found.append(Piece("dro-loss", ["-m", "benchmarks.dro_loss", f"--out={out}", *small], out))
    small = ["--depth=8", "--width=4", "--batch_size=32", "--replicas", "1", "2", "--max_count=20"] if tiny else []
    out = workdir / "replicas" / "replicas.json"
    found.append(Piece("replicas", ["-m", "benchmarks.replicas", f"--out={out}", *small], out))
    small = ["--model=wrn10_1", "--guide=wrn10_1", "--batch_size=16", "--attack_steps=2", "--repeats=1"] if tiny else []
    for dtype in ("float32", "bfloat16"):
        out = workdir / f"adversarial-step-{dtype}" / "step.json"
        command = ["-m", "benchmarks.adversarial_step", "--no_flops", f"--dtype={dtype}", f"--out={out}", *small]
        found.append(Piece(f"adversarial-step-{dtype}", command, out))
    small = ["--images=24", "--batch_size=16", "--attacks=apgd-ce"] if tiny else []
    out = workdir / "autoattack" / "autoattack.json"
    found.append(Piece("autoattack", ["-m", "benchmarks.autoattack", f"--out={out}", *small], out))
    runs = METHODS[:2] if tiny else METHODS
    usual = [long_tailed_run(method, workdir, data_dir, tiny) for method in runs]
    robust = [robust_run(name, workdir, data_dir, tiny) for name in list(ROBUST)[: 1 if tiny else None]]
    return [*found, *usual[:3], *itertools.chain(*robust), *usual[3:]]


def long_tailed_run(method: str, workdir: Path, data_dir: Path | None, tiny: bool) -> Piece:
    """Three seeds at full length."""
    name = f"run-{method}-if100"
    config = [f"--config=configs/cifar100_lt.py:method={method},imbalance=100", f"--config.replicas={REPLICAS}"]
    if tiny:
        config += ["--config.epochs=3", "--config.data.max_count=100", "--config.batch_size=32"]
        config += ["--config.model.depth=8", "--config.model.width=4"]
        config += ["--config.classifier.epochs=1"] if method == "mislas" else []
    config += [f"--workdir={workdir / name / 'run'}"] + ([f"--data_dir={data_dir}"] if data_dir else [])
    return Piece(name, ["run.py", *config], workdir / name / "run" / "results.json")


def robust_run(robust: str, workdir: Path, data_dir: Path | None, tiny: bool) -> list[Piece]:
    """Adversarial training of PreAct-ResNet-18 at full length, one seed, and its attack on 1,000 test images.

    On the long-tailed images: all of CIFAR-100 would not fit into the pack.
    """
    name, attack = f"run-{robust}-if100", f"attack-{robust}-if100"
    method = ROBUST[robust].partition(",")[0].removeprefix("method=")
    config = [f"--config=configs/cifar100_lt.py:{ROBUST[robust]},imbalance=100,model=preact18"]
    if tiny:
        config += ["--config.epochs=1", "--config.data.max_count=100", "--config.batch_size=32"]
        config += ["--config.model.width=4", f"--config.{method}.method.attack.num_steps=2"]
        config += ["--config.guide.width=4"] if method == "lbgat" else []
    config += [f"--workdir={workdir / name / 'run'}"] + ([f"--data_dir={data_dir}"] if data_dir else [])
    most = [f"--config.attack.num_images={24 if tiny else 1000}"]
    most += ["--config.attack.tests=('pgd-20', 'apgd-ce')", "--config.attack.batch_size=24"] if tiny else []
    folder = workdir / name / "run"
    return [
        Piece(name, ["run.py", *config], folder / "results.json"),
        Piece(attack, ["run.py", *config, "--mode=attack", *most], folder / "attack.json", after=name),
    ]


def read_result(path: Path) -> Any:
    """A piece's result, JSON-ready."""
    if path.suffix != ".xml":
        return json.loads(path.read_text())
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = {"outcome": outcome, "seconds": float(case.get("time", 0))}
    return found


def run_child(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> tuple[int, bool]:
    """Run a command for at most `seconds` -> its exit code, and whether it had to be stopped.

    It is stopped by SIGTERM, and killed where that does not help within `SAVING` seconds. Its process group is its own,
    so that Ctrl-C comes here alone: a second signal would stop a run of ltjax without saving.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(seconds, 0)), False
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(SAVING)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return process.returncode, process.returncode != 0


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def tail(log: Path, size: int = 3000) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def report() -> dict[str, Any]:
    """What this machine is, as JAX and the system see it. For a process of its own: it takes the device."""
    import jax
    import jax.numpy as jnp
    from jax.extend import backend

    from ltjax import results

    devices = jax.devices()
    started = time.perf_counter()
    total = float(jnp.ones((1024, 1024)).sum())
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        card = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        card = None
    return {
        "platform": devices[0].platform,
        "device": f"{devices[0].platform}: {devices[0].device_kind}",
        "num_devices": len(devices),
        "device_memory_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "first_computation": {"right": total == 1024.0**2, "seconds": time.perf_counter() - started},
        "backend": backend.get_backend().platform_version,
        "nvidia_smi": card,
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "versions": results.versions(),
        "flags": {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "XLA_"))},
    }


def show_list(out: Path, names: list[str]) -> None:
    """What is done and what is left, for each device that has results."""
    folders = sorted(path for path in out.glob("*") if path.is_dir()) or [out / "no device yet"]
    for folder in folders:
        print(f"{folder}:")
        for name in names:
            record = read(folder / f"{name}.json")
            print(f"  {name:32} " + (f"{record['status']}, {record['ended']}" if record else "left"))


def do(piece: Piece, folder: Path, workdir: Path, common: dict[str, Any], environment: dict[str, str], seconds: float):
    """Run a piece -> "done", "failed" or "stopped"; the first two leave `<folder>/<piece>.json`.

    common: what every record says of the machine and the code.
    """
    history, log = workdir / piece.name / "sessions.json", workdir / piece.name / "log.txt"
    sessions = read(history) or []
    started = now()
    if not piece.name.startswith("run-"):  # which goes on from what it finds
        piece.result.unlink(missing_ok=True)
    piece.result.parent.mkdir(parents=True, exist_ok=True)
    code, stopped = run_child([sys.executable, *piece.command], {**environment, **piece.environment}, log, seconds)
    sessions.append({"started": started, "ended": now(), "exit_code": code})
    write(history, sessions)
    if stopped:
        return "stopped"
    status = "done" if code == 0 else "failed"
    record = {
        "piece": piece.name,
        "status": status,
        **common,
        "command": shlex.join([*(f"{k}={v}" for k, v in piece.environment.items()), "python", *piece.command]),
        "started": sessions[0]["started"],
        "ended": sessions[-1]["ended"],
        "sessions": sessions,
        "result": read_result(piece.result) if piece.result.exists() else None,
    }
    write(folder / f"{piece.name}.json", record if status == "done" else {**record, "output": tail(log)})
    if status == "failed":
        print(tail(log))
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="results (default: results; tiny: <workdir>/results)")
    parser.add_argument("--workdir", type=Path, help="runs and logs (default: runs/accelerator; tiny: with -tiny)")
    parser.add_argument("--pack", type=Path, help="folder that benchmarks/pack.py made")
    parser.add_argument("--data_dir", type=Path, help="prepared data sets (default: the pack's, else $TFDS_DATA_DIR)")
    parser.add_argument("--only", default="", help="pieces whose name begins so")
    parser.add_argument("--tiny", action="store_true", help="tiny settings, for checking the procedure; a CPU will do")
    parser.add_argument("--list", action="store_true", help="show what is done and what is left")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # the child that looks at the machine
    args = parser.parse_args()
    if args.report:
        write(args.report, report())
        return 0
    if Path.cwd() != ROOT.resolve():
        parser.error(f"run this from the root of the checkout: cd {ROOT}")
    deadline = time.monotonic() + 60 * args.minutes - min(SAVING, 15 * args.minutes)
    workdir = args.workdir or Path("runs") / ("accelerator-tiny" if args.tiny else "accelerator")
    out = args.out or (workdir / "results" if args.tiny else Path("results"))
    names = ["environment", *(piece.name for piece in pieces(workdir, None, "gpu", args.tiny))]
    if args.list:
        show_list(out, names)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the child, as on Ctrl-C
    cache = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute())}
    environment = {**cache, **os.environ, "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT)]
    data_dir = args.data_dir
    if args.pack:
        to = workdir / "unpacked"
        if subprocess.run([sys.executable, "-m", "benchmarks.pack", f"--unpack={args.pack}", f"--to={to}"]).returncode:
            return 1
        paths.insert(0, str((to / "site").absolute()))
        sys.path.insert(0, paths[0])
        data_dir = data_dir or to / "data"
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])

    seen, log = workdir / "environment" / "report.json", workdir / "environment" / "log.txt"
    seen.unlink(missing_ok=True)
    command, started = ["-m", "benchmarks.accelerator", f"--report={seen}"], now()
    if run_child([sys.executable, *command], environment, log, deadline - time.monotonic())[0]:
        print(f"{tail(log)}\nerror: cannot look at this machine, see above")
        return 1
    machine = read(seen)
    print(f"{machine['num_devices']} x {machine['device']}, jax {machine['versions'].get('jax')}")
    if machine["platform"] == "cpu" and not args.tiny:
        print("error: JAX finds no accelerator here; --tiny checks the procedure on a CPU")
        return 1
    from benchmarks import pack

    if args.tiny and data_dir is None:
        from benchmarks import cifar_step

        data_dir = workdir / "random"
        cifar_step.write_random_images(data_dir, per_class=100)
    common = {
        "tiny": args.tiny,
        **{key: machine[key] for key in ("device", "num_devices", "versions")},
        "git_commit": pack.commit(args.pack),
    }
    folder = out / re.sub(r"[^a-z0-9]+", "-", machine["device"].partition(": ")[2].lower()).strip("-")
    if not (folder / "environment.json").exists():
        ran = {"command": shlex.join(["python", *command]), "started": started, "ended": now()}
        record = {"piece": "environment", "status": "done", **common, **ran, "result": machine}
        write(folder / "environment.json", record)

    failed, left = [], []
    for piece in pieces(workdir, data_dir, machine["platform"], args.tiny):
        if not piece.name.startswith(args.only) or (read(folder / f"{piece.name}.json") or {}).get("status") == "done":
            continue
        waits = piece.after and (read(folder / f"{piece.after}.json") or {}).get("status") != "done"
        seconds = deadline - time.monotonic()
        if waits or seconds < LEAST:
            left.append(piece.name)
            continue
        begun = time.monotonic()
        status = do(piece, folder, workdir, common, environment, seconds)
        print(f"{piece.name}: {status} after {time.monotonic() - begun:.0f} s", flush=True)
        failed += [piece.name] if status == "failed" else []
        left += [piece.name] if status == "stopped" else []
    print(f"failed: {', '.join(failed) or 'none'}; left: {', '.join(left) or 'none'}; results in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
