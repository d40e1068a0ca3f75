"""Recipes as chains of stages: `RECIPES` has the papers', `recipe=reslt+dro+smoothing` makes any other.

A chain starts with a block of `FIRST`, which trains a whole network. Each further block, of `NEXT`, continues from
the previous one. Lengths are for 200 epochs, or a short run of 12; for adversarial training (`configs/robust.py`), 100
or 2.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import robust


class Recipe(NamedTuple):
    title: str  # "": the blocks' names
    blocks: tuple[str, ...]
    stages: tuple[str, ...] = ()  # names in the config; (): the blocks'
    weight_decay: float = 2e-4  # for small images, like the next two
    epochs: int = 200  # of the first part; for adversarial training, see `configs/robust.py`
    epochs_on: Mapping[str, int] = MappingProxyType({})  # by config file, if they differ
    batch_size: int = 128
    decay: float = 0.1  # factor on the rate, twice
    auto_augment: bool = False  # AutoAugment and Cutout in every stage

    @property
    def adversarial(self) -> bool:
        """Return whether the first part trains on attacked images."""
        return bool(set(self.blocks) & set(robust.BLOCKS))


RECIPES = {
    "mislas": Recipe("MiSLAS", ("mixup", "smoothing"), stages=("features", "classifier")),
    "ce": Recipe("Cross-entropy", ("ce",)),
    "mixup": Recipe("Mixup", ("mixup",)),
    "focal": Recipe("Focal loss", ("focal",)),
    "cb_ce": Recipe("Class-balanced CE", ("cb_ce",)),
    "ldam": Recipe("LDAM", ("ldam",)),
    "ldam_drw": Recipe("LDAM-DRW", ("ldam", "drw")),
    "balanced_softmax": Recipe("Balanced softmax", ("balanced_softmax",)),
    # 13,000 steps of 512 images at imbalance 100, as its authors count them: see docs/methods/losses.md
    "balms": Recipe(
        "BALMS",
        ("balms",),
        weight_decay=5e-4,
        auto_augment=True,
        epochs=591,
        epochs_on={"cifar10_lt": 520},
        batch_size=512,
    ),
    "logit_adjustment": Recipe("Logit adjustment", ("logit_adjustment",)),
    "logit_adjustment_posthoc": Recipe("Post-hoc logit adjustment", ("ce", "logit_shift")),
    "crt": Recipe("cRT", ("ce", "crt")),
    "lws": Recipe("LWS", ("ce", "lws")),
    "tau_norm": Recipe("tau-normalisation", ("ce", "tau_norm")),
    "ncm": Recipe("Nearest class mean", ("ce", "ncm")),
    # the only decay in DRO-LT's code is LDAM's, 0.01, in an unused function
    "drolt": Recipe("DRO-LT", ("ce", "dro", "ce_classifier"), weight_decay=1e-4, auto_augment=True, decay=0.01),
    "reslt": Recipe("ResLT", ("reslt",), weight_decay=5e-4),
    "lift": Recipe("LIFT's classifier", ("lift",), weight_decay=5e-4),
    "best": Recipe("Self-distilled balanced softmax", ("balanced_teacher", "student"), weight_decay=5e-4),
    "proco": Recipe("ProCo", ("proco",), batch_size=256),
    "bcl": Recipe("BCL", ("bcl",), weight_decay=5e-4, batch_size=256),
    "pgd_at": Recipe("PGD-AT", ("pgd_at",)),
    "trades": Recipe("TRADES", ("trades",)),
    "alp": Recipe("ALP", ("alp",)),
    "bgat": Recipe("BGAT", ("natural", "bgat")),
    "lbgat": Recipe("LBGAT", ("lbgat",)),
    "gkl_at": Recipe("GKL-AT", ("gkl_at",), weight_decay=5e-4),
    "at_bsl": Recipe("AT-BSL", ("at_bsl",), weight_decay=5e-4),
    "best_robust": Recipe("Balanced GKL-AT", ("best_robust",), weight_decay=5e-4),
}

WITHOUT_PRETRAINED = tuple(name for name in RECIPES if name != "lift")  # methods without a pretrained backbone
# methods that need images in memory (a second batch, or several views of each), and recipes only for CIFAR
SMALL = ("best", "proco", "bcl", "at_bsl", "best_robust")
LARGE = tuple(name for name in WITHOUT_PRETRAINED if name not in SMALL)


class Smoothing(NamedTuple):
    """MiSLAS's second stage."""

    head: float  # label smoothing of the most frequent class
    tail: float  # of the rarest one
    classifier_rate: float  # factor on the classifier's learning rate
    shifted_batch_norm: bool


class ResLT(NamedTuple):
    beta: float
    medium_start: float  # first class of the second branch: its rank by count, or a share of the classes below 1
    tail_start: float | None  # first class of the third branch; None: there are two branches
    warmup_start: float = 7 / 15  # rate of the first epoch; 0: a linear rise from 0
    nesterov: bool = True
    tau: float = 0.0  # at evaluation, the paper's gamma: exponent of the norms that divide the class weights
    bias: bool = True  # whether evaluation adds the bias


class DataSetting(NamedTuple):
    """The papers' settings that depend on the data set; the defaults are for small images."""

    # where the papers have a figure, its config sets this
    smoothing: Smoothing = Smoothing(head=0.1, tail=0.1, classifier_rate=1.0, shifted_batch_norm=False)
    reslt: ResLT | None = None  # None: not for this data
    lr: float = 0.1
    warmup: float = 5 / 200  # share of the epochs; with a cosine, only for ResLT and before deferred re-weighting
    cosine: bool = False  # instead of two decays
    crop_padding: int = 4  # 0: the host crops random windows of any size
    color_jitter: float = 0.0
    mixup: float = 1.0  # MiSLAS's a of Beta(a, a)
    fixed: bool = False  # the backbone keeps its initial weights, without augmentation
    balanced_epochs: bool = True  # epochs of DRO-LT's later stages, see `ltjax.config.StageConfig.epoch_size`
    schedule: robust.Schedule = robust.LBGAT  # of adversarial training


class Setting(NamedTuple):
    """The input of a block."""

    parts: tuple[str, ...]  # the network's parts with parameters
    papers: DataSetting = DataSetting()
    epochs: Any = 0  # a reference to config.epochs, the length of the first part
    short: bool = False
    auto_augment: bool | None = None  # None: the recipe's own
    mixup: float = 0.0  # a of Beta(a, a) in stages that train the whole network; 0: the recipe's own
    # cutmix, ema, sam of the same stages, instead of the recipe's own
    changed: Mapping[str, Any] = MappingProxyType({})
    deferred: bool = False  # the last fifth of the first part is a separate stage, with class weights
    decay: float = 0.1  # factor on the rate, twice, in the first part
    adversarial: robust.Setting = robust.Setting()
    first: Mapping[str, Any] = MappingProxyType({})  # the first stage, read by later ones


EFFECTIVE_NUMBER = dict(kind="effective_number", beta=0.9999)  # class weights
# The defaults of a stage, as in `StageConfig` of `ltjax/config.py`, without the keys that `chain` writes.
STAGE = dict(schedule=dict(kind="constant"), sampler=dict(name="instance_balanced"), augment={}, batch_norm="train")
STAGE |= dict(keep_optimizer=False, epoch_size="images", drop_last=False, surgery={}, evaluate_net="net")
STAGE |= dict(ema={}, sam={}, views={})
# ProCo's SimAugment, for contrastive views of small images
SIM_AUGMENT = dict(
    crop_padding=0, crop_area=0.08, flip=True, color_jitter=0.4, hue=0.1, jitter_probability=0.8, grey=0.2
)
SIM_AUGMENT |= dict(blur=0.0, auto_augment=False, rand_augment=(), cutout_size=0)


def add_stages(config: ConfigDict, args: SimpleNamespace, recipe: Recipe, papers: DataSetting) -> None:
    """Write the stages of a recipe, and the epochs of adversarial training, into a config that has its networks."""
    special = robust.OVERRIDES.get(recipe.blocks[0])
    schedule = robust.SHORT if args.short else special.schedule if special else papers.schedule
    if recipe.adversarial:
        config.epochs = schedule.epochs
    smoothing = (
        dict(head=papers.smoothing.head, tail=papers.smoothing.tail) if args.loss == "label_aware_smoothing" else {}
    )
    optional = {
        "backbone": config.model.name != "features",
        "classifier": True,
        "branches": config.model.branches,
        "logit_scale": config.model.logit_scale,
        "guide": config.guide,
        "block": config.model.get("extra_block"),
        "linear_map": config.model.get("linear_map"),
    }
    setting = Setting(
        parts=tuple(part for part, used in optional.items() if used),
        papers=papers,
        short=args.short,
        auto_augment={"paper": recipe.auto_augment or None, "plain": False, "auto": True}[args.augment],
        mixup=args.mixup,
        changed={key: getattr(args, key) for key in ("cutmix", "ema", "sam") if key in args.changed},
        deferred="drw" in recipe.blocks,
        decay=recipe.decay,
        adversarial=robust.Setting(
            attack=robust.attack(args.epsilon, args.short),
            beta=args.beta,
            loss=dict(name=args.loss, **smoothing),
            awp=robust.AWP.get(recipe.blocks[0], robust.AWP_OTHERS) if args.awp == "true" else 0.0,
            sampler=args.sampler,
            schedule=schedule,
        ),
    )
    chain(config, recipe, setting)


def chain(config: ConfigDict, recipe: Recipe, setting: Setting) -> None:
    """Add the stages of a recipe to a config; epochs and optimizer refer to the run's."""
    names = recipe.stages or recipe.blocks
    config.stages = (*config.stages, *names)
    before = "scratch"
    for number, (block, name) in enumerate(zip(recipe.blocks, names, strict=True)):
        setting = setting._replace(epochs=config.get_oneway_ref("epochs"))
        stage = (NEXT if number else FIRST)[block](setting)
        if any(group["rate"] for part, group in stage["groups"].items() if part == "backbone"):
            stage = changed(stage, setting.changed)
        if not number:
            setting = setting._replace(first=stage)
        step = f", stage {number + 1}" if len(recipe.blocks) > 1 else ""
        optimizer = {key: config.optimizer.get_oneway_ref(key) for key in config.optimizer}
        config[name] = {
            **STAGE,
            **stage,
            "title": f"{recipe.title}{step}" if recipe.title else block,
            "start_from": before,
            "optimizer": {**optimizer, **stage.get("optimizer", {})},
            "eval_classifier": setting.first.get("eval_classifier", {}),
            "nearest_mean": "dro" in recipe.blocks and block != "natural",  # DRO-LT also evaluates its features
        }
        before = name


def changed(stage: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage changed by the arguments `cutmix`, `ema` and `sam`.

    Raises:
      ValueError: If `ema` is no number below 1.
    """
    stage = dict(stage)
    if "cutmix" in values:
        others = {key: value for key, value in stage["augment"].items() if not key.startswith("cutmix")}
        cutmix = dict(cutmix_alpha=1.0, cutmix_probability=0.5, cutmix_partner=values["cutmix"])
        stage["augment"] = others if values["cutmix"] == "none" else {**others, **cutmix}
    if "ema" in values:
        try:
            decay = float(values["ema"])
        except ValueError:
            decay = -1.0
        if not 0 <= decay < 1:
            raise ValueError(f"config argument 'ema={values['ema']}': from 0 (none) to below 1, or auto")
        stage["ema"] = dict(decay=decay) if decay else {}
    if values.get("sam"):
        stage["sam"] = dict(rho=values["sam"])
    return stage


def parse_recipe(text: str) -> Recipe:
    """Read "ce+dro+smoothing".

    Raises:
      ValueError: For an invalid block; it lists the valid ones.
    """
    blocks = tuple(text.split("+"))
    for number, block in enumerate(blocks):
        known = NEXT if number else FIRST
        if block not in known:
            place = "after the first block" if number else "first"
            raise ValueError(f"config argument 'recipe={text}': allowed {place}: {', '.join(known)}; not {block!r}")
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"config argument 'recipe={text}': each block once")
    for block in ("drw", "student"):
        if block in blocks[2:] or (block in blocks and blocks[0] in ("reslt", *robust.BLOCKS)):
            place = "second, after a block with one loss such as ce"
            raise ValueError(f"config argument 'recipe={text}': {block} comes {place}")
    if ("bgat" in blocks or blocks[0] == "natural") and blocks[:2] != ("natural", "bgat"):
        raise ValueError(f"config argument 'recipe={text}': natural and bgat go together, as natural+bgat at the start")
    known = [recipe for recipe in RECIPES.values() if recipe.blocks == blocks]
    first = next(recipe for recipe in RECIPES.values() if recipe.blocks[0] == blocks[0])
    return known[0] if known else Recipe("", blocks, weight_decay=first.weight_decay)


def head_settings(blocks: tuple[str, ...], fixed: bool = False) -> dict[str, Any]:
    """Return the settings of the network's head that a chain of blocks needs. fixed: on a backbone of photographs."""
    lifts = 28.0 if fixed else 25.0  # 25 is LIFT's; on fixed backbones it was less well calibrated
    return dict(
        # logits are multiples of a cosine, so that the softmax can become confident
        classifier="cosine" if {"ldam", "lift"} & set(blocks) else "linear",
        cosine_scale=lifts if "lift" in blocks else 30.0,
        logit_scale=bool({"lws", "smoothing"} & set(blocks)),
        branches=3 if "reslt" in blocks else 0,
    )


def groups(parts: tuple[str, ...], **rates: float) -> dict[str, dict[str, Any]]:
    """Return parameter groups: a factor on the learning rate for each part, by default 0 (frozen)."""
    paths = {"logit_scale": "net/logit_scale", "guide": "guide/.*"}
    return {part: dict(match=paths.get(part, f"net/{part}/.*"), rate=rates.get(part, 0.0)) for part in parts}


def augment(setting: Setting, *, auto: bool = False, mixup: float = 0.0) -> dict[str, Any]:
    if setting.papers.fixed:
        return dict(crop_padding=0, flip=False, mixup_alpha=mixup)
    auto = auto if setting.auto_augment is None else setting.auto_augment
    padding, mixing = setting.papers.crop_padding, dict(mixup_alpha=mixup)
    if padding:
        return dict(crop_padding=padding, flip=True, auto_augment=auto, cutout_size=16 if auto else 0, **mixing)
    jitter = 0.0 if auto else setting.papers.color_jitter
    rand = (2, 9.0) if auto else ()  # AutoAugment's policy is only for small images
    return dict(crop_padding=0, flip=True, rand_augment=rand, color_jitter=jitter, **mixing)


def _scratch(
    setting: Setting, method: dict, *, mixup: float = 0.0, decay: float | None = None, **more: Any
) -> dict[str, Any]:
    """Train the whole network: 5 epochs of warm-up, decays after 160 and 180 of 200; 2, 10 and 11 of 12 if short.

    Large images have a cosine without warm-up.
    """
    papers, epochs = setting.papers, setting.epochs
    schedule: dict[str, Any] = dict(kind="step", warmup=2 / 12 if setting.short else papers.warmup)
    schedule.update(decay_at=(0.8, 0.9), decay=setting.decay if decay is None else decay)
    if setting.deferred:
        epochs = epochs - (epochs + 4) // 5
        schedule.update(warmup=schedule["warmup"] / 0.8, decay_at=())
    elif papers.cosine:
        schedule.update(kind="cosine", warmup=0.0, decay_at=())
    return dict(
        method=method,
        epochs=epochs,
        lr=papers.lr,
        schedule=schedule,
        sampler=dict(name="instance_balanced"),
        augment=augment(setting, mixup=setting.mixup or mixup),
        batch_norm=batch_norm(setting),
        groups=groups(setting.parts, **network_rates(setting)),
        **more,
    )


def network_rates(setting: Setting) -> dict[str, float]:
    """Return the rates of a stage that trains the whole network; with an extra block, the backbone is frozen."""
    frozen = setting.papers.fixed or "block" in setting.parts
    return dict(backbone=0.0 if frozen else 1.0, block=1.0, branches=1.0, linear_map=1.0, classifier=1.0)


def batch_norm(setting: Setting, train: bool = True) -> str:
    """Return a stage's mode of batch norm; a fixed backbone keeps its statistics."""
    return "train" if train and not setting.papers.fixed else "eval"


def _loss(name: str, **settings: Any) -> dict[str, Any]:
    return dict(name="erm", loss=dict(name=name, **settings))


def reslt(setting: Setting) -> dict[str, Any]:
    paper = setting.papers.reslt
    assert paper is not None, "ResLT is for long-tailed data"
    method = dict(name="reslt", beta=paper.beta, medium_start=paper.medium_start)
    if paper.tail_start is not None:
        method["tail_start"] = paper.tail_start
    stage = _scratch(setting, method, drop_last=True)
    stage["optimizer"] = dict(nesterov=paper.nesterov)
    stage["eval_classifier"] = dict(tau=paper.tau, bias=paper.bias)
    warmup = setting.papers.warmup
    stage["schedule"].update(warmup=2 / 12 if setting.short and warmup else warmup, warmup_start=paper.warmup_start)
    return stage


def lift(setting: Setting) -> dict[str, Any]:
    """Train LIFT's classifier (Shi et al., ICML 2024) from class means, with adjusted logits."""
    stage = _scratch(setting, _loss("logit_adjusted", tau=1.0), surgery=dict(name="class_means"))
    return dict(stage, schedule=dict(kind="cosine"))


def balanced_teacher(setting: Setting) -> dict[str, Any]:
    """Train with balanced softmax, AutoAugment, CutMix with rare classes, a cosine, and an average of the weights."""
    stage = _scratch(setting, _loss("balanced_softmax"))
    stage["augment"].update(auto_augment=True, cutout_size=0)
    if not setting.mixup:
        stage["augment"].update(cutmix_alpha=1.0, cutmix_probability=0.5, cutmix_partner="class_balanced")
    stage["schedule"] = dict(kind="cosine", warmup=2 / 12 if setting.short else setting.papers.warmup)
    return dict(stage, optimizer=dict(nesterov=True), ema=dict(decay=0.999))


def student(setting: Setting) -> dict[str, Any]:
    """Train a new network like the first one, also on the logits of its average: self-distillation, as in DiVE.

    DiVE flattens the teacher's softmax by power 0.5. Here its power is 1, chosen by `benchmarks.left_out`.
    """
    loss = setting.first["method"]["loss"]
    method = dict(name="distil", loss=loss, kind="kl", temperature=2.0, share=0.5, power=1.0, warmup=0.0)
    return dict(setting.first, method=method, epochs=setting.epochs, surgery=dict(name="teacher"))


def _contrastive(setting: Setting, method: dict[str, Any], lr: float, **view: Any) -> dict[str, Any]:
    """Train with two more views of each image. `view` has changes of `SIM_AUGMENT`."""
    stage = _scratch(setting, method, drop_last=True)
    views = {name: dict(SIM_AUGMENT, **view) for name in ("first", "second")}
    groups = {**stage["groups"], "method": dict(match="method/.*", rate=1.0)}  # the projections
    return dict(stage, lr=lr, augment=augment(setting, auto=True, mixup=setting.mixup), views=views, groups=groups)


def proco(setting: Setting) -> dict[str, Any]:
    method = dict(name="proco", loss=dict(name="logit_adjusted", tau=1.0), weight=1.0)
    return _contrastive(setting, dict(method, temperature=0.1, projection=(512, 128)), lr=0.3)


def bcl(setting: Setting) -> dict[str, Any]:
    """Train BCL with ConCutMix's recipe for CIFAR, without its CutMix."""
    method = dict(name="bcl", loss=dict(name="logit_adjusted", tau=1.0), alpha=2.0, beta=0.6)
    return _contrastive(setting, dict(method, temperature=0.1, projection=(512, 128)), lr=0.15, crop_area=0.2, blur=0.5)


def balms(setting: Setting) -> dict[str, Any]:
    """Train with balanced softmax in BALMS's recipe: a cosine from 0.1 after 800 of 13,000 steps of warm-up from 0.05.

    In whole epochs, the warm-up is 37 of 591 on CIFAR-100-LT, and 32 of 520 on CIFAR-10-LT.
    """
    stage = _scratch(setting, _loss("balanced_softmax"), drop_last=True)
    stage["schedule"] = dict(kind="cosine", warmup=2 / 12 if setting.short else 0.062, warmup_start=0.5)
    return stage


def adversarial(name: str, setting: Setting) -> dict[str, Any]:
    """Train a block of `configs/robust.py` with its schedule; if there are two networks, train both."""
    robust_setting = setting.adversarial
    trained = {"natural": ("guide",), "bgat": ("backbone", "classifier")}.get(name, ("backbone", "classifier", "guide"))
    in_a_row = dict(in_a_row=4) if robust_setting.sampler == "class_aware" else {}
    special = robust.OVERRIDES.get(name)
    images = augment(setting, mixup=setting.mixup)
    if special and special.rand_augment and setting.auto_augment is None:
        images["rand_augment"] = special.rand_augment
    return dict(
        method=robust.BLOCKS[name](robust_setting),
        epochs=setting.epochs,
        lr=special.lr if special else setting.papers.lr,
        schedule=robust_setting.schedule.settings(),
        sampler=dict(name=robust_setting.sampler, **in_a_row),
        augment=images,
        ema=dict(decay=special.ema) if special and special.ema else {},
        batch_norm="train",
        groups=groups(setting.parts, **dict.fromkeys(trained, 1.0)),
        evaluate_net="guide" if name == "natural" else "net",
    )


FIRST: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "ce": lambda s: _scratch(s, _loss("cross_entropy")),
    "mixup": lambda s: _scratch(s, _loss("cross_entropy"), mixup=s.papers.mixup),
    "focal": lambda s: _scratch(s, _loss("focal", gamma=1.0)),  # as in LDAM's comparison; Lin et al. have 2
    "cb_ce": lambda s: _scratch(s, _loss("cross_entropy", class_weights=EFFECTIVE_NUMBER)),
    # margins of 0.5 in cosine, on logits that are 30 cosines; its authors decay by 0.01
    "ldam": lambda s: _scratch(s, _loss("ldam", max_margin=15.0, scale=1.0), decay=0.01),
    "balanced_softmax": lambda s: _scratch(s, _loss("balanced_softmax")),
    "logit_adjustment": lambda s: _scratch(s, _loss("logit_adjusted", tau=1.0)),
    "reslt": reslt,
    "lift": lift,
    "balms": balms,
    "balanced_teacher": balanced_teacher,
    "proco": proco,
    "bcl": bcl,
    **{name: partial(adversarial, name) for name in robust.BLOCKS if name != "bgat"},
}


def _later(setting: Setting, method: dict, *, epochs: int, short: int, lr: float, **more: Any) -> dict[str, Any]:
    """Continue from a trained network, for about 1/20 of the first stage's length; `short` epochs in a short run."""
    stage = dict(
        method=method,
        epochs=short if setting.short else epochs,
        lr=lr,
        schedule=dict(kind="cosine"),
        sampler=dict(name="class_balanced"),
        augment=augment(setting),
        batch_norm="eval",
    )
    return {**stage, **more}


def smoothing(setting: Setting) -> dict[str, Any]:
    """Return MiSLAS's second stage: label-aware smoothing, learnable weight scaling, shifted batch norm."""
    paper = setting.papers.smoothing
    return _later(
        setting,
        dict(name="mislas", head=paper.head, tail=paper.tail, shape="concave"),
        epochs=10,
        short=2,
        lr=0.1,
        sampler=dict(name="class_aware", in_a_row=4),
        batch_norm=batch_norm(setting, train=paper.shifted_batch_norm),
        groups=groups(setting.parts, classifier=paper.classifier_rate, logit_scale=1.0),
    )


def drw(setting: Setting) -> dict[str, Any]:
    """Return deferred re-weighting: the first stage continues at a lower rate, with class weights."""
    first = setting.first
    decay = first["schedule"]["decay"]
    loss = dict(first["method"]["loss"], class_weights=EFFECTIVE_NUMBER)
    return dict(
        first,
        method=dict(first["method"], loss=loss),
        epochs=(setting.epochs + 4) // 5,
        lr=first["lr"] * decay,
        schedule=dict(kind="step", decay_at=(0.5,), decay=decay),
        keep_optimizer=True,
    )


def _drolt(setting: Setting, method: dict, **more: Any) -> dict[str, Any]:
    """Train a later stage of DRO-LT: a constant rate, class-aware batches, AutoAugment."""
    return _later(
        setting,
        method,
        schedule=dict(kind="constant"),
        sampler=dict(name="class_aware", in_a_row=4),
        augment=augment(setting, auto=True),
        epoch_size="balanced" if setting.papers.balanced_epochs else "images",
        **more,
    )


def dro(setting: Setting) -> dict[str, Any]:
    """Return DRO-LT's second stage: train the features, freeze the classifier."""
    method: dict[str, Any] = dict(name="drolt", loss=dict(name="cross_entropy", class_weights=dict(kind="count")))
    method.update(robust_weight=1.0, radius="learned", radius_size=0.5, temperature=1.0, layers=())
    trained = groups(setting.parts, **{**network_rates(setting), "classifier": 0.0})
    trained["margins"] = dict(match="method/margins", rate=1.0, optional=True)  # only learned radii
    return _drolt(setting, method, epochs=80, short=3, lr=0.005, batch_norm=batch_norm(setting), groups=trained)


def ce_classifier(setting: Setting) -> dict[str, Any]:
    """Return DRO-LT's third stage: train only the classifier, with batch norm in evaluation mode."""
    trained = groups(setting.parts, classifier=1.0)
    return _drolt(setting, _loss("cross_entropy"), epochs=20, short=1, lr=0.01, groups=trained)


def robust_classifier(setting: Setting) -> dict[str, Any]:
    """Train only the classifier, on features of attacked images and class-balanced batches."""
    method = robust.BLOCKS["pgd_at"](setting.adversarial._replace(awp=0.0))
    return _later(setting, method, epochs=10, short=1, lr=0.01, groups=groups(setting.parts, classifier=1.0))


def _post_hoc(surgery: dict[str, Any]) -> dict[str, Any]:
    """Change the classifier's weights without training."""
    return dict(method=_loss("cross_entropy"), epochs=0, lr=0.1, surgery=surgery, batch_norm="eval", groups={})


def _classifier(setting: Setting, loss: str, part: str = "classifier", **more: Any) -> dict[str, Any]:
    """Train one part of the network for 10 epochs."""
    trained = groups(setting.parts, **{part: 1.0})
    return _later(setting, _loss(loss), epochs=10, short=2, lr=0.1, groups=trained, **more)


NEXT = {
    "drw": drw,
    "dro": dro,
    "ce_classifier": ce_classifier,
    "balanced_softmax_classifier": lambda s: _classifier(s, "balanced_softmax", sampler=dict(name="instance_balanced")),
    "smoothing": smoothing,
    "student": student,
    "bgat": partial(adversarial, "bgat"),
    "robust_classifier": robust_classifier,
    "crt": lambda s: _classifier(s, "cross_entropy", surgery=dict(name="new_head")),
    "lws": lambda s: _classifier(s, "cross_entropy", "logit_scale"),
    "tau_norm": lambda s: _post_hoc(dict(name="tau_norm", taus=tuple(k / 10 for k in range(21)))),
    "ncm": lambda s: _post_hoc(dict(name="nearest_mean", metric="cosine")),
    "logit_shift": lambda s: _post_hoc(dict(name="logit_shift", tau=1.0)),
}
