"""A run for tests of several processes: MiSLAS's two stages and ResLT on a folder of images, a few steps each."""

from ml_collections import ConfigDict

ALL = dict(all=dict(match="net/.*", rate=1.0))


def get_config(arg=None):
    stage = dict(lr=0.05, epochs=2, batch_norm="train", groups=ALL)
    mixing = dict(augment=dict(crop_padding=0, flip=True, mixup_alpha=0.2))
    head = dict(
        frozen=dict(match="net/(backbone|branches)/.*", rate=0.0),
        classifier=dict(match="net/classifier/.*", rate=0.1),
        scale=dict(match="net/logit_scale", rate=1.0),
    )
    later = dict(sampler=dict(name="class_aware", in_a_row=4), augment=dict(crop_padding=0), start_from="features")
    return ConfigDict(
        dict(
            name="processes",
            data=dict(name="image_folder", root=arg, profile="natural", size=16, resize=18, threads=2),
            model=dict(name="resnet_cifar", depth=8, width=4, branches=3, logit_scale=True),
            stages=("features", "classifier", "residual"),
            features=dict(stage, method=dict(name="erm", loss=dict(name="cross_entropy")), **mixing),
            classifier=dict(
                dict(stage, groups=head, **later), method=dict(name="mislas", head=0.3, tail=0.0, shape="concave")
            ),
            residual=dict(
                stage,
                method=dict(name="reslt", beta=0.9, medium_start=1, tail_start=2),
                augment=dict(crop_padding=0, color_jitter=0.4),
            ),
            batch_size=16,
            eval_batch_size=8,
            dispatch_steps=1,
            checkpoint_seconds=0.0,
            weights="",
        )
    )
