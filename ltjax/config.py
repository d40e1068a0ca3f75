"""What a config may say, with defaults: the one place where its keys are named. Checked before anything starts."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, get_origin

from ltjax.types import UserError

EPOCH_SIZES = ("images", "balanced")


class Data(NamedTuple):
    name: str  # of `ltjax.data.SOURCES`
    imbalance: float = 1.0  # largest class over smallest
    profile: str = "exp"  # "exp" or "step"; "natural": all images, as unequal as they are
    max_count: int = 0  # training images of the largest class; 0: all there are
    classes: int = 0  # only the first so many; 0: all
    holdout: int = 0  # images of each class held out of training, for selection and tuning
    seed: int = 0  # of the kept images; apart from the training seed, so that seeds share a training set
    groups: str = "counts"  # "counts" of training images; as in some papers, "ranges" of class numbers or of "ranks"
    many_above: int = 100  # counts: many > many_above,
    few_below: int = 20  # few < few_below
    ranges: tuple[int, ...] = ()  # ranges: (a, b), many = classes below a, few = classes from b on
    root: str = ""  # of an image_folder
    # of images that stay on disk, of any size:
    size: int = 224  # side of the square that the network sees, in pixels
    resize: int = 256  # evaluation: the shorter side, before that square is cut from the middle
    min_area: float = 0.08  # training: smallest share of an image in a random window
    threads: int = 0  # that decode; 0: one for each core


class Optimizer(NamedTuple):
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0


class Attack(NamedTuple):
    """How `--mode=attack` judges a checkpoint."""

    epsilon: float | str = "8/255"  # in pixel units of [0, 1]
    norm: str = "linf"  # or "l2"
    num_images: int = 0  # the first of the test set; 0: all
    tests: tuple[str, ...] = ("pgd-20", "cw-20", "autoattack")
    step_size: float | str = "2/255"  # of pgd-N and cw-N
    batch_size: int = 500  # images, over all devices
    seed: int = 0
    # of the report's curve of accuracy against epsilon, as multiples of it: pgd-20, where that is among the tests, at
    # each of them, its steps in proportion
    radii: tuple[float, ...] = ()


class Group(NamedTuple):
    match: str  # regular expression for whole paths
    rate: float  # factor on the stage's lr; 0 freezes
    weight_decay: float | None = None  # instead of the optimizer's
    optional: bool = False  # may match no parameter


class Stage(NamedTuple):
    method: Mapping[str, Any]  # name, and the method's own hyper-parameters
    epochs: int  # 0: only `surgery`, no training
    lr: float
    groups: Mapping[str, Mapping[str, Any]]  # {name: {match, rate, weight_decay}}, see `ltjax.optim`
    title: str = ""  # in the table
    start_from: str = "scratch"  # or the name of an earlier stage
    schedule: Mapping[str, Any] = {}  # kind, warmup, decay_at, decay: see `ltjax.optim.schedule_table`
    sampler: Mapping[str, Any] = {}  # name, and its own settings: see `ltjax.data.samplers`
    augment: Mapping[str, Any] = {}  # see `ltjax.data.augment.augment`
    batch_norm: str = "train"  # or "eval"
    optimizer: Mapping[str, Any] = {}  # momentum, nesterov, weight_decay where they differ from the run's
    keep_optimizer: bool = False  # go on with the momentum of `start_from`, which trained the same parameters
    # draws in an epoch: "images", as many as there are training images; "balanced", as many as if every class had those
    # of the largest one (DRO-LT's class-aware sampler)
    epoch_size: str = "images"
    drop_last: bool = False  # an epoch is whole batches: draws // batch_size steps, not rounded up
    surgery: Mapping[
        str, Any
    ] = {}  # name, and its own settings: what happens to the weights first, see `ltjax.surgery`
    eval_classifier: Mapping[str, Any] = {}  # tau, bias: `ltjax.surgery.tau_normalised` weights at evaluation only
    nearest_mean: bool = False  # at evaluation, accuracy of the nearest class mean as well
    evaluate_net: str = "net"  # or "guide", where that is what the stage trains


class Run(NamedTuple):
    name: str
    data: Data
    model: Mapping[str, Any]  # name, and the model's own settings
    stages: tuple[str, ...]  # each the name of a further key that holds a `Stage`
    epochs: int = 0  # of the first stage; the stages refer to it
    batch_size: int = 128
    seed: int = 0  # initialisation, sampling order, augmentation
    optimizer: Optimizer = Optimizer()
    guide: Mapping[str, Any] = {}  # a second network, like `model`, for methods that have one; {}: none
    attack: Attack = Attack()  # of --mode=attack; no part of training
    # epochs; 0: every fifth, and each of the last 20
    eval_every: int = 1
    eval_batch_size: int = 500
    replicas: int = 1  # runs with seeds seed, seed + 1, ... in one program
    replicate: str = "loop"  # one replica after the other on a device, or "vmap": all in one batched step
    # steps to a dispatch; 0: at most 100 on accelerators and 16 on a CPU, a fifth of that where each step attacks its
    # images, 4 of images that stay on disk
    dispatch_steps: int = 0
    # a folder that `python -m ltjax.interop.torch` has written: stages from scratch begin with it, and --mode=eval and
    # attack judge it where there is no run; "": random ones
    weights: str = ""
    weights_parts: tuple[str, ...] = ()  # of the network that are taken from there, such as ("backbone",); (): all
    gpu_graphs: str = "default"  # what of a training step becomes CUDA graphs, see `ltjax.system.xla.GPU_GRAPHS`
    accumulate: int = 1  # parts of a batch that go through the network one after the other, to save memory
    checkpoint_seconds: float = 300.0  # between checkpoints within a stage; its end is always saved


def _fill(kind: Any, values: Any, where: str, also: tuple[str, ...] = ()) -> Any:
    """A NamedTuple of type `kind` from a dict. also: further keys that may be there."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} = {values!r}: needs settings; allowed: {', '.join(kind._fields)}")
    unknown = sorted(set(values) - set(kind._fields) - set(also))
    if unknown:
        raise UserError(f"unknown key {where}.{unknown[0]}; allowed: {', '.join((*kind._fields, *also))}")
    required = [field for field in kind._fields if field not in kind._field_defaults]
    missing = [field for field in required if field not in values]
    if missing:
        raise UserError(f"missing key {where}.{missing[0]}; needed: {', '.join(required)}")
    for key, wanted in kind.__annotations__.items():
        value = values.get(key, kind._field_defaults.get(key))
        if get_origin(wanted) is Mapping and not isinstance(value, Mapping):
            raise UserError(f"{where}.{key} = {value!r}: needs settings")
        accepted = {int: int, float: (int, float), str: str, bool: bool}.get(wanted)
        if accepted and (not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool)):
            raise UserError(f"{where}.{key} = {value!r}: {wanted.__name__} expected")
    return kind(**{key: value for key, value in values.items() if key in kind._fields})


def parse(config: Mapping[str, Any]) -> tuple[Run, dict[str, Stage]]:
    """Check a config (nested dicts) against the types above -> the run and its stages by name.

    Raises: UserError naming the key and what is allowed.
    """
    stages = config.get("stages", ())
    if isinstance(stages, str):
        raise UserError(f"config.stages = {stages!r}: a tuple of names, such as ({stages!r},)")
    stages = tuple(stages)
    # settings of stages that this run leaves out may stay
    unused = tuple(
        key for key, value in config.items() if isinstance(value, Mapping) and {"method", "lr"} <= set(value)
    )
    run = _fill(Run, config, "config", also=tuple(dict.fromkeys((*stages, *unused))))
    run = run._replace(
        data=_fill(Data, run.data, "config.data"),
        optimizer=_fill(Optimizer, config.get("optimizer", {}), "config.optimizer"),
        attack=_fill(Attack, config.get("attack", {}), "config.attack"),
        stages=stages,
    )
    if not stages or len(set(stages)) != len(stages):
        raise UserError(f"config.stages = {stages}: name one stage or more, each once")
    if run.eval_every < 0:
        raise UserError(f"config.eval_every = {run.eval_every}: must be at least 1, or 0 to choose")
    for key in ("batch_size", "eval_batch_size", "replicas", "accumulate"):
        if getattr(run, key) < 1:
            raise UserError(f"config.{key} = {getattr(run, key)}: must be at least 1")
    for where, seed in (("config.seed", run.seed), ("config.data.seed", run.data.seed)):
        if not 0 <= seed < 2**32:
            raise UserError(f"{where} = {seed}: from 0 to 2**32 - 1")
    if run.seed + run.replicas > 2**32:
        raise UserError(f"config.seed = {run.seed}, replicas = {run.replicas}: the last seed would be above 2**32 - 1")
    if run.replicate not in ("loop", "vmap"):
        raise UserError(f"config.replicate = {run.replicate!r}; allowed: loop, vmap")
    if run.data.few_below > run.data.many_above + 1:
        raise UserError(
            f"config.data.few_below = {run.data.few_below}, many_above = {run.data.many_above}: "
            "a class would be both many and few"
        )
    _check_optimizer(run.optimizer, "config.optimizer")
    if run.dispatch_steps < 0:
        raise UserError(f"config.dispatch_steps = {run.dispatch_steps}: must be at least 1, or 0 to choose")
    if run.batch_size % run.accumulate:
        raise UserError(f"config.accumulate = {run.accumulate} does not divide config.batch_size = {run.batch_size}")
    if run.data.groups not in ("counts", "ranges", "ranks"):
        raise UserError(f"config.data.groups = {run.data.groups!r}; allowed: counts, ranges, ranks")
    if run.data.classes < 0 or run.data.threads < 0 or not 0 < run.data.min_area <= 1:
        raise UserError("config.data: classes and threads from 0 up, min_area above 0 and up to 1")
    if not 1 <= run.data.size <= run.data.resize:
        raise UserError(f"config.data.size = {run.data.size}, resize = {run.data.resize}: 1 or more, resize not below")
    ranges = tuple(run.data.ranges)
    if run.data.groups != "counts" and (len(ranges) != 2 or not 0 <= ranges[0] <= ranges[1]):
        raise UserError(f"config.data.ranges = {ranges}: two class numbers, the first not above the second")
    parsed: dict[str, Stage] = {}
    for name in stages:
        where = f"config.{name}"
        if name in Run._fields or name not in config:
            raise UserError(f"config.stages names {name!r}, which needs settings of its own in {where}")
        stage = _fill(Stage, config[name], where)
        if stage.start_from not in ("scratch", *parsed):
            earlier = ", ".join(("scratch", *parsed))
            raise UserError(f"{where}.start_from = {stage.start_from!r}: allowed here: {earlier}")
        least = 0 if stage.surgery else 1
        if not stage.lr > 0 or stage.epochs < least:
            raise UserError(
                f"{where} has lr = {stage.lr}, epochs = {stage.epochs}: lr above 0 and epochs of at least {least}"
            )
        if stage.epoch_size not in EPOCH_SIZES:
            raise UserError(f"{where}.epoch_size = {stage.epoch_size!r}; allowed: {', '.join(EPOCH_SIZES)}")
        optimizer = _fill(Optimizer, {**run.optimizer._asdict(), **stage.optimizer}, f"{where}.optimizer")
        _check_optimizer(optimizer, f"{where}.optimizer")
        nets = ("net", "guide") if run.guide else ("net",)
        if stage.evaluate_net not in nets:
            raise UserError(f"{where}.evaluate_net = {stage.evaluate_net!r}; allowed: {', '.join(nets)}")
        if stage.keep_optimizer and stage.start_from == "scratch":
            raise UserError(f"{where}.keep_optimizer: a stage from scratch has no optimizer to keep")
        for group, settings in stage.groups.items():
            _check_group(settings, f"{where}.groups.{group}")
        parsed[name] = stage._replace(
            title=stage.title or name,
            optimizer=optimizer._asdict(),
            schedule={"kind": "constant", **stage.schedule},
            sampler={"name": "instance_balanced", **stage.sampler},
        )
    return run, parsed


def _check_optimizer(optimizer: Optimizer, where: str) -> None:
    if not 0 <= optimizer.momentum < 1 or not optimizer.weight_decay >= 0:
        raise UserError(f"{where} = {optimizer._asdict()}: momentum in [0, 1), weight_decay from 0")


def _check_group(settings: Any, where: str) -> None:
    group = _fill(Group, settings, where)
    try:
        re.compile(group.match)
    except re.error as error:
        raise UserError(f"{where}.match = {group.match!r} is no regular expression: {error}") from None
    if not group.rate >= 0:
        raise UserError(f"{where}.rate = {group.rate}: 0 to freeze, or above")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Keys at which two configs differ, as "data.imbalance: 100 -> 50"."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b, path = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}.")
        elif a != b:
            found.append(f"{path}: {_short(a)} -> {_short(b)}")
    return found


def _short(value: Any) -> str:
    return "(absent)" if value is None else "(settings)" if isinstance(value, Mapping) else repr(value)
