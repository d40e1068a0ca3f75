"""CIFAR-10-LT, ResNet-32, every long-tail method.

    python -m ltjax.data.prepare cifar10
    python run.py --config=configs/cifar10_lt.py:method=mislas,imbalance=100

Arguments: those of configs/cifar100_lt.py. MiSLAS's shifted batch norm is off here, as in the paper.

Top-1 / ECE of the last epoch in %, imbalance 100, 50, 10, full length:
  MiSLAS, paper           82.1 / 3.70   85.7 / 2.17   90.0 / 1.20   (after stage 1 alone: 72.8, 78.1, 87.6)
  ResLT, paper            82.4          85.2          89.7
  BALMS, paper            -             -             -             (79.8 at imbalance 200)
  Logit adjustment, paper             77.9          -             -             (its README, another ResNet-32)
  Post-hoc logit adjustment, paper    77.3          -             -             (its README, another ResNet-32)
  any method, ours        not yet run
"""

from configs import common


def get_config(arg=None):
    smoothing = {10: (0.1, 0.0, 0.2, False), 50: (0.2, 0.0, 0.2, False), 100: (0.3, 0.0, 0.5, False)}
    reslt = dict(beta={10: 0.96, 50: 0.998, 100: 0.998}, medium_start=2, tail_start=4)
    return common.small_images(
        "cifar10", arg, mislas=smoothing, reslt=reslt, ranges=(3, 7)
    )  # MiSLAS's; ResLT has (3, 6)
