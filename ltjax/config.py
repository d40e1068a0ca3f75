"""All keys of a config, with their types and defaults. `parse` checks a config against them before a run.

A config does not import this module, so `defaults` of `configs/common.py` and `STAGE` of `configs/recipes.py` repeat
the defaults; `tests/configs/test_files.py` compares them.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ltjax.system import registry
from ltjax.types import UserError

BATCH_NORM_MODES = ("train", "eval")
EPOCH_SIZES = ("images", "balanced")
GROUPINGS = ("counts", "ranges", "ranks")
REPLICATE = ("loop", "vmap")


class DataConfig(NamedTuple):
    name: str  # one of `ltjax.data.SOURCES`
    imbalance: float = 1.0  # count of the largest class divided by that of the smallest
    profile: str = "exp"  # how counts fall: "exp", "step"; "natural": all images
    max_count: int = 0  # training images of the largest class; 0: all
    classes: int = 0  # keep only the first classes; 0: all
    holdout: int = 0  # images of each class held out of training, for selection and tuning
    seed: int = 0  # chooses the training images; runs with different training seeds share a training set
    groups: str = "counts"  # many, medium and few: by "counts" of images, "ranges" of class numbers, or "ranks"
    many_above: int = 100  # counts: a class is many if it has more images
    few_below: int = 20  # counts: a class is few if it has fewer images
    ranges: tuple[int, ...] = ()  # ranges and ranks: (a, b): many are the classes below a, few those from b on
    root: str = ""  # folder of an image_folder
    # Table of an image_folder's labels, a CSV or TSV file: file,label[,split]; "": folders are classes.
    labels: str = ""
    # For images that stay on disk, of any size:
    size: int = 224  # side of the network's square input, in pixels
    resize: int = 256  # evaluation: length of the shorter side before the central square is cropped
    min_area: float = 0.08  # training: smallest share of an image's area in a random crop; 1: crop as in evaluation
    threads: int = 0  # decoding threads; 0: one for each core
    upright: bool = False  # turn images by the orientation tags of their files; benchmarks ignore them, as their papers


class OptimizerConfig(NamedTuple):
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0


class AttackConfig(NamedTuple):
    """The settings of `--mode=attack`."""

    epsilon: float | str = "0.031"  # radius, in pixel units of [0, 1]
    norm: str = "linf"  # or "l2"
    num_images: int = 0  # test images to attack, spread over the classes; 0: all
    tests: tuple[str, ...] = ("pgd-20", "cw-20", "autoattack")
    step_size: float | str = "2/255"  # of pgd-N and cw-N
    batch_size: int = 500  # over all devices
    seed: int = 0
    radii: tuple[float, ...] = (0.25, 0.5, 2.0, 4.0)  # of PGD-20's curve in the report, as multiples of epsilon


class GroupConfig(NamedTuple):
    """A group of parameters with the same learning rate."""

    match: str  # regular expression for whole paths of parameters
    rate: float  # factor on the stage's lr; 0 freezes
    weight_decay: float | None = None  # None: the optimizer's
    optional: bool = False  # whether the group may match no parameter


class StageConfig(NamedTuple):
    method: Mapping[str, Any]  # name and hyper-parameters of the method
    epochs: int  # 0: only `surgery`, no training
    lr: float
    groups: Mapping[str, Mapping[str, Any]]  # {name: values of a GroupConfig}, see `ltjax.optim`
    title: str = ""  # shown in tables
    start_from: str = "scratch"  # from config.weights, or random; or the name of an earlier stage
    schedule: Mapping[str, Any] = {}  # kind, warmup, decay_at, decay: see `ltjax.optim.schedule_table`
    sampler: Mapping[str, Any] = {}  # name and settings, see `ltjax.data.samplers`
    augment: Mapping[str, Any] = {}  # see `ltjax.data.augment.augment`
    views: Mapping[str, Mapping[str, Any]] = {}  # {name: values of `augment`}: further views of each image, by name
    batch_norm: str = "train"  # or "eval"
    optimizer: Mapping[str, Any] = {}  # replaces values of the run's optimizer
    keep_optimizer: bool = False  # continue with the momentum of `start_from`, which trained the same parameters
    # Number of images in an epoch: "images": the size of the training set; "balanced": the largest class's count times
    # the number of classes (DRO-LT's class-aware sampler).
    epoch_size: str = "images"
    drop_last: bool = False  # an epoch is images // batch_size steps, not rounded up
    surgery: Mapping[str, Any] = {}  # name and settings of a change of the weights before training: `ltjax.surgery`
    eval_classifier: Mapping[str, Any] = {}  # tau, bias: evaluate with `ltjax.surgery.tau_normalised` weights
    ema: Mapping[str, Any] = {}  # decay, ...: keep a moving average of the weights, see `ltjax.optim.ema`
    sam: Mapping[str, Any] = {}  # rho, adaptive: sharpness-aware minimisation, see `ltjax.optim.climbed`
    nearest_mean: bool = False  # also evaluate the classifier of the nearest class mean
    evaluate_net: str = "net"  # or "guide", if the stage trains only the guide
    # Set by `parse`:
    name: str = ""  # key of the stage in the config
    number: int = 0  # position of the stage in the run; its random numbers depend on it


class RunConfig(NamedTuple):
    name: str
    data: DataConfig
    model: Mapping[str, Any]  # name and settings of the network, see `ltjax.models.create`
    stages: Mapping[str, StageConfig]  # by name, in order. In a config: a tuple of names, each a key with a stage
    epochs: int = 0  # the length that a config's stages refer to; ltjax reads only theirs
    batch_size: int = 128
    seed: int = 0  # of initialisation, sampling order and augmentation
    optimizer: OptimizerConfig = OptimizerConfig()
    # Factors on the losses of each class's images: {name: weight}, also as text, 1 for other classes; "auto": inverse
    # to the classes' counts, with mean 1 over the training images; "": none.
    class_weights: Mapping[str, Any] | str = ""
    guide: Mapping[str, Any] = {}  # a second network, like `model`, for methods that need one; {}: none
    attack: AttackConfig = AttackConfig()  # of --mode=attack; training does not use it
    eval_every: int = 0  # epochs between evaluations; 0: every fifth epoch and each of the last 20
    eval_batch_size: int = 500
    replicas: int = 1  # number of runs, with seeds seed, seed + 1, ..., that train in one program
    replicate: str = "loop"  # replicas on a device: one after the other, or "vmap": in one batched step
    # Steps in a dispatch. 0: at most 100 on accelerators and 16 on a CPU, a fifth of that if each step attacks its
    # images; at most 4 if images are decoded from disk.
    dispatch_steps: int = 0
    # A folder written by `python -m ltjax.interop.torch`. Stages from scratch start with its weights. --mode=eval and
    # attack evaluate it if the workdir holds no run. "": random weights.
    weights: str = ""
    weights_sha256: str = ""  # of the arrays that `weights` must have: `ltjax.runs.weights.hash_weights`; "": any
    weights_parts: tuple[str, ...] = ()  # parts of the network to load from `weights`, such as ("backbone",); (): all
    gpu_graphs: str = "default"  # which kernels become CUDA graphs, see `ltjax.system.xla.GPU_GRAPHS`
    accumulate: int = 1  # parts of a batch that are computed one after the other, to save memory
    checkpoint_seconds: float = 300.0  # between checkpoints within a stage; the end of a stage is always saved


STAGE_DEFAULTS = {"schedule": {"kind": "constant"}, "sampler": {"name": "instance_balanced"}}
LOCATIONS = ("root", "labels", "threads")  # keys of config.data: where images lie, and how many threads decode them
# Keys in which runs of one row of `ltjax.compare` may differ: the seeds, and those that change no trained number.
WITHIN_A_ROW = (
    *("seed", "replicas", "replicate", "eval_every", "eval_batch_size"),
    *("checkpoint_seconds", "dispatch_steps", "gpu_graphs", "attack"),
)
SET_BY_PARSE = ("name", "number")  # fields of a StageConfig


def parse(config: Mapping[str, Any]) -> RunConfig:
    """Check a config, nested dicts, against the types above, and fill in the defaults.

    Raises:
      UserError: A key or value is wrong; the message names the key and what is allowed.
    """
    names = config.get("stages", ())
    if not registry.fits(names, tuple[str, ...]):
        raise UserError(f"config.stages = {names!r}: a tuple of names, such as ('ce',)")
    # A config may hold stages that `stages` does not list.
    unused = [key for key, value in config.items() if isinstance(value, Mapping) and {"method", "lr"} <= set(value)]
    values = {key: {} if key == "stages" else value for key, value in config.items()}
    run: RunConfig = _fill(RunConfig, values, "config", also=(*names, *unused))
    if not names or len(set(names)) != len(names):
        raise UserError(f"config.stages = {tuple(names)}: name one stage or more, each once")
    _check_run(run)
    _check_data(run.data)
    stages: dict[str, StageConfig] = {}
    for number, name in enumerate(names):
        if name in RunConfig._fields or name not in config:
            raise UserError(f"config.stages names {name!r}, which needs settings of its own in config.{name}")
        stages[name] = _stage(run, name, config[name], stages)._replace(name=name, number=number)
    return run._replace(stages=stages, class_weights=read_class_weights(run.class_weights))


def read_class_weights(asked: Mapping[str, Any] | str) -> dict[str, float] | str:
    """Read `config.class_weights`: {name: weight}, "auto", or "" for none. UserError if it is anything else."""
    if asked in ("", "auto"):
        return asked
    weights = asked
    if isinstance(asked, str):
        try:
            weights = ast.literal_eval(asked)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            weights = None
    numbers = [] if not isinstance(weights, Mapping) else list(weights.values())
    if not isinstance(weights, Mapping) or not all(registry.fits(x, float) and 0 < x < math.inf for x in numbers):
        raise UserError(
            f"config.class_weights = {asked!r}: {{'NAME': WEIGHT, ...}} with weights above 0, or auto, or nothing"
        )
    return {str(name): float(weight) for name, weight in weights.items()} or ""


def _check_run(run: RunConfig) -> None:
    for key in ("eval_every", "dispatch_steps"):
        if getattr(run, key) < 0:
            raise UserError(f"config.{key} = {getattr(run, key)}: must be at least 1, or 0 to choose")
    for key in ("batch_size", "eval_batch_size", "replicas", "accumulate"):
        if getattr(run, key) < 1:
            raise UserError(f"config.{key} = {getattr(run, key)}: must be at least 1")
    for where, seed in (("config.seed", run.seed), ("config.data.seed", run.data.seed)):
        if not 0 <= seed < 2**32:
            raise UserError(f"{where} = {seed}: from 0 to 2**32 - 1")
    if run.seed + run.replicas > 2**32:
        raise UserError(f"config.seed = {run.seed}, replicas = {run.replicas}: the last seed would be above 2**32 - 1")
    _check_choice("config.replicate", run.replicate, REPLICATE)
    if run.batch_size % run.accumulate:
        raise UserError(f"config.accumulate = {run.accumulate} does not divide config.batch_size = {run.batch_size}")
    _check_optimizer(run.optimizer, "config.optimizer")


def _check_data(data: DataConfig) -> None:
    if data.few_below > data.many_above + 1:
        raise UserError(
            f"config.data.few_below = {data.few_below}, many_above = {data.many_above}: "
            "a class would be both many and few"
        )
    _check_choice("config.data.groups", data.groups, GROUPINGS)
    ranges = tuple(data.ranges)
    if data.groups != "counts" and (len(ranges) != 2 or not 0 <= ranges[0] <= ranges[1]):
        raise UserError(f"config.data.ranges = {ranges}: two class numbers, the first not above the second")
    if data.classes < 0 or data.threads < 0 or not 0 < data.min_area <= 1:
        raise UserError("config.data: classes and threads from 0 up, min_area above 0 and up to 1")
    if not 1 <= data.size <= data.resize:
        raise UserError(f"config.data.size = {data.size}, resize = {data.resize}: 1 or more, resize not below")


def _stage(run: RunConfig, name: str, values: Any, earlier: Mapping[str, StageConfig]) -> StageConfig:
    where = f"config.{name}"
    stage: StageConfig = _fill(StageConfig, values, where, without=SET_BY_PARSE)
    _check_choice(f"{where}.start_from", stage.start_from, ("scratch", *earlier))
    least = 0 if stage.surgery else 1
    if not stage.lr > 0 or stage.epochs < least:
        raise UserError(
            f"{where} has lr = {stage.lr}, epochs = {stage.epochs}: lr above 0 and epochs of at least {least}"
        )
    _check_choice(f"{where}.batch_norm", stage.batch_norm, BATCH_NORM_MODES)
    _check_choice(f"{where}.epoch_size", stage.epoch_size, EPOCH_SIZES)
    _check_choice(f"{where}.evaluate_net", stage.evaluate_net, ("net", "guide") if run.guide else ("net",))
    if stage.keep_optimizer and stage.start_from == "scratch":
        raise UserError(f"{where}.keep_optimizer: a stage from scratch has no optimizer to keep")
    optimizer = _fill(OptimizerConfig, {**run.optimizer._asdict(), **stage.optimizer}, f"{where}.optimizer")
    _check_optimizer(optimizer, f"{where}.optimizer")
    for group, settings in stage.groups.items():
        _check_group(settings, f"{where}.groups.{group}")
    for view, settings in stage.views.items():
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}.views.{view} = {settings!r}: needs settings, as {where}.augment")
    return stage._replace(
        title=stage.title or name,
        optimizer=optimizer._asdict(),
        schedule={**STAGE_DEFAULTS["schedule"], **stage.schedule},
        sampler={**STAGE_DEFAULTS["sampler"], **stage.sampler},
    )


def _check_choice(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{where} = {value!r}; allowed: {', '.join(allowed)}")


def _check_optimizer(optimizer: OptimizerConfig, where: str) -> None:
    if not 0 <= optimizer.momentum < 1 or not optimizer.weight_decay >= 0:
        raise UserError(f"{where} = {optimizer._asdict()}: momentum in [0, 1), weight_decay from 0")


def _check_group(settings: Any, where: str) -> None:
    group: GroupConfig = _fill(GroupConfig, settings, where)
    try:
        re.compile(group.match)
    except re.error as error:
        raise UserError(f"{where}.match = {group.match!r} is no regular expression: {error}") from None
    if not group.rate >= 0:
        raise UserError(f"{where}.rate = {group.rate}: 0 to freeze, or above")


def _fill(section: Any, values: Any, where: str, *, also: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Any:
    """Make a NamedTuple of type `section` from a dict.

    Args:
      where: The section's path in the config, for messages.
      also: Other keys that the dict may have.
      without: Fields that the dict may not have.
    """
    fields = [field for field in section._fields if field not in without]
    if not isinstance(values, Mapping):
        raise UserError(f"{where} = {values!r}: needs settings; allowed: {', '.join(fields)}")
    if unknown := sorted(set(values) - {*fields, *also}):
        allowed = ", ".join(dict.fromkeys((*fields, *also)))
        raise UserError(f"unknown key {where}.{unknown[0]}; allowed: {allowed}")
    required = [field for field in fields if field not in section._field_defaults]
    if missing := [field for field in required if field not in values]:
        raise UserError(f"missing key {where}.{missing[0]}; needed: {', '.join(required)}")
    filled = {key: values[key] for key in fields if key in values}
    for key, value in filled.items():
        kind = section.__annotations__[key]
        if hasattr(kind, "_fields"):
            filled[key] = _fill(kind, value, f"{where}.{key}")
        elif not registry.fits(value, kind):
            raise UserError(f"{where}.{key} = {value!r}: {registry.expected(value, kind)}")
    return section(**filled)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in today's defaults, JSON-ready, so that configs of different versions of ltjax can be compared.

    Leave out the `LOCATIONS` of the data: `split.json` says whether the images are the same.
    """
    filled = {**RunConfig._field_defaults, **config}
    filled["data"] = {**DataConfig._field_defaults, **config.get("data", {})}
    filled["data"] = {key: value for key, value in filled["data"].items() if key not in LOCATIONS}
    filled["optimizer"] = {**OptimizerConfig._field_defaults, **config.get("optimizer", {})}
    filled["class_weights"] = read_class_weights(filled["class_weights"])  # as text or not
    defaults = {"optimizer": filled["optimizer"], **STAGE_DEFAULTS}
    for name in config.get("stages", ()):
        stage = {**StageConfig._field_defaults, **config.get(name, {})}
        filled[name] = {**stage, **{key: {**default, **stage[key]} for key, default in defaults.items()}}
    return json.loads(json.dumps(filled))  # a tuple becomes a list, as in a file


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """List the keys at which two configs differ, such as "data.imbalance: 100 -> 50"."""
    changes = []
    for key in sorted(set(old) | set(new)):
        a, b, path = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes += differences(a, b, f"{path}.")
        elif a != b:
            changes.append(f"{path}: {_short(a)} -> {_short(b)}")
    return changes


def _short(value: Any) -> str:
    return "(absent)" if value is None else "(settings)" if isinstance(value, Mapping) else repr(value)
