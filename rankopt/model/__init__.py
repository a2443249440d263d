"""What a model has: its matrices, its task, its size, and how it is loaded."""
