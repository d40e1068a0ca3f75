"""Arguments, images on disk, ResNets for 224 pixels and the papers' recipes, for the configs of large images."""

import re
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from configs import backbones, common, heads, recipes
from configs.common import Text

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DEPTHS = {"resnet": (10, 18, 34, 50, 101, 152), "resnext": (50, 101)}
_RESNETS = tuple(f"{kind}{depth}" for kind, depths in DEPTHS.items() for depth in depths)
_OTHERS = ("efficientnet_lite0", *common.VITS)
NETWORKS = f"one of {', '.join(_RESNETS + _OTHERS)}"


def read(arg: str | None, *, size: int = 224, pretrained: str = "none") -> tuple[SimpleNamespace, recipes.Recipe]:
    """Read the arguments; `backbone` becomes a `ltjax.interop.pretrained.Backbone`, or None.

    `runlocal` (an argument without a value) makes a run small enough for a laptop: 64 pixels, a ResNet-10, batches of
    64, few epochs, at most 100 images of each of the first 50 classes, and no pretrained network.
    """
    implied = backbones.implied(arg, pretrained)
    allowed: dict = {
        "method": recipes.LARGE if implied == "none" else backbones.FOR_PRETRAINED,
        "recipe": common.chains(long_tailed=True),
        "model": Text("auto", NETWORKS),
        "classifier": ("auto", "linear", "cosine"),
        **common.TRAINING_ARGUMENTS,
        "size": 0.0,
        "runlocal": False,
        **backbones.arguments(pretrained),
        **common.ROBUST_ARGUMENTS,
        "guide": Text("auto", NETWORKS),
    }
    args, recipe = common.read(arg, allowed, long_tailed=True)
    if args.size and (args.size != int(args.size) or args.size < 32):
        raise ValueError(f"config argument size={args.size:g}: a whole number of pixels, 32 or more")
    args.short, args.pretrained = args.runlocal, implied
    args.backbone = backbones.find(args, recipe)
    args.size = int(args.size) or (64 if args.runlocal else args.backbone.images["size"] if args.backbone else size)
    return args, recipe


def model(text: str) -> dict[str, Any]:
    """Return the settings of a network's name; `common.model` reads those for small images.

    Names are resnet10, 18, 34, 50, 101 and 152; resnext50 and 101 (32x4d); efficientnet_lite0; and those of `VITS`.
    Image sides are multiples of a vision transformer's patch, the last number of its name: 14, 16 or 32.
    """
    if text in _OTHERS:
        return common.model(text)
    match = re.fullmatch(r"(resnet|resnext)(\d+)", text)
    if not match or int(match[2]) not in DEPTHS[match[1]]:
        raise ValueError(f"config argument 'model={text}': {NETWORKS}")
    groups = dict(groups=32, group_width=4) if match[1] == "resnext" else {}
    return dict(name="resnet", depth=int(match[2]), stem="large", strides=(1, 2, 2, 2), **groups)


def base(
    file: str,
    args: SimpleNamespace,
    recipe: recipes.Recipe,
    *,
    network: str,
    epochs: int,
    weight_decay: float,
    batch_size: int = 256,
    pixels: dict = IMAGENET,
) -> ConfigDict:
    """Return a run without its stages, on images that stay on disk.

    `runlocal` changes the network, lengths and sizes; adversarial training changes epochs and weight decay. A
    pretrained backbone sets the network, the normalisation, and the size and crop of the images.
    """
    local, size, backbone = args.runlocal, args.size, args.backbone
    config = common.base(file, args)
    config.data.update(
        name=file,
        profile="natural",
        max_count=100 if local else 0,
        classes=50 if local else 0,
        size=size,
        resize=round(size / (backbone.images["crop"] if backbone else 224 / 256)),
    )
    if backbone:
        settings = backbones.network(backbone, args.finetune)
        pixels = {key: backbone.settings[key] for key in ("mean", "std")}
        config.update(weights=backbone.weights, weights_sha256=backbone.sha256, weights_parts=("backbone",))
        epochs = backbones.EPOCHS[args.finetune]
        config.data.min_area = 1.0 if args.finetune == "head" else config.data.min_area
    else:
        settings = model(args.model if args.model != "auto" else "resnet10" if local else network)
    guide = args.guide if args.guide != "auto" else "resnet10" if local else "resnet18"
    networks = dict(model=settings, guide=model(guide))
    fixed = bool(backbone) and args.finetune == "head"
    config.update(common.networks(args, recipe, **networks, fixed=fixed, **pixels, remat=False))
    if fixed:
        config.model.linear_map = heads.needs_linear_map(recipe)
    config.model.extra_block = False
    if config.model.branches:
        config.model.branch_kind = "conv"
    adapters = args.finetune in backbones.ADAPTERS
    config.batch_size = 64 if local else 128 if adapters else batch_size  # 128: LIFT's
    config.epochs = 6 if local else epochs
    config.eval_every = 1 if local else 5
    config.eval_batch_size = 256
    config.optimizer.weight_decay = recipe.weight_decay if recipe.adversarial else weight_decay
    return config


def papers(
    args: SimpleNamespace, *, reslt: recipes.ResLT, color_jitter: float = 0.4, **settings: Any
) -> recipes.DataSetting:
    """Return the papers' settings on large images: windows of any size, a cosine, and the given ones.

    With `runlocal`, ResLT's branches start at shares of the classes. A pretrained backbone has other rates.
    """
    if args.backbone:
        settings |= dict(lr=backbones.LR[args.finetune], fixed=args.finetune == "head", warmup=0.0)
        color_jitter = 0.0
    if args.runlocal:
        reslt = reslt._replace(medium_start=0.35, tail_start=None if reslt.tail_start is None else 0.7)
    return recipes.DataSetting(
        reslt=reslt._replace(warmup_start=0.0, nesterov=False, bias=False),
        color_jitter=color_jitter,
        cosine=True,
        crop_padding=0,
        balanced_epochs=False,  # a balanced epoch would be up to 19 times as long; DRO-LT's code has no large images
        **settings,
    )


def add_stages(config: ConfigDict, args: SimpleNamespace, recipe: recipes.Recipe, papers: recipes.DataSetting) -> None:
    """Write the stages of a recipe, see `configs.recipes`, and the rates of a pretrained backbone's layers."""
    recipes.add_stages(config, args, recipe, papers)
    if args.backbone and not papers.fixed:
        backbones.add_groups(config, args.finetune)
        for name in config.stages:
            config[name].batch_norm = "eval"
