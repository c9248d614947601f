"""Which weights of a trained model go, and what the rest become: pure functions of tensors."""
