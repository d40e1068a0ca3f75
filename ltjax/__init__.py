"""ltjax: long-tailed and adversarially robust image classification in JAX.

Nothing is imported here, so that `import ltjax.losses` costs jax alone.
"""

__version__ = "0.1.0"
