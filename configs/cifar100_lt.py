"""CIFAR-100-LT, ResNet-32, every long-tail method.

    python -m ltjax.data.prepare cifar100
    python run.py --config=configs/cifar100_lt.py:method=mislas,imbalance=100
    python run.py --config=configs/cifar100_lt.py:method=drolt --config.replicas=5    # five seeds in one program
    python run.py --config=configs/cifar100_lt.py:recipe=reslt+dro+smoothing          # blocks of configs/recipes.py

Arguments (:help lists all): method, or recipe; imbalance (10, 50 and 100 are the papers'), profile=exp|step,
budget=full|short (200 epochs and more, or 12 and a few), augment=paper|plain|auto (auto: AutoAugment and Cutout), mixup
(Beta(a, a) in stages that train the whole network), holdout (images of each class, held out of training; tau_norm
chooses tau on them and takes 10 by default: compare it with runs that have holdout=10).
method=balms is balanced softmax in BALMS's recipe: 12,411 steps of 512 images at imbalance 100, AutoAugment, Cutout.
MiSLAS's authors recommend --config.optimizer.weight_decay=5e-4: it gives better figures than their paper's.

Our figures at full length are in results/; docs/reproduction.md compares them with the papers'.

Top-1 / ECE in %, imbalance 100, 50, 10, full length (papers: mostly of the best epoch on the test images; ours: of
the last):
  MiSLAS, paper           47.0 / 4.83   52.3 / 2.25   63.2 / 1.73   (after stage 1 alone: 39.5, 45.4, 59.1)
  MiSLAS, README, paper   47.0 / 4.83   52.3 / 2.47   63.2 / 1.73
  DRO-LT, paper           47.3          -             63.4
  ResLT, paper            48.2          52.7          62.0
  BALMS, paper            -             -             -             (46.7 at imbalance 200)
  Logit adjustment, paper             44.1          -             -             (its README, another ResNet-32)
  Post-hoc logit adjustment, paper    44.1          -             -             (its README, another ResNet-32)
  LDAM-DRW, paper         42.04         -             58.71         (best epoch)
  ProCo, README, paper    52.8          57.1          65.5          (best epoch; 54.2 in 400 epochs)
  BCL, paper              51.9          56.6          64.9

Top-1 / few-shot classes / ECE of the last epoch in %, imbalance 100, budget=short (12 epochs and a few), seed 0, two
CPU cores, drolt and reslt with precision=bf16 ("before": with other recipes, see their pages):
  ce                21.1 / 0.1 / 20.2    commit dcabd12
  balanced_softmax  24.0 / 8.8 / 1.9            1ccdba6
  mislas            19.2 / 13.6 / 5.0           774415b
  drolt             15.9 / 10.4 / 2.2           6c4cfef
  drolt, before, float32   15.3 / 0.8 / 0.9     2411053
  reslt             27.2 / 15.8 / 40.1          6c4cfef
  reslt, before, float32   28.5 / 18.6 / 39.7   1ccdba6
"""

from configs import recipes, small
from configs.common import nearest
from configs.recipes import ResLT, Smoothing

# by imbalance
SMOOTHING = {
    10: Smoothing(head=0.2, tail=0.0, classifier_rate=0.1, shifted_batch_norm=True),
    50: Smoothing(head=0.3, tail=0.0, classifier_rate=0.1, shifted_batch_norm=True),
    100: Smoothing(head=0.4, tail=0.1, classifier_rate=0.2, shifted_batch_norm=True),
}
BETA = {10: 0.72, 50: 0.99, 100: 0.995}


def get_config(arg=None):
    args, recipe = small.read(arg, long_tailed=True)
    config = small.base("cifar100_lt", args, recipe)
    config.data.update(
        name="cifar100",
        imbalance=args.imbalance,
        profile=args.profile,
        ranges=(36, 71),  # MiSLAS's and ResLT's groups, for --config.data.groups=ranges
    )
    papers = recipes.DataSetting(
        smoothing=nearest(SMOOTHING, args.imbalance),
        reslt=ResLT(beta=nearest(BETA, args.imbalance), medium_start=35, tail_start=70),
    )
    recipes.add_stages(config, args, recipe, papers)
    return config
