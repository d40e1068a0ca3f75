"""Look up what a config names, and check its settings before use."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ltjax.types import UserError


def choose(kind: str, known: Mapping[str, Any], name: str) -> Any:
    """Return `known[name]`, or raise a UserError that lists the known names. kind: for the message ("method")."""
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return known[name]


def load(kind: str, modules: Mapping[str, str], name: str, entry: str) -> Callable:
    """Return the function `entry` of the module `modules[name]`."""
    return getattr(importlib.import_module(choose(kind, modules, name)), entry)


def bind(what: str, function: Callable, settings: Mapping[str, Any]) -> Callable:
    """Bind a function's keyword-only arguments to settings from a config.

    Args:
      what: Name of the thing in messages, such as "method 'mislas'".
      function: Whose keyword-only arguments are the settings.
      settings: {name: value}.

    Raises:
      UserError: A setting is unknown, or a required one is missing.
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
