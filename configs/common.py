"""What the configs share: reading `key=value,...` after the colon, and the runs on CIFAR and Tiny ImageNet."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import recipes, robust

LONG_TAILED = {"reslt", "smoothing", "balms"}  # blocks that need rare classes
BALANCED = ("pgd_at", "trades", "alp", "bgat", "ce", "mixup")  # and lbgat, methods where no class is rare
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the papers', for CIFAR-100 as well


class Text(NamedTuple):
    """An argument that is read later."""

    default: str
    form: str  # what it may be, in words


# What each argument of a config means, for `:help`.
MEANINGS = {
    "method": "the recipe: a chain of stages",
    "recipe": "instead of a method: blocks joined by +, such as reslt+dro+smoothing",
    "imbalance": "images of the largest class over those of the smallest, 1 or more",
    "profile": "how the images of a class become fewer: exponentially, or half of the classes in one step",
    "budget": "the papers' epochs, or a few, for a machine without an accelerator",
    "model": "the network; auto: the recipe's",
    "classifier": "the network's last layer; auto: the method's",
    "augment": "paper: the recipe's own; plain: crops and flips; auto: AutoAugment and Cutout, or RandAugment",
    "mixup": "of Beta(a, a), in stages that train the whole network; 0: the recipe's own",
    "precision": "of the network's body; parameters, statistics, logits and optimizer stay float32",
    "holdout": "images of each class that are kept out of training, to choose by",
    "size": "side of the images that the network sees, in pixels",
    "runlocal": "shrink everything to a laptop: 64 pixels, a ResNet-10, few classes, images and epochs",
    "guide": "adversarial training, lbgat and bgat: the natural network; auto: the recipe's",
    "beta": "adversarial training: weight of the KL divergence, from 0 up; else the method's own",
    "loss": "adversarial training: of the labels (lbgat: of the guide)",
    "awp": "adversarial training: perturb the weights as well, by 0.005 of their size; with pgd_at by 0.01",
    "sampler": "adversarial training: of the first stage",
    "epsilon": "adversarial training: l-inf radius in pixel units of [0, 1]",
}
PRECISIONS = {"float32": "float32", "bf16": "bfloat16"}  # {argument: the model's dtype}
NETWORKS = "such as resnet32, wrn34_10, wrn10_1, resnet18, resnet18_4x4 or preact18"
ROBUST_ARGUMENTS = {
    "guide": Text("auto", NETWORKS),
    "beta": -1.0,  # the method's own
    "loss": robust.LOSSES,
    "awp": ("false", "true"),
    "sampler": ("instance_balanced", "class_aware", "class_balanced"),
    "epsilon": Text("0.031", "a number, or a fraction such as 8/255"),
}


class Help(Exception):
    """`help` was among the arguments of a config. arguments: {name: (default, what is allowed, meaning)}."""

    def __init__(self, allowed: dict):
        super().__init__("help is for `python run.py --config=FILE:help`")
        self.arguments = {name: (*_in_words(choice), MEANINGS.get(name, "")) for name, choice in allowed.items()}


def _in_words(choice) -> tuple[str, str]:
    """The default of an argument, and what is allowed."""
    if isinstance(choice, Text):
        return choice
    if isinstance(choice, tuple):
        return choice[0], ", ".join(choice)
    if isinstance(choice, bool):
        return "", "no value"
    return f"{choice:g}" if choice >= 0 else "", "a number"


def read_arguments(text: str | None, allowed: dict) -> ConfigDict:
    """`"method=ce,imbalance=50"` -> values, with defaults.

    allowed: {name: (default, other choices...), or a `Text`, or a number, or False: given without a value}.
    Raises: ValueError for a mistake; Help where an argument is `help`.
    """
    values = {name: choice[0] if isinstance(choice, tuple) else choice for name, choice in allowed.items()}
    parts = [part for part in (text or "").split(",") if part]
    for part in parts:
        name, _, value = part.partition("=")
        if part == "help":
            continue
        if name not in allowed:
            raise ValueError(f"unknown config argument {name!r}; allowed: {', '.join(allowed) or 'none'}")
        if isinstance(allowed[name], Text):
            values[name] = value
        elif isinstance(allowed[name], tuple):
            if value not in allowed[name]:
                raise ValueError(f"config argument {part!r}: allowed values of {name}: {', '.join(allowed[name])}")
            values[name] = value
        elif isinstance(allowed[name], bool):
            if part != name:
                raise ValueError(f"config argument {part!r}: {name} takes no value")
            values[name] = True
        else:
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"config argument {part!r}: {name} is a number") from None
    if "help" in parts:
        raise Help(allowed)
    return ConfigDict(values)


def nearest(table: dict, imbalance: float):
    """The entry of {imbalance factor: settings} nearest to `imbalance`, as ratios go."""
    return table[min(table, key=lambda key: abs(math.log(key) - math.log(max(imbalance, 1.0))))]


def model(text: str, argument: str = "model") -> dict:
    """The network of a name: resnet32 (any 6 n + 2), wrn34_10, resnet18 and preact18 (or 34).

    resnet18 is LBGAT's, which ends in maps of 8x8 pixels; resnet18_4x4 the usual one for CIFAR. Authors leave their
    weights, and those of preact18, as PyTorch makes them.
    """
    if found := re.fullmatch(r"wrn(\d+)_(\d+)", text):
        return dict(name="wide_resnet", depth=int(found[1]), width=int(found[2]))
    if found := re.fullmatch(r"(resnet|preact)(18|34)", text):
        kind = {"resnet": "resnet", "preact": "preact_resnet"}[found[1]]
        return dict(name=kind, depth=int(found[2]), width=64, init="torch")
    if found := re.fullmatch(r"resnet(18|34)_4x4", text):
        return dict(name="resnet", depth=int(found[1]), width=64, strides=(1, 2, 2, 2), init="torch")
    if found := re.fullmatch(r"resnet(\d+)", text):
        return dict(name="resnet_cifar", depth=int(found[1]), width=16)
    raise ValueError(f"config argument '{argument}={text}': {NETWORKS}")


def choose(value: str, otherwise):
    """An argument whose default is "auto"."""
    return otherwise if value == "auto" else value


def chains(*, long_tailed: bool) -> Text:
    """The argument `recipe`."""
    fitting = lambda blocks: ", ".join(block for block in blocks if long_tailed or block not in LONG_TAILED)  # noqa: E731
    return Text("", f"first {fitting(recipes.SCRATCH)}; then any of {fitting(recipes.NEXT)}")


def checked(arg: str | None, allowed: dict, *, long_tailed: bool) -> tuple[ConfigDict, recipes.Recipe]:
    """The arguments of a config and the recipe that they name. Raises: ValueError for what does not go together."""
    arguments = read_arguments(arg, allowed)
    if arguments.recipe and "method=" in (arg or ""):
        raise ValueError(f"config arguments method={arguments.method} and recipe={arguments.recipe}: give one of them")
    whole(arguments.holdout)
    chosen = recipes.parse_recipe(arguments.recipe) if arguments.recipe else recipes.METHODS[arguments.method]
    if not chosen.robust and (given := [key for key in ROBUST_ARGUMENTS if f"{key}=" in (arg or "")]):
        raise ValueError(f"config argument {given[0]!r} is for adversarial training: {', '.join(robust.METHODS)}")
    for key, blocks in robust.NEEDED_BY.items():
        if f"{key}=" in (arg or "") and not set(blocks) & set(chosen.blocks):
            raise ValueError(f"config argument {key!r} is for {', '.join(blocks)}")
    if "beta=" in (arg or "") and not arguments.beta >= 0:
        raise ValueError(f"config argument 'beta={arguments.beta:g}': from 0 up")
    if not long_tailed and (tailed := LONG_TAILED & set(chosen.blocks)):
        raise ValueError(f"config argument 'recipe={arguments.recipe}': {min(tailed)} is for long-tailed data")
    return arguments, chosen


def attack(epsilon: str) -> dict:
    """How `--mode=attack` judges a run."""
    return dict(
        epsilon=epsilon,
        norm="linf",
        num_images=0,
        tests=("pgd-20", "cw-20", "autoattack"),
        step_size="2/255",
        radii=(0.25, 0.5, 2.0, 4.0),  # of the curve in the report; (): none
        batch_size=500,
        seed=0,
    )


def whole(holdout: float) -> int:
    """The argument `holdout`. Raises: ValueError for a fraction."""
    if holdout != int(holdout):
        raise ValueError(f"config argument holdout={holdout}: a whole number of images of each class")
    return int(holdout)


def held_out(arguments: ConfigDict, chosen: recipes.Recipe) -> int:
    """Images of each class in the hold-out: where tau is to be chosen, some at least."""
    return int(arguments.holdout) or (10 if "tau_norm" in chosen.blocks else 0)


def networks(arguments: ConfigDict, chosen: recipes.Recipe, pixels: dict, *, usual: dict, guide: dict) -> dict:
    """The `model` of a run and, where the recipe has one, its `guide`. pixels: their mean and std."""
    head = recipes.network(chosen.blocks)
    head["classifier"] = choose(arguments.classifier, head["classifier"])
    head["classifier_init"] = classifier_init(usual, chosen)
    pixels = dict(**pixels, dtype=PRECISIONS[arguments.precision])
    made = dict(model=dict(**usual, **pixels, **head))
    if {"natural", "lbgat"} & set(chosen.blocks):
        made["guide"] = dict(**guide, **pixels, classifier="linear", classifier_init=classifier_init(guide, chosen))
    return made


def classifier_init(network: dict, chosen: recipes.Recipe) -> str:
    """How the authors' classifiers begin: He-normal in the small ResNets of LDAM, MiSLAS and DRO-LT, else as PyTorch's
    do, but for the bias of a wide ResNet, which is 0."""
    if network["name"] == "wide_resnet":
        return "torch_no_bias"
    return "he" if network["name"] == "resnet_cifar" and not {"reslt", "balms"} & set(chosen.blocks) else "torch"


def add_stages(
    config: ConfigDict,
    arguments: ConfigDict,
    chosen: recipes.Recipe,
    *,
    short: bool,
    smoothing: tuple[float, float, float, bool],
    reslt: dict,
    schedule: robust.Schedule,
    scale: recipes.Scale = recipes.SMALL,
) -> None:
    """What all runs have in common: how they go on, how they are attacked, and the recipe's stages."""
    config.seed = 0
    config.replicas = 1
    config.replicate = "loop"
    config.dispatch_steps = 0
    config.gpu_graphs = "default"
    config.accumulate = 1
    config.checkpoint_seconds = 300.0
    config.weights = ""  # to begin with, see `python -m ltjax.interop.torch --help`
    config.weights_parts = ()
    config.attack = attack(arguments.epsilon)
    head, tail, *_ = smoothing
    label_loss = dict(name=arguments.loss, **(dict(head=head, tail=tail) if "smoothing" in arguments.loss else {}))
    parts = ("branches",) if config.model.branches else ()
    parts += ("logit_scale",) if config.model.logit_scale else ()
    parts += ("guide",) if "guide" in config else ()
    parts += ("block",) if config.model.get("extra_block") else ()
    setting = recipes.Setting(
        epochs=config.get_ref("epochs"),
        short=short,
        auto_augment={"paper": chosen.auto_augment or None, "plain": False, "auto": True}[arguments.augment],
        mixup=arguments.mixup,
        parts=("backbone", "classifier", *parts),
        smoothing=smoothing,
        reslt=reslt,
        deferred="drw" in chosen.blocks,
        decay=chosen.decay,
        adversarial=robust.Setting(
            attack=robust.attack(arguments.epsilon, short),
            beta=arguments.beta,
            loss=label_loss,
            awp=robust.AWP.get(chosen.blocks[0], robust.AWP_OTHERS) if arguments.awp == "true" else 0.0,
            sampler=arguments.sampler,
            schedule=schedule,
        ),
        scale=scale,
    )
    recipes.chain(config, chosen, setting)


def small_images(
    name: str,
    arg: str | None,
    *,
    mislas: dict | None = None,
    reslt: dict | None = None,
    ranges: tuple[int, ...] = (),
    mean: tuple[float, ...] = CIFAR_MEAN,
    std: tuple[float, ...] = CIFAR_STD,
    schedules: Mapping[str, robust.Schedule] = MappingProxyType({}),
) -> ConfigDict:
    """A run on CIFAR or Tiny ImageNet: long-tailed where the recipes for that are given, else all of the images.

    mislas: {imbalance factor: (smoothing head, tail, classifier's rate, shifted batch norm)}.
    reslt: {"beta": {imbalance factor: beta}, "medium_start": rank, "tail_start": rank}.
    ranges: where some papers let their medium and few-shot classes begin.
    mean, std: of the images, for networks that normalise them; those of adversarial training do not.
    schedules: {first block of adversarial training: its own on this data set, instead of LBGAT's}.
    """
    long_tailed = mislas is not None
    allowed: dict = {
        "method": tuple(recipes.METHODS) if long_tailed else ("lbgat", *BALANCED),
        "recipe": chains(long_tailed=long_tailed),
        **({"imbalance": 100.0, "profile": ("exp", "step")} if long_tailed else {}),
        "budget": ("full", "short"),
        "model": Text("auto", NETWORKS),
        "classifier": ("auto", "linear", "cosine"),
        "augment": ("paper", "plain", "auto"),
        "mixup": 0.0,
        "precision": tuple(PRECISIONS),
        "holdout": 0.0,
        **ROBUST_ARGUMENTS,
    }
    arguments, chosen = checked(arg, allowed, long_tailed=long_tailed)
    short, holdout = arguments.budget == "short", held_out(arguments, chosen)
    config = ConfigDict()
    config.name = _run_name(name, arguments, allowed, holdout, long_tailed)
    config.data = dict(
        name=name,
        imbalance=arguments.get("imbalance", 1.0),
        profile=arguments.get("profile", "exp"),
        max_count=0,
        holdout=holdout,
        seed=0,
        groups="counts",
        many_above=100,
        few_below=20,
        ranges=ranges,  # MiSLAS's and ResLT's groups, with --config.data.groups=ranges
    )
    usual = ("wrn10_1" if short else "wrn34_10") if chosen.robust else "resnet32"
    config.update(
        networks(
            arguments,
            chosen,
            dict(mean=(0.0,), std=(1.0,)) if chosen.robust else dict(mean=mean, std=std),
            usual=model(choose(arguments.model, usual)),
            guide=model(choose(arguments.guide, "wrn10_1" if short else "resnet18"), "guide"),
        )
    )
    schedule = robust.SHORT if short else schedules.get(chosen.blocks[0], robust.LBGAT)
    config.batch_size = chosen.batch_size
    config.epochs = schedule.epochs if chosen.robust else chosen.epochs(short)
    config.eval_every = (1 if chosen.robust else 3) if short else 0
    config.eval_batch_size = 500
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=chosen.weight_decay)
    add_stages(
        config,
        arguments,
        chosen,
        short=short,
        smoothing=nearest(mislas or {1: (0.1, 0.1, 1.0, False)}, config.data.imbalance),
        reslt=dict(reslt, beta=nearest(reslt["beta"], config.data.imbalance)) if reslt else {},
        schedule=schedule,
    )
    return config


def _run_name(name: str, arguments: ConfigDict, allowed: dict, holdout: int, long_tailed: bool) -> str:
    parts = [f"{name}_lt" if long_tailed else name, arguments.recipe or arguments.method]
    if long_tailed:
        parts += [f"if{arguments.imbalance:g}"] + ([arguments.profile] if arguments.profile != "exp" else [])
    parts += changed(arguments, allowed)
    parts += [f"holdout{holdout}"] if holdout else []
    parts += ["short"] if arguments.budget == "short" else []
    return "-".join(parts)


def changed(arguments: ConfigDict, allowed: dict) -> list[str]:
    """What a run's name says of arguments that are not the usual ones."""
    parts = []
    for key in ("model", "guide", "classifier", "loss", "sampler", "precision"):
        default = allowed[key][0] if isinstance(allowed[key], tuple) else allowed[key]
        if arguments[key] != default:
            parts.append(arguments[key] if key != "guide" else f"{arguments[key]}-guide")
    parts += [f"beta{arguments.beta:g}"] if arguments.beta >= 0 else []
    parts += (
        [f"eps{arguments.epsilon.replace('/', '_')}"]
        if arguments.epsilon != ROBUST_ARGUMENTS["epsilon"].default
        else []
    )
    parts += ["awp"] if arguments.awp == "true" else []
    parts += [f"{arguments.augment}-augment"] if arguments.augment != "paper" else []
    return parts + ([f"mixup{arguments.mixup:g}"] if arguments.mixup else [])
