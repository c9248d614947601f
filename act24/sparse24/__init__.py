"""2:4 sparsity: which entries stay, and the operations built on that.

selection, soft_threshold, mvue: from four numbers to at most two.
activation, feature_wise, calibration, statistics: 2:4 activations, their weight gradients, scales and counts.
transposable, weight, linear, semi_structured: 2:4 weights, a drop-in linear, PyTorch's packed tensors.
packed, products: the format cuSPARSELt multiplies on Hopper, and the choice between 2:4 and dense products.
packed_activation, narrow_activation: `activation24` on packed operands, and inside narrow products.
fp8: the forward product of `activation24` in e4m3, with a scale for each row.
registry, operators, product_operators, fp8_operators, narrow_operators, weight_operators: what
  `act24.sparse24.kernels` does, as PyTorch operators; order_operators: the order of the tokens, as one.
"""
