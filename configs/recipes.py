"""Recipes as chains of stages: `METHODS` has the papers', `recipe=reslt+dro+smoothing` makes any other.

A chain begins with a block of `SCRATCH`, which trains a whole network, and goes on with blocks of `NEXT`, each from
where the one before it ended. Lengths are those of 200 epochs, or of a short run of 12; adversarial training, which is
in `configs/robust.py`, has 100 or 2.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import robust


class Recipe(NamedTuple):
    title: str  # "": the blocks' names
    blocks: tuple[str, ...]
    stages: tuple[str, ...] = ()  # names in the config; none: the blocks'
    weight_decay: float = 2e-4
    auto_augment: bool = False  # AutoAugment and Cutout in every stage
    length: int = 200  # epochs of the first part, on small images; adversarial training's: see `configs/robust.py`
    batch_size: int = 128  # on small images
    decay: float = 0.1  # of the rate, twice

    def epochs(self, short: bool) -> int:
        """Of the first part, without adversarial training."""
        return 12 if short else self.length

    @property
    def robust(self) -> bool:
        """Whether its first part trains on attacked images."""
        return bool(set(self.blocks) & set(robust.BLOCKS))


METHODS = {
    "mislas": Recipe("MiSLAS", ("mixup", "smoothing"), stages=("features", "classifier")),
    "ce": Recipe("Cross-entropy", ("ce",)),
    "mixup": Recipe("Mixup", ("mixup",)),
    "focal": Recipe("Focal loss", ("focal",)),
    "cb_ce": Recipe("Class-balanced CE", ("cb_ce",)),
    "ldam": Recipe("LDAM", ("ldam",)),
    "ldam_drw": Recipe("LDAM-DRW", ("ldam", "drw")),
    "balanced_softmax": Recipe("Balanced softmax", ("balanced_softmax",)),
    # BALMS's 13,000 steps of 512 images, on CIFAR-100-LT at imbalance 100
    "balms": Recipe("BALMS", ("balms",), weight_decay=5e-4, auto_augment=True, length=591, batch_size=512),
    "logit_adjustment": Recipe("Logit adjustment", ("logit_adjustment",)),
    "logit_adjustment_posthoc": Recipe("Post-hoc logit adjustment", ("ce", "logit_shift")),
    "crt": Recipe("cRT", ("ce", "crt")),
    "lws": Recipe("LWS", ("ce", "lws")),
    "tau_norm": Recipe("tau-normalisation", ("ce", "tau_norm")),
    "ncm": Recipe("Nearest class mean", ("ce", "ncm")),
    # the only decay in DRO-LT's code is LDAM's, 0.01; nothing there calls it
    "drolt": Recipe("DRO-LT", ("ce", "dro", "ce_classifier"), weight_decay=1e-4, auto_augment=True, decay=0.01),
    "reslt": Recipe("ResLT", ("reslt",), weight_decay=5e-4),
    **{name: Recipe(title, blocks) for name, (title, blocks) in robust.METHODS.items()},
}


class Scale(NamedTuple):
    """In what training on large images differs from training on small ones."""

    lr: float = 0.1
    warmup: float = 5 / 200  # share of the epochs; with the cosine, ResLT's alone
    cosine: bool = False  # instead of two decays
    crop_padding: int = 4  # 0: random windows of another size are cut on the host
    color_jitter: float = 0.0
    mixup: float = 1.0  # MiSLAS's Beta(a, a)
    reslt_warmup_start: float = 7 / 15  # the rate of ResLT's first epoch; 0: the first step of an even rise
    reslt_nesterov: bool = True
    reslt_classifier: Mapping[str, Any] = MappingProxyType({"tau": 0.0, "bias": True})  # at evaluation
    frozen_backbone: bool = False  # trained elsewhere; an extra block learns in its place
    balanced_epochs: bool = True  # DRO-LT's stages count draws, not images: see `config.Stage.epoch_size`


SMALL = Scale()


class Setting(NamedTuple):
    """What a block may want to know."""

    epochs: Any  # reference to config.epochs, of the whole first part
    short: bool
    auto_augment: bool | None  # None: where the recipe has it
    mixup: float  # Beta(a, a) in stages that train the whole network; 0: none but the recipe's own
    parts: tuple[str, ...]  # of the network that have parameters
    smoothing: tuple[float, float, float, bool]  # MiSLAS: head, tail, classifier's rate, shifted batch norm
    reslt: dict[str, Any]  # ResLT: beta, medium_start, tail_start
    deferred: bool  # the last fifth of the first part is a stage of its own, with class weights
    decay: float = 0.1  # of the rate, twice, in the first part
    adversarial: robust.Setting = robust.Setting()
    scale: Scale = SMALL


def chain(config: ConfigDict, recipe: Recipe, setting: Setting) -> None:
    """Write the stages of a recipe into a config."""
    names = recipe.stages or recipe.blocks
    config.stages = names
    before, first = "scratch", {}
    for number, (block, name) in enumerate(zip(recipe.blocks, names, strict=True)):
        stage = SCRATCH[block](setting) if number == 0 else NEXT[block](setting, first)
        first = first or stage
        many = len(names) > 1
        stage["title"] = (f"{recipe.title}, stage {number + 1}" if many else recipe.title) if recipe.title else block
        if "eval_classifier" in first:
            stage["eval_classifier"] = first["eval_classifier"]
        stage["nearest_mean"] = "dro" in recipe.blocks and block != "natural"  # DRO-LT is judged by its features, too
        config[name] = dict(stage, start_from=before)
        before = name


def parse_recipe(text: str) -> Recipe:
    """ "ce+dro+smoothing" -> its recipe. Raises: ValueError naming the blocks that may stand there."""
    blocks = tuple(text.split("+"))
    for number, block in enumerate(blocks):
        known = NEXT if number else SCRATCH
        if block not in known:
            place = "after the first" if number else "first"
            raise ValueError(f"config argument 'recipe={text}': {place} may stand: {', '.join(known)}; not {block!r}")
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"config argument 'recipe={text}': each block once")
    if "drw" in blocks[2:] or ("drw" in blocks and blocks[0] in ("reslt", *robust.BLOCKS)):
        raise ValueError(f"config argument 'recipe={text}': drw comes second, after a block with one loss such as ce")
    if ("bgat" in blocks or blocks[0] == "natural") and blocks[:2] != ("natural", "bgat"):
        raise ValueError(f"config argument 'recipe={text}': natural and bgat go together, as natural+bgat at the start")
    known = [recipe for recipe in METHODS.values() if recipe.blocks == blocks]
    first = METHODS["bgat" if blocks[0] == "natural" else blocks[0]]
    return known[0] if known else Recipe("", blocks, weight_decay=first.weight_decay)


def network(blocks: tuple[str, ...]) -> dict[str, Any]:
    """What a chain of blocks asks of the model's head."""
    return dict(
        # LDAM: logits are 30 times a cosine, so that confidence means something
        classifier="cosine" if "ldam" in blocks else "linear",
        cosine_scale=30.0,
        logit_scale=bool({"lws", "smoothing"} & set(blocks)),
        branches=3 if "reslt" in blocks else 0,
    )


def groups(parts: tuple[str, ...], **rates: float) -> dict[str, dict[str, Any]]:
    """Parameter groups: a factor on the learning rate for each part of the network; 0, frozen, where none is given."""
    paths = {"logit_scale": "net/logit_scale", "guide": "guide/.*"}
    return {part: dict(match=paths.get(part, f"net/{part}/.*"), rate=rates.get(part, 0.0)) for part in parts}


def augment(setting: Setting, *, auto: bool = False, mixup: float = 0.0) -> dict[str, Any]:
    auto = auto if setting.auto_augment is None else setting.auto_augment
    scale = setting.scale
    mixing = dict(mixup_alpha=mixup)
    if scale.crop_padding:
        cut = 16 if auto else 0
        return dict(crop_padding=scale.crop_padding, flip=True, auto_augment=auto, cutout_size=cut, **mixing)
    rand = (2, 9.0) if auto else ()  # AutoAugment's policy is for small images
    return dict(
        crop_padding=0, flip=True, rand_augment=rand, color_jitter=0.0 if auto else scale.color_jitter, **mixing
    )


def _scratch(
    setting: Setting, method: dict, *, mixup: float = 0.0, decay: float | None = None, **more: Any
) -> dict[str, Any]:
    """The whole network: 5 epochs of warm-up, then two decays after 160 and 180 of 200; 2, 10 and 11 of 12 if short.
    Large images have a cosine instead, without warm-up."""
    epochs, warmup = setting.epochs, 2 / 12 if setting.short else setting.scale.warmup
    if setting.deferred:
        epochs, warmup = epochs - (epochs + 4) // 5, warmup / 0.8
    schedule = dict(kind="step", warmup=warmup, decay_at=() if setting.deferred else (0.8, 0.9))
    schedule["decay"] = setting.decay if decay is None else decay
    if setting.scale.cosine and not setting.deferred:
        schedule.update(kind="cosine", warmup=0.0, decay_at=())
    return dict(
        method=method,
        epochs=epochs,
        lr=setting.scale.lr,
        schedule=schedule,
        sampler=dict(name="instance_balanced"),
        augment=augment(setting, mixup=setting.mixup or mixup),
        batch_norm="train",
        groups=groups(setting.parts, **whole(setting)),
        **more,
    )


def whole(setting: Setting) -> dict[str, float]:
    """Rates of a stage that trains the whole network, or all of it that is not frozen for good."""
    backbone = 0.0 if setting.scale.frozen_backbone else 1.0
    return dict(backbone=backbone, block=1.0, branches=1.0, classifier=1.0)


def _loss(name: str, **settings: Any) -> dict[str, Any]:
    return dict(name="erm", loss=dict(name=name, **settings))


def _balanced(**settings: Any) -> dict[str, Any]:
    return dict(kind="effective_number", beta=0.9999, **settings)


def reslt(setting: Setting) -> dict[str, Any]:
    scale = setting.scale
    stage = _scratch(setting, dict(name="reslt", **setting.reslt), drop_last=True)
    stage["optimizer"] = dict(nesterov=scale.reslt_nesterov)
    stage["eval_classifier"] = dict(scale.reslt_classifier)  # tau is the paper's gamma
    warmup = 2 / 12 if setting.short and scale.warmup else scale.warmup
    stage["schedule"].update(warmup=warmup, warmup_start=scale.reslt_warmup_start)
    return stage


def balms(setting: Setting) -> dict[str, Any]:
    """Balanced softmax as BALMS trains it: a cosine from 0.1 after 800 steps of warm-up from 0.05."""
    stage = _scratch(setting, _loss("balanced_softmax"), drop_last=True)
    stage["schedule"] = dict(kind="cosine", warmup=2 / 12 if setting.short else 37 / 591, warmup_start=0.5)
    return stage


def adversarial(name: str, setting: Setting) -> dict[str, Any]:
    """A block of `configs/robust.py`: its recipe has its own schedule, and trains both networks where there are two."""
    own = setting.adversarial
    trained = {"natural": ("guide",), "bgat": ("backbone", "classifier")}.get(name, ("backbone", "classifier", "guide"))
    sampler = dict(name=own.sampler, **(dict(in_a_row=4) if own.sampler == "class_aware" else {}))
    return dict(
        method=robust.BLOCKS[name](own),
        epochs=setting.epochs,
        lr=setting.scale.lr,
        schedule=own.schedule.settings(),
        sampler=sampler,
        augment=augment(setting, mixup=setting.mixup),
        batch_norm="train",
        groups=groups(setting.parts, **dict.fromkeys(trained, 1.0)),
        evaluate_net="guide" if name == "natural" else "net",
    )


def robust_classifier(setting: Setting, first: dict) -> dict[str, Any]:
    """The classifier alone, on the features of attacked images and class-balanced batches."""
    return _later(
        setting,
        robust.BLOCKS["pgd_at"](setting.adversarial._replace(awp=0.0)),
        epochs=10,
        short=1,
        lr=0.01,
        groups=groups(setting.parts, classifier=1.0),
    )


SCRATCH = {
    "ce": lambda s: _scratch(s, _loss("cross_entropy")),
    "mixup": lambda s: _scratch(s, _loss("cross_entropy"), mixup=s.scale.mixup),
    "focal": lambda s: _scratch(s, _loss("focal", gamma=1.0)),  # LDAM's comparison; Lin et al. have 2
    "cb_ce": lambda s: _scratch(s, _loss("cross_entropy", class_weights=_balanced())),
    # margins of 0.5 in cosine, on logits that are 30 cosines; its authors decay by 0.01
    "ldam": lambda s: _scratch(s, _loss("ldam", max_margin=15.0, scale=1.0), decay=0.01),
    "balanced_softmax": lambda s: _scratch(s, _loss("balanced_softmax")),
    "logit_adjustment": lambda s: _scratch(s, _loss("logit_adjusted", tau=1.0)),
    "reslt": reslt,
    "balms": balms,
    **{name: partial(adversarial, name) for name in robust.BLOCKS if name != "bgat"},
}


def _later(setting: Setting, method: dict, *, epochs: int, short: int, lr: float, **more: Any) -> dict[str, Any]:
    """A stage on a trained network, 1/20 of the first one's length or so."""
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


def smoothing(setting: Setting, first: dict) -> dict[str, Any]:
    """MiSLAS's second stage: label-aware smoothing, learnable weight scaling, shifted batch norm."""
    head, tail, rate, shifted = setting.smoothing
    return _later(
        setting,
        dict(name="mislas", head=head, tail=tail, shape="concave"),
        epochs=10,
        short=2,
        lr=0.1,
        sampler=dict(name="class_aware", in_a_row=4),
        batch_norm="train" if shifted else "eval",
        groups=groups(setting.parts, classifier=rate, logit_scale=1.0),
    )


def drw(setting: Setting, first: dict) -> dict[str, Any]:
    """Deferred re-weighting: the first stage goes on at a lower rate, its loss now with class weights."""
    decay = first["schedule"]["decay"]
    loss = dict(first["method"]["loss"], class_weights=_balanced())
    return dict(
        first,
        method=dict(first["method"], loss=loss),
        epochs=(setting.epochs + 4) // 5,
        lr=first["lr"] * decay,
        schedule=dict(kind="step", decay_at=(0.5,), decay=decay),
        keep_optimizer=True,
    )


def dro(setting: Setting, first: dict) -> dict[str, Any]:
    """DRO-LT's second stage: features, with the classifier frozen."""
    parts = groups(setting.parts, **{**whole(setting), "classifier": 0.0})
    return _later(
        setting,
        dict(
            name="drolt",
            loss=dict(name="cross_entropy", class_weights=dict(kind="count")),
            robust_weight=1.0,
            radius="learned",
            radius_size=0.5,
            temperature=1.0,
            layers=(),
        ),
        epochs=80,
        short=3,
        lr=0.005,
        schedule=dict(kind="constant"),
        sampler=dict(name="class_aware", in_a_row=4),
        augment=augment(setting, auto=True),
        batch_norm="train",
        epoch_size="balanced" if setting.scale.balanced_epochs else "images",
        groups={**parts, "margins": dict(match="method/margins", rate=1.0, optional=True)},  # learned radii only
    )


def ce_classifier(setting: Setting, first: dict) -> dict[str, Any]:
    """DRO-LT's third stage: the classifier alone, on the second one's draws, batch norm in evaluation mode."""
    return _later(
        setting,
        _loss("cross_entropy"),
        epochs=20,
        short=1,
        lr=0.01,
        schedule=dict(kind="constant"),
        sampler=dict(name="class_aware", in_a_row=4),
        augment=augment(setting, auto=True),
        epoch_size="balanced" if setting.scale.balanced_epochs else "images",
        groups=groups(setting.parts, classifier=1.0),
    )


def _post_hoc(surgery: dict[str, Any]) -> dict[str, Any]:
    """No training: only the classifier's weights are made anew."""
    return dict(method=_loss("cross_entropy"), epochs=0, lr=0.1, surgery=surgery, batch_norm="eval", groups={})


NEXT = {
    "drw": drw,
    "dro": dro,
    "ce_classifier": ce_classifier,
    "balanced_softmax_classifier": lambda s, first: _later(
        s,
        _loss("balanced_softmax"),
        epochs=10,
        short=2,
        lr=0.1,
        sampler=dict(name="instance_balanced"),
        groups=groups(s.parts, classifier=1.0),
    ),
    "smoothing": smoothing,
    "bgat": lambda s, first: adversarial("bgat", s),
    "robust_classifier": robust_classifier,
    "crt": lambda s, first: _later(
        s,
        _loss("cross_entropy"),
        epochs=10,
        short=2,
        lr=0.1,
        surgery=dict(name="new_head"),
        groups=groups(s.parts, classifier=1.0),
    ),
    "lws": lambda s, first: _later(
        s, _loss("cross_entropy"), epochs=10, short=2, lr=0.1, groups=groups(s.parts, logit_scale=1.0)
    ),
    "tau_norm": lambda s, first: _post_hoc(dict(name="tau_norm", taus=tuple(k / 10 for k in range(21)))),
    "ncm": lambda s, first: _post_hoc(dict(name="nearest_mean", metric="cosine")),
    "logit_shift": lambda s, first: _post_hoc(dict(name="logit_shift", tau=1.0)),
}
