"""CIFAR-10, adversarially trained: LBGAT and its family, with the papers' recipes.

    python -m ltjax.data.prepare cifar10
    python run.py --config=configs/cifar10.py:method=lbgat,beta=0
    python run.py --config=configs/cifar10.py:method=lbgat,beta=0 --mode=attack    # clean, PGD-20, CW-20, AutoAttack

Arguments: see configs/cifar100.py. method=trades has its authors' 76 epochs here.

Clean / AutoAttack in %, l-inf 0.031:
  LBGAT, beta 0, WRN-34-10, paper   88.22 / 52.86    WRN-34-20 (model=wrn34_20)   88.70 / 53.57
  TRADES, WRN-34-10, paper          84.92 / 52.64    (LBGAT's README)
  GKL-AT, WRN-34-10, 8/255, paper   85.31 / 57.13    (its README)
  any method, ours                  not yet run
"""

from configs import recipes, robust, small


def get_config(arg=None):
    args, recipe = small.read(arg, long_tailed=False)
    config = small.base("cifar10", args, recipe)
    config.data.name = "cifar10"
    papers = recipes.DataSetting(schedule=robust.TRADES if "trades" in recipe.blocks else robust.LBGAT)
    recipes.add_stages(config, args, recipe, papers)
    return config
