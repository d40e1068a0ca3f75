"""Your own images: DIR/train/<class>/*.jpg, and optionally DIR/validation/<class>/*.jpg; or DIR/<class>/*.jpg.

    python run.py --config=configs/image_folder.py --config.data.root=DIR
    python run.py --config=configs/image_folder.py:method=ce,size=112 --config.data.root=DIR --config.epochs=30
    python run.py --config=configs/image_folder.py --config.data.root=DIR --config.data.labels=FILE.csv

FILE.csv has the columns file and label, and optionally split (train, validation); files are relative to DIR.

The run prints classes, counts, imbalance factor and groups before training. Without a folder for validation, the same
number of training images of each class is held out. Photographs are turned by their EXIF orientation.

A backbone that was trained on ImageNet, shipped with ltjax, computes the features of each image once; a classifier
learns on them in seconds. Arguments: pretrained=efficientnet_lite0, another one (hub:timm/resnet50.a1_in1k, a file, a
folder: docs/weights.md), or none; finetune=head|last|all|adaptformer|lora; size (pixels; from scratch 128); and those
of configs/imagenet_lt.py, such as method=mislas. model=resnet10 trains that network from scratch.

23 classes of Caltech-101, 300 down to 21 training images each (2,016 in all) and 10 for testing, from scratch with
model=resnet10,size=64, last epoch, top-1 (the 17 classes with up to 100 images) / ECE in %, seed 0, two busy CPU cores,
jax 0.10.2:
  ce, 30 epochs                  66.5 (57.6) / 8.4     commit b1eacc8, 25 images/s
  mislas, stage 1, 20 epochs     55.2 (42.9) / 8.3     commit b47a0ee, 58 images/s: faster convolutions of 2x2 maps
  mislas, stage 2, 10 epochs     62.6 (54.7) / 10.4    the same, 261 images/s
These are too few epochs for mixup. Training waited for its images for less than 0.2 % of the time.
"""

from configs import large
from configs.recipes import ResLT, Smoothing


def get_config(arg=None):
    args, recipe = large.read(arg, size=128, pretrained="efficientnet_lite0")
    config = large.base("image_folder", args, recipe, network="resnet10", epochs=60, batch_size=64, weight_decay=5e-4)
    config.data.update(ranges=(0, 0), upright=True)
    papers = large.papers(
        args,
        warmup=5 / 60,
        mixup=0.2,
        smoothing=Smoothing(head=0.3, tail=0.0, classifier_rate=0.2, shifted_batch_norm=True),
        reslt=ResLT(beta=0.99, medium_start=0.35, tail_start=0.7, tau=0.3),  # shares of the classes
    )
    large.add_stages(config, args, recipe, papers)
    return config
