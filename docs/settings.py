"""Tables of a config's recipe and settings, for `docs.generate`."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltjax.config import RunConfig, StageConfig, parse

ROOT = Path(__file__).parents[1]
FROM_SCRATCH = {"image_folder": ",pretrained=none"}  # if that is not the default
LONG_TAILED = ("cifar100_lt", "cifar10_lt", "imagenet_lt", "inat18", "places_lt", "image_folder")
BALANCED = ("cifar100", "cifar10", "tiny_imagenet")
TITLES = {
    "cifar100_lt": "CIFAR-100-LT",
    "cifar10_lt": "CIFAR-10-LT",
    "imagenet_lt": "ImageNet-LT",
    "inat18": "iNaturalist 2018",
    "places_lt": "Places-LT",
    "image_folder": "a folder of images",
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "tiny_imagenet": "Tiny ImageNet",
    "features": "features from a file",
}


def load(text: str) -> RunConfig:
    """Parse "cifar100_lt:method=mislas"."""
    name, _, arguments = text.partition(":")
    return parse(module(name)["get_config"](arguments or None).to_dict())


def module(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))


def command(text: str) -> str:
    name, colon, arguments = text.partition(":")
    return f"python run.py --config=configs/{name}.py{colon}{arguments}"


def shown(value: Any) -> str:
    """Format a setting: {"name": "erm", "net": "net"} -> "erm, net net"; floats with four digits."""
    if isinstance(value, Mapping):
        rest = [
            f"{key} ({shown(item)})" if isinstance(item, Mapping) else f"{key} {shown(item)}"
            for key, item in value.items()
            if key not in ("name", "kind") and is_set(item)
        ]
        return ", ".join([str(value[key]) for key in ("name", "kind") if key in value] + rest)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) if len(value) <= 4 else f"{shown(value[0])} to {shown(value[-1])}"
    return str(value)


def is_set(value: Any) -> bool:
    """Return whether a setting is neither 0, empty nor off; only those are shown."""
    return value not in (False, 0, "", None) and not (isinstance(value, (Mapping, tuple)) and not value)


def recipe(text: str) -> str:
    """Return a table with a column for each stage, and the command."""
    run = load(text)
    stages = run.stages
    rows: list[tuple[str, list[str]]] = [("", [stage.title for stage in stages.values()])]

    def row(title: str, values: list[str]) -> None:
        if any(values):
            rows.append((title, [value or "-" for value in values]))

    every = list(stages.values())
    row("name", [f"`config.{name}`" for name in stages])
    row("starts from", [stage.start_from for stage in every])
    row("new classifier", [shown(stage.surgery) for stage in every])
    row("method", [shown(stage.method) if stage.epochs else "" for stage in every])
    row("trains", [_trained(stage) for stage in every])
    row("epochs", [_epochs(stage) for stage in every])
    row("learning rate", [_schedule(stage) for stage in every])
    row("sampler", [shown(stage.sampler) if stage.epochs else "" for stage in every])
    row("augmentation", [_augmentation(stage.augment) if stage.epochs else "" for stage in every])
    row("views", [_views(stage.views) for stage in every])
    row("batch norm", [stage.batch_norm if stage.epochs else "" for stage in every])
    row("at evaluation", [shown(stage.eval_classifier) if stage.eval_classifier.get("tau") else "" for stage in every])
    optimizer = run.optimizer._replace(nesterov=any(stage.optimizer["nesterov"] for stage in every))
    lines = [f"| {title} | {' | '.join(values)} |" for title, values in rows]
    lines.insert(1, "|---|" + "---|" * len(every))
    lines += ["", f"Network: {_network(run.model)}{f'; guide: {_network(run.guide)}' if run.guide else ''}. "]
    decay, momentum = shown(optimizer.weight_decay), shown(optimizer.momentum)
    nesterov = " (Nesterov)" if optimizer.nesterov else ""
    lines[-1] += f"SGD with momentum {momentum}{nesterov}, weight decay {decay}, batches of {run.batch_size}."
    lines += ["", f"    {command(text)}"]
    return "\n".join(lines)


def _epochs(stage: StageConfig) -> str:
    """Describe the number of epochs, and their length if it is not one pass over the images."""
    balanced = ", each of (largest class count) x (classes) draws"
    return str(stage.epochs) + (balanced if stage.epoch_size == "balanced" else "")


def _schedule(stage: StageConfig) -> str:
    """Describe the learning rate: "0.1; warm-up over 5 epochs; times 0.1 at epoch 160 and again at 180"."""
    if not stage.epochs:
        return ""
    parts, schedule = [f"{stage.lr:g}"], dict(stage.schedule)
    if schedule["kind"] == "cosine":
        parts.append("falling as a cosine")
    if warmup := round(schedule.get("warmup", 0) * stage.epochs):
        start = schedule.get("warmup_start", 0)
        parts.append(f"warm-up over {warmup} epoch{'s' * (warmup > 1)}" + (f" from {start:.3g} of it" if start else ""))
    if schedule["kind"] == "step" and schedule.get("decay_at"):
        at = " and again at ".join(str(round(share * stage.epochs)) for share in schedule["decay_at"])
        parts.append(f"times {schedule['decay']:g} at epoch {at}")
    return "; ".join(parts)


def _trained(stage: StageConfig) -> str:
    rates = {name: group["rate"] for name, group in stage.groups.items() if group["rate"]}
    return ", ".join(name if rate == 1 else f"{name} at {rate:g} of the rate" for name, rate in rates.items())


def _augmentation(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        key if value is True else f"{key} {shown(value)}" for key, value in settings.items() if is_set(value)
    )


def _views(views: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the views of a stage; equal ones together, as "2 x (flip, grey 0.2)"."""
    texts = [_augmentation(views[name]) for name in sorted(views)]
    return ", ".join(f"{texts.count(text)} x ({text})" for text in dict.fromkeys(texts))


def _network(settings: Mapping[str, Any]) -> str:
    """Return a network's name and its unusual settings."""
    usual = dict(classifier="linear", classifier_init="he", cosine_scale=30.0, dtype="float32", branch_kind="norm")
    if settings.get("classifier") == "cosine":
        del usual["cosine_scale"]
    rest = {
        key: value
        for key, value in settings.items()
        if key not in ("name", "mean", "std") and is_set(value) and usual.get(key) != value
    }
    return f"`{settings['name']}`" + "".join(f", {key} {shown(value)}" for key, value in rest.items())


def across(text: str) -> str:
    """Return the table for "mislas: epochs, features.augment.mixup_alpha=mixup": settings for each long-tailed set."""
    method, _, columns = text.partition(":")
    paths = [column.strip().partition("=") for column in columns.split(",")]
    lines = ["| data set | " + " | ".join(title or path for path, _, title in paths) + " |"]
    lines.append("|---|" + "---|" * len(paths))
    for name in LONG_TAILED:
        for imbalance in (100, 50, 10) if name.startswith("cifar") else (None,):
            arguments = f"method={method}" + (f",imbalance={imbalance}" if imbalance else FROM_SCRATCH.get(name, ""))
            config = module(name)["get_config"](arguments).to_dict()
            title = TITLES[name] + (f", imbalance {imbalance}" if imbalance else "")
            lines.append(f"| {title} | " + " | ".join(shown(at(config, path)) for path, _, _ in paths) + " |")
    return "\n".join(lines)


def at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key, "-") if isinstance(config, Mapping) else "-"
    return config
