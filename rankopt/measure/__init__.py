"""From a model and data to a profile."""
