"""Both stages of MiSLAS in under three minutes on two CPU cores, on images that ship with the project.

    python run.py --config=configs/quickstart.py
    python run.py --config=configs/quickstart.py:holdout=5 --calibrate    # hold out 5 images of each class

The data is a long-tailed Fashion-MNIST: 1,000 down to 10 training images a class, and 1,000 balanced test images. Plain
cross-entropy trains first, then both stages of MiSLAS; a table compares them.

Top-1 (few-shot classes) / ECE in %, seed 0, commit 4ca7505, two CPU cores, jax 0.12:
  cross-entropy 69.4 (43.2) / 9.9; MiSLAS, stage 1: 67.4 (37.5) / 6.7; MiSLAS, stage 2: 80.7 (74.2) / 4.5
"""

from configs import common, recipes
from configs.recipes import RECIPES, DataSetting, Setting, Smoothing


def get_config(arg=None):
    args = common.read_arguments(arg, {"holdout": 0.0, "precision": tuple(common.PRECISIONS)})
    holdout = common.parse_holdout(args.holdout)
    config = common.defaults()
    config.name = "quickstart" + f"-holdout{holdout}" * bool(holdout) + "-bf16" * (args.precision == "bf16")
    config.data.update(
        name="fashion_mnist_lt",
        imbalance=100.0,
        max_count=1000,
        holdout=holdout,
        many_above=300,  # of 10 classes: 3 many, 3 medium, 4 few
        few_below=50,
    )
    if holdout:  # the stored images are already long-tailed: keep all others
        config.data.update(imbalance=1.0, profile="natural", max_count=0)
    config.model = dict(name="resnet_cifar", depth=8, width=8, mean=(0.286,), std=(0.353,), logit_scale=True)
    config.model.dtype = common.PRECISIONS[args.precision]
    config.batch_size = 64
    config.epochs = 24
    config.eval_every = 6
    config.optimizer.weight_decay = 5e-4

    # few images need less mixing and smoothing than CIFAR
    smoothing = Smoothing(head=0.1, tail=0.0, classifier_rate=0.5, shifted_batch_norm=True)
    papers = DataSetting(warmup=0.1, crop_padding=2, mixup=0.2, smoothing=smoothing)
    setting = Setting(parts=("backbone", "classifier", "logit_scale"), papers=papers, auto_augment=False)
    recipes.chain(config, RECIPES["ce"], setting)
    recipes.chain(config, RECIPES["mislas"], setting)
    config.classifier.epochs = 4
    return config
