"""What the configs share: reading `key=value,...` after the colon, and the runs on CIFAR and Tiny ImageNet."""

import math
import re

from ml_collections import ConfigDict

from configs import recipes

BALANCED = ("pgd_at", "trades", "alp", "bgat", "ce", "mixup")  # and lbgat, methods where no class is rare
# Arguments of adversarial training: the guide's network; the KL's weight, -1 for the method's own; the loss of the
# labels (LBGAT's guide); adversarial weight perturbation; the sampler of the first part; the radius.
ROBUST_ARGUMENTS = {
    "guide": "auto",
    "beta": -1.0,
    "loss": recipes.robust.LOSSES,
    "awp": ("false", "true"),
    "sampler": ("instance_balanced", "class_aware", "class_balanced"),
    "epsilon": "0.031",
}
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the papers', for CIFAR-100 as well


def read_arguments(text: str | None, allowed: dict) -> ConfigDict:
    """`"method=ce,imbalance=50"` -> values, with defaults.

    allowed: {name: (default, other choices...), or a number, or a text}.
    """
    values = {name: choice[0] if isinstance(choice, tuple) else choice for name, choice in allowed.items()}
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        if name not in allowed:
            raise ValueError(f"unknown config argument {name!r}; allowed: {', '.join(allowed) or 'none'}")
        if isinstance(allowed[name], tuple):
            if value not in allowed[name]:
                raise ValueError(f"config argument {part!r}: allowed values of {name}: {', '.join(allowed[name])}")
            values[name] = value
        elif isinstance(allowed[name], str):
            values[name] = value
        else:
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"config argument {part!r}: {name} is a number") from None
    return ConfigDict(values)


def nearest(table: dict, imbalance: float):
    """The entry of {imbalance factor: settings} nearest to `imbalance`, as ratios go."""
    return table[min(table, key=lambda key: abs(math.log(key) - math.log(max(imbalance, 1.0))))]


def model(text: str, argument: str = "model") -> dict:
    """The network of a name: resnet32 (any 6 n + 2), wrn34_10, resnet18 and preact18 (or 34)."""
    if found := re.fullmatch(r"wrn(\d+)_(\d+)", text):
        return dict(name="wide_resnet", depth=int(found[1]), width=int(found[2]))
    if found := re.fullmatch(r"(resnet|preact)(18|34)", text):
        return dict(name={"resnet": "resnet", "preact": "preact_resnet"}[found[1]], depth=int(found[2]), width=64)
    if found := re.fullmatch(r"resnet(\d+)", text):
        return dict(name="resnet_cifar", depth=int(found[1]), width=16)
    raise ValueError(f"config argument '{argument}={text}': such as resnet32, wrn34_10, wrn10_1, resnet18 or preact18")


def choose(value: str, otherwise):
    """An argument whose default is "auto"."""
    return otherwise if value == "auto" else value


def small_images(
    name: str,
    arg: str | None,
    *,
    mislas: dict | None = None,
    reslt: dict | None = None,
    ranges: tuple[int, ...] = (),
    mean: tuple[float, ...] = CIFAR_MEAN,
    std: tuple[float, ...] = CIFAR_STD,
) -> ConfigDict:
    """A run on CIFAR or Tiny ImageNet: long-tailed where the recipes for that are given, else all of the images.

    mislas: {imbalance factor: (smoothing head, tail, classifier's rate, shifted batch norm)}.
    reslt: {"beta": {imbalance factor: beta}, "medium_start": rank, "tail_start": rank}.
    ranges: where some papers let their medium and few-shot classes begin.
    mean, std: of the images, for networks that normalise them; those of adversarial training do not.
    """
    long_tailed = mislas is not None
    allowed: dict = {
        "method": tuple(recipes.METHODS) if long_tailed else ("lbgat", *BALANCED),
        "recipe": "",
        **({"imbalance": 100.0, "profile": ("exp", "step")} if long_tailed else {}),
        "budget": ("full", "short"),
        "model": "auto",
        "classifier": ("auto", "linear", "cosine"),
        "augment": ("paper", "plain", "auto"),
        "mixup": 0.0,
        "holdout": 0.0,
        **ROBUST_ARGUMENTS,
    }
    arguments = read_arguments(arg, allowed)
    if arguments.recipe and "method=" in (arg or ""):
        raise ValueError(f"config arguments method={arguments.method} and recipe={arguments.recipe}: give one of them")
    if arguments.holdout != int(arguments.holdout):
        raise ValueError(f"config argument holdout={arguments.holdout}: a whole number of images of each class")
    chosen = recipes.parse_recipe(arguments.recipe) if arguments.recipe else recipes.METHODS[arguments.method]
    if not chosen.robust and (given := [key for key in ROBUST_ARGUMENTS if f"{key}=" in (arg or "")]):
        raise ValueError(
            f"config argument {given[0]!r} is for adversarial training: {', '.join(recipes.robust.METHODS)}"
        )
    for key, blocks in recipes.robust.NEEDED_BY.items():
        if f"{key}=" in (arg or "") and not set(blocks) & set(chosen.blocks):
            raise ValueError(f"config argument {key!r} is for {', '.join(blocks)}")
    if "beta=" in (arg or "") and not arguments.beta >= 0:
        raise ValueError(f"config argument 'beta={arguments.beta:g}': from 0 up")
    if not long_tailed and (tailed := {"reslt", "smoothing"} & set(chosen.blocks)):
        raise ValueError(f"config argument 'recipe={arguments.recipe}': {min(tailed)} is for long-tailed data")
    short, tuned = arguments.budget == "short", "tau_norm" in chosen.blocks
    holdout = int(arguments.holdout) or (10 if tuned else 0)  # tau is chosen there
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
    pixels = dict(mean=(0.0,), std=(1.0,)) if chosen.robust else dict(mean=mean, std=std)
    head = recipes.network(chosen.blocks)
    head["classifier"] = choose(arguments.classifier, head["classifier"])
    config.model = dict(**model(choose(arguments.model, usual)), **pixels, dtype="float32", **head)
    if {"natural", "lbgat"} & set(chosen.blocks):
        guide = model(choose(arguments.guide, "wrn10_1" if short else "resnet18"), "guide")
        config.guide = dict(**guide, **pixels, dtype="float32", classifier="linear")
    config.batch_size = 128
    config.seed = 0
    config.replicas = 1
    config.replicate = "loop"
    config.epochs = chosen.epochs(short)
    config.eval_every = (1 if chosen.robust else 3) if short else 1
    config.eval_batch_size = 500
    config.dispatch_steps = 0
    config.weights = ""  # a folder of imported weights to start from, or to judge
    config.weights_parts = ()  # what to take of it; (): all
    config.checkpoint_seconds = 300.0
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=chosen.weight_decay)
    config.attack = dict(
        epsilon=arguments.epsilon,
        norm="linf",
        num_images=0,
        tests=("pgd-20", "cw-20", "autoattack"),
        step_size="2/255",
        batch_size=500,
        seed=0,
    )

    head, tail, *_ = smoothing = nearest(mislas or {1: (0.1, 0.1, 1.0, False)}, config.data.imbalance)
    label_loss = dict(name=arguments.loss, **(dict(head=head, tail=tail) if "smoothing" in arguments.loss else {}))
    setting = recipes.Setting(
        epochs=config.get_ref("epochs"),
        short=short,
        auto_augment={"paper": chosen.auto_augment or None, "plain": False, "auto": True}[arguments.augment],
        mixup=arguments.mixup,
        parts=("backbone", "classifier")
        + (("branches",) if config.model.branches else ())
        + (("logit_scale",) if config.model.logit_scale else ())
        + (("guide",) if "guide" in config else ()),
        smoothing=smoothing,
        reslt=dict(reslt, beta=nearest(reslt["beta"], config.data.imbalance)) if reslt else {},
        deferred="drw" in chosen.blocks,
        adversarial=recipes.robust.Setting(
            attack=recipes.robust.attack(arguments.epsilon, short),
            beta=arguments.beta,
            loss=label_loss,
            awp=0.005 if arguments.awp == "true" else 0.0,
            sampler=arguments.sampler,
        ),
    )
    recipes.chain(config, chosen, setting)
    return config


def _run_name(name: str, arguments: ConfigDict, allowed: dict, holdout: int, long_tailed: bool) -> str:
    parts = [f"{name}_lt" if long_tailed else name, arguments.recipe or arguments.method]
    if long_tailed:
        parts += [f"if{arguments.imbalance:g}"] + ([arguments.profile] if arguments.profile != "exp" else [])
    for key in ("model", "guide", "classifier", "loss", "sampler"):
        default = allowed[key][0] if isinstance(allowed[key], tuple) else allowed[key]
        if arguments[key] != default:
            parts.append(arguments[key] if key != "guide" else f"{arguments[key]}-guide")
    parts += [f"beta{arguments.beta:g}"] if arguments.beta >= 0 else []
    parts += [f"eps{arguments.epsilon.replace('/', '_')}"] if arguments.epsilon != ROBUST_ARGUMENTS["epsilon"] else []
    parts += ["awp"] if arguments.awp == "true" else []
    parts += [f"{arguments.augment}-augment"] if arguments.augment != "paper" else []
    parts += [f"mixup{arguments.mixup:g}"] if arguments.mixup else []
    parts += [f"holdout{holdout}"] if holdout else []
    parts += ["short"] if arguments.budget == "short" else []
    return "-".join(parts)
