"""Programs compiled for a TPU and an H100, without either, and their bounds.

Tests that need the compilers (`pip install -e ".[aot]"`) are skipped without them, or fail with LTJAX_REQUIRE_AOT=1.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled, flops, hlo
from ltjax import models
from ltjax.config import parse
from tests.configs.reading import ROOT

STEPS = ("mislas1-bf16", "mislas2-bf16")  # of the two stages of one small network


def figures(**changed):
    return {**dict.fromkeys(compiled.HEADINGS, 0), "collectives": {}, **changed}


@pytest.mark.parametrize("program", compiled.PROGRAMS, ids=lambda program: program.name)
@pytest.mark.parametrize("tiny", [False, True], ids=["full", "tiny"])
def test_every_program_is_a_stage_of_a_config(program, tiny):
    run = parse(compiled.settings_of(program, "gpu", tiny))
    stages = run.stages
    assert not program.stage or program.stage in stages
    assert set(program.chips) <= set(compiled.PLATFORMS)
    assert not any(run.batch_size % chips for chips in program.chips.values())


def test_program_names_are_unique():
    names = [program.name for program in compiled.PROGRAMS]
    assert len(set(names)) == len(names)


def test_every_bound_is_of_a_program_and_a_figure_and_has_a_reason():
    programs = {(program.name, platform) for program in compiled.PROGRAMS for platform in program.chips}
    assert set(compiled.BOUNDS) == programs
    assert set(compiled.EXCEPT) <= programs
    for bounds in (compiled.COMMON, *compiled.EXCEPT.values(), *compiled.BOUNDS.values()):
        assert set(bounds) <= set(compiled.HEADINGS)
        assert all(bound.why for bound in bounds.values())


def test_a_programs_bound_overrides_the_common_one():
    assert compiled.broken("drolt2", "tpu", figures(other_collectives=1), tiny=True) == []
    assert len(compiled.broken("drolt2", "tpu", figures(other_collectives=2), tiny=True)) == 1
    assert len(compiled.broken("mislas1", "tpu", figures(other_collectives=1), tiny=True)) == 1


def test_a_figure_above_its_bound_is_named_with_program_and_bound():
    assert compiled.broken("mislas1", "gpu", figures()) == []
    actual = compiled.broken("mislas1", "gpu", figures(scatters=3))
    assert len(actual) == 1 and actual[0].startswith("mislas1 on gpu: scatters = 3, bound 0: ")


def test_a_figure_that_a_platform_does_not_have_is_within_its_bound():
    assert compiled.broken("mislas1", "tpu", figures(dynamic_loops=None)) == []


def test_a_tiny_program_has_only_the_common_bounds(monkeypatch):
    monkeypatch.setitem(compiled.BOUNDS, ("mislas1", "gpu"), {"kernels": compiled.Bound(5, "few")})
    numbers = figures(kernels=6, scatters=1)
    assert len(compiled.broken("mislas1", "gpu", numbers)) == 2
    assert len(compiled.broken("mislas1", "gpu", numbers, tiny=True)) == 1


@pytest.fixture
def without_compiling(monkeypatch):
    """Let `main` read made-up figures: `without_compiling(scatters=1)`."""

    def given(**changed):
        actual = compiled.Compiled("", "", 0, "", "", 1.0)
        monkeypatch.setattr(compiled, "set_up", lambda: None)
        monkeypatch.setattr(compiled, "lower", lambda *_, **__: None)
        monkeypatch.setattr(compiled, "compile_it", lambda *_: actual)
        monkeypatch.setattr(compiled, "figures", lambda *_: figures(**changed))

    return given


def test_the_command_fails_if_a_figure_is_above_its_bound(without_compiling, capsys, tmp_path):
    out = tmp_path / "compiled.json"
    arguments = ["--tiny", "--platform=gpu", "--only=reslt", "--only=evaluation", f"--json={out}"]
    without_compiling()
    assert compiled.main(arguments) == 0
    without_compiling(host_transfers=2)
    assert compiled.main(arguments) == 1
    assert "reslt on gpu: host transfers = 2, bound 0: a step must not wait for the host" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [row["program"] for row in written["programs"]] == ["reslt", "evaluation"]
    assert all(row["figures"]["host_transfers"] == 2 and len(row["broken"]) == 1 for row in written["programs"])


def test_a_compiler_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "set_up", lambda: None)
    monkeypatch.setattr(compiled, "installed", lambda platform: False)
    with pytest.raises(SystemExit) as stopped:
        compiled.main(["--platform=tpu"])
    assert stopped.value.code == 2
    assert 'no XLA for tpu here (libtpu): pip install -e ".[aot]"' in capsys.readouterr().err


def test_the_made_up_inaturalist_has_the_official_counts():
    actual = compiled._made_up("i_naturalist2018")
    counts = [int(n) for n in jax.numpy.bincount(actual.train_labels)]
    assert (len(counts), sum(counts), max(counts), min(counts)) == (8142, 437_513, 1000, 2)
    assert len(actual.train_files) == 437_513 and len(actual.test_files) == 24_426


@pytest.fixture
def lowered(monkeypatch):
    """Return `lowered(program)`: its tiny step lowered for CPU devices, without a compiler."""
    monkeypatch.setattr(compiled, "devices", lambda platform, count: jax.devices()[:count])

    def text(name):
        program = next(each for each in compiled.PROGRAMS if each.name == name)
        actual = compiled.lower(program, "gpu", tiny=True).as_text()
        assert "stablehlo.convolution" in actual and "xbf16>" in actual
        return actual, compiled.settings_of(program, "gpu", True)["batch_size"]

    return text


@pytest.mark.parametrize("name", ["mislas1-bf16", "resnet50"])
def test_no_lowered_step_sums_bfloat16_over_a_batch(name, lowered):
    assert hlo.narrow_sums(*lowered(name)) == 0


def test_a_lowered_step_on_small_images_scatters_nothing(lowered):
    assert hlo.scatters(lowered("mislas1-bf16")[0]) == 0


@pytest.fixture(scope="module", params=compiled.PLATFORMS)
def made(request, tmp_path_factory):
    """Compile the small programs; return (platform, exit code, output, {program: its record})."""
    platform = request.param
    if not compiled.installed(platform) and not os.environ.get("LTJAX_REQUIRE_AOT"):
        pytest.skip(f'no XLA for {platform}: pip install -e ".[aot]" in an environment of its own')
    out = tmp_path_factory.mktemp(platform) / "compiled.json"
    # as users compile, not as tests do
    mine = ("JAX_", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    command = [sys.executable, "-m", "benchmarks.compiled", "--tiny", f"--platform={platform}", f"--json={out}"]
    only = [f"--only={name}" for name in STEPS]
    ran = subprocess.run([*command, *only], cwd=ROOT, env=environment, capture_output=True, text=True)
    written = json.loads(out.read_text()) if out.exists() else {"programs": []}
    return platform, ran.returncode, ran.stdout + ran.stderr, {row["program"]: row for row in written["programs"]}


def test_small_programs_are_within_the_common_bounds(made):
    _, code, printed, rows = made
    assert set(rows) == set(STEPS), printed
    assert code == 0 and not any(row["broken"] for row in rows.values()), printed


def test_operations_of_small_programs_are_those_by_hand(made):
    *_, rows = made
    for name, trains in zip(STEPS, (True, False), strict=True):
        by_hand = flops.by_hand(8, width=8, num_classes=100, backbone_trains=trains)
        actual = 1e9 * rows[name]["figures"]["gflop"] * rows[name]["chips"] / 64
        assert actual == pytest.approx(by_hand, rel=0.01)


def test_small_programs_have_the_figures_of_their_platform(made):
    platform, _, _, rows = made
    for row in rows.values():
        numbers = row["figures"]
        assert numbers["kernels"] > 10 and numbers["temporaries_mb"] > 0 and numbers["least_ms"] > 0
        if platform == "tpu":
            assert row["chips"] == 8 and numbers["xla_ms"] > numbers["least_ms"] / 2
            assert numbers["graphs"] is None
        else:
            assert 0 < numbers["graphs"] <= numbers["launches"] <= numbers["kernels"] + 20
            assert numbers["dynamic_loops"] == 0 and numbers["xla_ms"] is None


def test_devices_that_share_a_batch_sum_gradients_and_statistics(made):
    platform, _, _, rows = made
    if platform == "gpu":
        pytest.skip("compiled for one GPU")
    both = rows[STEPS[0]]["figures"], rows[STEPS[1]]["figures"]
    net = models.create("resnet_cifar", 100, depth=8, width=8)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    assert 2 * count <= both[0]["all_reduce_mb"] * 1e6 <= 4 * count  # bytes: in bfloat16, or some in float32
    assert both[0]["all_reduces"] > both[1]["all_reduces"] > 0
