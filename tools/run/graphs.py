"""CUDA graphs: forward, loss and backward of a micro-batch launched at once, not operator by operator.

At 64 rows of 256 tokens a 130m model's micro-batch is a thousand kernels of 25 µs each. Python, autograd and
the launches take longer than the kernels do, and the GPU waits. A captured micro-batch is one launch.

So are the casts of weights that forward and backward read, once an update: at 1b 145 weights by a dozen small
launches each, for which the GPU waited.

What is captured is a function of tensors at fixed addresses: inputs are copied into place (`FixedInputs`),
and gradients add up in a `.grad` that stays. The first calls of a kind run as they are, for real: they
compile, load kernels and make the gradients that capture may not make. Then the same function is captured,
which computes nothing, and from there on replayed: the same kernels on the same addresses, so the results
are the same bits (`act24.tools.bench.check_graphs`).

A call that runs as it is beside graphs needs memory of its own, as much as theirs, while they have nothing to
do: for it they are given up, and captured again at their next call, which takes the CPU as long as a launched
call does. It happens twice a kind. Their memory is not lent to it: a tensor that it leaves there would be
overwritten at the next replay, without a word.

Everything that makes or uses a gradient runs on one stream (`capture_stream`): autograd remembers on which
stream a parameter first got one, and a capture that has to wait for another stream fails.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.recipes.schema import Train

Tensors = tuple[Tensor, ...]

#: Calls of a kind that run as they are before it is captured. The second one adds to gradients that exist.
WARM_UP = 2


def why_not_captured(train: Train, device: torch.device, world_size: int, has_pipeline: bool = True) -> str:
    """What prevents capture, as far as a recipe and a machine tell; empty if nothing does.

    Args:
        has_pipeline: something says which operations are in force, so that no graph outlives them.

    Raises:
        Act24Error: `train.cuda_graphs = "on"`, and something does.
    """
    if train.cuda_graphs == "off":
        return 'train.cuda_graphs is "off"'
    reason = ""
    if device.type != "cuda":
        reason = f"there is no CUDA GPU, this is {device.type}"
    elif world_size > 1 and train.parallel == "fsdp":
        reason = (
            'train.parallel = "fsdp" gathers parameters between the blocks, which is launched call by call'
        )
    elif not has_pipeline:
        reason = "nobody says which operations are in force (TrainingStep was given no pipeline)"
    if reason and train.cuda_graphs == "on":
        raise Act24Error(f'train.cuda_graphs = "on" cannot be: {reason}. Set "auto" or "off"')
    return reason


class FixedInputs:
    """Tensors on a device at addresses that do not change, each filled anew before it is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[Hashable, Tensor] = {}

    def fill(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the device: the same one for every tensor of this name, shape and dtype."""
        key = (name, tensor.shape, tensor.dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source = tensor
        if self._device.type == "cuda" and tensor.device.type == "cpu":
            source = tensor.pin_memory()  # an unpinned copy would wait for the device
        return self._tensors[key].copy_(source, non_blocking=True)


class GraphedCalls:
    """Calls that are captured once they are warm, each under a key that says all that it depends on besides
    the tensors it reads: shapes, and which operations are in force.

    Attributes:
        problem: why a capture failed; empty as long as none has. From then on calls run as they are.
    """

    def __init__(
        self,
        device: torch.device,
        must: bool = False,
        capture: Callable[[Callable[[], Tensors], Any, Any], tuple[Any, Tensors]] | None = None,
    ) -> None:
        """
        Args:
            must: a capture that fails is an error.
            capture: in place of `capture_on`, for machines that have no graphs.
        """
        self.problem = ""
        self._must = must
        self._stream = capture_stream(device) if device.type == "cuda" else None
        self._capture = capture or capture_on
        self._warm: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Any, Tensors]] = {}

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """On the one stream, behind what was launched before; what follows waits for it."""
        if self._stream is None or torch.cuda.current_stream(self._stream.device) == self._stream:
            yield
            return
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def __call__(self, key: Hashable, function: Callable[[], Tensors]) -> Tensors:
        """What `function` returns. The next call may overwrite it: add it up or copy it before.

        Args:
            key: two calls of one key do the same to the same tensors.
            function: reads and writes tensors at fixed addresses, and waits for nothing.

        Raises:
            Act24Error: it cannot be captured, and must be.
        """
        if key not in self._graphs:
            if self.problem or self._warm[key] < WARM_UP:
                self._warm[key] += 1
                self._give_up()
                return function()
            try:
                self._graphs[key] = self._capture(function, self._stream, self._pool())
            except RuntimeError as error:
                self.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                if self._must:
                    raise Act24Error(
                        f'train.cuda_graphs = "on", and a step cannot be captured: {self.problem}. '
                        'Set "auto" or "off"'
                    ) from error
                return function()
        graph, outputs = self._graphs[key]
        graph.replay()
        return outputs

    def drop(self) -> None:
        """Forget all graphs and give their memory back: what they do is not done any more."""
        self._give_up()
        self._warm.clear()

    def _give_up(self) -> None:
        """Give the memory of all graphs back. What was warm is captured anew when it is next called."""
        if not self._graphs:
            return
        if self._stream is not None:
            self._stream.synchronize()
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        if self._stream is not None:
            torch.cuda.empty_cache()

    def _pool(self) -> Any:
        """The memory that all graphs share: they run in turn, and none keeps anything but its outputs."""
        return next((graph.pool() for graph, _ in self._graphs.values()), None)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device on which micro-batches run that are to be captured."""
    return torch.cuda.Stream(device)


def capture_on(function: Callable[[], Tensors], stream: Any, pool: Any) -> tuple[Any, Tensors]:
    """Capture a function on a stream: the graph, and the tensors in which a replay leaves its results.

    Raises:
        RuntimeError: it does something that cannot be captured. What follows runs as if nothing had been.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[stream.device_index]
    state = generator.clone_state()
    collects = gc.isenabled()
    gc.disable()  # another graph that is collected now would end the capture
    try:
        # thread_local: the threads of NCCL and of pinned memory may ask the device what they like.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    except RuntimeError:
        generator.graphsafe_set_state(state)  # PyTorch's would believe for ever that a capture goes on
        raise
    finally:
        if collects:
            gc.enable()
    return graph, outputs
