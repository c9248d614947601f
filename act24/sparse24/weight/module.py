"""A drop-in linear with a 2:4 weight, for training loops of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from act24.options import Range, Width, check_values, in_range, one_of
from act24.sparse24.format.products import Table
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import flip_rate, linear24, masked_decay_
from act24.sparse24.weight.methods import (
    METHODS,
    WeightGradient,
    decays,
    renewed_every,
    weight_mask,
    weight_scale,
)


class _Sizes(NamedTuple):
    """Numbers that the constructor takes."""

    in_features: Width
    out_features: Width
    seed: int


class SparseLinear24(nn.Linear):
    """nn.Linear, trained 2:4. Mask, scale and seed are buffers, and what else training depends on is a tensor
    in the state dict, so checkpoints resume exactly, also through safetensors.

        for layer in sparse_layers: layer.decay_gradient_()       # between clipping and optimizer.step()
        optimizer.step()
        for layer in sparse_layers: layer.update_()               # once an optimizer step
        ...
        for layer in sparse_layers: layer.sparse = False          # the dense finish, say for the last sixth

    Attributes:
        sparse: False makes it the dense nn.Linear that it is underneath.
        method: the record of its method (`act24.sparse24.weight.methods`).
        weight_gradient: what dW is made of.
        mask_every: updates between two masks.
        mask: boolean `[out, in]`, what the forward keeps.
        scale: β of soft thresholding, a float32 scalar whatever the dtype of the weight, fixed when the layer
            was made.
        seed: int64 scalar that the last training forward drew from.
        kernels: run on 2:4 products where this machine has them (`act24.sparse24.weight.forms`); False for
            plain PyTorch.
        algorithms: what a tuner found for the products (`act24.sparse24.format.products.Table`); empty for
            the rule for shapes that nobody tuned.
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
        method: str = "transposable",
        weight_gradient: WeightGradient | None = None,
        mask_every: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            method: a name in `act24.sparse24.weight.methods.METHODS`; `"soft_threshold"` is S-STE.
            weight_gradient: `"mvue"` makes the output gradient 2:4 in dW, `"dense"` does not. None: as
                published with the method.
            mask_every: optimizer steps between two masks, for methods that keep them. None: as published.
            seed: of mvue; give each layer its own.

        Raises:
            OptionError: an option that there is not, or that the method has not.
            ValueError: a size that the method cannot make 2:4.
        """
        owner = type(self).__name__
        check_values(_Sizes, owner, in_features=in_features, out_features=out_features, seed=seed)
        one_of(owner, "method", method, METHODS)
        record = METHODS[method]
        if wrong := record.wrong_size((out_features, in_features)):
            raise ValueError(f"{owner}: a weight {out_features} × {in_features} is {wrong}")
        if mask_every is not None:
            in_range(owner, "mask_every", mask_every, Range(ge=1))
        if weight_gradient is not None:
            one_of(owner, "weight_gradient", weight_gradient, get_args(WeightGradient))
        renewal = renewed_every(record, mask_every)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.method, self.mask_every = record, renewal
        self.weight_gradient: WeightGradient = weight_gradient or record.weight_gradient
        self.sparse = self.kernels = True
        self.algorithms: Table = ()
        self._first_seed, self._updates, self._unset = seed, 0, False
        device = self.weight.device
        self.register_buffer("mask", torch.empty(self.weight.shape, dtype=torch.bool, device=device))
        self.register_buffer("scale", torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("seed", torch.empty((), dtype=torch.int64, device=device))
        self.reset_sparsity_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: object) -> SparseLinear24:
        """The same weight and bias, not copied, in a sparse layer.

        Args:
            linear: `in` and, for masks along both sides, `out` are multiples of 4.
            options: `method`, `weight_gradient`, `mask_every` and `seed` of the constructor.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **options,  # type: ignore[arg-type]
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.reset_sparsity_()
        return layer

    def reset_parameters(self) -> None:
        """A fresh weight and bias, as those of nn.Linear, and the mask and scale that go with it."""
        super().reset_parameters()
        if "mask" in self._buffers:  # nn.Linear's own constructor comes here before there is one
            self.reset_sparsity_()

    @torch.no_grad()
    def reset_sparsity_(self) -> None:
        """Mask and scale of the weight as it is, and the first seed: after loading other weights."""
        self._unset = self.weight.is_meta
        if self._unset:
            return
        self.mask.copy_(weight_mask(self.weight, self.method.name))
        self.scale.copy_(weight_scale(self.weight))
        self.seed.fill_(self._first_seed)

    @torch.no_grad()
    def update_(self) -> Tensor:
        """Note an optimizer step; every `mask_every` of them make a new mask.

        Returns:
            the flip rate since the last call, a float32 scalar on the device.
        """
        self._updates += 1
        before = self.mask.clone()
        if self.sparse and self._updates % self.mask_every == 0:
            self.mask.copy_(weight_mask(self.weight, self.method.name))
        return flip_rate(before, self.mask)

    def decay_gradient_(self, decay: Annotated[float, Range(ge=0)] | None = None) -> None:
        """Masked decay: add decay · weight to the gradient of the weights that the mask drops. SR-STE has it
        in the gradient that is clipped, arXiv 2404.01847 adds it after clipping (`self.method.decay_place`).
        Once an update, whatever the number of its micro-batches.

        Args:
            decay: λ; None: as published with the method, nothing where it has none.

        Raises:
            OptionError: the method has no masked decay, or λ is not a number of 0 or more.
        """
        if decay is not None:
            in_range(type(self).__name__, "decay", decay, Range(ge=0))
        decay = decays(self.method, decay)
        if decay and self.sparse and self.weight.grad is not None:
            masked_decay_(self.weight.grad, self.weight, self.mask, decay)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`. In training each call draws from a seed of its own; nothing is drawn
        in evaluation."""
        if not self.sparse:
            return F.linear(input, self.weight, self.bias)
        if self._unset:
            self.reset_sparsity_()
        seed = None
        if self.weight_gradient == "mvue" and self.training and torch.is_grad_enabled():
            self.seed += 1
            seed = self.seed.clone()
        mask, scale = (None, self.scale) if self.method.soft else (self.mask, None)
        options = LinearOptions24(self.method.both_ways, self.kernels, self.algorithms)
        return linear24(input, self.weight, self.bias, mask, scale, seed, None, None, options)

    def get_extra_state(self) -> Tensor:
        """int64 `[3]`: optimizer steps noted, whether it is sparse, `mask_every`."""
        return torch.tensor([self._updates, int(self.sparse), self.mask_every])

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave."""
        self._updates, sparse, self.mask_every = state.tolist()
        self.sparse = bool(sparse)
        self._unset = False  # the buffers are loaded with it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear24:
        """`.to`, `.cuda`, `.bfloat16`, `.to_empty` come here. The scale keeps its dtype and its bits; what
        leaves the meta device has no values, and mask and scale are those of the weight at the next
        forward."""
        scale, was_meta = self.scale, self.weight.is_meta
        super()._apply(fn, recurse)
        device = self.scale.device
        self.scale = torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device)
        self._unset |= was_meta and not self.weight.is_meta
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method.name}, weight_gradient={self.weight_gradient}"
