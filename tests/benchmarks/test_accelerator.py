"""Measurements on a machine for a few minutes: pieces have limits, resume, and write one record each."""

import json
import re
import time

import pytest

import run as run_module
from benchmarks import (
    accelerator,
    adversarial_step,
    autoattack,
    decode,
    device_step,
    gradients,
    replicas,
    reproduce,
    resume,
)

PARSERS = (adversarial_step, autoattack, decode, device_step, gradients, replicas, resume)
SAVES = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("saved").write_text("1")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
if pathlib.Path("saved").exists():
    pathlib.Path("result.json").write_text("[7]")
else:
    time.sleep(60)
"""
ENDS = "import pathlib; pathlib.Path('{}').write_text('[1]')"
HANGS = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("partial.json").write_text("[0.5]")
print("compiling", flush=True)
time.sleep(60)
"""


def piece(name, code, result="result.json", **fields):
    return accelerator.Piece(name, ("-c", code), result, **fields)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "KILLED", 0.2)
    monkeypatch.setattr(accelerator, "LEAST", 0.0)
    return accelerator.Place(tmp_path / "work", tmp_path / "out", {"device": "cpu: cpu"}, {})


def work(place, *pieces, seconds=60.0):
    return accelerator.work(pieces, place, time.monotonic() + seconds)


def test_a_run_past_its_limit_gets_sigterm_saves_and_resumes(place):
    one = piece("run", SAVES, limit=2.0, resumes=True)
    assert work(place, one) == {"run": "stopped"}
    assert place.record("run")["result"] is None
    assert work(place, one) == {"run": "done"}
    record = place.record("run")
    assert record["result"] == [7] and record["device"] == "cpu: cpu"
    assert [session["exit_code"] for session in record["sessions"]] == [143, 0]
    assert work(place, one) == {}


def test_a_piece_past_its_limit_is_killed_and_the_next_one_runs(place):
    actual = work(place, piece("a", HANGS, "partial.json", limit=1.5), piece("b", ENDS.format("b.json"), "b.json"))
    assert actual == {"a": "stopped", "b": "done"}
    record = place.record("a")
    assert record["output"] == "compiling\n" and record["result"] == [0.5]
    assert record["sessions"][0]["exit_code"] == -9


def test_a_stopped_piece_gets_twice_its_limit_next_time(place):
    one = piece("a", f"import time; time.sleep(1.5); {ENDS.format('result.json')}", limit=1.2)
    assert [work(place, one) for _ in range(2)] == [{"a": "stopped"}, {"a": "done"}]


def test_the_children_of_a_stopped_piece_end(place):
    child = f"import time; time.sleep(2); {ENDS.format('late.json')}"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert work(place, piece("a", code, limit=1.0)) == {"a": "stopped"}
    time.sleep(2.5)
    assert not (place.workdir / "late.json").exists()


def test_a_failed_pieces_record_has_its_output(place):
    assert work(place, piece("a", "print('no such device'); raise SystemExit(3)")) == {"a": "failed"}
    assert place.record("a")["output"] == "no such device\n"


def test_the_background_is_stopped_before_a_piece_that_runs_alone(place):
    waits = "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.02)\n"
    begun = "open('begun', 'w')\n"
    actual = work(
        place,
        piece("behind", begun + SAVES, limit=2.0, resumes=True, background=True),
        piece("beside", waits.format("begun") + ENDS.format("1.json"), "1.json", parallel=True),
        piece("alone", f"assert open('saved')\n{ENDS.format('2.json')}", "2.json"),
    )
    assert actual == {"behind": "stopped", "beside": "done", "alone": "done"}


def test_the_background_saves_at_the_end_of_a_call(place, monkeypatch):
    monkeypatch.setattr(accelerator, "SAVING", 1.0)
    behind = piece("behind", SAVES, limit=50.0, resumes=True, background=True)
    assert work(place, behind, seconds=3.0) == {"behind": "stopped"}
    assert (place.workdir / "saved").exists()


def test_the_background_saves_if_the_call_is_interrupted(place, monkeypatch):
    behind = piece("behind", SAVES, resumes=True, background=True)
    start = accelerator.Child.__init__

    def interrupted(child, one, *rest):
        if one.name == "front":
            while (place.workdir / "logs" / "behind.txt").read_text() != "begun\n":
                time.sleep(0.02)
            raise KeyboardInterrupt
        start(child, one, *rest)

    monkeypatch.setattr(accelerator.Child, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(place, behind, piece("front", "", parallel=True))
    assert (place.workdir / "saved").exists()
    assert place.record("behind")["status"] == "stopped"


def test_a_piece_waits_for_the_one_before_it_and_for_time(place, monkeypatch):
    monkeypatch.setattr(accelerator, "LEAST", 5.0)
    late = piece("late", ENDS.format("late.json"), "late.json", after="early")
    early = piece("early", ENDS.format("early.json"), "early.json")
    assert work(place, late) == {"late": "left"}
    assert work(place, early, late, seconds=4.0) == {"early": "left", "late": "left"}
    assert work(place, early, late) == {"early": "done", "late": "done"}


def test_the_list_shows_finished_and_remaining_pieces(tmp_path, capsys):
    for name, status in (("environment", "done"), ("tests", "stopped")):
        record = {"status": status, "sessions": [{"started": "today"}]}
        accelerator.write(tmp_path / "some-gpu" / f"{name}.json", record)
    accelerator.show_list(tmp_path, ["tests", "step"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["tests", "stopped,", "today"],
        ["step", "left"],
    ]


def measured(tmp_path, tiny=False):
    first = accelerator.full_length(True, tiny)[0]
    return accelerator.measured("gpu", tmp_path, first, tiny)


def test_the_most_informative_pieces_are_first(tmp_path):
    names = [one.name for one in measured(tmp_path)]
    background = "cifar100_lt-mislas-if100-bf16-seed0"
    assert names[:6] == ["environment", "pipeline", background, "tests", "gradients", "resume"]
    assert names[6:] == [
        *("step", "step-graphs", "resnet50", "lbgat-bfloat16", "lbgat-float32", "autoattack", "replicas")
    ]
    assert [one.name for one in measured(tmp_path, tiny=True)] == names


def test_the_limits_fit_into_a_call(tmp_path):
    pieces = measured(tmp_path)
    (behind,) = (one for one in pieces if one.background)
    assert sum(one.limit for one in pieces if not one.background) <= accelerator.SECONDS <= 540
    assert behind.limit + accelerator.SAVING <= sum(one.limit for one in pieces if one.parallel)


def test_the_readme_has_the_pieces_with_their_limits(tmp_path):
    text = (accelerator.ROOT / "benchmarks" / "README.md").read_text()
    listed = {}
    for names, limits in re.findall(r"^ +\| (`.*?) \| ([\d, ]+) \|", text, re.MULTILINE):
        listed |= dict(zip(re.findall("`(.*?)`", names), map(int, limits.split(", ")), strict=True))
    assert listed == {one.name: one.limit for one in measured(tmp_path)}


def test_parallel_pieces_share_the_memory(tmp_path):
    key = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    pieces = measured(tmp_path)
    behind = next(float(one.environment[key]) for one in pieces if one.background)
    assert all(behind + float(one.environment[key]) < 0.9 for one in pieces if one.parallel)
    assert not any(key in one.environment for one in pieces if not (one.parallel or one.background))


@pytest.mark.parametrize("tiny", [True, False])
def test_every_benchmark_takes_its_command_line(tmp_path, tiny):
    parsers = {module.__name__: module.arguments_parser() for module in PARSERS}
    benchmarks = [one for one in measured(tmp_path, tiny)[1:] if one.command[1].startswith("benchmarks.")]
    assert {one.command[1] for one in benchmarks} == parsers.keys()
    for one in benchmarks:
        args = parsers[one.command[1]].parse_args(one.command[2:])
        assert str(args.out) == one.result


@pytest.mark.parametrize("tiny", [True, False])
def test_full_length_pieces_are_the_commands_of_the_queue(tiny):
    pieces = {one.name: one for one in accelerator.full_length(False, tiny)}
    listed = [(run, reproduce.describe(run)) for run in reproduce.read_list(reproduce.LIST)]
    trained = {name: one for name, one in pieces.items() if one.resumes}
    assert list(trained) == [one.name for _, one in listed if one.name in trained]
    assert len(trained) == (3 if tiny else len(listed))
    for run, one in listed:
        if one.name not in trained:
            continue
        command = reproduce.command(run, one)
        assert list(trained[one.name].command[: len(command)]) == command
        last = pieces[f"{one.name}-archive"]
        attack = pieces.get(f"{one.name}-attack")
        assert bool(attack) == bool(run.attack)
        assert last.after == (attack.name if attack else one.name)
        if attack:
            assert attack.after == one.name and [*attack.command[: len(command)]] == command
        if run.begin:
            begins_with = trained[one.name].after
            assert begins_with == f"{run.begin}-seed{run.seed}-archive"
            assert list(pieces).index(begins_with) < list(pieces).index(one.name)


def test_a_pack_is_only_for_runs_that_use_no_black_image():
    trained = [one for one in accelerator.full_length(True, tiny=False) if one.resumes]
    assert len(trained) > 10
    assert all("cifar100_lt.py:" in one.command[1] and "imbalance=100" in one.command[1] for one in trained)


def test_run_py_takes_the_flags_of_tiny_runs(monkeypatch):
    monkeypatch.chdir(accelerator.ROOT)
    for one in accelerator.full_length(True, tiny=True):
        if one.resumes:
            run_module.check_overrides([word.replace("checkout/", "") for word in one.command])


def test_results_of_pytest_are_read_from_its_xml(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b" time="0.5"/>'
        '<testcase classname="a" name="c" time="1"><failure message="m">t</failure></testcase></testsuite></testsuites>'
    )
    actual = json.loads(json.dumps(accelerator.read_result(path)))
    assert actual == {"a::b": {"outcome": "passed", "seconds": 0.5}, "a::c": {"outcome": "failure", "seconds": 1.0}}
