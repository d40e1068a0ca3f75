"""Look up the names of a config, and check their settings before use."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ltjax.types import UserError


def choose(kind: str, known: Mapping[str, Any] | Sequence[str], name: str) -> Any:
    """Return `known[name]`, or of a sequence the name itself; raise UserError that lists the names if it lacks it.

    Args:
      kind: For the message, such as "method".
    """
    if not isinstance(name, str) or name not in known:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return known[name] if isinstance(known, Mapping) else name


def load(kind: str, modules: Mapping[str, str], name: str, entry: str) -> Callable:
    """Return the function `entry` of the module `modules[name]`."""
    return getattr(importlib.import_module(choose(kind, modules, name)), entry)


def bind(what: str, function: Callable, settings: Mapping[str, Any]) -> Callable:
    """Bind a function's keyword-only arguments to settings from a config.

    Args:
      what: Name of the thing in messages, such as "method 'mislas'".
      function: Whose keyword-only arguments are the settings.

    Raises:
      UserError: A setting is unknown or of another type than the function's annotation, or a required one is missing.
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
    check_types(what, function, settings)
    return partial(function, **settings)


def check_types(what: str, function: Callable, settings: Mapping[str, Any]) -> None:
    """Raise UserError if a setting is not of the type of the function's argument. what: see `bind`."""
    try:
        kinds = get_type_hints(function)
    except (NameError, TypeError):  # types that are imported for checkers alone; or no function, such as a `partial`
        return
    for name, value in settings.items():
        if not fits(value, kinds.get(name, Any)):
            raise UserError(f"{what}: {name} = {value!r}: {expected(value, kinds[name])}")


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value of a config has an annotated type.

    A list counts as a tuple, and an int as a float; nan is no number. Any value fits a type that no config can hold.
    """
    origin, options = get_origin(kind), get_args(kind)
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's numbers and arrays
    if origin in (UnionType, Union):
        return any(fits(value, option) for option in options)
    if origin in (tuple, Sequence):
        return isinstance(value, (tuple, list)) and all(fits(item, options[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and value == value
    if origin is Mapping or kind in (bool, str, NoneType):
        return isinstance(value, origin or kind)
    return True


def expected(value: Any, kind: Any) -> str:
    """Describe a type that a value does not have, for messages, such as "float or str expected"."""
    origin, options = get_origin(kind), get_args(kind)
    if Mapping in (origin, *map(get_origin, options)):
        return "needs settings" + (f", such as {{'name': {value!r}}}" if isinstance(value, str) else "")
    if origin in (tuple, Sequence):
        return f"a tuple of {getattr(options[0], '__name__', options[0])} expected"
    names = [getattr(option, "__name__", str(option)) for option in options or (kind,)]
    return f"{' or '.join('None' if name == 'NoneType' else name for name in names)} expected"
