"""Shipped weights: folders of `ltjax.runs.weights`, each with a NOTICE and the script that made it."""
