"""`python -m act24.tools.bench.check_optimizer`, by hand on a GPU: AdamW's update in one pass over memory
against its formula in float64, and its time beside the passes that it stands for and beside PyTorch's fused
kernel with bfloat16 moments, on the weights of a few layers of 7b.

Prints what failed, and leaves with status 1 then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from unittest import mock

import torch

from act24.llama import PRESETS
from act24.optim import adamw, adamw_
from act24.optim.one_pass import why_not_one_pass
from act24.tools.bench.rows import graph_milliseconds, milliseconds, needed_gpu

#: Layers of 7b whose weights are updated.
LAYERS = 4


def main() -> None:
    device = needed_gpu()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(device), torch.__version__, flush=True)
    reason = why_not_one_pass(device)
    for line in _times(device):
        print(line, flush=True)
    if reason:
        print(f"FAILED {reason}")
    sys.exit(bool(reason))


def _times(device: torch.device) -> Iterator[str]:
    config = PRESETS["llama-7b"]
    width, features = config.hidden_size, config.intermediate_size
    shapes = [*[(width, width)] * 4, (features, width), (features, width), (width, features)] * LAYERS
    shapes += [(config.vocab_size, width)] * 2
    parameters = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    elements = sum(parameter.numel() for parameter in parameters)
    yield f"{len(shapes)} weights, {elements / 1e6:.0f}M parameters"
    for name, dtype, usable, moved in (
        ("one pass, float32 moments", torch.float32, True, 22),
        ("several passes, float32 moments", torch.float32, False, 100),
        ("PyTorch's fused kernel, bfloat16 moments", torch.bfloat16, False, 14),
    ):
        moments = [[torch.zeros_like(p, dtype=dtype) for p in parameters] for _ in range(2)]

        def update(moments: list[list[torch.Tensor]] = moments) -> None:
            numbers = {"step": 5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
            adamw_(parameters, gradients, *moments, lr=1e-4, **numbers)

        with mock.patch.object(
            adamw, "why_not_one_pass", lambda device, usable=usable: "" if usable else "off"
        ):
            launched, alone = milliseconds(update), graph_milliseconds(update)
        rate = elements * moved / alone / 1e9
        yield f"{name}: {launched:.2f} ms, {alone:.2f} replayed; {rate:.2f} TB/s at {moved} bytes a parameter"


if __name__ == "__main__":
    main()
