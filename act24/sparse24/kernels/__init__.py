"""Triton kernels of the 2:4 operations. Operators in `act24.sparse24` (`operators`, `product_operators`,
`fp8_operators`, `narrow_operators`, `weight_operators`) have a reference beside each, and are all that
launches them.

compiler: Triton, where there is one.
keys, random_draw: what kernels share, from a 16-bit value to a sorted pair and its metadata.
pack_activation, pack_gradient, unpack_gradient, activation_gradient: the elementwise passes of a 2:4
  feed-forward network.
quantise: rows to e4m3 over their own scales, of a matrix or of a packed one.
gather_features: single features of packed matrices, for statistics. replace_rows: into a product.
low_rank: products with the 2:4 activation in them, for narrow linears.
pack_weight: a weight and its transpose from one read.
cusparselt: the library's products with plans that are kept.
"""
