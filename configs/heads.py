"""Methods that only train a classifier, on fixed features, and their arguments."""

from types import SimpleNamespace

from configs import recipes, robust

# Blocks that train a backbone, or change its images.
OTHERS = ("reslt", "balms", "balanced_teacher", "student", "proco", "bcl", "robust_classifier", *robust.BLOCKS)
ON_FEATURES = tuple(
    name for name, recipe in recipes.RECIPES.items() if not (recipe.adversarial or set(OTHERS) & set(recipe.blocks))
)


def check(recipe: recipes.Recipe) -> None:
    """Raise ValueError if a recipe needs more than a classifier."""
    if unfit := [block for block in recipe.blocks if block in OTHERS]:
        raise ValueError(
            f"config argument: {unfit[0]} trains a whole network, and the backbone is fixed; methods for its "
            f"features: {', '.join(ON_FEATURES)}"
        )


def papers(**settings) -> recipes.DataSetting:
    """Return the settings of fixed features: a cosine schedule, and no augmentation."""
    return recipes.DataSetting(cosine=True, crop_padding=0, balanced_epochs=False, fixed=True, **settings)


def complete(args: SimpleNamespace) -> None:
    """Add the other configs' arguments, with values that have no effect."""
    vars(args).update(augment="plain", short=False, epsilon="0.031", beta=-1.0, awp="false")
    vars(args).update(loss=robust.LOSSES[0], sampler="instance_balanced")
    args.changed -= {"augment", "epsilon", "beta", "awp", "loss", "sampler"}


def needs_linear_map(recipe: recipes.Recipe) -> bool:
    """Return whether a recipe trains features, and so needs a linear map of the fixed ones."""
    return "dro" in recipe.blocks
