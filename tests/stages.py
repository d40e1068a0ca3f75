"""Compile stages of toy networks and methods, without a config file."""

import jax

from ltjax.config import DataConfig, OptimizerConfig, RunConfig, StageConfig
from ltjax.engine.stage import build as build_stage
from ltjax.engine.stage import random_variables


def build(
    nets,
    method,
    draw,
    params,
    *,
    groups,
    lr,
    factors,
    bn="train",
    number=0,
    replicas=1,
    replicate="loop",
    accumulate=1,
    steps_per_epoch,
    mesh,
    image_shape=(32, 32, 3),
    ema=None,
    sam=None,
    **optimizer,
):
    """Call `ltjax.engine.stage.build` with values of StageConfig and RunConfig as keywords."""
    stage = StageConfig(
        method={},
        epochs=len(factors),
        lr=lr,
        groups=groups,
        batch_norm=bn,
        optimizer=OptimizerConfig(**optimizer)._asdict(),
        number=number,
        ema=ema or {},
        sam=sam or {},
    )
    run = RunConfig("toy", DataConfig("toy"), {}, {}, replicas=replicas, replicate=replicate, accumulate=accumulate)
    rest = dict(factors=factors, steps_per_epoch=steps_per_epoch, mesh=mesh, image_shape=image_shape)
    return build_stage(nets, method, draw, params, stage, run, **rest)


def initial(nets, image_shape, method):
    """Initialise the variables of networks and of a method."""
    variables = jax.jit(lambda key: random_variables(nets, image_shape, key))(jax.random.key(0))
    extra, arrays = method.init(jax.random.key(1))
    params = {**variables.params, **({"method": extra} if extra else {})}
    return variables._replace(params=params, arrays=arrays)
