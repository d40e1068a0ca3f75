"""What the configs of large images share: pictures on disk, ResNets for 224 pixels, the papers' recipes for them."""

import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import common, recipes, robust

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LOCAL_STARTS = dict(medium_start=0.35, tail_start=0.7)  # of ResLT's branches, as shares of the classes
DEPTHS = {"resnet": (10, 18, 34, 50, 101, 152), "resnext": (50, 101)}
NETWORKS = "one of " + ", ".join(f"{kind}{depth}" for kind, depths in DEPTHS.items() for depth in depths)


class Recipe(NamedTuple):
    """What a data set's papers ask for."""

    epochs: int
    model: str  # of all methods but ResLT
    smoothing: tuple[float, float, float, bool]  # MiSLAS: head, tail, classifier's rate, shifted batch norm
    mixup: float  # MiSLAS's Beta(a, a)
    weight_decay: float
    reslt_model: str
    reslt: dict[str, float]  # beta, medium_start and perhaps tail_start
    reslt_branches: int
    gammas: dict[str, float]  # ResLT: power of the lengths that the classifier's rows are divided by, by model
    ranks: tuple[int, int]  # where some papers let their medium and few-shot classes begin, by rank of count
    size: int = 224
    batch_size: int = 256
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    only_mislas_jitters: bool = False  # colours; else all methods do
    reslt_warmup: int = 5  # epochs
    pooled_branches: tuple[str, ...] = ()  # networks with which ResLT's branches see features, not maps
    # One new block on a frozen backbone that was trained elsewhere (config.weights). Adversarial training goes without:
    # a frozen backbone keeps the features of clean images, so all of its network trains, from scratch.
    extra_block: bool = False


def model(text: str) -> dict[str, Any]:
    """The network of a name: resnet10, 18, 34, 50, 101 or 152; resnext50 or 101 (32x4d)."""
    found = re.fullmatch(r"(resnet|resnext)(\d+)", text)
    if not found or int(found[2]) not in DEPTHS[found[1]]:
        raise ValueError(f"config argument 'model={text}': {NETWORKS}")
    groups = dict(groups=32, group_width=4) if found[1] == "resnext" else {}
    return dict(name="resnet", depth=int(found[2]), stem="large", strides=(1, 2, 2, 2), **groups)


def images(name: str, arg: str | None, recipe: Recipe, *, source: str = "") -> ConfigDict:
    """A run on images that stay on disk. source: the data set, where its name is another.

    `runlocal` (an argument without a value) shrinks any of them to a laptop: 64 pixels, a ResNet-10, batches of 64, few
    epochs, at most 100 images of each of the first 50 classes, and no network that was trained elsewhere.
    """
    local = "runlocal" in (arg or "").split(",")
    allowed: dict = {
        "method": tuple(recipes.METHODS),
        "recipe": common.chains(long_tailed=True),
        "model": common.Text("auto", NETWORKS),
        "classifier": ("auto", "linear", "cosine"),
        "augment": ("paper", "plain", "auto"),
        "mixup": 0.0,
        "precision": tuple(common.PRECISIONS),
        "holdout": 0.0,
        "size": float(64 if local else recipe.size),
        "runlocal": False,
        **common.ROBUST_ARGUMENTS,
        "guide": common.Text("auto", NETWORKS),
    }
    arguments, chosen = common.checked(arg, allowed, long_tailed=True)
    if arguments.size != int(arguments.size) or arguments.size < 32:
        raise ValueError(f"config argument size={arguments.size:g}: a whole number of pixels, 32 or more")
    size, holdout = int(arguments.size), common.held_out(arguments, chosen)
    residual = "reslt" in chosen.blocks
    usual = "resnet10" if local else recipe.reslt_model if residual else recipe.model
    network = common.choose(arguments.model, usual)
    config = ConfigDict()
    config.name = _run_name(name, arguments, allowed, holdout, local)
    config.data = dict(
        name=source or name,
        root="",
        imbalance=1.0,
        profile="natural",
        max_count=100 if local else 0,
        classes=50 if local else 0,
        holdout=holdout,
        seed=0,
        groups="counts",
        many_above=100,
        few_below=20,
        ranges=recipe.ranks,  # some papers' groups, with --config.data.groups=ranks
        size=size,
        resize=round(size * 256 / 224),
        min_area=0.08,
        threads=0,
    )
    config.update(
        common.networks(
            arguments,
            chosen,
            dict(mean=recipe.mean, std=recipe.std, remat=False),
            usual=model(network),
            guide=model(common.choose(arguments.guide, "resnet10" if local else "resnet18")),
        )
    )
    if residual:
        kind = "pooled_conv" if network in recipe.pooled_branches else "conv"
        config.model.update(branches=2 if recipe.reslt_branches == 2 else 3, branch_kind=kind)
    config.model.extra_block = extended = recipe.extra_block and not (local or chosen.robust)
    config.batch_size = 64 if local else recipe.batch_size
    schedule = robust.SHORT if local else robust.LBGAT
    config.epochs = schedule.epochs if chosen.robust else 6 if local else recipe.epochs
    config.eval_every = 1 if local else 5
    config.eval_batch_size = 256
    decay = chosen.weight_decay if chosen.robust else recipe.weight_decay
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=decay)
    jittered = not recipe.only_mislas_jitters or bool({"mixup", "smoothing"} & set(chosen.blocks))
    scale = recipes.Scale(
        lr=0.1,
        warmup=recipe.reslt_warmup / recipe.epochs,
        cosine=True,
        crop_padding=0,
        color_jitter=0.4 if jittered else 0.0,
        mixup=recipe.mixup,
        reslt_warmup_start=0.0,
        reslt_nesterov=False,
        reslt_classifier=dict(tau=recipe.gammas.get(network, 0.3), bias=False),
        frozen_backbone=extended,
        balanced_epochs=False,  # DRO-LT has none of these data sets; balanced ones would be up to 19 times as long
    )
    reslt = dict(recipe.reslt)
    if local:
        reslt.update({start: share for start, share in LOCAL_STARTS.items() if start in reslt})
    own = dict(smoothing=recipe.smoothing, reslt=reslt, schedule=schedule, scale=scale)
    common.add_stages(config, arguments, chosen, short=local, **own)
    return config


def _run_name(name: str, arguments: ConfigDict, allowed: dict, holdout: int, local: bool) -> str:
    parts = [name, arguments.recipe or arguments.method, *common.changed(arguments, allowed)]
    parts += [f"{arguments.size:g}px"] if arguments.size != allowed["size"] else []
    parts += [f"holdout{holdout}"] if holdout else []
    return "-".join(parts + (["runlocal"] if local else []))
