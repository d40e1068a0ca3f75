"""Arguments, networks, lengths and the optimizer, for the configs of CIFAR and Tiny ImageNet."""

from types import SimpleNamespace

from ml_collections import ConfigDict

from configs import common, recipes, robust
from configs.common import NETWORKS, Text

CIFAR = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))  # the papers', for CIFAR-100 as well


def read(arg: str | None, *, long_tailed: bool) -> tuple[SimpleNamespace, recipes.Recipe]:
    """Read the arguments; with `long_tailed`, also the imbalance and all methods."""
    allowed: dict = {
        "method": recipes.WITHOUT_PRETRAINED if long_tailed else ("lbgat", *common.BALANCED),
        "recipe": common.chains(long_tailed=long_tailed),
        **({"imbalance": 100.0, "profile": ("exp", "step")} if long_tailed else {}),
        "budget": ("full", "short"),
        "model": Text("auto", NETWORKS),
        "classifier": ("auto", "linear", "cosine"),
        **common.TRAINING_ARGUMENTS,
        **common.ROBUST_ARGUMENTS,
    }
    args, recipe = common.read(arg, allowed, long_tailed=long_tailed)
    args.short = args.budget == "short"
    return args, recipe


def base(file: str, args: SimpleNamespace, recipe: recipes.Recipe, *, pixels: dict = CIFAR) -> ConfigDict:
    """Return a run without its stages. `pixels` has mean and std; adversarial training does not normalise."""
    config, short = common.base(file, args), args.short
    config.batch_size = recipe.batch_size
    config.optimizer.weight_decay = recipe.weight_decay
    network, guide = "resnet32", "wrn10_1" if short else "resnet18"
    if recipe.adversarial:
        special = robust.OVERRIDES.get(recipe.blocks[0])
        network = "wrn10_1" if short else special.network if special else "wrn34_10"
        pixels = dict(mean=(0.0,), std=(1.0,))
        config.eval_every = 1 if short else 0  # 0: every fifth epoch, and each of the last 20
    else:
        config.epochs = 12 if short else recipe.epochs_on.get(file, recipe.epochs)
        config.eval_every = 3 if short else 0
    networks = dict(
        model=common.model(network if args.model == "auto" else args.model),
        guide=common.model(guide if args.guide == "auto" else args.guide, "guide"),
    )
    config.update(common.networks(args, recipe, **networks, **pixels))
    return config
