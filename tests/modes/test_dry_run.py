"""The description of a run by --dry_run, compared with the run."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltjax import config, data, optim, train
from ltjax.engine import experiment as experiments
from ltjax.modes import dry_run
from ltjax.system import parallel
from ltjax.types import UserError
from tests.engine.test_streamed import both, settings
from tests.test_run import tiny_config

SMALL = {"model.width": 4, "batch_size": 32, "stages": ("features", "classifier")}


def prepared(settings):
    """Return the config, the compiled stages, and the experiment."""
    run = config.parse(settings)
    experiment, compiled = experiments.set_up_with_stages(run, None)
    return run, compiled, experiment


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Return a dry run: its output, the folder above its workdir, and {"run", "compiled", "experiment"}."""
    folder, parts = tmp_path_factory.mktemp("dry"), {}
    set_up = dry_run.set_up_with_stages

    def recorded(*arguments, **settings):
        experiment, compiled = set_up(*arguments, **settings)
        parts.update(run=arguments[0], compiled=compiled, experiment=experiment)
        return experiment, compiled

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(dry_run, "set_up_with_stages", recorded)
        dry_run.dry_run(tiny_config(**SMALL), folder / "run")
    return shown.getvalue(), folder, parts


@pytest.fixture(scope="module")
def small(dry):
    return tuple(dry[2].values())


@pytest.mark.parametrize(
    "asked, shown",
    [
        ("auto", "  class weights: auto, from 0.525 (T-shirt/top) to 2.1 (Bag)"),
        ("{'Bag': 2, 'Coat': 0.5}", "  class weights: Bag 2, Coat 0.5; 1 for other classes"),
    ],
)
def test_class_weights_are_shown(tmp_path, capsys, asked, shown):
    dry_run.dry_run(tiny_config(**SMALL, class_weights=asked), tmp_path / "run")
    assert shown in capsys.readouterr().out.splitlines()


def test_a_class_weight_of_no_class_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config.class_weights names 'Bags', none of the classes: the nearest are Bag"):
        dry_run.dry_run(tiny_config(**SMALL, class_weights="{'Bags': 2}"), tmp_path / "run")


def test_a_dry_run_writes_nothing(dry):
    assert list(dry[1].iterdir()) == []


def test_a_dry_run_shows_stages_groups_schedules_and_memory(dry, small):
    text = dry[0]
    _, compiled, experiment = small
    counts = experiment.split.class_counts
    assert f"{counts.sum()} training images of 10 classes, {counts.max()} down to {counts.min()} a class" in text
    for group, member in experiment.groups.items():
        assert f"  {group}: {member.sum()} classes, {counts[member].sum()} images: " in text
    sizes = dry_run.stage_params(experiment, compiled["classifier"])
    head = sum(size for path, size in sizes.items() if path.startswith("net/classifier/"))
    rows = [line.split() for line in text.splitlines()]
    assert ["classifier", str(head), "trained", "0.05", "0.0005"] in rows
    assert ["logit_scale", "10", "trained", "0.1", "0.0005"] in rows and ["logit_scale", "10", "frozen"] in rows
    assert "stage classifier: mislas (head=0.1, shape=concave, tail=0.0); " in text
    assert "; sampler class_aware, in_a_row 4; batch norm train; augmentation: " in text
    (features,) = (line for line in text.splitlines() if line.startswith("stage features: erm"))
    assert "mixup" in features.partition("; augmentation: ")[2]
    assert "groups in proportion: 0.1 in epoch 1" in text
    assert "memory of each device, MB" in text and "estimate" in text


def test_a_dry_run_refuses_the_workdir_of_another_config(tmp_path):
    train.write_json(tmp_path / "config.json", tiny_config(**SMALL))
    with pytest.raises(UserError, match="holds a run of another config"):
        dry_run.dry_run(tiny_config(**SMALL, **{"features.lr": 0.3}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.depth": 9}, r"depth = 9"),
        ({"classifier.groups.logit_scale.match": "net/scale"}, "net/logit_scale"),
        ({"weights": "nowhere"}, "nowhere holds no weights"),
        ({"classifier.keep_optimizer": True}, "does not train the same parameters"),
    ],
)
def test_a_dry_run_finds_mistakes_in_the_config(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        dry_run.dry_run(tiny_config(**SMALL, **changes), tmp_path / "run")


def test_a_workdir_below_a_file_is_refused_without_writing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use workdir .*file/run: .*Not a directory"):
        dry_run.dry_run(tiny_config(**SMALL), tmp_path / "file" / "run")


# Schedules and groups.


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ([0.1], "0.1 in epoch 1  █"),
        ([0.05, 0.1, 0.1, 0.01], "0.05 in epoch 1, 0.1 in epoch 2, 0.01 in epoch 4  ▅██▂"),
        ([0.2, 0.1], "0.2 in epoch 1, 0.1 in epoch 2  █▅"),
    ],
)
def test_a_schedule_shows_its_first_largest_and_last_rate(rates, text):
    assert dry_run.schedule(np.array(rates)) == text


def test_a_long_schedule_keeps_its_shape_in_forty_bars():
    bars = dry_run.schedule(np.linspace(1, 0, 200)).split()[-1]
    assert len(bars) == 40 and bars[0] == "█" and bars[-1] == "▁"
    assert list(bars) == sorted(bars, reverse=True)


def test_the_parameters_of_a_method_count_in_its_groups():
    """DRO-LT's radii."""
    settings = {**tiny_config(**SMALL), "stages": ("features",)}
    settings["features"]["method"] = dict(name="drolt", radius="learned", loss=dict(name="cross_entropy"))
    settings["features"]["groups"] = dict(everything=dict(match="net/.*|method/.*", rate=1.0))
    run, compiled, experiment = prepared(settings)
    sizes = dry_run.stage_params(experiment, compiled["features"])
    assert any(path.startswith("method/") for path in sizes)
    column = dry_run.groups_table(run.stages["features"], sizes).columns[1]
    assert list(column.cells) == [f"{sum(sizes.values()):,}"]


# Memory.


def megabyte(dtype=jnp.float32):
    return jnp.zeros((1000, 250), dtype)


def peak_of(function, *arguments):
    return dry_run.peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr) / 1e6


def test_arrays_live_from_their_creation_to_their_last_use():
    def chain(x):  # two at a time
        return jnp.sin(jnp.cos(jnp.sin(x)))

    def reused(x):  # the first of three is needed at the end
        first = jnp.sin(x)
        return first + jnp.cos(jnp.exp(first))

    assert (peak_of(chain, megabyte()), peak_of(reused, megabyte())) == (2.0, 3.0)


def test_peak_bytes_excludes_arguments_and_depends_on_the_dtype():
    assert peak_of(lambda x, y: x + y, megabyte(), megabyte()) == 1.0
    assert peak_of(lambda x, y: x + y, megabyte(jnp.bfloat16), megabyte(jnp.bfloat16)) == 0.5


def test_a_loop_needs_the_memory_of_one_iteration():
    def iteration(carry, _):
        return jnp.sin(jnp.cos(jnp.exp(carry))), None

    def loop(x, length):
        return jax.lax.scan(iteration, x, length=length)[0]

    assert peak_of(lambda x: loop(x, 3), megabyte()) == peak_of(lambda x: loop(x, 300), megabyte()) == 2.0


def test_activations_live_until_the_backward_pass():
    def loss(x):
        for _ in range(8):
            x = jnp.sin(x)
        return x.sum()

    assert peak_of(jax.grad(loss), megabyte()) >= 8.0 > 3.0 > peak_of(loss, megabyte())


def test_the_estimate_of_a_step_is_half_to_twice_xlas_plan(small, optimised):
    run, _, experiment = small
    alone = experiment._replace(mesh=parallel.make_mesh(jax.devices()[:1]))
    single = experiments.build_stage(alone, run.stages["features"])
    state = jax.eval_shape(single.init, experiments.seeds(run), experiments.fresh_shapes(alone))
    source = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experiment.train_data)
    quick = {**optimised, "xla_backend_optimization_level": 0}  # affects machine code, not the memory plan
    planned = single.run.lower(state, source, 1).compile(quick).memory_analysis()
    estimate = dry_run.peak_bytes(jax.make_jaxpr(single.run, static_argnums=2)(state, source, 1).jaxpr)
    assert 0.5 < estimate / planned.temp_size_in_bytes < 2
    counted = dry_run.num_bytes((state, source))
    assert planned.argument_size_in_bytes == pytest.approx(counted, rel=0.01)


def test_memory_is_the_share_of_one_device(small):
    """Each of 8 devices has all parameters and training images, and an eighth of every batch."""
    run, _, experiment = small
    memory = dry_run.expected_memory(experiment)
    params = sum(leaf.size for leaf in optim.flatten(experiment.shapes.params).values())
    assert memory.variables["features"] == dry_run.num_bytes(experiment.shapes) >= 4 * params
    trained = params - 10  # without the logit scales
    assert 4 * trained <= memory.optimizer["features"] < 4 * trained + 100  # momentum, and steps counted
    assert memory.optimizer["classifier"] < memory.optimizer["features"] / 4
    assert memory.step["classifier"] < memory.step["features"]
    train_bytes = 105 * (28 * 28 + 4)
    test_bytes = 1000 / 8 * (28 * 28 + 4)
    assert train_bytes + test_bytes <= memory.images < 1.1 * (train_bytes + test_bytes)
    fourfold = dry_run.expected_memory(experiment._replace(config=run._replace(batch_size=128)))
    assert 3 < fourfold.step["features"] / memory.step["features"] <= 4


def test_memory_of_streamed_images_grows_with_the_steps_of_a_dispatch(monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: both()[1])
    run, _, experiment = prepared(settings())  # 5 steps an epoch
    one, five = (
        dry_run.expected_memory(experiment._replace(config=run._replace(dispatch_steps=steps))).images
        for steps in (1, 5)
    )
    assert five == pytest.approx(5 * one, rel=0.01)


def test_the_peak_adds_a_stages_step_to_the_states_kept_so_far():
    memory = dry_run.Memory(images=10, variables=dict(a=5, b=5), optimizer=dict(a=2, b=1), step=dict(a=100, b=95))
    assert memory.peak() == (10 + 5 + 2 + 5 + 1 + 95, "b")


def test_a_stage_without_training_needs_no_memory_for_steps():
    settings = tiny_config(**SMALL)
    surgery = dict(
        epochs=0, groups={}, start_from="features", surgery=dict(name="nearest_mean"), method=dict(name="erm")
    )
    settings["ncm"] = {**settings["classifier"], **surgery}
    _, _, experiment = prepared({**settings, "stages": ("features", "ncm")})
    memory = dry_run.expected_memory(experiment)
    assert memory.step["ncm"] == 0 < memory.step["features"]
