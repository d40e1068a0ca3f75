"""The attacks lowered for accelerators, on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.tree_util import Partial

from ltjax import attacks
from ltjax.attacks import ball, objectives, slots
from ltjax.attacks.apgd import LOSSES, Apgd
from ltjax.attacks.fab import Fab
from ltjax.attacks.square import Square

IMAGES = jnp.full((16, 8, 8, 3), 0.5)
LABELS = jnp.zeros(16, jnp.int32)
MACHINES = {
    **{f"apgd-{loss}-{norm}": Apgd(0.1, norm, loss) for loss in LOSSES for norm in ball.NORMS},
    **{f"fab-{norm}": Fab(0.1, norm) for norm in ball.NORMS},
    **{f"square-{norm}": Square(0.1, norm) for norm in ball.NORMS},
}


def apply(weights, images):
    return images.reshape(len(images), -1) @ weights


PREDICT = Partial(apply, jnp.asarray(np.random.default_rng(0).normal(size=(192, 10)), jnp.float32))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("norm", ball.NORMS)
def test_pgd_lowers(platform, norm):
    def attack(images):
        value = partial(objectives.margin, labels=LABELS)
        how = dict(epsilon=0.1, step_size=0.02, num_steps=10, norm=norm, unroll=False)
        return attacks.pgd(images, images, lambda x: value(PREDICT(x)), **how)

    assert "stablehlo.while" in export.export(jax.jit(attack), platforms=[platform])(IMAGES).mlir_module()


@pytest.mark.parametrize("name", MACHINES)
def test_every_attack_lowers_in_its_loop_over_eight_devices(name):
    mesh, machine, rng = slots.make_mesh(), MACHINES[name], jax.random.key(0)
    batch = slots._Slots(IMAGES, LABELS, jnp.ones((16, 9), jnp.int32), jnp.arange(16, dtype=jnp.int32))
    state = jax.eval_shape(machine.init, jax.eval_shape(batch.task, rng))
    come_from = jnp.full(16, -1, jnp.int32)
    for platform in ("tpu", "cuda"):
        lower = partial(export.export, platforms=[platform])
        advance = lower(slots._advance)(machine, mesh, PREDICT, batch, state, rng, 50, 1)
        arrange = lower(slots._arrange)(machine, mesh, batch, state, come_from, batch, rng)
        assert advance.platforms == arrange.platforms == (platform,)
        assert advance.nr_devices == arrange.nr_devices == 8
        assert "callback" not in advance.mlir_module()
