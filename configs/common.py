"""What the configs share: reading `key=value,...` after the colon, and the CIFAR-LT runs."""

import math

from ml_collections import ConfigDict

from configs import recipes

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


def cifar_long_tailed(name: str, arg: str | None, mislas: dict, reslt: dict, ranges: tuple[int, int]) -> ConfigDict:
    """A CIFAR-LT run.

    mislas: {imbalance factor: (smoothing head, tail, classifier's rate, shifted batch norm)}.
    reslt: {"beta": {imbalance factor: beta}, "medium_start": rank, "tail_start": rank}.
    ranges: where some papers let their medium and few-shot classes begin.
    """
    arguments = read_arguments(
        arg,
        {
            "method": tuple(recipes.METHODS),
            "recipe": "",
            "imbalance": 100.0,
            "profile": ("exp", "step"),
            "budget": ("full", "short"),
            "augment": ("paper", "plain", "auto"),
            "mixup": 0.0,
            "holdout": 0.0,
        },
    )
    if arguments.recipe and "method=" in (arg or ""):
        raise ValueError(f"config arguments method={arguments.method} and recipe={arguments.recipe}: give one of them")
    if arguments.holdout != int(arguments.holdout):
        raise ValueError(f"config argument holdout={arguments.holdout}: a whole number of images of each class")
    chosen = recipes.parse_recipe(arguments.recipe) if arguments.recipe else recipes.METHODS[arguments.method]
    short, tuned = arguments.budget == "short", "tau_norm" in chosen.blocks
    holdout = int(arguments.holdout) or (10 if tuned else 0)  # tau is chosen there
    config = ConfigDict()
    parts = [arguments.recipe or arguments.method, f"if{arguments.imbalance:g}"]
    parts += [arguments.profile] if arguments.profile != "exp" else []
    parts += [f"{arguments.augment}-augment"] if arguments.augment != "paper" else []
    parts += [f"mixup{arguments.mixup:g}"] if arguments.mixup else []
    parts += [f"holdout{holdout}"] if holdout else []
    parts += ["short"] if short else []
    config.name = f"{name}_lt-" + "-".join(parts)
    config.data = dict(
        name=name,
        imbalance=arguments.imbalance,
        profile=arguments.profile,
        max_count=0,
        holdout=holdout,
        seed=0,
        groups="counts",
        many_above=100,
        few_below=20,
        ranges=ranges,  # MiSLAS's and ResLT's groups, with --config.data.groups=ranges
    )
    config.model = dict(
        name="resnet_cifar",
        depth=32,
        width=16,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        dtype="float32",
        **recipes.network(chosen.blocks),
    )
    config.batch_size = 128
    config.seed = 0
    config.replicas = 1
    config.replicate = "loop"
    config.epochs = 12 if short else 200
    config.eval_every = 3 if short else 1
    config.eval_batch_size = 500
    config.dispatch_steps = 0
    config.checkpoint_seconds = 300.0
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=chosen.weight_decay)

    model = config.model
    setting = recipes.Setting(
        epochs=config.get_ref("epochs"),
        short=short,
        auto_augment={"paper": chosen.auto_augment or None, "plain": False, "auto": True}[arguments.augment],
        mixup=arguments.mixup,
        parts=("backbone", "classifier")
        + (("branches",) if model.branches else ())
        + (("logit_scale",) if model.logit_scale else ()),
        smoothing=nearest(mislas, arguments.imbalance),
        reslt=dict(reslt, beta=nearest(reslt["beta"], arguments.imbalance)),
        deferred="drw" in chosen.blocks,
    )
    recipes.chain(config, chosen, setting)
    return config
