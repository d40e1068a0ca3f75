"""Set up a run, compile its stages, bring its images to the devices, evaluate."""
