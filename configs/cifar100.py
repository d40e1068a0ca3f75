"""CIFAR-100, adversarially trained: LBGAT and its family, with the papers' recipes.

    python -m ltjax.data.prepare cifar100
    python run.py --config=configs/cifar100.py:method=lbgat,beta=6
    python run.py --config=configs/cifar100.py:method=lbgat,beta=6 --mode=attack    # clean, PGD-20, CW-20, AutoAttack
    python run.py --config=configs/cifar100.py:method=lbgat,beta=6,awp=true,epsilon=8/255

Arguments: method=lbgat|pgd_at|trades|alp|bgat|gkl_at|ce|mixup, or recipe (blocks of configs/recipes.py);
budget=full|short (100 epochs, WRN-34-10, 10 attack steps; or 2 epochs, WRN-10-1, 3 steps for a machine without an
accelerator), model=wrn34_10|wrn34_20|wrn28_10|preact18|resnet18|resnet18_4x4|..., guide=resnet18|... (LBGAT's natural
model), beta (weight of the KL; LBGAT 0 or 6, TRADES 6), awp=true (adversarial weight perturbation of 0.005, with pgd_at
of 0.01), epsilon (0.031, 8/255), loss (of the labels, for LBGAT of the guide), sampler, classifier=linear|cosine,
augment, mixup, holdout.

Clean / AutoAttack in %, l-inf 0.031 (with AWP 8/255):
  LBGAT, beta 0, WRN-34-10, paper         70.25 / 27.16
  LBGAT, beta 6, WRN-34-10, paper         60.64 / 29.33    with AWP   62.99 / 31.20    WRN-34-20   62.55 / 30.20
  TRADES, WRN-34-10, paper                56.50 / 26.87    (LBGAT's README)
  GKL-AT, WRN-34-10, 8/255, paper         65.76 / 31.91    with AutoAugment   65.93 / 32.52    (its README)
  any method at full length, ours         not yet run

Clean / AutoAttack on the first 500 test images in %, budget=short (WRN-10-1, 2 epochs), l-inf 0.031, last epoch,
seed 0, two CPU cores, trained at commit 5f6fcdc, attacked at ccae3c4 with --mode=attack --config.attack.num_images=500:
  pgd_at   8.2 / 2.0    trades   14.5 / 4.0    lbgat, beta 0   9.1 / 0.8    lbgat, beta 6   6.8 / 1.0
"""

from configs import recipes, small


def get_config(arg=None):
    args, recipe = small.read(arg, long_tailed=False)
    config = small.base("cifar100", args, recipe)
    config.data.name = "cifar100"
    recipes.add_stages(config, args, recipe, recipes.DataSetting())
    return config
