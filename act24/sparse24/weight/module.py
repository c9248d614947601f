"""A drop-in linear with a 2:4 weight, for training loops of one's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from act24.sparse24.weight.linear24 import (
    Method,
    WeightGradient,
    flip_rate,
    linear24,
    masked_decay_,
    weight_mask,
    weight_scale,
)


class SparseLinear24(nn.Linear):
    """nn.Linear, trained 2:4. Mask, scale and seed are buffers, so checkpoints resume exactly.

        for layer in sparse_layers: layer.decay_gradient_(6e-5)   # between clipping and optimizer.step()
        optimizer.step()
        for layer in sparse_layers: layer.update_()               # once an optimizer step
        ...
        for layer in sparse_layers: layer.sparse = False          # the dense finish, say for the last sixth

    Attributes:
        sparse: False makes it the dense nn.Linear that it is underneath.
        mask: boolean `[out, in]`, what the forward keeps.
        scale: β of soft thresholding, fixed when the layer was made.
    """

    mask: Tensor
    scale: Tensor
    seed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        method: Method = "transposable",
        weight_gradient: WeightGradient = "mvue",
        mask_every: int = 40,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            method: as in `act24.sparse24.weight.linear24.weight_mask`; `"soft_threshold"` is S-STE.
            weight_gradient: `"mvue"` makes the output gradient 2:4 in dW, `"dense"` does not.
            mask_every: optimizer steps between two masks; always 1 for soft thresholding.
            seed: of mvue; give each layer its own.

        Raises:
            ValueError: a size that the method cannot make 2:4.
        """
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.method: Method = method
        self.weight_gradient: WeightGradient = weight_gradient
        # Soft thresholding takes the weight as it is, so its mask is always that of the last step.
        self.mask_every = 1 if method == "soft_threshold" else mask_every
        self.sparse = True
        self.register_buffer("mask", weight_mask(self.weight, method))
        self.register_buffer("scale", weight_scale(self.weight))
        self.register_buffer("seed", torch.tensor(seed, device=self.weight.device))
        self._updates = 0

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: object) -> SparseLinear24:
        """The same weight and bias, not copied, in a sparse layer; `options` as for the constructor."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **options,  # type: ignore[arg-type]
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.reset_sparsity_()
        return layer

    @torch.no_grad()
    def reset_sparsity_(self) -> None:
        """Mask and scale of the weight as it is: after loading other weights."""
        self.mask.copy_(weight_mask(self.weight, self.method))
        self.scale.copy_(weight_scale(self.weight))

    @torch.no_grad()
    def update_(self) -> Tensor:
        """Note an optimizer step; every `mask_every` of them make a new mask.

        Returns:
            the flip rate since the last call, a scalar on the device.
        """
        self._updates += 1
        before = self.mask.clone()
        if self.sparse and self._updates % self.mask_every == 0:
            self.mask.copy_(weight_mask(self.weight, self.method))
        return flip_rate(before, self.mask)

    def get_extra_state(self) -> int:
        """Optimizer steps noted, for the state dict."""
        return self._updates

    def set_extra_state(self, state: int) -> None:
        self._updates = state

    def decay_gradient_(self, decay: float) -> None:
        """Masked decay: add decay · weight to the gradient of the weights that the mask drops."""
        if self.sparse and self.weight.grad is not None:
            masked_decay_(self.weight.grad, self.weight, self.mask, decay)

    def forward(self, input: Tensor) -> Tensor:
        if not self.sparse:
            return F.linear(input, self.weight, self.bias)
        seed = None
        if self.weight_gradient == "mvue":
            self.seed += 1
            seed = self.seed.clone()
        soft = self.method == "soft_threshold"
        return linear24(
            input, self.weight, self.bias, None if soft else self.mask, self.scale if soft else None, seed
        )
