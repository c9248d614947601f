"""What a run writes for TensorBoard: scalars, values by layer, text and hyperparameters, in one event folder.

A *layer tag* is a tag with `*` where the layer stands: `sparsity_relu/*` or `weight_sparsity/*/mlp_up_proj`.
Its values are written as `sparsity_relu/layer_0`, …, with `mean_across_layers`, `min_across_layers` and
`max_across_layers` in the same place, and as a layer × step picture, `sparsity_relu/heatmap`.

Custom Scalars shows each layer tag in two charts: the mean within the band from smallest to largest, and
every layer. TensorBoard colours lines by run, so in the second all lines have one colour and are told apart
by markers and tooltip; the heatmap is the view that separates layers. A child run for each layer would have
given colours, at the price of a run list with one entry a layer and of names that no longer hold the layer.
"""

from __future__ import annotations

import functools
import logging
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, TypeVar

from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from act24.tools.watch.heatmap import History
from act24.words import counted

ACROSS_LAYERS = ("mean_across_layers", "min_across_layers", "max_across_layers")

#: Of event files: tells ours from those that another program writes beside them (`tools/run/folder.py`).
EVENTS_SUFFIX = ".act24"
_EVENTS = "events.out.tfevents."

logger = logging.getLogger("act24")

Write = TypeVar("Write", bound=Callable[..., None])


def _never_fatal(write: Write) -> Write:
    """A log that cannot be written (a full disk) ends with one warning, and says what it lacks when it is
    closed; the training it watches goes on."""

    counts = write.__name__ in ("scalars", "layers", "text", "hparams")

    @functools.wraps(write)
    def guarded(self: RunLog, *arguments: Any, **options: Any) -> None:
        self.unwritten += counts
        if not self.broken:
            try:
                write(self, *arguments, **options)
            except OSError as error:
                self.broken = True
                logger.warning("nothing more is written for TensorBoard: %s", error)

    return guarded  # type: ignore[return-value]


def _no_traceback_of_writers() -> Callable[[], None]:
    """Keep the thread of an event file from printing one where its disk fails: the next write raises the same
    error, and says it in one line. Returns what puts the hook of before back."""
    before = threading.excepthook

    def quiet(failed: threading.ExceptHookArgs) -> None:
        of_writer = type(failed.thread).__module__.startswith("tensorboard.")
        if not (of_writer and issubclass(failed.exc_type, OSError)):
            before(failed)

    def put_back() -> None:
        if threading.excepthook is quiet:
            threading.excepthook = before

    threading.excepthook = quiet
    return put_back


@contextmanager
def _named_behind_others(run_dir: Path) -> Iterator[None]:
    """Make the name of a new event file the last of its folder.

    Readers take files in the order of names, which begin with the second of the clock, and each hides what
    those before it logged at its steps and later. After a clock went back, or within a second, a run that
    goes on would be hidden by what it went on from.
    """
    names = [path.name.removeprefix(_EVENTS) for path in run_dir.glob(f"{_EVENTS}*")]
    newest = max((int(second[0]) for name in names if (second := re.match(r"\d+", name))), default=0)
    named_by = max(time.time(), newest + 1)
    # The writer asks its module's clock, and takes no name.
    clock, event_file_writer.time = event_file_writer.time, SimpleNamespace(time=lambda: named_by)  # type: ignore[assignment]
    try:
        yield
    finally:
        event_file_writer.time = clock


class RunLog:
    """The event files in a run's folder. One process has it, the first.

    Attributes:
        broken: they cannot be written any more.
        unwritten: groups of values, pictures and texts that are not known to be on the disk.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        layer_tags: Sequence[str] = (),
        resumed_from: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            run_dir: where the event files go; its name is the run's in TensorBoard.
            layer_tags: those that will be logged; each gets its charts.
            resumed_from: step of the checkpoint from which the run goes on; what was logged after it is
                hidden. None hides all that an earlier run left in the folder.
            state: what `state()` returned then. Without it the heatmaps begin anew.
        """
        self.broken, self.unwritten = False, 0
        self._histories = histories(state or {})
        self._put_back = _no_traceback_of_writers()
        # A new run gets a start event too: TensorBoard's server hides nothing at the first of a folder.
        first_step = 0 if resumed_from is None else resumed_from + 1
        self._open(run_dir, first_step, layer_tags)

    @_never_fatal
    def _open(self, run_dir: Path, first_step: int, layer_tags: Sequence[str]) -> None:
        with _named_behind_others(run_dir):
            self._writer = SummaryWriter(str(run_dir), purge_step=first_step, filename_suffix=EVENTS_SUFFIX)
        self._writer.add_custom_scalars(layout(layer_tags))

    @_never_fatal
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    @_never_fatal
    def layers(self, layer_tag: str, values: Mapping[int, float], step: int) -> None:
        """Values by layer of the model, their mean and range, and the picture when it has a new column."""
        across = values.values()
        named = {f"layer_{layer}": value for layer, value in values.items()}
        named |= zip(ACROSS_LAYERS, (fmean(across), min(across), max(across)), strict=True)
        for name, value in named.items():
            self._writer.add_scalar(layer_tag.replace("*", name), value, step)
        history = self._histories.setdefault(layer_tag, History(layers=list(values)))
        if history.add(list(across), step) and history.varies:
            tag = layer_tag.replace("*", "heatmap")
            self._writer.add_image(tag, history.picture(), step, dataformats="HWC")

    @_never_fatal
    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        self._writer.add_text(tag, markdown, step)

    @_never_fatal
    def hparams(self, recipe: Mapping[str, Any]) -> None:
        """The recipe's values by dotted name (`passes.0.mlp_rank`).

        Not by `SummaryWriter.add_hparams`: it adds a run to the list, and to each metric a made-up point. Nor
        is its table of names and metrics written: TensorBoard would take one run's for all, sorted by name.
        Without it names are gathered from all runs, and those in which they differ come first.
        """
        _names, *values = hparams_summaries(flat(recipe), {})
        for summary in values:
            self._writer._get_file_writer().add_summary(summary)

    def shown(self, layer_tag: str) -> bool:
        """Whether a value by layer was written under this tag, in this process or before it went on."""
        return layer_tag in self._histories

    def state(self) -> dict[str, Any]:
        """The heatmaps' histories as JSON values, for the checkpoint."""
        return {tag: asdict(history) for tag, history in self._histories.items()}

    @_never_fatal
    def flush(self) -> None:
        """Writes out what is waiting. To be called before a checkpoint, or a resumed run may miss points."""
        self._writer.flush()
        self.unwritten = 0

    def close(self) -> None:
        """Flushes and closes, and says what was lost; calling it again does nothing."""
        self.flush()
        self._close()
        self._put_back()
        if self.broken and self.unwritten:
            groups = "groups of values, pictures and texts"
            lacking = counted(self.unwritten, "value by layer, picture or text", groups)
            logger.warning("TensorBoard lacks %s", lacking)
        self.unwritten = 0

    @_never_fatal
    def _close(self) -> None:
        self._writer.close()


def histories(state: Mapping[str, Any]) -> dict[str, History]:
    """The heatmaps' histories from what `RunLog.state` returned.

    Raises:
        TypeError, ValueError: it returned something else.
    """
    return {tag: History(**history) for tag, history in state.items()}


def layout(layer_tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The Custom Scalars page: the two losses in one chart, then rates, then two charts for each layer tag.

    A Multiline chart takes regular expressions, matched from the start of a tag; a Margin chart takes the
    tags of value, lower and upper.
    """
    page: dict[str, dict[str, list[Any]]] = {
        "loss": {"train and held-out": ["Multiline", ["^loss/train$", "^loss/val$"]]},
        "rates": {
            "learning rate": ["Multiline", ["^optim/lr$"]],
            "gradient norm": ["Multiline", ["^optim/grad_norm$"]],
            "tokens/s": ["Multiline", ["^perf/tokens_per_s$"]],
        },
    }
    for tag in layer_tags:
        every_layer = re.escape(tag).replace(r"\*", r"layer_\d+")
        page.setdefault(tag.partition("/")[0], {}).update(
            {
                f"{tag}: mean, smallest to largest": [
                    "Margin",
                    [tag.replace("*", name) for name in ACROSS_LAYERS],
                ],
                f"{tag}: every layer": ["Multiline", [f"^{every_layer}$"]],
            }
        )
    return page


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables and lists as one table: `{"passes": [{"rank": 8}]}` → `{"passes.0.rank": 8}`."""
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    else:
        return {name: value}
    return {
        dotted: leaf
        for key, item in inner
        for dotted, leaf in flat(item, f"{name}.{key}" if name else str(key)).items()
    }


def open_hint(run_dir: Path) -> str:
    """The command that shows the run, by this environment's `tensorboard` if there is none on the PATH."""
    program = "tensorboard"
    beside_python = Path(sys.executable).with_name(program)
    if shutil.which(program) is None and beside_python.exists():
        program = str(beside_python)
    return shlex.join([program, "--logdir", str(run_dir)])
