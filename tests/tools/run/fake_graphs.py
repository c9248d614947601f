"""CUDA graphs for machines without a GPU: what was captured runs again, on the very tensors of the capture.

Like a graph, a capture computes nothing, its results lie in tensors of its own, and it knows the gradients
by their addresses: a `.grad` that is another tensor than at the capture is an error here, where a GPU would
add to memory that nobody reads.
"""

import inspect

import pytest
import torch

from act24.tools.run import step as step_module
from act24.tools.run.graphs import GraphedCalls, why_not_captured


class FakeGraph:
    def __init__(self, function, outputs, gradients):
        self._function, self._outputs, self._gradients = function, outputs, gradients
        self.name = function.__name__
        self.replays = 0

    def replay(self):
        before = self._gradients()
        for output, value in zip(self._outputs, self._function(), strict=True):
            output.copy_(value)
        assert before == self._gradients() == self.addresses
        self.replays += 1

    def capture(self):
        self.addresses = self._gradients()
        return self

    def reset(self):
        self._function = None

    def pool(self):
        return "pool"


class FakeCapture:
    """In place of `capture_on`. `made` are the graphs, in order."""

    def __init__(self):
        self.made = []

    def __call__(self, function, stream, pool):
        assert pool == ("pool" if self.made and self.made[-1]._function else None) or pool is None
        owner = inspect.getclosurevars(function).nonlocals.get("self")
        parameters = [] if owner is None else list(owner.summed_loss.parameters())

        def gradients():
            return [None if p.grad is None else p.grad.data_ptr() for p in parameters]

        numbers = {"renew": 0, "accumulate": 1, "forward": 2}[function.__name__]
        outputs = (torch.zeros(()), torch.zeros((), dtype=torch.int64))[:numbers]
        graph = FakeGraph(function, outputs, gradients).capture()
        self.made.append(graph)
        return graph, outputs


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """Let training steps be captured on this machine."""
    fake = FakeCapture()

    def why(train, device, world_size, has_pipeline=True):
        return why_not_captured(train, torch.device("cuda"), world_size, has_pipeline)

    monkeypatch.setattr(step_module, "why_not_captured", why)
    monkeypatch.setattr(
        step_module, "GraphedCalls", lambda device, must: GraphedCalls(device, must, capture=fake)
    )
    return fake
