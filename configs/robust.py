"""The adversarial blocks of the recipes: PGD-AT, TRADES, ALP, BGAT, LBGAT and others, with any loss of the labels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# {argument: the blocks that use it}
NEEDED_BY = {"guide": ("natural", "lbgat"), "beta": ("trades", "bgat", "lbgat")}
LOSSES = ("cross_entropy", "balanced_softmax", "logit_adjusted", "label_aware_smoothing")


class Schedule(NamedTuple):
    """The learning rate: multiplied by 0.1 after each share of the epochs in `decay_at`."""

    epochs: int
    decay_at: tuple[float, ...]
    first: float = 1.0  # factor of the first epoch
    kind: str = "step"  # or "cosine", without decays

    def settings(self) -> dict[str, Any]:
        if self.kind == "cosine":
            return dict(kind="cosine")
        warmup = dict(warmup=1 / self.epochs, warmup_start=self.first) if self.first < 1 else {}
        return dict(kind="step", **warmup, decay_at=self.decay_at, decay=0.1)


# LBGAT's, also for its baselines: first epoch at 0.02; 0.01 from epoch 76 of 100, 0.001 from 91
LBGAT = Schedule(100, (0.75, 0.9), first=0.2)
TRADES = Schedule(76, (74 / 76,))  # its authors', on CIFAR-10: epochs 75 and 76 at 0.01
SHORT = Schedule(2, (0.5,))


class Override(NamedTuple):
    """The settings of a block that differ from LBGAT's recipe."""

    schedule: Schedule
    lr: float = 0.1
    epsilon: str = "8/255"
    loss: str = "cross_entropy"
    network: str = "wrn34_10"  # for small images
    rand_augment: tuple[float, ...] = ()  # for small images
    ema: float = 0.0  # decay of the moving average of the weights; 0: none
    awp: str = "true"


GKL = Schedule(200, (), kind="cosine")
AT_BSL = Schedule(100, (0.74, 0.89))  # 0.01 from epoch 75 of 100, 0.001 from 90
# magnitude 8 of torchvision's 31 bins equals 2.7 here
_RESNET18 = dict(schedule=AT_BSL, loss="balanced_softmax", network="resnet18_4x4", rand_augment=(2, 2.7))
OVERRIDES = {
    "gkl_at": Override(GKL, lr=0.2, ema=0.9997),  # 0.9 for an epoch of 391 steps
    "at_bsl": Override(**_RESNET18, awp="false"),
    "best_robust": Override(**_RESNET18, ema=0.999),
}
# size of the adversarial weight perturbation relative to the weights: AT-AWP's, and TRADES-AWP's for all others
AWP = {"pgd_at": 0.01}
AWP_OTHERS = 0.005


class Setting(NamedTuple):
    """The input of a block."""

    attack: Mapping[str, Any] = MappingProxyType({})  # see `ltjax.methods.adversarial.create`
    beta: float = -1.0  # weight of the KL; below 0: the method's default
    loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"})  # of the labels; LBGAT: of the guide
    awp: float = 0.0
    sampler: str = "instance_balanced"
    schedule: Schedule = LBGAT


def attack(epsilon: str, short: bool) -> dict[str, Any]:
    """Return the attack in training: 10 steps of 0.007 within 0.031, as in the papers.

    For another epsilon, steps are a quarter of it. If `short`, there are 3 steps, twice as large.

    Raises:
      ValueError: If epsilon is not a number above 0 and up to 1.
    """
    number = _number(epsilon)
    step = 0.007 if number == 0.031 else number / 4
    steps = dict(step_size=2 * step, num_steps=3) if short else dict(step_size=step, num_steps=10)
    return dict(epsilon=number, **steps, norm="linf", start="gaussian", start_scale=0.001, radius_share=0.0, ramp=0.0)


def _number(text: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        number = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"config argument 'epsilon={text}': a number, or a fraction such as 8/255") from None
    if not 0 < number <= 1:
        hint = f"; did you mean {number:g}/255?" if number > 1 else ""
        raise ValueError(f"config argument 'epsilon={text}': above 0 and up to 1{hint}")
    return number


def _block(name: str, setting: Setting, loss: str = "loss", **settings: Any) -> dict[str, Any]:
    """Return a method with an attack. `loss` is the key of the labels' loss; "": none."""
    if "beta" in settings and setting.beta >= 0:
        settings["beta"] = setting.beta
    losses = {loss: setting.loss} if loss else {}
    return dict(name=name, **settings, **losses, attack=setting.attack, awp=setting.awp)


def _gkl(setting: Setting, *, attack: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Return GKL-AT, whose attack and weights differ from the other blocks'."""
    return {**_block("gkl_at", setting, alpha=4.0, **settings, attack_beta=1.0), "attack": {**setting.attack, **attack}}


def gkl_at(setting: Setting) -> dict[str, Any]:
    """Attack with 5 steps of half the radius, which rises from 0 over the whole stage."""
    attack = dict(num_steps=5, step_size=setting.attack["epsilon"] / 2, ramp=1.0)
    return _gkl(setting, beta=20.0, gamma=1.0, weights_temperature=4.0, attack=attack, awp_start=10 / 200)


def best_robust(setting: Setting) -> dict[str, Any]:
    """Add to GKL-AT RobustLT's larger radius for rare classes, which rises over half of the stage, and AWP."""
    attack = dict(radius_share=0.3, ramp=0.5)
    return _gkl(setting, beta=5.0, gamma=0.2, weights_temperature=1.0, attack=attack, awp_start=10 / 100)


BLOCKS = {
    "pgd_at": lambda s: _block("pgd_at", s),
    "trades": lambda s: _block("trades", s, beta=6.0),
    "alp": lambda s: _block("alp", s, pairing_weight=0.5),
    "natural": lambda s: dict(name="erm", net="guide", loss=s.loss),
    "bgat": lambda s: _block("bgat", s, loss="", beta=0.0),
    "lbgat": lambda s: _block("lbgat", s, loss="guide_loss", beta=0.0),
    "gkl_at": gkl_at,
    "at_bsl": lambda s: _block("pgd_at", s),
    "best_robust": best_robust,
}
