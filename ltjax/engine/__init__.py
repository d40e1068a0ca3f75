"""What trains and evaluates: a run set up, its stages compiled, batches, figures."""
