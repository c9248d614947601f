"""Operators of our own in PyTorch's library: a compiled graph has one node for each, and never breaks.

An operator has a schema; a reference in plain PyTorch, which is what it does on a CPU and what its kernel is
held against; the kernel, which CUDA runs; and the shapes of its outputs, for tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("act24", "DEF")

#: The plain-PyTorch form of every operator, by name: it runs on any device.
REFERENCES: dict[str, Callable[..., Any]] = {}


def operator(
    schema: str, reference: Callable[..., Any], kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define an operator; it is also at `torch.ops.act24`. No gradient of its own."""
    name = schema[: schema.index("(")]
    # Packed buffers and rows that run along the tokens mean nothing in other strides.
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"act24::{name}", fake, lib=_LIBRARY)
    REFERENCES[name] = reference
    return getattr(torch.ops.act24, name)
