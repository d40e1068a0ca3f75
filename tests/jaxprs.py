"""What a traced function consists of."""

from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                yield from equations(getattr(value, "jaxpr", value))
