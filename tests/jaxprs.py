"""The equations of traced functions."""

from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """Return all equations of a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                yield from equations(getattr(value, "jaxpr", value))
