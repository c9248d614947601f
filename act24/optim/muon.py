"""Muon for the hidden matrices, AdamW for the rest: embeddings, head, norms, biases.

The rule is PyTorch's, `torch.optim.Muon` (Jordan et al., https://kellerjordan.github.io/posts/muon/):
momentum, made orthogonal by Newton-Schulz iterations. Embeddings and head are no hidden matrices and get
AdamW, as there. With `adjust_lr = "match_rms_adamw"` (Liu et al., "Muon is Scalable for LLM Training", arXiv
2502.16982) an update has the root mean square of AdamW's, so both share one learning rate and one weight
decay, those that were tuned for AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from act24.optim.adamw import AdamW, Beta, parameter_groups
from act24.optim.base import OptimizerOptions, Surroundings
from act24.options import OptionError, Range


@dataclass(frozen=True, kw_only=True)
class MuonOptions(OptimizerOptions):
    """Options of `muon`: Muon on the matrices of the blocks, AdamW on all else.

    Attributes:
        weight_decay: decoupled, times the learning rate; of matrices and head, not of embeddings and norms.
        momentum: of the matrices.
        nesterov: look ahead, as published.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: `"match_rms_adamw"` gives an update the root mean square of AdamW's, by a factor of
            0.2 √max(rows, columns) on the learning rate; `"original"`: by √max(1, rows / columns).
        betas, eps: AdamW's, for the rest.
    """

    name: ClassVar[str] = "muon"

    weight_decay: Annotated[float, Range(ge=0)] = 0.1
    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Range(ge=1, lt=100)] = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Range(gt=0)] = 1e-8

    def build(self, model: nn.Module, surroundings: Surroundings) -> Muon:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise OptionError(
                'muon: makes whole matrices orthogonal, and these are sharded: use train.parallel = "ddp"'
            )
        head = getattr(getattr(model, "lm_head", None), "weight", None)
        groups = []
        for group in parameter_groups(model, self.weight_decay):
            hidden = [
                p for p in group["params"] if group["name"] == "decay" and p.ndim == 2 and p is not head
            ]
            chosen = {id(parameter) for parameter in hidden}
            rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            if hidden:
                groups.append({**group, "name": "muon", "params": hidden} | self._of_matrices())
            if rest:
                groups.append({**group, "params": rest})
        if not any(group["name"] == "muon" for group in groups):
            raise OptionError("muon: the model has no matrix beside embeddings and head")
        return Muon(groups, lr=self.lr, betas=self.betas, eps=self.eps)

    def _of_matrices(self) -> dict[str, Any]:
        """What `torch.optim.Muon` reads of a group."""
        rule = {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.ns_steps}
        return rule | {"adjust_lr_fn": self.adjust_lr}


class Muon(AdamW):
    """AdamW whose groups named `muon` are updated by `torch.optim.Muon`; their state is in this optimizer."""

    def __init__(self, params: Any, **options: Any) -> None:
        """
        Args:
            params: groups; those named `muon` hold matrices, with the options of `torch.optim.Muon`.
            options: as for `AdamW`.
        """
        super().__init__(params, **options)
        matrices = [p for group in self.param_groups if group["name"] == "muon" for p in group["params"]]
        self._rule = torch.optim.Muon(matrices)
        for group in self.param_groups:
            if group["name"] == "muon":  # its eps bounds a norm, AdamW's a root
                names = ("ns_coefficients", "eps")
                group.update({name: self._rule.defaults[name] for name in names})

    def _is_adamw(self, group: dict[str, Any]) -> bool:
        return group["name"] != "muon"

    def _update(self, group: dict[str, Any]) -> None:
        if self._is_adamw(group):
            return super()._update(group)
        self._rule.param_groups, self._rule.state = [group], self.state
        self._rule.step()
