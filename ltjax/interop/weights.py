"""The public names of `ltjax.runs.weights`, folders of weights."""

from ltjax.runs.weights import Weights, hash_weights, in_our_order, load_weights, save_weights, shipped

__all__ = ["Weights", "hash_weights", "in_our_order", "load_weights", "save_weights", "shipped"]
