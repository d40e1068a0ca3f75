"""Things that a config chooses by name, and their settings, checked before they are used."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ltjax.types import UserError


def choose(kind: str, known: Mapping[str, Any], name: str) -> Any:
    """`known[name]`. kind: what is being chosen ("method"). Raises: UserError naming what is known."""
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return known[name]


def load(kind: str, modules: Mapping[str, str], name: str, entry: str) -> Callable:
    """The function `entry` of the module that `name` stands for."""
    return getattr(importlib.import_module(choose(kind, modules, name)), entry)


def bind(what: str, function: Callable, settings: Mapping[str, Any]) -> Callable:
    """`function` with its keyword-only arguments filled in from a config.

    what: the thing in messages ("method 'mislas'"). Raises: UserError for a setting that it does not take, or lacks.
    """
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    allowed = ", ".join(keywords) or "none"
    for name in settings:
        if name not in keywords:
            raise UserError(f"{what} has no setting {name!r}; allowed: {allowed}")
    missing = [name for name, p in keywords.items() if p.default is p.empty and name not in settings]
    if missing:
        raise UserError(f"{what} needs the setting {missing[0]!r}; allowed: {allowed}")
    return partial(function, **settings)
