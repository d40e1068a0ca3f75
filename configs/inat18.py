"""iNaturalist 2018: 437,513 images of 8,142 species, 1,000 down to 2 a class; 24,426 test images, 3 of each.

    python -m ltjax.data.prepare inat18 --source=DIR    # train_val2018.tar.gz, train2018.json, val2018.json
    python run.py --config=configs/inat18.py:method=mislas
    python run.py --config=configs/inat18.py:method=mislas,runlocal    # on a laptop

Arguments: as in configs/imagenet_lt.py. Several machines: docs/launch.md.

Top-1 / ECE in %, last epoch, ResNet-50, full length:
  MiSLAS, paper     71.6 / 7.67
  DRO-LT, paper     69.7
  ResLT, paper      70.2            (two branches)
  any method, ours  not yet run
"""

from configs import large

RECIPE = large.Recipe(
    epochs=200,
    model="resnet50",
    smoothing=(0.3, 0.0, 0.05, True),
    mixup=0.2,
    weight_decay=1e-4,
    reslt_model="resnet50",
    reslt=dict(beta=0.85, medium_start=1542),  # the second branch is for the 6,600 rarest species
    reslt_branches=2,
    gammas=dict(resnet50=0.3),
    ranks=(842, 4543),
    mean=(0.466, 0.471, 0.380),
    std=(0.195, 0.194, 0.192),
    only_mislas_jitters=True,
    reslt_warmup=0,
)


def get_config(arg=None):
    return large.images("inat18", arg, RECIPE, source="i_naturalist2018")
