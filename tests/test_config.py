"""`ltjax.config`: parsing, its error messages, and differences between configs."""

import pytest

from ltjax import config
from ltjax.runs.workdir import prepare_workdir
from ltjax.system.files import write_json
from ltjax.types import UserError


def small(**changes):
    """Return a minimal config of two stages; None removes a key."""
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
    run = config.parse(small())
    stages = run.stages
    assert (run.data, run.optimizer, run.attack) == (
        config.DataConfig("cifar10"),
        config.OptimizerConfig(),
        config.AttackConfig(),
    )
    assert run.guide == {} and stages["first"].evaluate_net == "net"
    assert list(stages) == ["first", "second"]
    assert stages["first"].title == "first"
    assert stages["first"].schedule == {"kind": "constant"}
    assert stages["first"].sampler == {"name": "instance_balanced"}


def test_the_default_attack_is_that_of_the_tables():
    run = config.parse(small(attack={"num_images": 100, "epsilon": 0.031}))
    assert run.attack == config.AttackConfig(0.031, "linf", 100, ("pgd-20", "cw-20", "autoattack"), "2/255", 500, 0)
    assert config.parse(small()).attack.epsilon == "0.031"


def test_a_stage_may_evaluate_the_guide_if_there_is_one():
    values = {**changed_stage(evaluate_net="guide"), "guide": {"name": "resnet"}}
    assert config.parse(values).stages["second"].evaluate_net == "guide"


def test_parse_keeps_the_order_of_the_stages():
    assert list(config.parse(small(stages=("second", "first"), second=small()["first"])).stages) == ["second", "first"]


@pytest.mark.parametrize(
    "values, where",
    [
        (small(batchsize=64), "config.batchsize"),
        (small(data={"name": "cifar10", "imbalanc": 100}), "config.data.imbalanc"),
        (small(optimizer={"wd": 0.1}), "config.optimizer.wd"),
        (small(attack={"eps": 0.1}), "config.attack.eps"),
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
def test_each_stage_is_named_once(stages):
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
def test_a_stage_starts_from_scratch_or_an_earlier_stage(start):
    message = message_of(changed_stage(start_from=start))
    assert message == f"config.second.start_from = {start!r}; allowed: scratch, first"


def test_a_stage_may_not_start_from_a_later_stage():
    assert "; allowed: scratch" in message_of(small(stages=("second", "first")))


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"lr": -0.1}, {"epochs": 0}, {"epochs": -1}])
def test_lr_and_epochs_are_above_0(changes):
    assert message_of(changed_stage(**changes)).startswith("config.second has lr = ")


def test_a_stage_with_surgery_may_have_no_epochs():
    stages = config.parse(changed_stage(epochs=0, surgery={"name": "new_head"}, groups={})).stages
    assert (stages["second"].epochs, stages["second"].groups) == (0, {})


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size", "replicas"])
def test_sizes_are_at_least_1(key):
    assert message_of(small(**{key: 0})) == f"config.{key} = 0: must be at least 1"


def test_eval_every_may_be_0():
    assert config.parse(small(eval_every=0)).eval_every == 0
    assert message_of(small(eval_every=-1)) == "config.eval_every = -1: must be at least 1, or 0 to choose"


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
    "values, message",
    [
        (small(replicate="pmap"), "config.replicate = 'pmap'; allowed: loop, vmap"),
        (small(replicas=2.5), "config.replicas = 2.5: int expected"),
        (small(seed=2**32 - 2, replicas=3), "config.seed = 4294967294, replicas = 3: the last seed would be above"),
        (small(optimizer={"momentum": 1.0}), "config.optimizer = {'momentum': 1.0, "),
        (changed_stage(optimizer={"weight_decay": -0.1}), "config.second.optimizer = {'momentum': 0.9, "),
        (changed_stage(lr=float("nan")), "config.second.lr = nan: float expected"),
        (changed_stage(optimizer={"nesterov": 1}), "config.second.optimizer.nesterov = 1: bool expected"),
        (changed_stage(optimizer={"wd": 0.1}), "unknown key config.second.optimizer.wd; allowed: momentum, "),
        (changed_stage(keep_optimizer="yes"), "config.second.keep_optimizer = 'yes': bool expected"),
        (
            changed_stage(keep_optimizer=True, start_from="scratch"),
            "config.second.keep_optimizer: a stage from scratch has no optimizer to keep",
        ),
        (small(attack={"tests": "autoattack"}), "config.attack.tests = 'autoattack': a tuple of str expected"),
        (small(attack={"tests": ("autoattack", 20)}), "config.attack.tests = ('autoattack', 20): a tuple of str expe"),
        (small(attack={"epsilon": None}), "config.attack.epsilon = None: float or str expected"),
        (small(data={"name": "cifar10", "ranges": 3}), "config.data.ranges = 3: a tuple of int expected"),
        (small(weights_parts="backbone"), "config.weights_parts = 'backbone': a tuple of str expected"),
        (changed_stage(name="third"), "unknown key config.second.name; allowed: method, "),
        (changed_stage(drop_last=1), "config.second.drop_last = 1: bool expected"),
        (changed_stage(evaluate_net="guide"), "config.second.evaluate_net = 'guide'; allowed: net"),
        (
            {**changed_stage(evaluate_net="teacher"), "guide": {"name": "resnet"}},
            "config.second.evaluate_net = 'teacher'; allowed: net, guide",
        ),
        (changed_stage(evaluate_net=1), "config.second.evaluate_net = 1: str expected"),
        (small(attack={"num_images": "all"}), "config.attack.num_images = 'all': int expected"),
        (changed_stage(nearest_mean="cosine"), "config.second.nearest_mean = 'cosine': bool expected"),
        (changed_stage(groups={"all": {"match": ".*", "rate": 1.0, "optional": 0}}), "config.second.groups.all.optio"),
        (changed_stage(groups={"all": {"match": ".*", "rate": -1.0}}), "config.second.groups.all.rate = -1.0"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    assert message_of(values).startswith(message)


def test_the_last_seed_of_the_replicas_may_be_the_largest():
    assert config.parse(small(seed=2**32 - 2, replicas=2)).replicas == 2


def test_a_stages_optimizer_replaces_values_of_the_runs():
    values = small(optimizer={"weight_decay": 0.1, "nesterov": True})
    values["second"] = {**values["second"], "optimizer": {"momentum": 0.5, "nesterov": False}}
    stages = config.parse(values).stages
    assert stages["first"].optimizer == {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    assert stages["second"].optimizer == {"momentum": 0.5, "nesterov": False, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "group",
    [{"rate": 1.0}, {"match": ".*"}, {"match": ".*", "rate": 1.0, "weight_dacay": 0.1}, {"match": "(", "rate": 1}],
)
def test_a_parameter_group_has_a_pattern_and_a_rate(group):
    assert "config.second.groups.all" in message_of(changed_stage(groups={"all": group}))


SETTINGS_OF_A_STAGE = ("method", "groups", "schedule", "sampler", "augment", "optimizer", "surgery", "eval_classifier")


@pytest.mark.parametrize(
    "values, where",
    [
        (small(data=3), "config.data"),
        (small(model="resnet"), "config.model"),
        (small(second="mislas"), "config.second"),
        (small(optimizer="sgd"), "config.optimizer"),
        (small(attack="pgd-20"), "config.attack"),
        (small(guide="resnet18"), "config.guide"),
        *((changed_stage(**{key: "name"}), f"config.second.{key}") for key in SETTINGS_OF_A_STAGE),
        (changed_stage(groups={"all": 1.0}), "config.second.groups.all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_in_place_of_settings_is_refused(values, where):
    message = message_of(values)
    assert message.startswith(f"{where} = ") and "needs settings" in message


# differences().


def test_equal_configs_have_no_differences():
    assert config.differences(small(), small()) == []


def test_differences_give_the_path_and_both_values():
    old, new = (
        small(data={"name": "cifar10", "imbalance": 100}),
        small(data={"name": "cifar10", "imbalance": 50}, seed=1),
    )
    assert config.differences(old, new) == ["data.imbalance: 100 -> 50", "seed: (absent) -> 1"]


def test_a_missing_key_is_a_difference():
    assert config.differences({"a": 1, "b": {"c": 2}}, {"b": {}}) == ["a: 1 -> (absent)", "b.c: 2 -> (absent)"]


def test_a_section_that_became_a_value_is_a_difference():
    assert config.differences({"a": {"b": 1}}, {"a": 2}) == ["a: (settings) -> 2"]


def test_stages_as_a_string_are_refused():
    with pytest.raises(UserError, match=r"a tuple of names, such as \('ce',\)"):
        config.parse(small(stages="ce"))


def test_a_key_that_an_older_config_lacks_has_its_default(tmp_path):
    """Check that a run resumes after an update of ltjax that added keys."""
    write_json(tmp_path / "config.json", small())
    newer = {**changed_stage(optimizer={"momentum": 0.9}, schedule={"kind": "constant"}), "accumulate": 1}
    prepare_workdir(tmp_path, newer)
    with pytest.raises(UserError, match=r"another config \(accumulate: 1 -> 2\)"):
        prepare_workdir(tmp_path, {**newer, "accumulate": 2})


# A folder holds one run; its attack settings may change.


@pytest.mark.parametrize("attack", [{"epsilon": "4/255"}, {"num_images": 10, "tests": ("pgd-20",)}, None])
def test_attack_settings_of_a_trained_run_may_change(tmp_path, attack):
    write_json(tmp_path / "config.json", small(attack={"epsilon": "0.031"}))
    prepare_workdir(tmp_path, small(attack=attack))


def test_a_run_without_attack_settings_may_be_attacked(tmp_path):
    write_json(tmp_path / "config.json", small())
    prepare_workdir(tmp_path, small(attack={"epsilon": "4/255"}))


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("", ""),
        ("auto", "auto"),
        ({}, ""),
        ("{}", ""),
        ({"cat": 2}, {"cat": 2.0}),
        ('{"cat": 2, 7: 0.5}', {"cat": 2.0, "7": 0.5}),
    ],
)
def test_class_weights_are_read_from_settings_or_text(asked, expected):
    assert config.parse(small(class_weights=asked)).class_weights == expected


@pytest.mark.parametrize(
    "asked",
    [
        "balanced",
        "{'cat': 0}",
        "{'cat': -1.0}",
        "{'cat': 1e999}",
        "{'cat': 'much'}",
        "{'cat': True}",
        "['cat']",
        "{'cat'",
    ],
)
def test_invalid_class_weights_are_refused(asked):
    assert "config.class_weights = " in (message := message_of(small(class_weights=asked)))
    assert "{'NAME': WEIGHT, ...} with weights above 0, or auto, or nothing" in message


def test_the_same_class_weights_written_differently_are_the_same_run(tmp_path):
    write_json(tmp_path / "config.json", small(class_weights="{'cat': 2, 'owl': 3}"))
    prepare_workdir(tmp_path, small(class_weights={"owl": 3.0, "cat": 2.0}))
    with pytest.raises(UserError, match=r"another config \(class_weights.owl: 3.0 -> 4.0\)"):
        prepare_workdir(tmp_path, small(class_weights="{'cat': 2, 'owl': 4}"))


def test_another_run_is_refused(tmp_path):
    write_json(tmp_path / "config.json", small(attack={"epsilon": "0.031"}))
    with pytest.raises(UserError) as raised:
        prepare_workdir(tmp_path, small(attack={"epsilon": "4/255"}, seed=1))
    assert "another config (seed: 0 -> 1)" in str(raised.value)
