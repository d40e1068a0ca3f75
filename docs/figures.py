"""Draw the pages' pictures with the library's functions.

    python -m docs.figures [FOLDER]

Each file contains some of its numbers; a test compares them with the current ones.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from docs import generate, settings
from ltjax import attacks, losses, optim, surgery
from ltjax.data import samplers, splits
from ltjax.system import registry

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777"  # Okabe and Ito's
COUNTS = splits.class_counts(100, 500, imbalance=100)  # CIFAR-100-LT


def canvas(columns: int = 2, width: float = 7.4, height: float = 2.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def label(axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.set_title(title, fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes, **more: Any) -> None:
    axes.legend(fontsize="x-small", frameon=False, **more)


def whole_network() -> Figure:
    """Draw focal loss, class weights, and balanced softmax of equal logits."""
    figure, (focal, weights, prior) = canvas(3)
    p = jnp.linspace(0.01, 0.99, 99)
    logits = jnp.stack([jnp.log(p), jnp.log1p(-p)], -1)  # [99, 2]
    for gamma, colour in ((0.0, GREY), (1.0, BLUE), (2.0, ORANGE)):
        focal.plot(p, losses.focal(logits, jnp.zeros(99, int), gamma=gamma), color=colour, label=f"gamma {gamma:g}")
    label(focal, "probability of the label", "loss", "focal")
    legend(focal)
    for beta, colour in ((0.99, BLUE), (0.999, GREEN), (0.9999, ORANGE)):
        weights.loglog(COUNTS, losses.effective_number_weights(COUNTS, beta=beta), color=colour, label=f"beta {beta:g}")
    label(weights, "images of the class", "weight", "cb_ce")
    legend(weights)
    equal, labels = jnp.zeros((100, 100)), jnp.arange(100)
    prior.semilogx(COUNTS, losses.cross_entropy(equal, labels), color=GREY, label="ce")
    for tau, colour in ((0.5, BLUE), (1.0, ORANGE)):
        values = losses.logit_adjusted(equal, labels, class_counts=COUNTS, tau=tau)
        name = "balanced softmax" if tau == 1 else f"tau {tau:g}"
        prior.semilogx(COUNTS, values, color=colour, label=name)
    label(prior, "images of the label's class", "loss, all logits equal", "logit_adjustment")
    legend(prior)
    return figure


def ldam() -> Figure:
    """Draw the loss by the margin of the label's logit for three counts, and the learning rates of LDAM-DRW."""
    figure, (loss, drw) = canvas()
    ahead = jnp.linspace(-0.5, 1.0, 61)
    for c, colour in ((0, BLUE), (50, GREEN), (99, ORANGE)):
        cosines = jnp.zeros((61, 100)).at[:, c].set(ahead)
        values = losses.ldam(cosines, jnp.full(61, c), class_counts=COUNTS)
        loss.plot(ahead, values, color=colour, label=f"{COUNTS[c]} images")
    label(loss, "label's cosine minus the others'", "loss")
    legend(loss)
    stages = settings.load("cifar100_lt:method=ldam_drw").stages
    started = 0
    for stage, colour, name in zip(stages.values(), (BLUE, ORANGE), ("no class weights", "class weights"), strict=True):
        drw.semilogy(started + np.arange(stage.epochs), _rates(stage), color=colour, label=name)
        started += stage.epochs
    label(drw, "epoch", "learning rate", "LDAM-DRW")
    legend(drw)
    return figure


def _rates(stage) -> np.ndarray:
    factor = registry.bind("schedule", optim.schedule_table, stage.schedule)(stage.epochs)
    return stage.lr * factor


def decoupling() -> Figure:
    """Draw how often each sampler draws each class in an epoch."""
    figure, (share, drawn) = canvas()
    batch, steps = 128, 85
    for name, colour in (("instance_balanced", BLUE), ("class_balanced", GREEN), ("class_aware", ORANGE)):
        sampler = samplers.create(name)
        picked = np.concatenate(
            [sampler(np.uint32(0), np.uint32(step), batch_size=batch, class_counts=COUNTS) for step in range(steps)]
        )
        classes = np.searchsorted(np.cumsum(COUNTS), picked, side="right")
        each = np.bincount(classes, minlength=100)
        share.plot(each, color=colour, label=name)
        drawn.semilogy(each / COUNTS, color=colour, label=name)
    label(share, "class, by falling count", "images drawn", "in an epoch of 85 batches")
    label(drawn, "class, by falling count", "times each image is drawn")
    legend(share)
    return figure


def posthoc() -> Figure:
    """Draw the lengths of a synthetic classifier's vectors under tau-normalisation, and a logit shift."""
    figure, (lengths, shift) = canvas()
    way = jax.random.normal(jax.random.key(0), (16, 100))
    way = way / jnp.sqrt(jnp.square(way).sum(0))
    kernel = way * jnp.asarray(COUNTS / COUNTS.max()) ** 0.3  # longer for frequent classes, as trained ones are
    params = {"classifier": {"kernel": kernel, "bias": jnp.zeros(100)}}
    for tau, colour in ((0.0, GREY), (0.5, BLUE), (1.0, ORANGE), (1.5, GREEN)):
        normalised = surgery.tau_normalised(params, tau=tau)["classifier"]["kernel"]
        lengths.plot(jnp.sqrt(jnp.square(normalised).sum(0)), color=colour, label=f"tau {tau:g}")
    label(lengths, "class, by falling count", "length of its weights", "tau_norm, a synthetic classifier")
    legend(lengths)
    for tau, colour in ((0.5, BLUE), (1.0, ORANGE)):
        bias = surgery.logit_shifted(params, COUNTS, tau=tau)["classifier"]["bias"]
        shift.plot(bias, color=colour, label=f"tau {tau:g}")
    label(shift, "class, by falling count", "added to its logit", "logit_adjustment_posthoc")
    legend(shift)
    return figure


def mislas() -> Figure:
    """Draw the smoothing of each class in the four shapes, and the loss by probability."""
    figure, (smoothing, loss) = canvas()
    for shape, colour in zip(losses.SMOOTHING_SHAPES, (ORANGE, GREY, BLUE, GREEN), strict=True):
        e = losses.smoothing_by_count(COUNTS, head=0.4, tail=0.1, shape=shape, power=3.0)
        smoothing.plot(COUNTS, e, color=colour, label=shape + (", power 3" if shape == "exp" else ""))
    label(smoothing, "images of the class", "smoothing", "head 0.4, tail 0.1")
    legend(smoothing)
    p = jnp.linspace(0.02, 0.999, 99)
    logits = jnp.concatenate([jnp.log(p)[:, None], jnp.broadcast_to(jnp.log((1 - p) / 99)[:, None], (99, 99))], -1)
    for e, name, colour in ((0.0, "cross-entropy", GREY), (0.1, "rarest class", BLUE), (0.4, "commonest", ORANGE)):
        values = losses.label_aware_smoothing(logits, jnp.zeros(99, int), smoothing=jnp.full(100, e))
        loss.plot(p, values, color=colour, label=f"{name}, e = {e:g}")
        loss.plot(p[values.argmin()], values.min(), "o", color=colour, markersize=4)
    label(loss, "probability of the label", "loss", "of 100 classes; dot: the smallest loss")
    legend(loss)
    return figure


def drolt() -> Figure:
    """Draw the gradient of the features of two classes, and the bound by the radius."""
    figure, (field, bound) = canvas(height=3.2)
    near, far = jax.random.split(jax.random.key(3))
    features = jnp.concatenate(
        [jax.random.normal(near, (8, 2)) * 0.7, jax.random.normal(far, (4, 2)) * 0.7 + jnp.array([2.0, 1.0])]
    )
    labels = jnp.array([0] * 8 + [1] * 4)
    centroids = jnp.array([[0.0, 0.0], [2.0, 1.0]])
    downhill = -jax.jit(jax.grad(losses.dro_loss))(features, labels, centroids, margins=jnp.array([0.5, 1.5]))
    for c, colour in ((0, BLUE), (1, ORANGE)):
        members = labels == c
        z, move = np.asarray(features[members]), np.asarray(downhill[members])
        field.quiver(*z.T, *move.T, color=colour, width=0.006)
        field.plot(*z.T, "o", color=colour, markersize=3)
        field.plot(*centroids[c], "*", color=colour, markersize=13, markeredgecolor="white")
        angle = np.linspace(0, 2 * np.pi, 61)
        radius = (0.25, 0.75)[c]
        field.plot(centroids[c, 0] + radius * np.cos(angle), centroids[c, 1] + radius * np.sin(angle), color=colour)
    field.set_aspect("equal")
    label(field, "feature 1", "feature 2", "downhill, with each class's ball")
    radii = jnp.linspace(0, 2, 21)
    of_radius = jax.jit(jax.vmap(lambda r: losses.dro_bound(features, labels, centroids, margins=2 * r)[0]))
    values = of_radius(radii)
    bound.plot(radii, values[:, 0], color=BLUE, label="8 samples")
    bound.plot(radii, values[:, 1], color=ORANGE, label="4 samples")
    label(bound, "radius of the ball", "bound of the class")
    legend(bound)
    return figure


def reslt() -> Figure:
    """Draw the classes of each branch, and each class's share of the branches' loss."""
    figure, (masks, weight) = canvas()
    stages = settings.load("cifar100_lt:method=reslt,imbalance=100").stages
    method = stages["reslt"].method
    starts = dict(medium_start=method["medium_start"], tail_start=method["tail_start"])
    answers = np.asarray(losses.branch_masks(COUNTS, **starts))  # [3, C]
    for branch, colour in enumerate((BLUE, GREEN, ORANGE)):
        where = np.flatnonzero(answers[branch])
        masks.fill_between(where, 2.6 - branch, 3.4 - branch, color=colour, step="mid")
    masks.set_yticks([3, 2, 1], ["all", "medium, tail", "tail"])
    label(masks, "class, by falling count", "", "a branch's classes")
    share = COUNTS / COUNTS.sum()
    memberships = answers.sum(0) * COUNTS
    weight.semilogy(share, color=GREY, label="cross-entropy")
    weight.semilogy(memberships / memberships.sum(), color=ORANGE, label="the branches' loss")
    label(weight, "class, by falling count", "share of the terms")
    legend(weight)
    return figure


def adversarial() -> Figure:
    """Draw PGD's path in two pixels, l-inf and l2, over the loss of a small random network."""
    figure, panels = canvas(height=3.2)
    weights = jax.random.normal(jax.random.key(4), (2, 8)) * 9, jax.random.normal(jax.random.key(6), (8, 2))

    def loss(images):  # [B, 1, 2, 1] -> [B]
        hidden = jnp.tanh((images.reshape(-1, 2) - 0.5) @ weights[0])
        return losses.cross_entropy(hidden @ weights[1], jnp.zeros(len(images), int))

    grid = jnp.linspace(0, 1, 41)
    plane = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 1, 2, 1)
    height = np.asarray(loss(plane)).reshape(41, 41)
    pgd_step = partial(attacks.pgd, epsilon=0.25, step_size=0.05, num_steps=1, unroll=True)
    step = jax.jit(pgd_step, static_argnums=2, static_argnames="norm")
    image = jnp.array([0.45, 0.4]).reshape(1, 1, 2, 1)
    start = attacks.random_start(jax.random.key(1), image, kind="uniform", scale=0.1)
    for axes, norm in zip(panels, ("linf", "l2"), strict=True):
        axes.contourf(grid, grid, height, levels=8, cmap="Greys")
        steps = [start]
        for _ in range(10):
            steps.append(step(image, steps[-1], loss, norm=norm))
        path = np.concatenate([np.asarray(step).reshape(1, 2) for step in steps])
        axes.plot(*path.T, "o-", color=ORANGE, markersize=3)
        axes.plot(*np.asarray(image).reshape(2), "o", color=BLUE)
        x, y = np.asarray(image).reshape(2)
        angle = np.linspace(0, 2 * np.pi, 61)
        round_ = (np.cos(angle), np.sin(angle))
        square = (np.array([-1, 1, 1, -1, -1]), np.array([-1, -1, 1, 1, -1]))
        edge = square if norm == "linf" else round_
        axes.plot(x + 0.25 * edge[0], y + 0.25 * edge[1], color=BLUE)
        axes.set_aspect("equal")
        label(axes, "pixel 1", "pixel 2", f"{norm}, epsilon 0.25: darker is a larger loss")
    return figure


def lbgat() -> Figure:
    """Draw LBGAT's squared distance and the KL, by shifts and factors of the logits."""
    figure, (pairing, temper) = canvas()
    guide = jnp.array([[3.0, 0.0, -1.0]])
    shift = jnp.linspace(-4, 4, 81)
    moved = guide + shift[:, None]  # the same softmax, other logits
    scaled = guide * jnp.linspace(0, 2, 81)[:, None]
    factor = np.linspace(0, 2, 81)
    panels = ((pairing, shift, moved, "added to all logits"), (temper, factor, scaled, "factor on the logits"))
    for axes, x, logits, title in panels:
        axes.plot(x, losses.logit_pairing(logits, guide), color=ORANGE, label="logit_pairing")
        natural = jnp.broadcast_to(guide, logits.shape)
        axes.plot(x, losses.kl_divergence(natural, logits), color=BLUE, label="kl_divergence")
        label(axes, title, "distance from the guide's (3, 0, -1)")
        axes.set_ylim(-0.2, 6)
    legend(pairing)
    return figure


def combinations() -> Figure:
    """Draw the learning rate of each part of the network over two chains."""
    figure, panels = canvas(height=3.0)
    colours = {"backbone": BLUE, "classifier": ORANGE, "logit_scale": PINK, "branches": GREEN, "margins": GREY}
    for axes, name in zip(panels, ("method=mislas", "recipe=reslt+dro+smoothing"), strict=True):
        stages = settings.load(f"cifar100_lt:{name}").stages
        started = 0
        for stage in stages.values():
            x = started + np.arange(stage.epochs)
            for group, group_rates in stage.groups.items():
                if group_rates["rate"]:
                    moved = 1 + 0.06 * list(colours).index(group)  # side by side if rates are equal
                    axes.semilogy(x, moved * group_rates["rate"] * _rates(stage), color=colours[group], linewidth=1.6)
            started += stage.epochs
            axes.axvline(started, color=GREY, linewidth=0.5)
        label(axes, "epoch", "learning rate", name)
        axes.set_ylim(1e-4, 0.3)
    for group, colour in colours.items():
        panels[1].plot([], [], color=colour, label=group)
    legend(panels[1], loc="lower left")
    return figure


def results() -> Figure:
    """Draw accuracy by group, and ECE, of our full-length runs on CIFAR-100-LT at imbalance 100."""
    rows = generate.best_first("cifar100_lt-*-if100-bf16")[::-1]
    figure, (accuracy, ece) = canvas(width=7.4, height=0.7 + 0.25 * len(rows))
    places = np.arange(len(rows))
    for group, colour in (("many", BLUE), ("medium", GREEN), ("few", ORANGE), ("all", "black")):
        shares = [100 * row.figures[group].mean for row in rows]
        accuracy.plot(shares, places, "|" if group == "all" else "o", color=colour, label=group, markersize=7)
    label(accuracy, "accuracy, %", "", "by the classes' number of training images")
    accuracy.set_yticks(places, [row.name for row in rows])
    figure.legend(fontsize="x-small", frameon=False, loc="outside upper right", ncols=4)
    measured = [(place, 100 * row.figures["ece"].mean) for place, row in enumerate(rows) if "ece" in row.figures]
    for place, share in measured:
        ece.plot([0, share], [place, place], color=PINK, linewidth=5, solid_capstyle="butt")
    label(ece, "ECE, %", "", "gap between confidence and accuracy")
    ece.set_yticks(places, [""] * len(rows))
    ece.set_xlim(0)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw
    for draw in (
        *(whole_network, ldam, decoupling, posthoc, mislas, drolt, reslt, adversarial, lbgat, combinations),
        results,
    )
}


def numbers(figure: Figure) -> list[float]:
    """Return five points of every line, to compare drawings."""
    lines = [np.asarray(line.get_xydata(), np.float64) for axes in figure.axes for line in axes.lines]
    points = [line[np.linspace(0, len(line) - 1, 5).round().astype(int)] for line in lines if len(line)]
    return np.concatenate(points).ravel().tolist()


def write(name: str, folder: Path) -> Path:
    figure = FIGURES[name]()
    path = folder / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Description": " ".join(f"{n:.4g}" for n in numbers(figure))})
    return path


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        print(write(name, folder))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
