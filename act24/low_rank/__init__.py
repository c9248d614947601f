"""Low-rank weights: first values of factors, and steps on the manifold of matrices of a fixed rank.

A factorised linear computes y = (x W_inᵀ) W_outᵀ with `weight_in` `[R, in]` and `weight_out` `[out, R]`, both
as PyTorch's linears store them. In LORO's notation N = W_inᵀ and M = W_out, so that W = M Nᵀ = W_out W_in; in
CoLA's A = W_inᵀ and B = W_outᵀ. Functions work on stacks of same-shaped factors, `[n, R, in]` and
`[n, out, R]`.
"""
