"""The pages of `--help` and `:help`: complete, short and fast."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs import common
from ltjax.modes import usage
from tests.configs.reading import ROOT, read
from tests.configs.test_files import FILES

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections on Python 3.11


def asked(name, argument="help"):
    """Return the arguments that the help of a config lists."""
    with pytest.raises(common.Help) as raised:
        read(name, argument)
    return raised.value.arguments


@pytest.fixture(scope="module")
def program():
    """Import run.py."""
    return runpy.run_path(str(ROOT / "run.py"), run_name="run")


@pytest.fixture(scope="module")
def started():
    """Run --help in a fresh interpreter; return its lines, and the loaded modules."""
    code = (
        "import runpy, sys\nsys.argv = ['run.py', '--help']\n"
        "try:\n    runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, *sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    exit_code, *modules = ran.stderr.split()
    assert exit_code == "0"
    return ran.stdout.splitlines(), set(modules)


def test_help_fits_on_a_screen(started):
    lines, _ = started
    assert 15 <= len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_help_loads_no_heavy_package(started):
    assert not started[1] & {"jax", "numpy", "rich", "flax"}


def test_help_lists_exactly_the_flags_of_run_py(program):
    ours = flags.FLAGS.flags_by_module_dict()[flags.FLAGS.find_module_defining_flag("mode")]
    page = program["help_page"]()
    assert {"config", "mode", "workdir", "dry_run", "coordinator"} <= {flag.name for flag in ours}
    assert page.count("\n  --") == len(ours)
    for flag in ours:
        assert f"\n  --{flag.name}" in page


def test_help_shows_the_values_and_the_default_of_a_choice(program):
    values = "|".join(flags.FLAGS["mode"].parser.enum_values)
    text = program["help_page"]().partition(f"\n  --mode={values}")[2].partition("\n  --")[0]
    assert text.split() == ["What", "to", "do.", "Default:", "train."]


@pytest.mark.parametrize("arguments", [["run.py"], ["run.py", "-h"], ["run.py", "--mode=eval", "--help"]])
def test_no_arguments_print_the_help(program, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        program["parse_flags"](arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out == program["help_page"]() + "\n"


@pytest.mark.parametrize("name", FILES)
def test_every_argument_of_every_config_has_a_meaning(name):
    assert all(meaning for _, _, meaning in asked(name).values())


def test_meanings_list_only_arguments_of_configs():
    assert set(common.MEANINGS) == {argument for name in FILES for argument in asked(name)}


@pytest.mark.parametrize("name", FILES)
def test_every_listed_default_is_accepted_and_changes_nothing(name):
    given = {argument: default for argument, (default, *_) in asked(name).items() if default}
    given = [f"{key}={value}" for key, value in given.items() if key not in common.ROBUST_ARGUMENTS]
    assert read(name, ",".join(given)).to_dict() == read(name).to_dict()


@pytest.mark.parametrize("name", ["cifar100_lt", "cifar100"])
def test_every_listed_block_starts_or_continues_a_recipe(name):
    first, _, then = asked(name)["recipe"][1].partition("; then any of ")
    for block in first.removeprefix("first ").split(", "):
        read(name, f"recipe={'natural+bgat' if block == 'natural' else block}")
    for block in then.split(", "):
        read(name, f"recipe={'natural' if block == 'bgat' else 'ce'}+{block}")


def test_help_among_other_arguments_shows_their_settings(program, capsys):
    path = str(ROOT / "configs" / "cifar100_lt.py")
    with pytest.raises(SystemExit) as end:
        program["parse_flags"](["run.py", f"--config={path}:budget=short,help,method=drolt"])
    page = capsys.readouterr().out
    assert end.value.code == 0
    assert "\n  epochs=12 " in page and "ce, dro, ce_classifier" in page
    assert "\n  method=mislas " in page  # the default all the same


def test_help_works_with_the_config_after_a_space(program, capsys):
    pages = []
    for given in (
        [f"--config={ROOT}/configs/cifar100_lt.py:help"],
        ["--config", f"{ROOT}/configs/cifar100_lt.py:help"],
    ):
        with pytest.raises(SystemExit) as end:
            program["parse_flags"](["run.py", *given])
        assert end.value.code == 0
        pages.append(capsys.readouterr().out)
    assert "\n  method=mislas " in pages[1] and pages[0] == pages[1]


def test_a_mistake_in_a_value_after_a_space_is_named(program, capsys):
    with pytest.raises(SystemExit) as end:
        program["parse_flags"](["run.py", "--config", f"{ROOT}/configs/quickstart.py", "--config.epoch", "3"])
    assert end.value.code == 2
    assert "unknown config key config.epoch; allowed in config: " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("common", "is no config file"), ("commons", "no config file")])
def test_a_wrong_config_file_gets_a_list_of_configs(program, capsys, name, message):
    with pytest.raises(SystemExit) as end:
        program["parse_flags"](["run.py", f"--config={ROOT}/configs/{name}.py"])
    assert end.value.code == 2
    error, _, have = capsys.readouterr().err.partition("; in its folder: ")
    assert message in error and f"configs/{name}.py" in error
    assert sorted(Path(path).stem for path in have.strip().split(", ")) == sorted(FILES)


def test_a_config_without_folder_and_ending_gets_a_suggestion(program, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        program["parse_flags"](["run.py", "--config=quickstart"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no config file quickstart; did you mean --config=configs/quickstart.py?\n"


def test_a_mistake_next_to_help_is_named(program, capsys):
    with pytest.raises(SystemExit) as end:
        program["parse_flags"](["run.py", f"--config={ROOT}/configs/cifar100_lt.py:help,metod=ce"])
    assert end.value.code == 2
    assert "unknown config argument 'metod'" in capsys.readouterr().err


def page_of(name, argument="help"):
    return usage.config_page(f"configs/{name}.py", "Heading", asked(name, argument), read(name).to_dict())


@pytest.mark.parametrize("name", FILES)
def test_help_shows_the_values_of_the_config(name):
    config = read(name)
    listed = page_of(name).partition("--config.KEY=VALUE")[2].partition("\n\n")[0]
    names = [line.split()[0].partition("=") for line in listed.splitlines() if line[:3].strip()]
    assert len(names) > 8
    for key, _, value in names:
        setting = config
        for part in key.split("."):
            setting = setting[part]
        assert str(setting).lower() == value.lower()


def test_each_listed_setting_exists_in_some_config():
    pages = [page_of(name) for name in FILES]
    for key in usage.OVERRIDES:
        assert any(f"\n  {key}=" in page for page in pages), key


def test_a_config_without_arguments_says_so():
    assert "\nNo arguments.\n" in usage.config_page("configs/own.py", "Heading", {}, read("quickstart").to_dict())


def test_a_value_for_an_argument_that_takes_none_is_refused():
    with pytest.raises(ValueError, match="config argument 'runlocal=1': runlocal takes no value"):
        read("inat18", "runlocal=1")


def test_text_is_wrapped_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, page_of("cifar100_lt").splitlines()[3:])) <= 80
