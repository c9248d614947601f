"""What may stand between the two factors of a linear."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from act24.relu2 import relu2

#: Elementwise functions by name; None: nothing stands there, and the two factors have a product.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {"silu": F.silu, "relu2": relu2, "none": None}
