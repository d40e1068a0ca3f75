"""The benchmarks of a device at a small size: times of a step, gradients in bfloat16, bit-identical resuming."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import cifar_step, decode, device_step, gradients, resume

SMALL = ["--depth=8", "--width=4", "--batch_size=16", "--steps=2", "--repeats=2"]
LARGE = ["--net=resnet50", "--depth=10", "--size=32", "--batch_size=8", "--steps=1", "--repeats=1", "--jpegs=40x32"]


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch):
    """Let the data sets have fewer images, because each one is hashed: CIFAR-100 a fifth, iNaturalist one a class."""

    def random_images(folder, write=cifar_step.write_random_images, **_):
        write(folder, per_class=100, num_test=100)

    def one_of_each_class(files, inaturalist=decode.inaturalist):
        stored = inaturalist(files)
        labels = np.unique(stored.train_labels)
        return stored._replace(train_labels=labels, test_labels=labels)

    monkeypatch.setattr(cifar_step, "write_random_images", random_images)
    monkeypatch.setattr(decode, "inaturalist", one_of_each_class)


def measured(tmp_path, *arguments):
    out = tmp_path / "step.json"
    device_step.main([*arguments, f"--out={out}"])
    return json.loads(out.read_text())


def test_each_data_type_and_flag_is_a_row_and_the_first_one_is_traced(tmp_path):
    both = ["--dtype", "bfloat16", "float32", "--flags", "default", "dispatch"]
    numbers = measured(tmp_path, *SMALL, *both, "--trace")
    rows = [(row["flags"], row["dtype"]) for row in numbers["programs"]]
    assert rows == [(flags, dtype) for flags in ("default", "dispatch") for dtype in ("bfloat16", "float32")]
    for row in numbers["programs"]:
        assert row["images_per_second"] == pytest.approx(16 * 2 / np.median(row["seconds_per_dispatch"]))
        assert row["steps"] == 2 and row["bytes_by_xla"] > 0
    assert numbers["trace"]["events"] > 0 and 0 < numbers["trace"]["busy_share"] <= 1


def test_measurements_before_an_error_are_written(tmp_path, monkeypatch):
    def fails(prepared, flags, steps, compile_all=device_step.compile_all):
        if flags == "dispatch":
            raise RuntimeError("no such graph")
        return compile_all(prepared, flags, steps)

    monkeypatch.setattr(device_step, "compile_all", fails)
    with pytest.raises(RuntimeError, match="no such graph"):
        measured(tmp_path, *SMALL, "--flags", "default", "dispatch")
    kept = json.loads((tmp_path / "step.json").read_text())
    assert [row["flags"] for row in kept["programs"]] == ["default"]


def test_images_on_disk_are_timed_on_the_device_and_streamed(tmp_path, monkeypatch):
    first = []
    dispatch = device_step.Program.dispatch

    def watched(program, source):
        first.append((int(source.first), int(program.carried[0].step)))
        return dispatch(program, source)

    def narrow(large=device_step.large, **settings):
        values = large(**settings)
        return {**values, "model": {**values["model"], "width": 8}}

    monkeypatch.setattr(device_step.Program, "dispatch", watched)
    monkeypatch.setattr(device_step, "large", narrow)  # 11 million random numbers take long
    numbers = measured(tmp_path, *LARGE, "--stream=2")
    (row,) = numbers["programs"]
    assert first == [(step, step) for step in range(2 + 2 + 2)]  # held twice, two to fill the stream, two to time
    assert len(row["streamed"]["seconds_per_dispatch"]) == 2 and row["streamed"]["images_per_second"] > 0
    assert row["bytes_by_dry_run"] > 8142 * 64 * 4  # the classifier alone


@pytest.mark.parametrize("flags", device_step.FLAGS)
def test_xla_knows_the_flags(flags):
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=device_step.FLAGS[flags] or None)(2.0) == 3.0


def test_kernels_are_summed_by_name_and_gaps_are_idle():
    found = device_step.summarise([("a", 0, 2e6), ("b", 1e6, 2e6), ("a", 6e6, 4e6)])
    assert found["span_ms"] == 10 and found["busy_share"] == pytest.approx(0.7) and found["events"] == 3
    assert found["kernels"] == [{"name": "a", "count": 2, "ms": 6.0}, {"name": "b", "count": 1, "ms": 2.0}]


def test_gradients_are_compared_by_direction_and_length():
    exact = {"a": np.array([3.0, 4.0]), "zero": np.zeros(2)}
    (found,) = gradients.compare(exact, {"a": np.array([4.0, -3.0]), "zero": np.ones(2)}).values()
    assert found == {"cosine": pytest.approx(0), "relative_error": pytest.approx(2**0.5)}


def test_a_resumed_process_is_compared_bit_by_bit(tmp_path, capsys):
    cifar_step.write_random_images(tmp_path)
    args = resume.arguments_parser().parse_args(["--depth=8", "--width=4", "--batch_size=16", "--steps=2"])
    folder = tmp_path / "none"
    folder.mkdir()
    resume.part("saves", folder, args)
    resume.part("resumes", folder, args)
    assert json.loads(capsys.readouterr().out)["summary"]["equal"]
    changed = dict(np.load(folder / "expected.npz"))
    last = max((name for name in changed if changed[name].dtype == np.float32), key=lambda name: changed[name].size)
    changed[last].view(np.uint32).reshape(-1)[0] ^= 1  # the last bit of one number
    np.savez(folder / "expected.npz", **changed)
    resume.part("resumes", folder, args)
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert not summary["equal"] and summary["differ"] == 1 and summary["arrays"] == len(changed)


@pytest.mark.parametrize("fails", [False, True])
def test_each_way_has_its_flags_and_no_compilation_cache(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("XLA_FLAGS", "--xla_own=1")
    asked = []

    class Done:
        returncode, stdout, stderr = int(fails), '{"summary": {"equal": true}}\n', "no memory"

    monkeypatch.setattr(resume.subprocess, "run", lambda command, env, **_: asked.append((command, env)) or Done)
    if fails:
        with pytest.raises(RuntimeError, match="deterministic, the process that saves: no memory"):
            resume.attempt("deterministic", [], tmp_path)
        return
    for way, flags in resume.WAYS.items():
        assert resume.attempt(way, ["--depth=8"], tmp_path) == {"summary": {"equal": True}}
        for (command, environment), which in zip(asked[-2:], ("saves", "resumes"), strict=True):
            assert command[3:] == ["--depth=8", f"--part={which}", f"--folder={Path(tmp_path) / way}"]
            assert environment["XLA_FLAGS"] == f"--xla_own=1 {flags.format(folder=tmp_path / way)}".strip()
            assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"
