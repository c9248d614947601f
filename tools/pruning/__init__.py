"""Pruning a trained model, and recovering its accuracy: what walks over a model and writes files."""
