"""When the training loop evaluates."""

import jax
import pytest

from ltjax import train


def epochs_with_one(epochs, every):
    return [epoch for epoch in range(1, epochs + 1) if train.evaluates(epoch, epochs, every)]


@pytest.mark.parametrize("every, expected", [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (9, [7])])
def test_every_so_many_epochs_and_the_last(every, expected):
    assert epochs_with_one(7, every) == expected


def test_left_to_choose_a_cpu_skips_most_until_the_last_20(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert epochs_with_one(200, 0) == [*range(5, 181, 5), *range(181, 201)]
    assert epochs_with_one(12, 0) == list(range(1, 13))


def test_left_to_choose_an_accelerator_skips_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert epochs_with_one(200, 0) == list(range(1, 201))
