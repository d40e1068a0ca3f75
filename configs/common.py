"""What the configs share: reading `key=value,...` after the colon, and the stages of the CIFAR recipes."""

import math

from ml_collections import ConfigDict

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the papers', for CIFAR-100 as well


def read_arguments(text: str | None, allowed: dict) -> ConfigDict:
    """`"method=ce,imbalance=50"` -> values, with defaults. allowed: {name: (default, other choices...) or a number}."""
    values = {name: choice[0] if isinstance(choice, tuple) else choice for name, choice in allowed.items()}
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        if name not in allowed:
            raise ValueError(f"unknown config argument {name!r}; allowed: {', '.join(allowed) or 'none'}")
        if isinstance(allowed[name], tuple):
            if value not in allowed[name]:
                raise ValueError(f"config argument {part!r}: allowed values of {name}: {', '.join(allowed[name])}")
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


def cifar_long_tailed(name: str, arg: str | None, mislas: dict, ranges: tuple[int, int]) -> ConfigDict:
    """A CIFAR-LT run. mislas: {imbalance factor: (smoothing head, tail, classifier's rate, shifted batch norm)}.

    ranges: where some papers let their medium and few-shot classes begin.
    """
    arguments = read_arguments(
        arg, {"method": ("mislas", "ce"), "imbalance": 100.0, "profile": ("exp", "step"), "budget": ("full", "short")}
    )
    short = arguments.budget == "short"
    config = ConfigDict()
    shape = f"if{arguments.imbalance:g}" + ("" if arguments.profile == "exp" else f"-{arguments.profile}")
    config.name = f"{name}_lt-{arguments.method}-{shape}" + ("-short" if short else "")
    config.data = dict(
        name=name,
        imbalance=arguments.imbalance,
        profile=arguments.profile,
        max_count=0,
        holdout=0,
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
        classifier="linear",
        logit_scale=arguments.method == "mislas",
        dtype="float32",
    )
    config.batch_size = 128
    config.seed = 0
    config.epochs = 12 if short else 200
    config.eval_every = 3 if short else 1
    config.eval_batch_size = 500
    config.dispatch_steps = 0
    config.checkpoint_seconds = 300.0
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=2e-4)

    # 5 epochs of warm-up, then x0.1 after 160 and x0.01 after 180 of 200; a short run's warm-up is 2 of 12 epochs
    steps = dict(kind="step", warmup=2 / 12 if short else 5 / 200, decay_at=(0.8, 0.9), decay=0.1)
    crop_flip = dict(crop_padding=4, flip=True, auto_augment=False, cutout_size=0, mixup_alpha=0.0)
    plain = dict(epochs=config.get_ref("epochs"), lr=0.1, schedule=steps, start_from="scratch", batch_norm="train")
    if arguments.method == "ce":
        config.stages = ("ce",)
        config.ce = dict(
            plain,
            title="Cross-entropy",
            method=dict(name="erm"),
            sampler=dict(name="instance_balanced"),
            augment=crop_flip,
            groups=dict(all=dict(match=".*", rate=1.0)),
        )
    else:
        config.stages = ("features", "classifier")
        head, tail, rate, shifted = nearest(mislas, arguments.imbalance)
        epochs = 2 if short else 10
        config.update(mislas_stages(plain, crop_flip, head=head, tail=tail, rate=rate, shifted=shifted, epochs=epochs))
    return config


def mislas_stages(
    plain: dict, augment: dict, *, head: float, tail: float, rate: float, shifted: bool, epochs: int, lr: float = 0.1
) -> dict:
    """MiSLAS's stages. plain: common settings of a stage from scratch. head, tail: label-aware smoothing.

    rate: the classifier's learning rate over `lr`, that of the logit scale. shifted: batch norm goes on learning.
    """
    features = dict(
        plain,
        title="MiSLAS, stage 1",
        method=dict(name="erm"),
        sampler=dict(name="instance_balanced"),
        augment=dict(augment, mixup_alpha=1.0),
        groups=dict(
            network=dict(match="net/(backbone|classifier)/.*", rate=1.0), frozen=dict(match="net/logit_scale", rate=0.0)
        ),
    )
    classifier = dict(
        title="MiSLAS, stage 2",
        method=dict(name="mislas", head=head, tail=tail, shape="concave"),
        epochs=epochs,
        lr=lr,
        schedule=dict(kind="cosine"),
        start_from="features",
        sampler=dict(name="class_aware", in_a_row=4),
        augment=augment,
        batch_norm="train" if shifted else "eval",
        groups=dict(
            frozen=dict(match="net/backbone/.*", rate=0.0),
            classifier=dict(match="net/classifier/.*", rate=rate),
            scale=dict(match="net/logit_scale", rate=1.0),
        ),
    )
    return dict(features=features, classifier=classifier)
