"""Any argument and any setting is accepted, or is refused in one line."""

import copy
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.common import Help
from ltjax import config
from ltjax.engine.experiment import set_up_with_stages
from ltjax.types import UserError
from tests.configs.reading import ROOT, read
from tests.test_run import tiny_config

FILES = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text(encoding="utf-8")
)
KEYS = (
    "method",
    "imbalance",
    "precision",
    "budget",
    "epochs",
    "model",
    "holdout",
    "seed",
    "mixup",
    "norm",
    "help",
    "x",
)
WORDS = (
    "mislas",
    "ce",
    "reslt",
    "lbgat",
    "bf16",
    "short",
    "100",
    "0",
    "-1",
    "1e9",
    "nan",
    "inf",
    "auto",
    "True",
    "=",
    "",
)
arguments = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), st.one_of(st.sampled_from(WORDS), st.text(max_size=5))).map("=".join),
        st.text(max_size=8),
        st.sampled_from(("runlocal", "help", "quick")),
    ),
    max_size=4,
).map(",".join)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ("mislas", "erm", "scratch", "ce", "train", "eval", "exp", "step", "vmap", "balanced", "8/255", "1/0")
    ),
    st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=3), st.floats()), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=4), st.integers(-1, 3), max_size=2),
)


@functools.cache
def default(file):
    return read(file).to_dict()


def leaves(settings, path=()):
    """Return the paths of all keys of nested dicts."""
    for key, value in settings.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def changed(settings, changes):
    """Set, remove or add keys. changes: [(path, "set" | "remove" | "add", value)]."""
    settings = copy.deepcopy(settings)
    for path, action, value in changes:
        place = settings
        for key in path[:-1]:
            place = place.get(key, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            continue
        if action == "remove":
            place.pop(path[-1], None)
        else:
            place[path[-1] if action == "set" else "unknown"] = value
    return settings


def changes_of(settings, most=3):
    paths = list(leaves(settings))
    change = st.tuples(st.sampled_from(paths), st.sampled_from(["set", "set", "remove", "add"]), values)
    return st.lists(change, min_size=1, max_size=most)


def one_line_of(error):
    """Return the message as run.py prints it."""
    text = str(error).strip()
    assert text and len(text) < 3000
    return text


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
def test_any_argument_is_read_or_refused(file, data):
    argument = data.draw(arguments)
    try:
        settings = read(file, argument).to_dict()
    except Help:
        return
    except ValueError as error:
        one_line_of(error)
        return
    run = config.parse(settings)  # what a config file makes is valid
    assert list(run.stages)


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
def test_any_setting_is_checked(file, data):
    settings = changed(default(file), data.draw(changes_of(default(file))))
    try:
        run = config.parse(settings)
    except UserError as error:
        one_line_of(error)
        return
    assert list(run.stages) == list(settings["stages"])
    config.with_defaults(settings)  # can be saved and compared


@given(data=st.data())
def test_a_setting_that_is_wrong_is_found_before_the_first_step(data):
    tiny = tiny_config(**{"data.max_count": 6, "data.imbalance": 2.0, "stages": ("ce",), "ce.epochs": 1})
    settings = changed(tiny, data.draw(changes_of(tiny, most=1)))
    try:
        _, compiled = set_up_with_stages(config.parse(settings), None)
    except UserError as error:
        assert one_line_of(error)
        return
    assert all(stage.num_steps >= 0 for stage in compiled.values())
