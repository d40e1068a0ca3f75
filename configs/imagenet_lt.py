"""ImageNet-LT: 115,846 images of 1,000 classes, 1,280 down to 5 a class; 50 test images of each. Every method.

    python -m ltjax.data.prepare imagenet_lt --source=DIR    # ILSVRC2012_img_train.tar, _val.tar, ImageNet_LT_*.txt
    python run.py --config=configs/imagenet_lt.py:method=mislas
    python run.py --config=configs/imagenet_lt.py:method=reslt,model=resnext50
    python run.py --config=configs/imagenet_lt.py:method=mislas,runlocal    # on a laptop

Arguments: method, or recipe; model (resnet10, 50, ..., resnext50, resnext101; vit_s16, vit_b16, dinov2_s14, clip_b16,
...), size=224, augment=paper|auto (auto: RandAugment), mixup, holdout, and those of adversarial training
(configs/cifar100.py). On a small accelerator, use precision=bf16, --config.accumulate=4 and --config.model.remat=true.
Vision transformers are for imported weights: docs/weights.md. The paper's batch and rate of ResLT with model=resnext101
are --config.batch_size=128 --config.reslt.lr=0.05.

Top-1 / ECE in %, last epoch, full length:
  MiSLAS, ResNet-50, paper      52.7 / 1.78
  DRO-LT, ResNet-50, paper      53.5            (its recipe for large images is not published: ours is CIFAR's chain)
  ResLT, paper                  43.8 (ResNet-10), 52.9 (ResNeXt-50), 55.1 (ResNeXt-101)
  cRT, ResNeXt-50, paper                   49.6  (classifier-balancing, as the three below)
  LWS, ResNeXt-50, paper                   49.9
  tau-normalisation, ResNeXt-50, paper     49.4
  Nearest class mean, ResNeXt-50, paper    47.3
  any method, ours              not yet run
"""

from configs import large
from configs.recipes import ResLT, Smoothing


def get_config(arg=None):
    args, recipe = large.read(arg)
    reslt = "reslt" in recipe.blocks
    network = "resnext50" if reslt else "resnet50"
    config = large.base("imagenet_lt", args, recipe, network=network, epochs=180, weight_decay=5e-4)
    config.data.ranges = (390, 835)  # some papers' groups by rank of count, for --config.data.groups=ranks
    if reslt and config.model.depth == 10:
        config.model.branch_kind = "pooled_conv"  # the branches' input is pooled features, not maps
    papers = large.papers(
        args,
        warmup=5 / 180,
        mixup=0.2,
        smoothing=Smoothing(head=0.3, tail=0.0, classifier_rate=0.05, shifted_batch_norm=True),
        reslt=ResLT(beta=0.99, medium_start=175, tail_start=780, tau=0.7 if "groups" in config.model else 0.3),
    )
    large.add_stages(config, args, recipe, papers)
    return config
