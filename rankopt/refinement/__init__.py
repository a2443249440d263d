"""Low-rank factors learn from the dense model what truncation has taken."""
