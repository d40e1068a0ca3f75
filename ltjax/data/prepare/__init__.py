"""Write data sets to disk, once: `python -m ltjax.data.prepare DATASET`. One file a data set."""
