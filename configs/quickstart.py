"""The whole of MiSLAS in under three minutes on two CPU cores, on images that come with the project.

    python run.py --config=configs/quickstart.py
    python run.py --config=configs/quickstart.py:holdout=5 --calibrate    # 5 images of each class kept out of training

Fashion-MNIST made long-tailed: 1,000 down to 10 training images a class, 1,000 balanced test images. Plain
cross-entropy first, then both stages of MiSLAS, and a table that compares them.

Top-1 (few-shot classes) / ECE in %, seed 0, commit 4ca7505, two CPU cores, jax 0.12:
  cross-entropy 69.4 (43.2) / 9.9; MiSLAS, stage 1: 67.4 (37.5) / 6.7; MiSLAS, stage 2: 80.7 (74.2) / 4.5
"""

from ml_collections import ConfigDict

from configs import common, recipes


def get_config(arg=None):
    arguments = common.read_arguments(arg, {"holdout": 0.0, "precision": tuple(common.PRECISIONS)})
    holdout = common.whole(arguments.holdout)
    config = ConfigDict()
    config.name = f"quickstart-holdout{holdout}" if holdout else "quickstart"
    config.name += "-bf16" if arguments.precision == "bf16" else ""
    config.data = dict(
        name="fashion_mnist_lt",
        imbalance=100.0,
        profile="exp",
        max_count=1000,
        holdout=holdout,
        seed=0,
        groups="counts",
        many_above=300,  # of 10 classes: 3 many, 3 medium, 4 few
        few_below=50,
        ranges=(),
    )
    config.model = dict(name="resnet_cifar", depth=8, width=8, mean=(0.286,), std=(0.353,), logit_scale=True)
    config.model.dtype = common.PRECISIONS[arguments.precision]
    if holdout:  # the images are as long-tailed as that: all others stay
        config.data.update(imbalance=1.0, profile="natural", max_count=0)
    config.batch_size = 64
    config.seed = 0
    config.replicas = 1
    config.replicate = "loop"
    config.epochs = 24
    config.eval_every = 6
    config.eval_batch_size = 500
    config.dispatch_steps = 0
    config.gpu_graphs = "default"
    config.weights = ""  # a folder of imported weights to start from, or to judge
    config.weights_parts = ()  # what to take of it; (): all
    config.checkpoint_seconds = 300.0
    config.attack = common.attack("0.031")
    config.optimizer = dict(momentum=0.9, nesterov=False, weight_decay=5e-4)

    setting = recipes.Setting(
        epochs=config.get_ref("epochs"),
        short=False,
        auto_augment=False,
        mixup=0.0,
        parts=("backbone", "classifier", "logit_scale"),
        # so few images want less mixing and smoothing than the CIFAR recipes have
        smoothing=(0.1, 0.0, 0.5, True),
        reslt={},
        deferred=False,
    )
    recipes.chain(config, recipes.METHODS["mislas"], setting)
    config.ce = dict(recipes.SCRATCH["ce"](setting), title="Cross-entropy", start_from="scratch")
    config.stages = ("ce", *config.stages)
    for name in config.stages:
        config[name].augment.crop_padding = 2
    config.ce.schedule.warmup = config.features.schedule.warmup = 0.1
    config.features.augment.mixup_alpha = 0.2
    config.classifier.epochs = 4
    return config
