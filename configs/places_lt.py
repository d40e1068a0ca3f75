"""Places-LT: 62,500 images of 365 kinds of places, 4,980 down to 5 a class; 100 test images of each.

    python -m ltjax.data.prepare places_lt --source=DIR    # places365standard_easyformat.tar, Places_LT_*.txt
    python -m ltjax.interop.torch resnet152.pth --model=resnet,depth=152,stem=large,normalise=imagenet --out=resnet152
    python run.py --config=configs/places_lt.py:method=mislas

As in MiSLAS, a ResNet-152 trained on ImageNet is frozen, a new block replaces its last one, and the new block and the
classifier train. config.weights names the folder of its weights, resnet152 by default. It may hold torchvision's whole
network: the run ignores the last block, with a note. Other networks trained on ImageNet also work, such as
model=resnet50 with its weights; the new block then follows the last one. Adversarial training freezes nothing and
starts from scratch. Arguments: as in configs/imagenet_lt.py.

Top-1 / ECE in %, last epoch, ResNet-152, full length:
  MiSLAS, paper     40.4 / 3.41
  ResLT, paper      39.8
  any method, ours  not yet run
"""

from configs import large
from configs.recipes import ResLT, Smoothing


def get_config(arg=None):
    args, recipe = large.read(arg)
    config = large.base("places_lt", args, recipe, network="resnet152", epochs=90, weight_decay=5e-4)
    config.data.ranges = (131, 288)
    # Adversarial training trains the whole network, because a frozen backbone keeps the features of clean images.
    # An extra block needs a ResNet's maps.
    if not (recipe.adversarial or args.runlocal or args.backbone or config.model.name == "vit"):
        config.model.extra_block = True
        config.weights, config.weights_parts = f"resnet{config.model.depth}", ("backbone",)
        if config.model.depth == 152:
            config.model.blocks = (3, 8, 36, 2)
    papers = large.papers(
        args,
        warmup=5 / 90,
        mixup=0.2,
        smoothing=Smoothing(head=0.4, tail=0.1, classifier_rate=0.05, shifted_batch_norm=True),
        # beta and tau are our choice, those of ImageNet-LT
        reslt=ResLT(beta=0.99, medium_start=131, tail_start=288, tau=0.3),
    )
    large.add_stages(config, args, recipe, papers)
    return config
