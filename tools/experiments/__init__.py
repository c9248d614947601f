"""The scripts that made the figures in docs/results."""
