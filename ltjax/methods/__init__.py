"""Ways to train, one file each: `create(class_counts [C], *, hyper-parameters) -> ltjax.types.Method`."""

from ltjax import registry
from ltjax.types import Method, UserError

METHODS = {
    name: f"ltjax.methods.{name}"
    for name in ("erm", "mislas", "drolt", "reslt", "pgd_at", "trades", "alp", "bgat", "lbgat")
}


def create(name: str, class_counts, **settings) -> Method:
    """The method of a stage. class_counts: [C] training images. settings: the method's own, as in a config.

    Raises: UserError for an unknown name or hyper-parameter, or a value it cannot have.

    Examples:
      >>> method = methods.create("mislas", np.array([100, 10, 1]), head=0.4, tail=0.1)
      >>> method.per_class({})["Label smoothing"]  # of each class
      Array([0.4  , 0.143, 0.1  ], dtype=float32)
    """
    function = registry.load("method", METHODS, name, "create")
    try:
        return registry.bind(f"method {name!r}", function, settings)(class_counts)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"method {name!r}: {error}") from error
