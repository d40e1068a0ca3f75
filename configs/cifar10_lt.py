"""CIFAR-10-LT, ResNet-32, every long-tail method.

    python -m ltjax.data.prepare cifar10
    python run.py --config=configs/cifar10_lt.py:method=mislas,imbalance=100

Arguments: those of configs/cifar100_lt.py. MiSLAS's shifted batch norm is off here, as in the paper.

Our figures at full length are in results/; docs/reproduction.md compares them with the papers'.

Top-1 / ECE in %, imbalance 100, 50, 10, full length (papers: mostly of the best epoch on the test images; ours: of
the last):
  MiSLAS, paper           82.1 / 3.70   85.7 / 2.17   90.0 / 1.20   (after stage 1 alone: 72.8, 78.1, 87.6)
  MiSLAS, README, paper   82.5 / 3.66   85.7 / 2.01   90.0 / 1.20
  ResLT, paper            82.4          85.2          89.7
  BALMS, paper            -             -             -             (79.8 at imbalance 200)
  Logit adjustment, paper             77.9          -             -             (its README, another ResNet-32)
  Post-hoc logit adjustment, paper    77.3          -             -             (its README, another ResNet-32)
  LDAM-DRW, paper         77.03         -             88.16         (best epoch)
  Cross-entropy, paper    70.36         -             -             (LDAM-DRW's baseline, best epoch)
  ProCo, README, paper    85.9          88.2          91.9          (best epoch)
"""

from configs import recipes, small
from configs.common import nearest
from configs.recipes import ResLT, Smoothing

# by imbalance
SMOOTHING = {
    10: Smoothing(head=0.1, tail=0.0, classifier_rate=0.2, shifted_batch_norm=False),
    50: Smoothing(head=0.2, tail=0.0, classifier_rate=0.2, shifted_batch_norm=False),
    100: Smoothing(head=0.3, tail=0.0, classifier_rate=0.5, shifted_batch_norm=False),
}
BETA = {10: 0.96, 50: 0.998, 100: 0.998}


def get_config(arg=None):
    args, recipe = small.read(arg, long_tailed=True)
    config = small.base("cifar10_lt", args, recipe)
    config.data.update(
        name="cifar10",
        imbalance=args.imbalance,
        profile=args.profile,
        ranges=(3, 7),  # MiSLAS's groups, for --config.data.groups=ranges; ResLT has (3, 6)
    )
    papers = recipes.DataSetting(
        smoothing=nearest(SMOOTHING, args.imbalance),
        reslt=ResLT(beta=nearest(BETA, args.imbalance), medium_start=2, tail_start=4),
    )
    recipes.add_stages(config, args, recipe, papers)
    return config
