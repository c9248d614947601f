"""Which two of every four stay, and with what value: pure functions of tensors."""
