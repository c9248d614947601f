"""Triton kernels of the 2:4 operations. Each has its reference beside it in `act24.sparse24.operators`, which
is also what decides between the two; nothing else launches them.

compiler: Triton, where there is one.
keys: the functions that kernels share, from a 16-bit value to a sorted pair and its metadata.
pack_activation, pack_gradient: the two elementwise passes of a 2:4 feed-forward network.
pack_weight: a weight and its transpose from one read.
"""
