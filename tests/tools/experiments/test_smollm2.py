"""A real model, in the order in which pruning costs it perplexity (`make recover-demo` has the table)."""

import copy
import math

import pytest
import torch

from act24.errors import Act24Error
from act24.tools.commands.recovery import calibration_data
from act24.tools.experiments.prune_recover import model_file
from act24.tools.pruning.calibration import calibration_rows
from act24.tools.pruning.prune import prune_
from act24.tools.run.opening import open_any
from act24.tools.run.protocol import window_loss

LENGTH = 256
KINDS = {
    "wanda 0.5": ("wanda", "0.5"),
    "wanda 4:8": ("wanda", "4:8"),
    "wanda 2:4": ("wanda", "2:4"),
    "magnitude 2:4": ("magnitude", "2:4"),
}


@pytest.mark.slow
def test_perplexity_in_order_of_what_is_lost():
    """T7, on the built-in text: other text than that of the published anchors, so the order alone."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    try:
        file = model_file()
    except Act24Error as error:  # the package is not installed
        pytest.skip(str(error))
    opened = open_any(str(file))
    data = calibration_data("builtin", ()).model_copy(update={"max_length": LENGTH})
    batches, _ = calibration_rows(data, opened.open_tokenizer(), 12, opened.vocab_size)
    rows = torch.cat(batches)
    calibration, heldout = rows[:8], rows[8:]

    def perplexity(model):
        with torch.no_grad():
            return math.exp(sum(float(window_loss(model, row[None])) for row in heldout) / len(heldout))

    found = {"dense": perplexity(opened.model)}
    for name, (method, pattern) in KINDS.items():
        model = copy.deepcopy(opened.model)
        done = prune_(model, [calibration], method=method, pattern=pattern)
        assert len(done.masks) == 210
        assert done.sparsity == pytest.approx(0.5, abs=1e-6)
        found[name] = perplexity(model)
    values = list(found.values())
    assert values == sorted(values), found
    assert found["magnitude 2:4"] > 3 * found["wanda 2:4"], found
