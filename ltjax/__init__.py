"""ltjax: long-tailed and adversarially robust image classification in JAX.

    model = ltjax.load("runs/quickstart-seed0")  # a run's workdir, or a folder of weights
    probabilities = model(images)  # [N, H, W, channels] -> [N, C]

Nothing is imported here, so that `import ltjax.losses` costs jax alone; `load` comes when it is asked for.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load":
        from ltjax.predictor import load

        return load
    raise AttributeError(f"module 'ltjax' has no attribute {name!r}")
