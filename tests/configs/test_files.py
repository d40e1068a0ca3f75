"""Every file in configs/: arguments, run names, and settings that the library accepts."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, heads, recipes
from ltjax import config, methods, models, optim, surgery
from ltjax.data import SOURCES, augment, load, samplers, splits
from ltjax.system import registry
from tests.configs.reading import ROOT, parsed, rates_of, read

# Each method gets one of these, in turn, and another one in each file.
CHOICES = (
    "imbalance=100",
    "imbalance=10,profile=step,budget=short,augment=plain",
    "imbalance=50,budget=short,augment=auto,mixup=0.2",
    "imbalance=10,holdout=20",
)
FREE = (
    *("reslt+dro+smoothing", "mixup+dro+lws", "ce+drw", "focal+drw+logit_shift", "ldam+crt", "ce+ce_classifier+ncm"),
    *("ce+balanced_softmax_classifier", "lbgat+robust_classifier", "trades+smoothing", "natural+bgat+crt"),
)
# arguments of adversarial training, each at least once
ROBUST = (
    *("method=pgd_at,loss=balanced_softmax,classifier=cosine", "method=trades,loss=label_aware_smoothing,beta=3"),
    *("method=alp,loss=logit_adjusted,sampler=class_aware", "method=bgat,beta=6,guide=wrn16_2,budget=short"),
    *("method=lbgat,beta=6,awp=true,epsilon=8/255,model=wrn34_20", "method=lbgat,model=preact18,guide=preact34"),
    *("method=pgd_at,model=wrn28_10,sampler=class_balanced,mixup=0.2", "recipe=trades+robust_classifier,awp=true"),
)
BALANCED = tuple(f"method={name}" for name in ("lbgat", *common.BALANCED))
CHAINS = tuple(f"method={name}" for name in recipes.WITHOUT_PRETRAINED) + tuple(f"recipe={blocks}" for blocks in FREE)
ARGUMENTS = {
    name: [f"{chain},{CHOICES[(number + offset) % len(CHOICES)]}" for number, chain in enumerate(CHAINS)]
    for offset, name in enumerate(("cifar10_lt", "cifar100_lt"))
}
ARGUMENTS = {**{name: arguments + list(ROBUST) for name, arguments in ARGUMENTS.items()}, "cifar10": BALANCED}
LARGE = ("method=mislas,runlocal", "method=reslt,model=resnext50", "method=ldam_drw,augment=auto", "method=lbgat")
ARGUMENTS |= {
    "imagenet_lt": (*(chain for chain in CHAINS if chain.removeprefix("method=") not in recipes.SMALL), *LARGE[:3]),
    "inat18": LARGE,
    "places_lt": (*LARGE, "method=reslt,runlocal", "method=drolt,model=resnet50", "method=mislas,model=vit_s16"),
    "image_folder": (
        *LARGE[:3],
        "method=lbgat,pretrained=none",
        "recipe=reslt+dro+smoothing,size=64,pretrained=none",
        "method=trades,sampler=class_aware,finetune=all",
        "method=crt,pretrained=none",
        "method=crt,finetune=last",
        "method=drolt,size=64",
        "method=reslt,model=clip_b16",
        "method=mislas,model=efficientnet_lite0",
        "method=lbgat,model=efficientnet_lite0,guide=efficientnet_lite0",
    ),
}
ARGUMENTS |= {"features": tuple(f"method={name}" for name in heads.ON_FEATURES)}
ARGUMENTS |= {"cifar100": ROBUST, "tiny_imagenet": ("method=ce,budget=short", "method=lbgat,beta=6", ROBUST[3])}
FILES = [path.stem for path in sorted((ROOT / "configs").glob("*.py")) if "def get_config" in path.read_text()]
EVERY = [(name, argument) for name in FILES for argument in (None, *ARGUMENTS.get(name, ()))]
# classes, training images of the largest, height and width of each
DATA = {
    "cifar10": (10, 5000, 32),
    "cifar100": (100, 500, 32),
    "fashion_mnist_lt": (10, 1000, 28),
    "tiny_imagenet": (200, 500, 64),
    # sizes at which the augmentation is tried
    "imagenet_lt": (1000, 1280, 16),
    "i_naturalist2018": (8142, 1000, 16),
    "places_lt": (365, 4980, 16),
    "image_folder": (23, 300, 16),
    "features": (23, 300, 1),
}


def test_every_file_is_a_config_or_shared_code():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} - set(FILES) == {
        "backbones",
        "common",
        "heads",
        "large",
        "recipes",
        "robust",
        "small",
    }


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("", config.RunConfig),
        ("data", config.DataConfig),
        ("optimizer", config.OptimizerConfig),
        ("attack", config.AttackConfig),
    ],
)
def test_the_configs_and_the_library_have_the_same_defaults(section, kind):
    configs = common.defaults().to_dict()
    ours = configs[section] if section else configs
    library = {key: value for key, value in kind._field_defaults.items() if not hasattr(value, "_fields")}
    assert {key: ours[key] for key in library if key in ours and key != "stages"} == {
        key: value for key, value in library.items() if key in ours and key != "stages"
    }


def test_every_block_is_in_a_chain_that_is_tested():
    used = {block for recipe in recipes.RECIPES.values() for block in recipe.blocks} | {
        b for f in FREE for b in f.split("+")
    }
    assert used == {*recipes.FIRST, *recipes.NEXT}


@functools.cache
def parameters(settings, channels):
    """Return shapes of a model's parameters. Only their paths matter here, so there are as many classes everywhere."""
    model = json.loads(settings)
    net = models.create(model.pop("name"), 10, **model)
    return jax.eval_shape(net.init, jax.random.key(0), models.example(net, channels))["params"]


@functools.cache
def augmented(settings, size, channels):
    """Return the shapes of two augmented images of a stage."""
    bound = registry.bind("augment", augment.augment, json.loads(settings))
    images, labels = jnp.zeros((2, size, size, channels), jnp.uint8), jnp.zeros(2, jnp.int32)
    others = (images, labels) if json.loads(settings).get("cutmix_partner", "batch") != "batch" else None
    return jax.eval_shape(bound, jax.random.key(0), images, labels, others)


@pytest.mark.parametrize("name, argument", EVERY)
def test_the_library_accepts_every_setting(name, argument):
    run, stages = parsed(name, argument)
    assert run.data.name in SOURCES
    num_classes, most, size = DATA[run.data.name]
    most = (run.data.max_count or most) - run.data.holdout
    if run.data.profile == "natural":
        counts = np.maximum(most // np.arange(1, num_classes + 1), 2)
    else:
        counts = splits.class_counts(num_classes, most, imbalance=run.data.imbalance, profile=run.data.profile)
    channels = 1 if run.data.name == "fashion_mnist_lt" else 3
    settings = {"net": run.model, **({"guide": run.guide} if run.guide else {})}
    nets = {name: parameters(json.dumps(dict(each)), channels) for name, each in settings.items()}
    for stage in stages.values():
        hyper = dict(stage.method)
        method = methods.create(hyper.pop("name"), counts, 64, **hyper)
        extra, _ = jax.eval_shape(lambda init=method.init: init(jax.random.key(0)))
        samplers.create(**stage.sampler)
        shape = (2, size, size, channels)
        for settings in (stage.augment, *stage.views.values()):
            assert augmented(json.dumps(settings), size, channels).images.shape == shape
        registry.bind("schedule", optim.schedule_table, stage.schedule)(stage.epochs)
        assert stage.batch_norm in ("train", "eval")
        if stage.surgery:
            branches, holdout = run.model.get("branches", 0), run.data.holdout > 0
            surgery.create(stage.surgery, nets["net"], branches=branches, holdout=holdout)
        if stage.epochs:
            paths = list(optim.flatten({**nets, **({"method": extra} if extra else {})}))
            assigned = optim.assign_groups(paths, stage.groups)
            assert any(stage.groups[group]["rate"] > 0 for group in assigned.values())
        else:
            assert stage.surgery and stage.groups == {}


def test_a_config_is_the_same_after_json():
    """A workdir stores its config as JSON."""
    for name, argument in EVERY:
        values = read(name, argument).to_dict()
        run, same = config.parse(values), config.parse(json.loads(json.dumps(values)))
        assert json.dumps(same) == json.dumps(run), f"{name}:{argument}"


def test_overriding_the_epochs_reaches_the_stages_that_share_them():
    """Stages from scratch and BGAT's adversarial one share them; deferred re-weighting takes a fifth, rounded up."""
    for name, argument in EVERY:
        values = read(name, argument)
        before = config.parse(values.to_dict()).stages
        values.epochs = 11
        run = config.parse(values.to_dict())
        assert run.epochs == 11
        deferred = "drw" in run.stages
        for stage, settings in run.stages.items():
            expected = before[stage].epochs
            if settings.start_from == "scratch" or stage in ("bgat", "student"):
                expected = 8 if deferred else 11
            elif stage == "drw":
                expected = 3
            assert settings.epochs == expected, f"{name}:{argument}, {stage}"


@pytest.mark.parametrize("name", [name for name in FILES if name != "quickstart"])
def test_a_new_part_of_a_network_trains_in_its_first_stage(name):
    from_scratch = {"image_folder": ",pretrained=none"}.get(name, "")
    methods = (None, *(f"method={m}{from_scratch if m != 'lift' else ''}" for m in read_methods(name)))
    for argument in methods:
        run, stages = parsed(name, argument)
        trained = {"logit_scale", *run.weights_parts}  # the scale begins as 1, which changes nothing
        for stage, settings in stages.items():
            rates = rates_of(settings)
            used = {part for part in rates if part != "guide"}
            if settings.method["name"] in ("lbgat", "bgat"):
                used.add("guide")
            if settings.method.get("net") == "guide":
                used = {"guide"}
            frozen = {part for part in used - trained if not rates[part]}
            assert not frozen, f"{name}:{argument}, {stage}"
            trained |= used


def read_methods(name):
    """Return the methods that a config allows."""
    with pytest.raises(common.Help) as asked:
        read(name, "help")
    return asked.value.arguments["method"][1].split(", ")


def test_a_config_has_every_key_that_the_parser_knows():
    for name, argument in EVERY:
        values = read(name, argument).to_dict()
        sections = {"data": config.DataConfig, "optimizer": config.OptimizerConfig, "attack": config.AttackConfig}
        for stage in values["stages"]:
            sections |= {stage: config.StageConfig, f"{stage}.optimizer": config.OptimizerConfig}
        assert set(values) == {*config.RunConfig._fields, *values["stages"]}, f"{name}:{argument}"
        for section, kind in sections.items():
            keys = functools.reduce(dict.__getitem__, section.split("."), values)
            parsed_later = config.SET_BY_PARSE if kind is config.StageConfig else ()
            assert set(keys) == set(kind._fields) - set(parsed_later), f"{name}:{argument}, {section}"


def test_defaults_are_the_parsers():
    assert common.defaults().data.to_dict() == {"name": "", **config.DataConfig._field_defaults}
    stage = {key: value for key, value in config.StageConfig._field_defaults.items() if key in recipes.STAGE}
    assert recipes.STAGE == stage | dict(schedule={"kind": "constant"}, sampler={"name": "instance_balanced"})


def overridden(monkeypatch, name, argument, *overrides):
    """Return the config of a file, as `run.py` reads it from the command line."""
    path = ROOT / "configs" / f"{name}.py"
    line = ["run.py", f"--config={path}:{argument}", *(f"--config.{override}" for override in overrides)]
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", line)  # ml_collections reads the overrides there
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(line)
    run = config.parse(values["config"].value.to_dict())
    return run, run.stages


from_command_line = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections, 3.11


@from_command_line
def test_flags_override_the_epochs_and_a_stages_own_settings(monkeypatch):
    changes = ("epochs=3", "classifier.method.head=0.2")
    run, stages = overridden(monkeypatch, "cifar100_lt", "imbalance=50", *changes)
    assert (run.data.imbalance, run.epochs, stages["features"].epochs, stages["classifier"].epochs) == (50, 3, 3, 10)
    assert stages["classifier"].method["head"] == 0.2


@from_command_line
@pytest.mark.parametrize("name", FILES)
def test_flags_override_the_optimizer_of_all_stages_or_one(monkeypatch, name):
    first, *_ = parsed(name)[0].stages
    changes = ("accumulate=2", "optimizer.weight_decay=0.125", f"{first}.optimizer.momentum=0.5")
    run, stages = overridden(monkeypatch, name, "", *changes)
    assert (run.accumulate, run.optimizer.momentum) == (2, 0.9)
    assert {stage.optimizer["weight_decay"] for stage in stages.values()} == {0.125}
    momentum = {stage: settings.optimizer["momentum"] for stage, settings in stages.items()}
    assert momentum == {stage: 0.5 if stage == first else 0.9 for stage in stages}


@from_command_line
def test_flags_override_the_epochs_of_only_one_stage(monkeypatch):
    run, stages = overridden(monkeypatch, "cifar100", "method=bgat", "natural.epochs=3")
    assert (run.epochs, stages["natural"].epochs, stages["bgat"].epochs) == (100, 3, 100)


def test_different_arguments_give_different_run_names():
    names = [read(name, argument).name for name, argument in EVERY if argument]
    one_choice = (
        "imbalance=50",
        "profile=step",
        "budget=short",
        "augment=auto",
        "augment=plain",
        "mixup=1",
        "holdout=5",
        "model=resnet20",
        "classifier=cosine",
    )
    names += [read("cifar100_lt", f"method=ce,{choice}").name for choice in one_choice]
    one_choice = ("guide=wrn10_1", "beta=0", "beta=6", "loss=balanced_softmax", "awp=true", "sampler=class_aware")
    names += [read("cifar100_lt", f"method=lbgat,{choice}").name for choice in (*one_choice, "epsilon=8/255")]
    assert len(set(names)) == len(names)


INVALID_VALUES = {
    "methd=ce": "unknown config argument 'methd'; allowed: "
    "method, recipe, imbalance, profile, budget, model, classifier, augment, mixup, cutmix, ema, sam, precision, "
    "holdout, guide, beta, loss, awp, sampler, epsilon",
    "method=erm": f"config argument 'method=erm': allowed values of method: {', '.join(recipes.WITHOUT_PRETRAINED)}",
    "method": f"config argument 'method': allowed values of method: {', '.join(recipes.WITHOUT_PRETRAINED)}",
    "imbalance=ten": "config argument 'imbalance=ten': imbalance is a finite number",
    "imbalance=": "config argument 'imbalance=': imbalance is a finite number",
    "mixup=yes": "config argument 'mixup=yes': mixup is a finite number",
    "holdout=some": "config argument 'holdout=some': holdout is a finite number",
    "holdout=inf": "config argument 'holdout=inf': holdout is a finite number",
    "profile=linear": "config argument 'profile=linear': allowed values of profile: exp, step",
    "method=ce,budget=tiny": "config argument 'budget=tiny': allowed values of budget: full, short",
    "augment=none": "config argument 'augment=none': allowed values of augment: paper, plain, auto",
    "classifier=dot": "config argument 'classifier=dot': allowed values of classifier: auto, linear, cosine",
    "model=foo": f"config argument 'model=foo': {common.NETWORKS}",
    "method=lbgat,guide=foo": f"config argument 'guide=foo': {common.NETWORKS}",
    "method=lbgat,epsilon=8": "config argument 'epsilon=8': above 0 and up to 1; did you mean 8/255?",
    "method=lbgat,epsilon=-1/255": "config argument 'epsilon=-1/255': above 0 and up to 1",
    "method=lbgat,epsilon=8/0": "config argument 'epsilon=8/0': a number, or a fraction such as 8/255",
    "method=lbgat,epsilon=some": "config argument 'epsilon=some': a number, or a fraction such as 8/255",
    "method=lbgat,beta=-1": "config argument 'beta=-1': from 0 up",
    "method=lbgat,awp=0.005": "config argument 'awp=0.005': allowed values of awp: false, true",
    "method=pgd_at,beta=6": "config argument 'beta' is for trades, bgat, lbgat",
    "method=trades,guide=resnet18": "config argument 'guide' is for natural, lbgat",
    **{
        f"method=ce,{name}={value}": f"config argument '{name}' is for adversarial training: "
        "pgd_at, trades, alp, bgat, lbgat, gkl_at, at_bsl, best_robust"
        for name, value in dict(
            guide="resnet18", beta=6, loss="balanced_softmax", awp="true", sampler="class_aware", epsilon="8/255"
        ).items()
    },
}
FIRST, AFTER = ", ".join(recipes.FIRST), ", ".join(recipes.NEXT)
INVALID_CHAINS = {
    "recipe=smoothing": f"config argument 'recipe=smoothing': allowed first: {FIRST}; not 'smoothing'",
    "recipe=ce+ldam": f"config argument 'recipe=ce+ldam': allowed after the first block: {AFTER}; not 'ldam'",
    "recipe=ce+": f"config argument 'recipe=ce+': allowed after the first block: {AFTER}; not ''",
    "recipe=ce+crt+crt": "config argument 'recipe=ce+crt+crt': each block once",
    **{
        f"recipe={blocks}": f"config argument 'recipe={blocks}': drw comes second, "
        "after a block with one loss such as ce"
        for blocks in ("ce+crt+drw", "reslt+drw", "lbgat+drw", "pgd_at+drw")
    },
    "recipe=bgat": f"config argument 'recipe=bgat': allowed first: {FIRST}; not 'bgat'",
    **{
        f"recipe={blocks}": f"config argument 'recipe={blocks}': natural and bgat go together, "
        "as natural+bgat at the start"
        for blocks in ("natural", "natural+crt", "ce+bgat", "trades+robust_classifier+bgat")
    },
}


@pytest.mark.parametrize("name", ["cifar10_lt", "cifar100_lt"])
def test_an_invalid_argument_is_named_with_the_allowed_values(name):
    for argument, message in {**INVALID_VALUES, **INVALID_CHAINS}.items():
        with pytest.raises(ValueError) as raised:
            read(name, argument)
        assert str(raised.value) == message


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_balanced_data_refuses_long_tailed_methods(name):
    methods = ", ".join(("lbgat", *common.BALANCED))
    mistakes = {
        "method=reslt": f"config argument 'method=reslt': allowed values of method: {methods}",
        "recipe=reslt": "config argument 'recipe=reslt': reslt is for long-tailed data",
        "recipe=lbgat+smoothing": "config argument 'recipe=lbgat+smoothing': smoothing is for long-tailed data",
        "imbalance=100": "unknown config argument 'imbalance'; allowed: method, recipe, budget, model, classifier, "
        "augment, mixup, cutmix, ema, sam, precision, holdout, guide, beta, loss, awp, sampler, epsilon",
    }
    for argument, message in mistakes.items():
        with pytest.raises(ValueError) as raised:
            read(name, argument)
        assert str(raised.value) == message


def test_each_block_is_a_stage_that_starts_from_the_previous_one():
    run, stages = parsed("cifar100_lt", "recipe=reslt+dro+smoothing")
    assert tuple(stages) == ("reslt", "dro", "smoothing")
    assert [stage.start_from for stage in stages.values()] == ["scratch", "reslt", "dro"]
    assert [stage.title for stage in stages.values()] == ["reslt", "dro", "smoothing"]
    assert (run.model["branches"], run.model["logit_scale"]) == (3, True)


AUGMENTED = {  # argument: (AutoAugment, Cutout) of each stage
    "method=ce": [(False, 0)],
    "method=ce,augment=auto": [(True, 16)],
    "method=drolt": [(True, 16)] * 3,
    "method=drolt,augment=plain": [(False, 0)] * 3,
    "recipe=ce+dro+crt": [(False, 0), (True, 16), (False, 0)],
    "recipe=ce+dro+crt,augment=auto": [(True, 16)] * 3,
    "recipe=ce+dro+crt,augment=plain": [(False, 0)] * 3,
}


@pytest.mark.parametrize("argument", AUGMENTED)
def test_augment_is_the_papers_or_the_same_in_all_stages(argument):
    augments = [stage.augment for stage in parsed("cifar10_lt", argument)[1].values()]
    assert [(a["auto_augment"], a["cutout_size"]) for a in augments] == AUGMENTED[argument]
    assert all((a["crop_padding"], a["flip"]) == (4, True) for a in augments)


@pytest.mark.parametrize(
    "argument, alphas",
    [
        ("method=mislas", [1.0, 0.0]),
        ("method=mislas,mixup=0.2", [0.2, 0.0]),
        ("method=reslt,mixup=0.2", [0.2]),
        ("method=drolt,mixup=0.2", [0.2, 0.0, 0.0]),
        ("method=ldam_drw,mixup=0.2", [0.2, 0.2]),
    ],
)
def test_mixup_applies_to_stages_that_train_the_whole_network(argument, alphas):
    _, stages = parsed("cifar10_lt", argument)
    assert [stage.augment["mixup_alpha"] for stage in stages.values()] == alphas


@pytest.mark.parametrize(
    "argument, holdout", [("method=ce", 0), ("method=tau_norm", 10), ("method=tau_norm,holdout=3", 3)]
)
def test_tau_norm_has_a_holdout(argument, holdout):
    assert parsed("cifar100_lt", argument)[0].data.holdout == holdout


@pytest.mark.parametrize("imbalance", ["0", "-10", "0.5", "nan", "inf"])
def test_an_impossible_imbalance_is_an_error_that_names_it(imbalance):
    with pytest.raises(ValueError, match=f"imbalance.*{imbalance}"):
        run, _ = parsed("cifar100_lt", f"imbalance={imbalance}")
        splits.long_tailed_split(np.repeat(np.arange(100), 500), 100, imbalance=run.data.imbalance)


def test_quickstart_takes_no_method():
    with pytest.raises(ValueError, match="unknown config argument 'method'; allowed: holdout"):
        read("quickstart", "method=ce")


def test_quickstart_can_hold_images_out_of_every_class():
    data = parsed("quickstart", "holdout=5")[0].data
    labels = load("fashion_mnist_lt").train_labels
    kept = splits.long_tailed_split(labels, 10, imbalance=data.imbalance, profile=data.profile, holdout=data.holdout)
    assert (kept.class_counts == np.bincount(labels) - 5).all() and len(kept.holdout) == 50


def test_quickstart_has_the_attack_of_the_other_configs():
    assert read("quickstart")["attack"] == read("cifar100_lt")["attack"]
