"""From a plan to a smaller model, saved and loaded again."""
