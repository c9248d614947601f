"""2:4 sparsity. Each folder imports only what stands before it in this list:

pattern        which two of four stay: selection, soft thresholds, unbiased draws, transposable masks
format         how a 2:4 matrix lies in memory, cuSPARSELt's products with it, and when they pay
kernels        one file an operator: schema, reference in plain PyTorch, Triton kernel
feed_forward   the operation `activation24` and the forms in which it runs
weight         the operation `linear24`, the module `SparseLinear24`, PyTorch's semi-structured tensors

`feed_forward` and `weight` do not import each other.
"""
