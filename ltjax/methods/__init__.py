"""Ways to train, one file each: `create(class_counts [C], *, hyper-parameters) -> ltjax.types.Method`."""

from ltjax import registry
from ltjax.types import Method, UserError

METHODS = {
    name: f"ltjax.methods.{name}"
    for name in ("erm", "mislas", "drolt", "reslt", "pgd_at", "trades", "alp", "bgat", "lbgat")
}


def create(name: str, class_counts, **settings) -> Method:
    """The method of a stage. Raises: UserError for an unknown name or hyper-parameter, or a value it cannot have."""
    function = registry.load("method", METHODS, name, "create")
    try:
        return registry.bind(f"method {name!r}", function, settings)(class_counts)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"method {name!r}: {error}") from error
