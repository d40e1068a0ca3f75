"""What a config may say; and every file in configs/, as `run.py` reads it, against the papers' recipes."""

import functools
import itertools
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from ltjax import config, methods, models, optim, registry
from ltjax.data import SOURCES, augment, samplers, splits
from ltjax.types import UserError

ROOT = Path(__file__).parents[1]
CIFAR_ARGUMENTS = [
    f"method={method},imbalance={imbalance},profile={profile},budget={budget}"
    for method, imbalance, profile, budget in itertools.product(
        ("mislas", "ce"), (10, 100), ("exp", "step"), ("full", "short")
    )
]
ARGUMENTS = {"cifar10_lt": CIFAR_ARGUMENTS, "cifar100_lt": CIFAR_ARGUMENTS}
FILES = [path.stem for path in sorted((ROOT / "configs").glob("*.py")) if "def get_config" in path.read_text()]
EVERY = [(name, argument) for name in FILES for argument in (None, *ARGUMENTS.get(name, ()))]
every_config = pytest.mark.parametrize("name, argument", EVERY)
NUM_CLASSES = {"cifar10": (10, 5000), "cifar100": (100, 500), "fashion_mnist_lt": (10, 1000)}


@pytest.fixture
def read(monkeypatch):
    """read("cifar10_lt", "imbalance=50"): the ConfigDict of a file with its arguments."""
    monkeypatch.syspath_prepend(str(ROOT))

    def read(name, argument=None):
        arguments = () if argument is None else (argument,)
        return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](*arguments)

    return read


@pytest.fixture
def parsed(read):
    """The same, checked: the run and its stages."""
    return lambda *arguments: config.parse(read(*arguments).to_dict())


def small(**changes):
    """A config of two stages, the least that says something."""
    stage = {"method": {"name": "erm"}, "epochs": 2, "lr": 0.1, "groups": {"all": {"match": ".*", "rate": 1.0}}}
    whole = {
        "name": "small",
        "data": {"name": "cifar10"},
        "model": {"name": "resnet_cifar"},
        "stages": ("first", "second"),
        "first": stage,
        "second": {**stage, "start_from": "first"},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


def changed_stage(**changes):
    stage = {**small()["second"], **changes}
    return small(second={key: value for key, value in stage.items() if value is not None})


def message_of(values):
    with pytest.raises(UserError) as raised:
        config.parse(values)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What parse accepts and refuses.


def test_parse_fills_in_the_defaults():
    run, stages = config.parse(small())
    assert (run.data, run.optimizer) == (config.Data("cifar10"), config.Optimizer())
    assert list(stages) == ["first", "second"]
    assert stages["first"].title == "first"
    assert stages["first"].schedule == {"kind": "constant"}
    assert stages["first"].sampler == {"name": "instance_balanced"}


def test_parse_keeps_the_order_of_the_stages():
    assert list(config.parse(small(stages=("second", "first"), second=small()["first"]))[1]) == ["second", "first"]


@pytest.mark.parametrize(
    "values, where",
    [
        (small(batchsize=64), "config.batchsize"),
        (small(data={"name": "cifar10", "imbalanc": 100}), "config.data.imbalanc"),
        (small(optimizer={"wd": 0.1}), "config.optimizer.wd"),
        (changed_stage(learning_rate=0.1), "config.second.learning_rate"),
        (small(third={}), "config.third"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_key_is_named_with_the_allowed_ones(values, where):
    assert message_of(values).startswith(f"unknown key {where}; allowed: ")


@pytest.mark.parametrize(
    "values, where",
    [
        (small(name=None), "config.name"),
        (small(data=None), "config.data"),
        (small(model=None), "config.model"),
        (small(data={}), "config.data.name"),
        (changed_stage(method=None), "config.second.method"),
        (changed_stage(lr=None), "config.second.lr"),
        (changed_stage(groups=None), "config.second.groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_key_is_named(values, where):
    assert message_of(values).startswith(f"missing key {where}; needed: ")


@pytest.mark.parametrize("stages", [(), ("first", "first")])
def test_stages_are_named_once_each(stages):
    values = small(stages=stages, second=None, **({} if stages else {"first": None}))
    assert message_of(values) == f"config.stages = {stages}: name one stage or more, each once"


def test_a_config_without_stages_says_so():
    assert message_of(small(stages=None, first=None, second=None)).startswith("missing key config.stages; needed: ")


def test_a_stage_needs_settings():
    assert message_of(small(second=None)).startswith("config.stages names 'second', which needs settings")


@pytest.mark.parametrize("name", ["data", "model", "stages", "epochs"])
def test_a_stage_may_not_take_the_name_of_a_setting(name):
    assert message_of(small(stages=("first", "second", name))).startswith(f"config.stages names '{name}'")


@pytest.mark.parametrize("start", ["second", "third", "", "Scratch"])
def test_a_stage_starts_from_scratch_or_an_earlier_one(start):
    found = message_of(changed_stage(start_from=start))
    assert found == f"config.second.start_from = {start!r}: allowed here: scratch, first"


def test_a_stage_may_not_start_from_a_later_one():
    assert "allowed here: scratch" in message_of(small(stages=("second", "first")))


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"lr": -0.1}, {"lr": float("nan")}, {"epochs": 0}, {"epochs": -1}])
def test_rate_and_epochs_are_above_0(changes):
    assert message_of(changed_stage(**changes)).startswith("config.second has lr = ")


@pytest.mark.parametrize("key", ["batch_size", "eval_every", "eval_batch_size"])
def test_sizes_are_at_least_1(key):
    assert message_of(small(**{key: 0})) == f"config.{key} = 0: must be at least 1"


@pytest.mark.parametrize(
    "data, message",
    [
        ({"groups": "thirds"}, "config.data.groups = 'thirds'; allowed: counts, ranges"),
        ({"groups": "ranges"}, "config.data.ranges = (): two class numbers, the first not above the second"),
        ({"groups": "ranges", "ranges": (7, 3)}, "config.data.ranges = (7, 3): two class numbers"),
        ({"groups": "ranges", "ranges": (1, 2, 3)}, "config.data.ranges = (1, 2, 3): two class numbers"),
    ],
)
def test_groups_are_counts_or_two_class_numbers(data, message):
    assert message_of(small(data={"name": "cifar10", **data})).startswith(message)


def test_no_class_may_be_both_many_and_few():
    assert "few_below" in message_of(small(data={"name": "cifar10", "few_below": 50, "many_above": 10}))


@pytest.mark.parametrize(
    "values, where",
    [(small(seed=-1), "config.seed"), (small(data={"name": "cifar10", "seed": -1}), "config.data.seed")],
)
def test_a_seed_below_0_is_refused_before_anything_starts(values, where):
    assert where in message_of(values)


@pytest.mark.parametrize(
    "group",
    [{"rate": 1.0}, {"match": ".*"}, {"match": ".*", "rate": 1.0, "weight_dacay": 0.1}, {"match": "(", "rate": 1}],
)
def test_a_parameter_group_has_a_pattern_and_a_rate(group):
    assert "config.second.groups.all" in message_of(changed_stage(groups={"all": group}))


@pytest.mark.parametrize("values", [small(data=3), small(second="mislas"), small(optimizer="sgd")])
def test_a_value_in_place_of_settings_is_refused(values):
    assert "config." in message_of(values)


# differences() tells why a folder holds another run.


def test_equal_configs_have_no_differences():
    assert config.differences(small(), small()) == []


def test_differences_give_the_path_and_both_values():
    old, new = (
        small(data={"name": "cifar10", "imbalance": 100}),
        small(data={"name": "cifar10", "imbalance": 50}, seed=1),
    )
    assert config.differences(old, new) == ["data.imbalance: 100 -> 50", "seed: (absent) -> 1"]


def test_a_key_that_went_is_a_difference():
    assert config.differences({"a": 1, "b": {"c": 2}}, {"b": {}}) == ["a: 1 -> (absent)", "b.c: 2 -> (absent)"]


def test_a_section_that_became_a_value_is_a_difference():
    assert config.differences({"a": {"b": 1}}, {"a": 2}) == ["a: (settings) -> 2"]


# The files in configs/.


def test_every_file_but_the_common_one_is_a_config():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} - set(FILES) == {"common"}


@functools.cache
def parameter_paths(num_classes, settings):
    """Paths and shapes of a model, as the training loop sees them."""
    model = json.loads(settings)
    net = models.create(model.pop("name"), num_classes, **model)
    images = jnp.zeros((1, 8, 8, len(model["mean"])))
    return list(optim.flatten({"net": jax.eval_shape(net.init, jax.random.key(0), images)["params"]}))


@every_config
def test_every_setting_of_every_config_is_one_that_its_part_takes(parsed, name, argument):
    run, stages = parsed(name, argument)
    assert run.data.name in SOURCES
    num_classes, most = NUM_CLASSES[run.data.name]
    most = run.data.max_count or most
    counts = splits.class_counts(num_classes, most, imbalance=run.data.imbalance, profile=run.data.profile)
    paths = parameter_paths(num_classes, json.dumps(dict(run.model)))
    for stage in stages.values():
        hyper = dict(stage.method)
        methods.create(hyper.pop("name"), counts, **hyper)
        samplers.create(**stage.sampler)
        registry.bind("augment", augment.augment, stage.augment)
        registry.bind("schedule", optim.schedule_table, stage.schedule)(stage.epochs)
        assigned = optim.assign_groups(paths, stage.groups)
        assert any(stage.groups[group]["rate"] > 0 for group in assigned.values())
        assert stage.batch_norm in ("train", "eval")


@every_config
def test_every_config_means_the_same_after_json(read, name, argument):
    """A run's folder holds its config as JSON."""
    values = read(name, argument).to_dict()
    run, stages = config.parse(values)
    same_run, same_stages = config.parse(json.loads(json.dumps(values)))
    assert same_run.stages == run.stages
    assert json.dumps(same_stages) == json.dumps(stages)


@every_config
def test_overriding_the_epochs_reaches_every_stage_from_scratch(read, name, argument):
    values = read(name, argument)
    before = config.parse(values.to_dict())[1]
    values.epochs = 3
    run, stages = config.parse(values.to_dict())
    assert run.epochs == 3
    for stage, settings in stages.items():
        assert settings.epochs == (3 if settings.start_from == "scratch" else before[stage].epochs), stage


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections on Python 3.11
def test_flags_override_the_epochs_and_a_stages_own_settings(monkeypatch):
    path = ROOT / "configs" / "cifar100_lt.py"
    line = ["run.py", f"--config={path}:imbalance=50", "--config.epochs=3", "--config.classifier.method.head=0.2"]
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", line)  # where ml_collections looks for what is overridden
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(line)
    run, stages = config.parse(values["config"].value.to_dict())
    assert (run.data.imbalance, run.epochs, stages["features"].epochs, stages["classifier"].epochs) == (50, 3, 3, 10)
    assert stages["classifier"].method["head"] == 0.2


def test_names_of_runs_tell_the_choices_apart(read):
    names = [read(name, argument).name for name, argument in EVERY if argument]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["cifar10_lt", "cifar100_lt"])
def test_every_mistaken_argument_is_one_clear_line(read, name):
    mistakes = {
        "methd=ce": "unknown config argument 'methd'; allowed: method, imbalance, profile, budget",
        "method=erm": "config argument 'method=erm': allowed values of method: mislas, ce",
        "method": "config argument 'method': allowed values of method: mislas, ce",
        "imbalance=ten": "config argument 'imbalance=ten': imbalance is a number",
        "imbalance=": "config argument 'imbalance=': imbalance is a number",
        "profile=linear": "config argument 'profile=linear': allowed values of profile: exp, step",
        "method=ce,budget=tiny": "config argument 'budget=tiny': allowed values of budget: full, short",
    }
    for argument, message in mistakes.items():
        with pytest.raises(ValueError) as raised:
            read(name, argument)
        assert str(raised.value) == message


@pytest.mark.parametrize("imbalance", ["0", "-10", "0.5", "nan", "inf"])
def test_an_impossible_imbalance_is_an_error_that_names_it(parsed, imbalance):
    with pytest.raises(ValueError, match=f"imbalance.*{imbalance}"):
        run, _ = parsed("cifar100_lt", f"imbalance={imbalance}")
        splits.long_tailed_split(np.repeat(np.arange(100), 500), 100, imbalance=run.data.imbalance)


def test_quickstart_takes_no_arguments(read):
    with pytest.raises(ValueError, match="unknown config argument 'method'; allowed: none"):
        read("quickstart", "method=ce")


# MiSLAS's table: (classes, imbalance) -> smoothing of head and tail, factor on the classifier's rate, batch norm
RECIPES = {
    (100, 10): (0.2, 0.0, 0.1, "train"),
    (100, 50): (0.3, 0.0, 0.1, "train"),
    (100, 100): (0.4, 0.1, 0.2, "train"),
    (10, 10): (0.1, 0.0, 0.2, "eval"),
    (10, 50): (0.2, 0.0, 0.2, "eval"),
    (10, 100): (0.3, 0.0, 0.5, "eval"),
}
each_recipe = pytest.mark.parametrize("classes, imbalance", RECIPES)


@each_recipe
def test_the_second_stage_of_mislas_is_the_papers(parsed, classes, imbalance):
    _, stages = parsed(f"cifar{classes}_lt", f"method=mislas,imbalance={imbalance}")
    stage, (head, tail, factor, batch_norm) = stages["classifier"], RECIPES[classes, imbalance]
    assert stage.method == {"name": "mislas", "head": head, "tail": tail, "shape": "concave"}
    assert (stage.epochs, stage.lr, stage.start_from, stage.batch_norm) == (10, 0.1, "features", batch_norm)
    assert {name: group["rate"] for name, group in stage.groups.items()} == {
        "frozen": 0.0,
        "classifier": factor,
        "scale": 1.0,
    }
    assert stage.schedule == {"kind": "cosine"}
    assert stage.sampler == {"name": "class_aware", "in_a_row": 4}
    assert stage.augment.get("mixup_alpha", 0.0) == 0.0


@each_recipe
def test_the_first_stage_of_mislas_is_the_papers(parsed, classes, imbalance):
    run, stages = parsed(f"cifar{classes}_lt", f"method=mislas,imbalance={imbalance}")
    stage = stages["features"]
    assert (run.data.name, run.data.imbalance, run.data.profile) == (f"cifar{classes}", imbalance, "exp")
    assert (run.model["name"], run.model["depth"], run.model["width"]) == ("resnet_cifar", 32, 16)
    assert (run.model["mean"], run.model["std"]) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (run.batch_size, run.optimizer) == (128, config.Optimizer(0.9, False, 2e-4))
    assert (stage.method, stage.epochs, stage.lr) == ({"name": "erm"}, 200, 0.1)
    assert stage.sampler == {"name": "instance_balanced"}
    assert (stage.augment["mixup_alpha"], stage.augment["crop_padding"], stage.augment["flip"]) == (1.0, 4, True)
    factors = registry.bind("schedule", optim.schedule_table, stage.schedule)(stage.epochs)
    np.testing.assert_allclose(factors[[0, 4, 5, 159, 160, 179, 180, 199]], [0.2, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("classes, ranges", [(100, (36, 71)), (10, (3, 7))])
def test_mislass_groups_by_class_number_are_one_switch_away(parsed, classes, ranges):
    run, _ = parsed(f"cifar{classes}_lt")
    assert (run.data.groups, run.data.ranges) == ("counts", ranges)
    assert (run.data.many_above, run.data.few_below) == (100, 20)


def test_cross_entropy_differs_from_mislas_stage_1_in_mixup_and_the_scale_alone(parsed):
    baseline = parsed("cifar100_lt", "method=ce")[1]["ce"]
    features = parsed("cifar100_lt", "method=mislas")[1]["features"]
    changed = {field for field in config.Stage._fields if getattr(baseline, field) != getattr(features, field)}
    assert changed == {"title", "augment", "groups"}
    assert {**baseline.augment, "mixup_alpha": 1.0} == features.augment


@pytest.mark.parametrize("imbalance, nearest", [(1, 10), (20, 10), (25, 50), (75, 100), (200, 100)])
def test_an_imbalance_that_no_paper_has_takes_the_nearest_ones_recipe(parsed, imbalance, nearest):
    found, expected = (parsed("cifar100_lt", f"imbalance={i}")[1]["classifier"] for i in (imbalance, nearest))
    assert (found.method, found.groups) == (expected.method, expected.groups)


def test_the_short_budget_is_12_and_2_epochs(parsed):
    stages = parsed("cifar100_lt", "budget=short")[1]
    assert [stage.epochs for stage in stages.values()] == [12, 2]
    factors = registry.bind("schedule", optim.schedule_table, stages["features"].schedule)(12)
    np.testing.assert_allclose(factors, [0.5, *[1] * 9, 0.1, 0.01])


def test_stages_as_a_bare_string_are_told_apart_from_a_tuple():
    with pytest.raises(UserError, match=r"a tuple of names, such as \('ce',\)"):
        config.parse(small(stages="ce"))
