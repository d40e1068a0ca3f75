"""CIFAR-100-LT, ResNet-32.

    python -m ltjax.data.prepare cifar100
    python run.py --config=configs/cifar100_lt.py:method=mislas,imbalance=100

method=mislas|ce, imbalance (10, 50 and 100 are the papers'), profile=exp|step, budget=full|short (12 + 2 epochs).
The MiSLAS authors recommend --config.optimizer.weight_decay=5e-4 for better figures than their paper's.

Top-1 / ECE of the last epoch in %, imbalance 100, 50, 10:
  MiSLAS, paper           47.0 / 4.83   52.3 / 2.25   63.2 / 1.73   (after stage 1 alone: 39.5, 45.4, 59.1)
  MiSLAS, ours            not yet run
  cross-entropy, ours     not yet run
  MiSLAS, ours, short     19.2 / 5.0    not yet run   not yet run   (after stage 1 alone: 14.4 / 13.5)
  cross-entropy, short    21.1 / 20.2   not yet run   not yet run   (few-shot classes 0.1; MiSLAS's 13.6)

Short: --config=configs/cifar100_lt.py:method=mislas,imbalance=100,budget=short, seed 0, commit 774415b, and with
method=ce, commit dcabd12; two CPU cores.
"""

from configs import common


def get_config(arg=None):
    smoothing = {10: (0.2, 0.0, 0.1, True), 50: (0.3, 0.0, 0.1, True), 100: (0.4, 0.1, 0.2, True)}
    reslt = dict(beta={10: 0.72, 50: 0.99, 100: 0.995}, medium_start=35, tail_start=70)
    return common.cifar_long_tailed("cifar100", arg, smoothing, reslt, ranges=(36, 71))
