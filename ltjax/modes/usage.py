"""Make the pages of `run.py --help` and `--config=FILE:help` from the flags and the config."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

# Settings that a config's help page lists, in this order, if the config has them.
OVERRIDES = {
    "data.root": "folder of the images",
    "data.labels": "table of an image folder's labels: a CSV file with the columns file, label and optionally split",
    "epochs": "epochs of the stages that train the whole network",
    "class_weights": "factors on the losses of a class's images: auto, or \"{'NAME': 2.0}\"",
    "batch_size": "images in a step, over all devices",
    "accumulate": "parts of a batch that are computed one after the other, to save memory",
    "model.remat": "true: activations are recomputed instead of stored, to save memory",
    "model.dtype": "precision of the network: float32 or bfloat16",
    "optimizer.weight_decay": "weight decay of stages that do not set it",
    "seed": "seed of initialisation, order of the images and augmentation",
    "replicas": "number of runs, with seeds from `seed` on, in one program",
    "eval_every": "epochs between evaluations; 0: every fifth epoch and each of the last 20",
    "data.groups": "which classes are many, medium and few: by counts, ranges or ranks",
    "weights": "folder of imported weights to start from",
    "attack.epsilon": "radius of --mode=attack",
    "attack.num_images": "number of images for --mode=attack, spread over classes; 0: all",
}

INDENT = 28  # columns before the texts
WITHOUT_VALUE = "no value"  # the allowed values of an argument without a value


def flags_page(heading: str, flags: Iterable[Any]) -> str:
    """Make the page of `--help`.

    Flags whose text begins like "With several processes: ..." have a section of their own, "Several processes".
    """
    sections: dict[str, list[str]] = {"": []}
    for flag in flags:
        text = flag.help.rpartition(">: ")[2]  # absl puts the values of a choice first
        match = re.fullmatch("With ([^:]+): (.*)", text)
        title, text = match.groups() if match else ("", text)
        sections.setdefault(title, []).extend(_entry(_flag(flag), text[:1].upper() + text[1:] + _default(flag)))
    lines = [heading.strip()]
    for title, entries in sections.items():
        lines += ["", *([f"{title[:1].upper()}{title[1:]}:"] if title else []), *entries]
    return "\n".join([*lines, "", "--helpfull lists the flags of all libraries."])


def _flag(flag: Any) -> str:
    kind = flag.flag_type()
    if kind == "bool":
        return f"--{flag.name}"
    values = getattr(flag.parser, "enum_values", None)
    return f"--{flag.name}={'|'.join(values) if values else 'N' if kind == 'int' else '...'}"


def _default(flag: Any) -> str:
    return f" Default: {flag.default}." if flag.default not in (None, "", False) else ""


def config_page(
    path: str, heading: str, arguments: Mapping[str, tuple[str, str, str]], config: Mapping[str, Any]
) -> str:
    """Make the page of `--config=FILE:help`.

    Args:
      arguments: {name: (default, allowed values, meaning)}.
      config: The config, as nested dicts.
    """
    lines = [heading, ""]
    if arguments:
        lines += [f"Arguments, with their defaults: --config={path}:NAME=VALUE,..."]
        for name, (default, allowed, meaning) in arguments.items():
            bare = allowed == WITHOUT_VALUE
            lines += _entry(name, meaning) if bare else _entry(f"{name}={default}", f"{meaning} [{allowed}]")
    else:
        lines += ["No arguments."]
    lines += ["", "Some settings, with their values: --config.KEY=VALUE"]
    for key, meaning in OVERRIDES.items():
        try:
            lines += _entry(f"{key}={_value(config, key)}", meaning)
        except KeyError:
            continue
    names = config.get("stages", ())
    for name in names[:1]:
        for key in ("lr", "epochs"):
            text = f"the same for each stage: {', '.join(names)}"
            lines += _entry(f"{name}.{key}={_value(config, f'{name}.{key}')}", text)
    others = "All other settings are in the run's config.json. The error message for an unknown key lists the keys."
    return "\n".join([*lines, "", *textwrap.wrap(others, _width())])


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Look up a dotted key. KeyError if the config lacks it."""
    for part in key.split("."):
        config = config[part]
    return str(config).lower() if isinstance(config, bool) else config


def _width() -> int:
    """Return the columns of the terminal, at most 120; 120 for a file."""
    return min(shutil.get_terminal_size((120, 0)).columns, 120)


def _entry(name: str, text: str) -> list[str]:
    """Format "  name    text" with the text wrapped. After a long name, the text starts on the next line."""
    wrapped = textwrap.wrap(text, max(_width() - INDENT, 40), break_on_hyphens=False) or [""]
    if len(name) + 3 > INDENT:
        wrapped.insert(0, "")
    heads = [f"  {name}".ljust(INDENT), *[" " * INDENT] * (len(wrapped) - 1)]
    return [(head + line).rstrip() for head, line in zip(heads, wrapped, strict=True)]
