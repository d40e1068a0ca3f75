"""Arguments after the colon, the defaults of a run, and networks by name, for all configs."""

import math
import re
from types import SimpleNamespace
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import recipes, robust

LONG_TAILED = {"reslt", "smoothing", "balms", "proco", "bcl"}  # blocks that need rare classes
BALANCED = ("pgd_at", "trades", "alp", "bgat", "gkl_at", "ce", "mixup")  # and lbgat: methods for balanced classes


class Text(NamedTuple):
    """An argument of any text."""

    default: str
    form: str  # the allowed values, in words


# The meaning of each argument, for `:help`.
MEANINGS = {
    "method": "the recipe: a chain of stages",
    "recipe": "instead of a method: blocks joined by +, such as reslt+dro+smoothing",
    "imbalance": "images of the largest class divided by those of the smallest, 1 or more",
    "profile": "exp: class sizes fall exponentially; step: half of the classes are large, half small",
    "budget": "full: the papers' epochs; short: a few, for a machine without an accelerator",
    "model": "the network; auto: the recipe's",
    "classifier": "the network's last layer; auto: the method's",
    "augment": "paper: the recipe's own; plain: crops and flips; auto: AutoAugment and Cutout, or RandAugment",
    "mixup": "a of Beta(a, a), in stages that train the whole network; 0: the recipe's own",
    "precision": "dtype of the network's activations; parameters, statistics, logits and optimizer stay float32",
    "normalise": "normalisation of features: none, unit (length 1), standardise (mean 0, variance 1 of each dimension)",
    "cutmix": "source of CutMix's boxes; auto: the method's",
    "ema": "decay of a moving average of the weights, for evaluation; auto: the method's",
    "sam": "rho of sharpness-aware minimisation; 0: none",
    "holdout": "images of each class held out of training, for selection and tuning",
    "size": "side of the images that the network sees, in pixels; 0: that of the weights, or the config's own",
    "runlocal": "make the run small enough for a laptop: 64 pixels, a ResNet-10, few classes, images and epochs",
    "pretrained": "the pretrained backbone; none: train from scratch",
    "finetune": "the trained parts: head (features are computed once), the last third, all, or adapters of a ViT",
    "guide": "adversarial training, lbgat and bgat: the natural network; auto: the recipe's",
    "beta": "adversarial training: weight of the KL divergence, 0 or more; default: the method's own",
    "loss": "adversarial training: loss of the labels (lbgat: of the guide)",
    "awp": "adversarial training: perturb the weights as well, by 0.005 of their size; with pgd_at by 0.01",
    "sampler": "adversarial training: sampler of the first stage",
    "epsilon": "adversarial training: l-inf radius in pixel units of [0, 1]",
}
PRECISIONS = {"float32": "float32", "bf16": "bfloat16"}  # {argument: the model's dtype}
NETWORKS = "such as resnet32, wrn34_10, wrn10_1, resnet18, resnet18_4x4, preact18, vit_ti16 or efficientnet_lite0"
# All settings of vision transformers, so that --config.model.KEY=VALUE can change them; then networks by name.
VIT = dict(depth=12, width=768, heads=0, mlp_width=0, patch=16, grid=14, registers=0, layer_scale=False, pre_norm=False)
VIT |= dict(qkv_bias=True, epsilon=1e-6, activation="gelu", projection=0, features="class", adapter="none", rank=0)
_SIZES = dict(ti=dict(width=192), s=dict(width=384), b=dict(width=768), l=dict(width=1024, depth=24))
_DINOV2 = dict(patch=14, grid=37, layer_scale=True)
_CLIP = dict(pre_norm=True, epsilon=1e-5, activation="quick_gelu")
VITS: dict[str, dict] = {f"vit_{size}16": shape for size, shape in _SIZES.items()}
for _size in ("s", "b", "l"):
    VITS[f"dinov2_{_size}14"] = dict(_SIZES[_size], **_DINOV2)
    VITS[f"dinov2_{_size}14_reg"] = dict(_SIZES[_size], **_DINOV2, registers=4)
VITS |= dict(
    clip_b16=dict(_SIZES["b"], **_CLIP),
    clip_b32=dict(_SIZES["b"], **_CLIP, patch=32, grid=7),
    clip_l14=dict(_SIZES["l"], **_CLIP, patch=14, grid=16),
)
# arguments of stages that train the whole network, for any method
TRAINING_ARGUMENTS = {
    "augment": ("paper", "plain", "auto"),
    "mixup": 0.0,
    "cutmix": ("auto", "none", "batch", "class_balanced"),
    "ema": Text("auto", "a number below 1; 0: none"),
    "sam": 0.0,
    "precision": tuple(PRECISIONS),
    "holdout": 0.0,
}
ROBUST_ARGUMENTS = {
    "guide": Text("auto", NETWORKS),
    "beta": -1.0,  # the method's default
    "loss": robust.LOSSES,
    "awp": ("false", "true"),
    "sampler": ("instance_balanced", "class_aware", "class_balanced"),
    "epsilon": Text("0.031", "a number, or a fraction such as 8/255"),
}


class Help(Exception):
    """The arguments of a config contain `help`.

    Attributes:
      arguments: {name: (default, allowed values, meaning)}.
    """

    def __init__(self, allowed: dict):
        super().__init__("help is for `python run.py --config=FILE:help`")
        self.arguments = {name: (*_in_words(choice), MEANINGS.get(name, "")) for name, choice in allowed.items()}


def _in_words(choice) -> tuple[str, str]:
    """Return the default of an argument, and its allowed values."""
    if isinstance(choice, Text):
        return choice
    if isinstance(choice, tuple):
        return choice[0], ", ".join(choice)
    if isinstance(choice, bool):
        return "", "no value"
    return f"{choice:g}" if choice >= 0 else "", "a number"


def parts_of(text: str | None) -> list[tuple[str, str, str]]:
    """Split `"method=ce,runlocal"` -> [("method", "method=ce", "ce"), ("runlocal", "runlocal", "")]."""
    parts = [part for part in (text or "").split(",") if part]
    return [(part.partition("=")[0], part, part.partition("=")[2]) for part in parts]


def read_arguments(text: str | None, allowed: dict) -> SimpleNamespace:
    """Read `"method=ce,imbalance=50"`.

    Args:
      text: The arguments after the colon, if any.
      allowed: {name: (default, other choices...), or a `Text`, or a number, or False: given without a value}.

    Returns:
      A value for each name; `given`, the names in `text`; `changed`, the names whose value is not the default.

    Raises:
      ValueError: For a mistake.
      Help: If an argument is `help`.
    """
    default = {name: choice[0] if isinstance(choice, tuple) else choice for name, choice in allowed.items()}
    values, parts = dict(default), parts_of(text)
    for name, part, value in parts:
        if part == "help":
            continue
        if name not in allowed:
            raise ValueError(f"unknown config argument {name!r}; allowed: {', '.join(allowed) or 'none'}")
        values[name] = _value(name, part, value, allowed[name])
    given = {name for name, *_ in parts}
    if "help" in given:
        raise Help(allowed)
    return SimpleNamespace(**values, given=given, changed={name for name in values if values[name] != default[name]})


def _value(name: str, part: str, value: str, choice):
    """Check one argument. Raise ValueError if it is wrong."""
    if isinstance(choice, Text):
        return value
    if isinstance(choice, tuple):
        if value not in choice:
            raise ValueError(f"config argument {part!r}: allowed values of {name}: {', '.join(choice)}")
        return value
    if isinstance(choice, bool):
        if part != name:
            raise ValueError(f"config argument {part!r}: {name} takes no value")
        return True
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"config argument {part!r}: {name} is a finite number")
    return number


def read(text: str | None, allowed: dict, *, long_tailed: bool) -> tuple[SimpleNamespace, recipes.Recipe]:
    """Read the arguments of a config, and look up their recipe.

    Raises:
      ValueError: For a wrong argument, or two that exclude each other.
    """
    args = read_arguments(text, allowed)
    if args.recipe and "method" in args.given:
        raise ValueError(f"config arguments method={args.method} and recipe={args.recipe}: give one of them")
    args.holdout = parse_holdout(args.holdout)
    recipe = recipes.parse_recipe(args.recipe) if args.recipe else recipes.RECIPES[args.method]
    if special := robust.OVERRIDES.get(recipe.blocks[0]):
        vars(args).update({key: getattr(special, key) for key in ("epsilon", "loss", "awp") if key not in args.given})
    if not recipe.adversarial and (given := [key for key in ROBUST_ARGUMENTS if key in args.given]):
        methods = ", ".join(name for name, each in recipes.RECIPES.items() if each.adversarial)
        raise ValueError(f"config argument {given[0]!r} is for adversarial training: {methods}")
    for key, blocks in robust.NEEDED_BY.items():
        if key in args.given and not set(blocks) & set(recipe.blocks):
            raise ValueError(f"config argument {key!r} is for {', '.join(blocks)}")
    if "beta" in args.given and not args.beta >= 0:
        raise ValueError(f"config argument 'beta={args.beta:g}': from 0 up")
    if not long_tailed and (tailed := LONG_TAILED & set(recipe.blocks)):
        raise ValueError(f"config argument 'recipe={args.recipe}': {min(tailed)} is for long-tailed data")
    if "tau_norm" in recipe.blocks and not args.holdout:
        args.holdout = 10  # to choose tau on
        args.changed.add("holdout")
    return args, recipe


def chains(*, long_tailed: bool) -> Text:
    """Describe the argument `recipe`."""
    first, then = (
        ", ".join(block for block in blocks if long_tailed or block not in LONG_TAILED)
        for blocks in (recipes.FIRST, recipes.NEXT)
    )
    return Text("", f"first {first}; then any of {then}")


def parse_holdout(holdout: float) -> int:
    """Check the argument `holdout`. Raise ValueError for a fraction."""
    if holdout != int(holdout):
        raise ValueError(f"config argument holdout={holdout}: a whole number of images of each class")
    return int(holdout)


def defaults() -> ConfigDict:
    """Return all settings of a run with their defaults; configs change some.

    `RunConfig` of `ltjax/config.py` has the same keys and defaults, with their types and meanings.
    """
    config = ConfigDict(dict(name="", model={}, guide={}, batch_size=128, epochs=0, seed=0, stages=()))
    config.data = dict(name="", imbalance=1.0, profile="exp", max_count=0, classes=0, holdout=0, seed=0)
    config.data.update(groups="counts", many_above=100, few_below=20, ranges=())
    config.data.update(root="", labels="", size=224, resize=256, min_area=0.08, threads=0, upright=False)  # on disk
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=0.0)
    config.update(replicas=1, replicate="loop", dispatch_steps=0, gpu_graphs="default", accumulate=1, class_weights="")
    config.update(eval_every=0, eval_batch_size=500, checkpoint_seconds=300.0)
    config.update(weights="", weights_sha256="", weights_parts=())  # see `python -m ltjax.interop.torch --help`
    config.attack = dict(epsilon="0.031", norm="linf", num_images=0, tests=("pgd-20", "cw-20", "autoattack"))
    config.attack.update(step_size="2/255", batch_size=500, seed=0)
    config.attack.radii = (0.25, 0.5, 2.0, 4.0)  # extra radii for the report's curve, as multiples of epsilon
    return config


def run_name(file: str, args: SimpleNamespace) -> str:
    """Join the file's name, the method, and the changed arguments."""
    words = dict(profile="{}", model="{}", guide="{}-guide", classifier="{}", loss="{}", sampler="{}", precision="{}")
    words |= dict(beta="beta{:g}", epsilon="eps{}", awp="awp", augment="{}-augment", mixup="mixup{:g}", size="{:g}px")
    words |= dict(cutmix="{}-cutmix", ema="ema{}", sam="sam{:g}")
    words |= dict(pretrained="{}-backbone", finetune="{}")
    words |= dict(holdout="holdout{}", budget="{}", runlocal="runlocal")
    parts = [file, args.recipe or args.method]
    parts += [f"if{args.imbalance:g}"] if hasattr(args, "imbalance") else []
    parts += [word.format(_short(getattr(args, name))) for name, word in words.items() if name in args.changed]
    return "-".join(parts).replace("/", "_")


def _short(value):
    """Return the last part of a path or of a repository's name."""
    return re.sub(r"^.*/(?=[^/])|/+$|\.safetensors$", "", value) if isinstance(value, str) else value


def base(file: str, args: SimpleNamespace) -> ConfigDict:
    """Return the defaults, changed by the common arguments."""
    config = defaults()
    config.name = run_name(file, args)
    config.data.holdout = args.holdout
    config.attack.epsilon = args.epsilon
    return config


def model(text: str, argument: str = "model") -> dict:
    """Return the settings of a network's name, for small images; `large.model` reads those for large ones.

    Names are resnet32 (any 6 n + 2), wrn34_10, resnet18 and preact18 (or 34), efficientnet_lite0, and those of `VITS`.
    resnet18 is LBGAT's, with last maps of 8x8 pixels; resnet18_4x4 is the usual one for CIFAR. These networks and
    preact18 start with PyTorch's initial weights, like their authors'.
    """
    if text in VITS:
        return dict(name="vit", **{**VIT, **VITS[text]})
    if text == "efficientnet_lite0":
        return dict(name="efficientnet_lite0")
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", text):
        return dict(name="wide_resnet", depth=int(match[1]), width=int(match[2]))
    if match := re.fullmatch(r"(resnet|preact)(18|34)", text):
        name = {"resnet": "resnet", "preact": "preact_resnet"}[match[1]]
        return dict(name=name, depth=int(match[2]), width=64, init="torch")
    if match := re.fullmatch(r"resnet(18|34)_4x4", text):
        return dict(name="resnet", depth=int(match[1]), width=64, strides=(1, 2, 2, 2), init="torch")
    if match := re.fullmatch(r"resnet(\d+)", text):
        return dict(name="resnet_cifar", depth=int(match[1]), width=16)
    raise ValueError(f"config argument '{argument}={text}': {NETWORKS}")


def networks(
    args: SimpleNamespace, recipe: recipes.Recipe, *, model: dict, guide: dict, fixed: bool = False, **pixels
) -> dict:
    """Return `model` with the recipe's head, and `guide` if the recipe has one.

    Args:
      args: Only `classifier` and `precision` are used.
      recipe: Its blocks determine the head.
      model: Settings of the network, without its head.
      guide: Settings of the natural network.
      fixed: Whether the backbone keeps pretrained weights.
      **pixels: `mean`, `std` and other settings of both.
    """
    pixels["dtype"] = PRECISIONS[args.precision]
    head = recipes.head_settings(recipe.blocks, fixed)
    head["classifier"] = head["classifier"] if args.classifier == "auto" else args.classifier
    settings = dict(model=dict(**model, **pixels, **head, classifier_init=classifier_init(model, recipe)))
    if {"natural", "lbgat"} & set(recipe.blocks):
        settings["guide"] = dict(**guide, **pixels, classifier="linear", classifier_init=classifier_init(guide, recipe))
    elif "student" in recipe.blocks:
        settings["guide"] = dict(settings["model"])  # the teacher
    return settings


def classifier_init(network: dict, recipe: recipes.Recipe) -> str:
    """Return the authors' initialisation of the classifier.

    It is He-normal in the small ResNets of LDAM, MiSLAS and DRO-LT, else PyTorch's; a wide ResNet's bias is 0.
    """
    if network["name"] == "wide_resnet":
        return "torch_no_bias"
    torch = {"reslt", "balms", "proco", "bcl"} & set(recipe.blocks)
    return "he" if network["name"] == "resnet_cifar" and not torch else "torch"


def nearest(table: dict, imbalance: float):
    """Return the entry of {imbalance: settings} with the nearest imbalance by ratio."""
    return table[min(table, key=lambda key: abs(math.log(key) - math.log(max(imbalance, 1.0))))]
