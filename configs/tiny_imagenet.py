"""Tiny ImageNet (200 classes, 64x64 pixels), adversarially trained: LBGAT and its family.

    python -m ltjax.data.prepare tiny_imagenet
    python run.py --config=configs/tiny_imagenet.py:method=lbgat,beta=6
    python run.py --config=configs/tiny_imagenet.py:method=lbgat,beta=6 --mode=attack

The images (1.2 GB) are on the device; the 10,000 official validation images are the test set.
Arguments: see configs/cifar100.py. Any method, ours: not yet run.
"""

from configs import recipes, small

PIXELS = dict(mean=(0.4802, 0.4481, 0.3975), std=(0.2770, 0.2691, 0.2821))


def get_config(arg=None):
    args, recipe = small.read(arg, long_tailed=False)
    config = small.base("tiny_imagenet", args, recipe, pixels=PIXELS)
    config.data.name = "tiny_imagenet"
    recipes.add_stages(config, args, recipe, recipes.DataSetting())
    return config
