"""What a config names is looked up, and its settings are checked before use."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from ltjax.system import registry
from ltjax.types import UserError


@pytest.mark.parametrize(
    "value, kind, fits",
    [
        (1, float, True),
        (np.float32(0.5), float, True),
        (float("nan"), float, False),
        (True, int, False),
        (0.5, int, False),
        ("1", int | None, False),
        (None, int | None, True),
        ([1, 2], tuple[int, ...], True),
        ("ab", tuple[str, ...], False),
        ((1.0, "2"), Sequence[float], False),
        ({}, Mapping[str, int], True),
        ([], Mapping[str, int], False),
        (object(), np.ndarray, True),  # no config can hold one
    ],
)
def test_a_value_fits_its_annotation(value, kind, fits):
    assert registry.fits(value, kind) == fits


def method(counts, *, rate: float, steps: int = 1):
    return rate * steps * counts


def test_settings_are_bound_to_keywords():
    assert registry.bind("method", method, dict(rate=2, steps=3))(1) == 6


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rate=1, step=2), "method has no setting 'step'; allowed: rate, steps"),
        (dict(steps=2), "method needs the setting 'rate'; allowed: rate, steps"),
        (dict(rate="1"), "method: rate = '1': float expected"),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(settings, message):
    with pytest.raises(UserError) as refused:
        registry.bind("method", method, settings)
    assert str(refused.value) == message


@pytest.mark.parametrize("name", ["c", ["a"]])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"unknown kind .*; known: a, b"):
        registry.choose("kind", {"a": 1, "b": 2}, name)
