"""Options, models and callbacks of a training run."""
