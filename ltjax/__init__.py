"""ltjax: long-tailed and adversarially robust image classification in JAX.

    model = ltjax.load("runs/quickstart-seed0")  # a run's workdir, or a folder of weights
    probabilities = model(images)  # [N, H, W, channels] -> [N, C]

Nothing is imported here, so that `import ltjax.losses` costs jax alone; `load` comes when it is asked for.
"""

from os import environ as _environ

__version__ = "0.1.0"

# OpenCV reads this when it is imported. It refuses larger images, also those whose headers Pillow cannot read. The
# number is `ltjax.data.decode.MAX_PIXELS`.
_environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 28))


def __getattr__(name: str):
    if name == "load":
        from ltjax.predictor import load

        return load
    raise AttributeError(f"module 'ltjax' has no attribute {name!r}")
