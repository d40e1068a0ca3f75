"""The contents of a run's folder: checkpoints, logs, results."""
