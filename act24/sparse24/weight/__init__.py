"""2:4 weights: the operation `linear24`, a drop-in linear, and PyTorch's semi-structured tensors."""
