"""Train a classifier on features of any model, such as embeddings of CLIP or DINOv2.

    python run.py --config=configs/features.py --config.data.root=FILE.npz
    python run.py --config=configs/features.py:method=balanced_softmax,normalise=unit --config.data.root=FILE.npz
    python run.py --workdir=WORKDIR --mode=predict --images=OTHERS.npz --out=FILE.csv

FILE.npz holds `features` [N, D] and `labels` [N], and optionally `split` ("train" or "validation"); .npy, .parquet and
.csv are also read (`ltjax/data/feature_files.py`). Arguments: method, or recipe; classifier, mixup, holdout;
normalise=none|unit|standardise (divide a row by its length, or each dimension by its standard deviation).
"""

from configs import common, heads, recipes


def get_config(arg=None):
    allowed: dict = {
        "method": ("lift", *(name for name in heads.ON_FEATURES if name != "lift")),
        "recipe": common.chains(long_tailed=True),
        "classifier": ("auto", "linear", "cosine"),
        "normalise": ("none", "unit", "standardise"),
        "mixup": 0.0,
        "precision": tuple(common.PRECISIONS),
        "holdout": 0.0,
    }
    args, recipe = common.read(arg, allowed, long_tailed=True)
    heads.check(recipe)
    heads.complete(args)
    config = common.base("features", args)
    config.data.update(name="features", profile="natural")
    network = dict(name="features", normalise=args.normalise)
    config.update(common.networks(args, recipe, model=network, guide={}, mean=(0.0,), std=(1.0,)))
    config.model.linear_map = heads.needs_linear_map(recipe)
    config.epochs = 30
    config.eval_every = 5
    config.optimizer.weight_decay = recipe.weight_decay
    recipes.add_stages(config, args, recipe, heads.papers())
    return config
