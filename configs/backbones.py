"""Pretrained backbones in the configs of large images: arguments, trained layers and learning rates."""

from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from configs import common, heads, recipes
from configs.common import Text
from ltjax.interop import pretrained

ADAPTERS = ("adaptformer", "lora")
FINETUNE = ("head", "last", "all", *ADAPTERS)
FOR_PRETRAINED = ("lift", *recipes.LARGE)  # methods for a pretrained backbone; the first is the default
# The layers of each family of backbones in three parts, from the input to the features.
LAYERS = {
    "resnet": ("(conv|norm|stage[12]_.*)", "stage3_.*", "stage4_.*"),
    "efficientnet_lite0": ("(conv|norm|stage[123]_.*)", "stage[45]_.*", "(stage[67]_.*|head|head_norm)"),
}
RATES = (0.01, 0.03, 0.1)  # learning rates of these parts, relative to the classifier's
LR = dict(head=0.3, last=0.1, all=0.1, adaptformer=0.01, lora=0.01)
EPOCHS = dict(head=30, last=10, all=10, adaptformer=10, lora=10)


def arguments(default: str) -> dict[str, Any]:
    """Return the arguments, for `common.read`. `default` is a name, or "none"."""
    return {"pretrained": Text(default, pretrained.FORMS.format(", ".join(pretrained.shipped()))), "finetune": FINETUNE}


def implied(arg: str | None, default: str) -> str:
    """Return the backbone that the arguments choose: none if they name another network, or `runlocal`."""
    given = {name: value for name, _, value in common.parts_of(arg)}
    other_network = "runlocal" in given or given.get("model", "auto") != "auto"
    return given.get("pretrained") or ("none" if other_network else default)


def find(args: SimpleNamespace, recipe: recipes.Recipe) -> pretrained.Backbone | None:
    """Find the backbone, and check the other arguments. Return None if the network trains from scratch.

    Raises:
      ValueError: If arguments exclude each other, or there is no such backbone.
    """
    if args.pretrained == "none":
        if "finetune" in args.changed:
            raise ValueError(f"config argument 'finetune={args.finetune}' needs a pretrained= backbone")
        return None
    if args.runlocal or args.model != "auto":
        other = "runlocal" if args.runlocal else f"model={args.model}"
        raise ValueError(
            f"config arguments {other} and pretrained={args.pretrained}: the network is that of the weights"
        )
    if args.finetune == "head":
        try:
            heads.check(recipe)
        except ValueError as error:
            raise ValueError(f"{error}; or finetune=all, or pretrained=none to train from scratch") from None
    if recipe.adversarial and args.finetune != "all":
        raise ValueError("config argument: adversarial training needs finetune=all, or pretrained=none")
    backbone = pretrained.find(args.pretrained)
    if args.finetune in ADAPTERS and backbone.settings["name"] != "vit":
        raise ValueError(
            f"config argument 'finetune={args.finetune}' is for vision transformers; allowed: head, last, all"
        )
    return backbone


def network(backbone: pretrained.Backbone, finetune: str) -> dict[str, Any]:
    """Return the settings of the network, without its head and its images' normalisation."""
    settings = {key: value for key, value in backbone.settings.items() if key not in ("mean", "std")}
    return {**settings, "adapter": finetune} if finetune in ADAPTERS else settings


def layers(settings: dict[str, Any]) -> tuple[str, str, str]:
    """Return regular expressions for three parts of a backbone's layers, from the images to the features."""
    if settings["name"] != "vit":
        return LAYERS[settings["name"]]
    blocks, third = range(1, settings["depth"] + 1), -(-settings["depth"] // 3)
    first, second, last = (blocks[at : at + third] for at in (0, third, 2 * third))
    early, middle, late = ("|".join(f"block{n}" for n in part) for part in (first, second, last))
    return (f"(conv|class_token|positions|registers|pre_norm|{early})", f"({middle})", f"({late}|norm|projection)")


def add_groups(config: ConfigDict, finetune: str) -> None:
    """Set the rates of the backbone's layers, in all stages that would train the whole backbone.

    With "last", only the last third trains; with adapters, only the adapters, at the classifier's rate.
    """
    for stage in (config[name] for name in config.stages):
        if "backbone" not in stage.groups or not stage.groups.backbone.rate:
            continue
        del stage.groups["backbone"]
        if finetune in ADAPTERS:
            stage.groups["adapters"] = dict(match="net/backbone/.*/adapter/.*", rate=1.0)
            stage.groups["backbone"] = dict(match="net/backbone/(?!.*/adapter/).*", rate=0.0)
            continue
        rates = RATES if finetune == "all" else (0.0, 0.0, RATES[-1])
        for name, match, rate in zip(("early", "middle", "late"), layers(config.model.to_dict()), rates, strict=True):
            stage.groups[name] = dict(match=f"net/backbone/{match}(/.*)?", rate=rate)
