"""Weights that come with ltjax: folders of `ltjax.interop.weights`, each with a NOTICE and the script that made it."""
