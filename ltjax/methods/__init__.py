"""Ways to train, one file each: `create(class_counts [C], *, hyper-parameters) -> ltjax.types.Method`."""

from ltjax import registry
from ltjax.types import Method

METHODS = {name: f"ltjax.methods.{name}" for name in ("erm", "mislas")}


def create(name: str, class_counts, **settings) -> Method:
    """The method of a stage. Raises: UserError for an unknown name or hyper-parameter."""
    function = registry.load("method", METHODS, name, "create")
    return registry.bind(f"method {name!r}", function, settings)(class_counts)
