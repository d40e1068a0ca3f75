"""Adversarial training's part of the recipes: PGD-AT, TRADES, ALP, BGAT and LBGAT, with any loss of the labels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

SHORT_EPOCHS = 2

# method: title, blocks
METHODS = {
    "pgd_at": ("PGD-AT", ("pgd_at",)),
    "trades": ("TRADES", ("trades",)),
    "alp": ("ALP", ("alp",)),
    "bgat": ("BGAT", ("natural", "bgat")),
    "lbgat": ("LBGAT", ("lbgat",)),
}

# arguments that some blocks alone have a use for
NEEDED_BY = {"guide": ("natural", "lbgat"), "beta": ("trades", "bgat", "lbgat")}
LOSSES = ("cross_entropy", "balanced_softmax", "logit_adjusted", "label_aware_smoothing")


class Schedule(NamedTuple):
    """SGD's rate: 0.1, times 0.1 after each share of the epochs in `decay_at`."""

    epochs: int
    decay_at: tuple[float, ...]
    first: float = 1.0  # factor of the first epoch

    def settings(self) -> dict[str, Any]:
        warmup = dict(warmup=1 / self.epochs, warmup_start=self.first) if self.first < 1 else {}
        return dict(kind="step", **warmup, decay_at=self.decay_at, decay=0.1)


# LBGAT's, which its comparisons share: the first epoch at 0.02, a tenth from epoch 76 of 100, a hundredth from 91
LBGAT = Schedule(100, (0.75, 0.9), first=0.2)
TRADES = Schedule(76, (74 / 76,))  # its own, of CIFAR-10: epochs 75 and 76 alone at a tenth
SHORT = Schedule(SHORT_EPOCHS, (0.5,))
# size of the adversarial weight perturbation over that of the weights: AT-AWP's; TRADES-AWP's, for all others
AWP = {"pgd_at": 0.01}
AWP_OTHERS = 0.005


class Setting(NamedTuple):
    """What the methods share."""

    attack: Mapping[str, Any] = MappingProxyType({})  # in training, see `ltjax.methods.adversarial.create`
    beta: float = -1.0  # weight of the KL; below 0: the method's own
    loss: Mapping[str, Any] = MappingProxyType({"name": "cross_entropy"})  # of the labels; LBGAT: of the guide
    awp: float = 0.0
    sampler: str = "instance_balanced"
    schedule: Schedule = LBGAT


def attack(epsilon: str, short: bool) -> dict[str, Any]:
    """The papers' 10 steps of 0.007 within 0.031, or a quarter of another epsilon; short: 3 steps, twice as long."""
    number = 0.031 if epsilon == "0.031" else _number(epsilon)
    step = 0.007 if epsilon == "0.031" else number / 4
    steps = dict(step_size=2 * step, num_steps=3) if short else dict(step_size=step, num_steps=10)
    return dict(epsilon=number, **steps, norm="linf", start="gaussian", start_scale=0.001)


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    try:
        number = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"config argument 'epsilon={text}': a number, or a fraction such as 8/255") from None
    if not 0 < number <= 1:
        hint = f"; did you mean {number:g}/255?" if number > 1 else ""
        raise ValueError(f"config argument 'epsilon={text}': above 0 and up to 1{hint}")
    return number


def _with_beta(setting: Setting, method: dict[str, Any]) -> dict[str, Any]:
    return {**method, **({"beta": setting.beta} if setting.beta >= 0 else {})}


def _own(setting: Setting) -> dict[str, Any]:
    return dict(attack=setting.attack, awp=setting.awp)


BLOCKS = {
    "pgd_at": lambda s: dict(name="pgd_at", loss=s.loss, **_own(s)),
    "trades": lambda s: _with_beta(s, dict(name="trades", beta=6.0, loss=s.loss, **_own(s))),
    "alp": lambda s: dict(name="alp", pairing_weight=0.5, loss=s.loss, **_own(s)),
    "natural": lambda s: dict(name="erm", net="guide", loss=s.loss),
    "bgat": lambda s: _with_beta(s, dict(name="bgat", beta=0.0, **_own(s))),
    "lbgat": lambda s: _with_beta(s, dict(name="lbgat", beta=0.0, guide_loss=s.loss, **_own(s))),
}
