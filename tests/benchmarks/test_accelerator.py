"""The order of things on a machine that is lent for minutes: pieces are stopped, go on, and leave one record each."""

import json
import sys

import pytest

from benchmarks import accelerator
from configs import cifar100_lt

SAVES = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("{done}").write_text("1")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
if pathlib.Path("{done}").exists():
    pathlib.Path("{result}").write_text("[7]")
else:
    time.sleep(60)
"""


@pytest.fixture
def do(tmp_path, monkeypatch):
    """`do(code, seconds)` runs Python code as the piece "run-it" -> (status, its record or None)."""
    monkeypatch.chdir(tmp_path)

    def run(code, seconds=30.0):
        piece = accelerator.Piece("run-it", ["-c", code], tmp_path / "result.json")
        status = accelerator.do(piece, tmp_path / "out", tmp_path / "work", {"device": "cpu: cpu"}, {}, seconds)
        return status, accelerator.read(tmp_path / "out" / "run-it.json")

    return run


def test_a_piece_that_the_time_ends_is_stopped_by_sigterm_and_goes_on(do, tmp_path):
    code = SAVES.format(done=tmp_path / "saved", result=tmp_path / "result.json")
    assert do(code, seconds=2.0) == ("stopped", None)
    status, record = do(code)
    assert status == record["status"] == "done"
    assert record["result"] == [7] and record["device"] == "cpu: cpu"
    assert [session["exit_code"] for session in record["sessions"]] == [143, 0]
    assert record["started"] == record["sessions"][0]["started"] and record["ended"] == record["sessions"][1]["ended"]


def test_a_failed_piece_says_what_it_printed(do):
    status, record = do("print('no such device'); raise SystemExit(3)")
    assert status == record["status"] == "failed"
    assert record["output"] == "no such device\n" and record["result"] is None


def test_a_piece_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "SAVING", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert accelerator.run_child([sys.executable, "-c", code], {}, tmp_path / "log.txt", 1.0) == (-9, True)


def test_the_list_shows_what_is_done_and_what_is_left(tmp_path, capsys):
    accelerator.write(tmp_path / "some-gpu" / "tests.json", {"status": "done", "ended": "today"})
    accelerator.show_list(tmp_path, ["tests", "step-float32"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["tests", "done,", "today"],
        ["step-float32", "left"],
    ]


@pytest.mark.parametrize("tiny", [True, False])
def test_pieces_have_names_and_results_of_their_own(tmp_path, tiny):
    found = accelerator.pieces(tmp_path, None, "gpu", tiny)
    assert len({piece.name for piece in found}) == len({piece.result for piece in found}) == len(found)
    runs = [piece for piece in found if piece.name.startswith("run-")]
    assert len(runs) == (3 if tiny else len(accelerator.METHODS) + len(accelerator.ROBUST))


def test_graphs_are_timed_on_a_gpu_alone(tmp_path):
    asked = {}
    for platform in ("gpu", "tpu"):
        commands = [piece.command for piece in accelerator.pieces(tmp_path, None, platform, False)]
        asked[platform] = {word for command in commands for word in command if word.startswith("--gpu_graphs=")}
    assert asked == {"gpu": {"--gpu_graphs=step", "--gpu_graphs=dispatch"}, "tpu": set()}


@pytest.mark.parametrize("tiny", [True, False])
def test_an_attack_follows_its_run_with_the_same_config(tmp_path, tiny):
    found = {piece.name: piece for piece in accelerator.pieces(tmp_path, None, "gpu", tiny)}
    names = list(found)
    attacks = [piece for piece in found.values() if piece.after]
    assert len(attacks) == (1 if tiny else len(accelerator.ROBUST))
    for piece in attacks:
        trained = found[piece.after]
        assert names.index(piece.name) == names.index(trained.name) + 1
        assert piece.result.parent == trained.result.parent
        length = len(trained.command)
        assert piece.command[:length] == trained.command
        assert piece.command[length] == "--mode=attack"
        assert all(flag.startswith("--config.attack.") for flag in piece.command[length + 1 :])


@pytest.mark.parametrize("name", accelerator.ROBUST)
def test_configs_of_robust_runs_can_be_read(tmp_path, name):
    for tiny in (True, False):
        path = accelerator.robust_run(name, tmp_path, None, tiny)[0].command[1].partition(":")[2]
        made = cifar100_lt.get_config(path)
        assert made.model.name == "preact_resnet" and made.replicas == 1


def test_an_attack_waits_for_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(accelerator.ROOT)
    machine = {"platform": "gpu", "device": "gpu: some", "num_devices": 1, "versions": {}}
    monkeypatch.setattr(accelerator, "run_child", lambda *_: (0, False))
    monkeypatch.setattr(accelerator, "do", lambda *_: "failed")
    monkeypatch.setattr(accelerator, "read", lambda path: machine if path.name == "report.json" else None)
    monkeypatch.setattr(sys, "argv", ["accelerator", f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"])
    assert accelerator.main() == 1
    said = capsys.readouterr().out.splitlines()[-1]
    left = said.partition("; left: ")[2].partition("; ")[0].split(", ")
    assert left == [f"attack-{name}-if100" for name in accelerator.ROBUST]


def test_results_of_pytest_are_read_from_its_xml(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b" time="0.5"/>'
        '<testcase classname="a" name="c" time="1"><failure message="m">t</failure></testcase></testsuite></testsuites>'
    )
    found = json.loads(json.dumps(accelerator.read_result(path)))
    assert found == {"a::b": {"outcome": "passed", "seconds": 0.5}, "a::c": {"outcome": "failure", "seconds": 1.0}}
