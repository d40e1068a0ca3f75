"""Made-up numbers of a run, for pages of any size."""

import numpy as np

from ltjax import metrics
from ltjax.report import analysis, charts

STAGES = ("ce", "classifier")


def results(num_classes=10, stages=STAGES, seed=0, *, largest=1000, smallest=2, names=None, **also):
    """Return what results.json holds; classes 3 and 7 have no test image."""
    rng = np.random.default_rng(seed)
    counts = class_counts(num_classes, largest, smallest)
    accuracy = np.clip(np.linspace(0.9, 0.3, num_classes) + rng.normal(0, 0.1, num_classes), 0, 1)
    per_class = [None if c in (3, 7) else float(a) for c, a in enumerate(accuracy)]
    groups = {name: float(accuracy[member].mean()) for name, member in groups_of(counts).items()}
    bins = {"accuracies": (np.arange(15) / 16).tolist(), "confidences": (np.arange(15) / 15 + 0.03).tolist()}
    one = {
        "epochs": 4,
        "accuracy": {"all": float(accuracy.mean()), **groups},
        "ece": 0.1,
        "per_class_accuracy": per_class,
        "calibration_bins": {**bins, "counts": list(range(15))},
        "best_on_test": {"accuracy": float(accuracy.mean()) + 0.01, "epoch": 3},
        "seconds": 60.0,
        "num_images": 1000,
    }
    return {
        "name": "made-up",
        "final_stage": stages[-1],
        **one,
        "stages": {name: {"title": f"Stage {name}", **one} for name in stages},
        "seed": seed,
        "class_names": list(names or (f"class {c}" for c in range(num_classes))),
        "class_counts": counts.tolist(),
        "group_sizes": {"all": num_classes, **{name: int(m.sum()) for name, m in groups_of(counts).items()}},
        "device": "cpu: cpu",
        "num_devices": 2,
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "git_commit": "0123456789",
        "command": "python run.py --config=configs/quickstart.py",
        **also,
    }


def class_counts(num_classes, largest=1000, smallest=2):
    return np.rint(np.geomspace(largest, smallest, num_classes)).astype(int)


def groups_of(counts):
    return {name: member for name, member in metrics.count_groups(counts).items() if member.any()}


def numbers(num_classes=10, stages=STAGES, seed=0, picture="data:image/png;base64,iVBORw0KGgo="):
    """Return what report/numbers.json holds."""
    rng = np.random.default_rng(seed)
    counts = class_counts(num_classes)
    labels = np.repeat(np.arange(num_classes), 3)
    observed = {
        "predictions": np.where(rng.random(len(labels)) < 0.6, labels, rng.integers(0, num_classes, len(labels))),
        "own": rng.uniform(0.5, 1.5, len(labels)),
        "wrong": rng.uniform(0.8, 1.8, len(labels)),
        "gaps": rng.normal(0, 0.1, (num_classes, 15)),
    }
    learned = {"Logit scale": 1 + rng.random(num_classes), "LDAM's margin": rng.random(num_classes)}
    made = analysis.stage_numbers([observed], labels, groups_of(counts), learned)
    cells = analysis.confusions(observed["predictions"], labels, num_classes)
    confusion = analysis.confusion_numbers(cells, charts.class_order(groups_of(counts), counts))
    image = {"uri": picture, "small": True, "confidence": 0.9}
    pair = {"true": num_classes - 1, "predicted": 0, "total": 3, "shares": dict.fromkeys(stages, 0.5)}
    pairs = [{"title": "Most confused", "pairs": [{**pair, "images": [image, {**image, "confidence": None}]}]}]
    return {
        "final_stage": stages[-1],
        "stages": {name: made for name in stages},
        "pairs": pairs,
        "confusion": {"seeds": 1, **confusion},
        "mistakes": {"wrong": 2, "shown": [{**image, "true": 0, "predicted": num_classes - 1, "name": "val/a/1.jpg"}]},
    }


def curves(stages=STAGES, epochs=4):
    groups = ("all", "many", "medium", "few")
    train = [(e / 4, 2.0 - e / 8, 0.1) for e in range(4 * epochs)]
    test = [(e, {group: e / epochs for group in groups}) for e in range(1, epochs + 1)]
    return {name: {"train": train, "test": test} for name in stages}


def robustness(seed=0, stage="classifier", accuracy=0.5):
    """Return what attack.json holds."""

    def test(title, value):
        groups = {"all": value, "many": value + 0.1, "medium": value, "few": value / 2}
        return {"title": title, "accuracy": groups, "ece": 0.1, "seconds": 1.0}

    points = [(0.0, 1.0), (4 / 255, 0.8), (8 / 255, 0.5), (32 / 255, 0.0)]
    return {
        "stage": stage,
        "epsilon": 8 / 255,
        "norm": "linf",
        "num_images": 1000,
        "tests": {"clean": test("Clean", accuracy), "pgd-20": test("PGD-20", accuracy / 2)},
        "curve": [{"epsilon": e, "accuracy": test("", accuracy * share)["accuracy"]} for e, share in points],
    }
