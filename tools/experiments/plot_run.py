"""Plots of one run from its event files: losses, and what relu² and 2:4 did in each layer.

    python -m act24.tools.experiments.plot_run RUN PICTURE.png

Needs matplotlib, which act24 itself does not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_PANELS = (
    ("sparsity_relu", "zeros after relu²"),
    ("sparsity_dropped_energy", "share of energy that 2:4 drops"),
)


def main() -> None:
    """Draw three panels into one picture."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]

    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    figure, (losses, *panels) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for tag, label in (("loss/train", "training"), ("loss/val", "held-out")):
        points = events.Scalars(tag)
        losses.plot([p.step for p in points], [p.value for p in points], label=label)
    losses.set(xlabel="step", ylabel="loss, nats per token", ylim=(None, 6))
    losses.legend()
    for panel, (group, title) in zip(panels, _PANELS, strict=True):
        layers = sorted(
            (int(match[1]), tag) for tag in tags if (match := re.fullmatch(rf"{group}/layer_(\d+)", tag))
        )
        colours = plt.get_cmap("viridis")
        for layer, tag in layers:
            points = events.Scalars(tag)
            colour = colours(layer / max(len(layers) - 1, 1))
            panel.plot(
                [p.step for p in points], [p.value for p in points], color=colour, label=f"layer {layer}"
            )
        panel.set(xlabel="step", title=title)
    panels[0].legend(ncols=2, fontsize="small")
    panels[1].set_yscale("log")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main()
