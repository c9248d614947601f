"""Random states survive JSON, for every generator and in the middle of a pair of Gaussians."""

import json
import random

import numpy
import pytest
import torch

from act24.tools.checkpoints.random_states import random_states, set_random_states_


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
    ]


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_the_same_numbers_come_again(drawn_before):
    for _ in range(drawn_before):
        random.gauss(0, 1)  # leaves the second of a pair behind every other time
        numpy.random.randn()
        torch.randn(1)
    states = json.loads(json.dumps(random_states()))
    assert states == random_states()
    first = draw()
    assert draw() != first
    set_random_states_(states)
    assert draw() == first
    assert states["cuda"] is None or torch.cuda.is_initialized()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_numbers_come_again_on_the_gpu():
    torch.rand(1, device="cuda")
    states = json.loads(json.dumps(random_states()))
    first = torch.randn(100, device="cuda")
    set_random_states_(states)
    assert torch.equal(torch.randn(100, device="cuda"), first)
