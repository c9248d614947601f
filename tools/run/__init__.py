"""A training run: from a recipe to its end, on the processes at hand."""
