"""What `run.py --help` and `--config=FILE:help` print, read off the flags and the config."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

# Settings that are worth knowing, in the order shown; those that a config has are listed with its values.
OVERRIDES = {
    "data.root": "the folder of the images",
    "epochs": "of the stages that train the whole network",
    "batch_size": "images to a step, over all devices",
    "accumulate": "parts of a batch that go through the network one after the other, to save memory",
    "model.remat": "true: activations are computed again instead of kept, to save memory",
    "model.dtype": "of the network's arithmetic: float32 or bfloat16",
    "optimizer.weight_decay": "where a stage has none of its own",
    "seed": "initialisation, order of the images, augmentation",
    "replicas": "runs with seeds from `seed` on, in one program",
    "eval_every": "epochs between evaluations; 0: every fifth, and each of the last 20",
    "data.groups": "which classes are many, medium and few: by counts, ranges or ranks",
    "weights": "a folder of imported weights to begin with",
    "attack.epsilon": "radius of --mode=attack",
    "attack.num_images": "images that --mode=attack takes, the first; 0: all",
}

INDENT = 28  # columns before the texts
WITHOUT_VALUE = "no value"  # what is allowed of an argument that is there or not


def flags_page(heading: str, flags: Iterable[Any]) -> str:
    """The page of `--help`: what comes first, and the flags of absl to list.

    Flags whose text begins as in "Of several processes: how many" are listed together, below those of every run.
    """
    sections: dict[str, list[str]] = {"": []}
    for flag in flags:
        text = flag.help.rpartition(">: ")[2]  # absl puts the values of a choice first
        found = re.fullmatch("Of ([^:]+): (.*)", text)
        title, text = found.groups() if found else ("", text)
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
    """The page of `--config=FILE:help`.

    Args:
      path: of the file. heading: what it is. arguments: {name: (default, what is allowed, meaning)}.
      config: what it says, as nested dicts.
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
            lines += _entry(f"{name}.{key}={_value(config, f'{name}.{key}')}", f"so for each stage: {', '.join(names)}")
    others = "All others are in the run's config.json; a wrong name lists what may stand there."
    return "\n".join([*lines, "", *textwrap.wrap(others, _width())])


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Raises: KeyError."""
    for part in key.split("."):
        config = config[part]
    return str(config).lower() if isinstance(config, bool) else config


def _width() -> int:
    """Columns of the terminal, up to 120; of a file, 120."""
    return min(shutil.get_terminal_size((120, 0)).columns, 120)


def _entry(name: str, text: str) -> list[str]:
    """ "  name    text", the text wrapped; it begins on a line of its own where the name is long."""
    wrapped = textwrap.wrap(text, max(_width() - INDENT, 40), break_on_hyphens=False) or [""]
    if len(name) + 3 > INDENT:
        wrapped.insert(0, "")
    heads = [f"  {name}".ljust(INDENT), *[" " * INDENT] * (len(wrapped) - 1)]
    return [(head + line).rstrip() for head, line in zip(heads, wrapped, strict=True)]
