"""2:4 sparsity: which entries stay, and the operations built on that."""
