"""iNaturalist 2018: 437,513 images of 8,142 species, 1,000 down to 2 a class; 24,426 test images, 3 of each.

    python -m ltjax.data.prepare inat18 --source=DIR    # train_val2018.tar.gz, train2018.json, val2018.json
    python run.py --config=configs/inat18.py:method=mislas
    python run.py --config=configs/inat18.py:method=mislas,runlocal    # on a laptop

Arguments: as in configs/imagenet_lt.py. For several machines, see docs/launch.md.

Top-1 / ECE in %, last epoch, ResNet-50, full length:
  MiSLAS, paper     71.6 / 7.67
  DRO-LT, paper     69.7
  ResLT, paper      70.2            (two branches)
  any method, ours  not yet run
"""

from configs import large
from configs.recipes import ResLT, Smoothing


def get_config(arg=None):
    args, recipe = large.read(arg)
    pixels = dict(mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))
    config = large.base("inat18", args, recipe, network="resnet50", epochs=200, weight_decay=1e-4, pixels=pixels)
    config.data.update(name="i_naturalist2018", ranges=(842, 4543))
    if "reslt" in recipe.blocks:
        config.model.branches = 2
    papers = large.papers(
        args,
        warmup=0.0,
        mixup=0.2,
        color_jitter=0.4 if {"mixup", "smoothing"} & set(recipe.blocks) else 0.0,  # only MiSLAS's
        smoothing=Smoothing(head=0.3, tail=0.0, classifier_rate=0.05, shifted_batch_norm=True),
        # the second branch is for the 6,600 rarest species
        reslt=ResLT(beta=0.85, medium_start=1542, tail_start=None, tau=0.3),
    )
    large.add_stages(config, args, recipe, papers)
    return config
