"""`act24 prune`: a model in, a folder with the pruned one out, and what an interrupted pruning goes on from.

OUT/
    config.json, model.safetensors, tokenizer…   as `transformers` opens it, zeros and all
    masks.safetensors                            what is pruned (`masks.py`)
    prune.json                                   how, and the report by layer
    events.out.tfevents…                         the same for TensorBoard

Until it is whole it is OUT.partial, with a file for each finished block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from act24.errors import Act24Error
from act24.pruning.methods import METHODS
from act24.pruning.pattern import parse_pattern, stored_pattern
from act24.recipes.schema import Data
from act24.tools.files import whole_file
from act24.tools.huggingface.any_model import AnyModel, write_any
from act24.tools.huggingface.config import read_json
from act24.tools.pruning.calibration import calibration_rows, tokens_of, window
from act24.tools.pruning.kept import BlockFiles, becoming
from act24.tools.pruning.masks import Masks, check_pruned, masks_beside, write_masks
from act24.tools.pruning.prune import LayerReport, Pruning, prune_
from act24.tools.run.opening import open_any
from act24.tools.watch.tensorboard import RunLog

REPORT = "prune.json"


def prune_model(
    source: str,
    out: Path,
    *,
    method: str = "wanda",
    pattern: str = "2:4",
    data: Data,
    samples: int = 128,
    seqlen: int | None = None,
    by_layer: Mapping[str, str] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Pruning:
    """Prune a model into a new folder. Interrupted, the same call goes on with the next block.

    Args:
        source: as for `act24.tools.run.opening.open_any`.
        data: the calibration text; its `max_length` is set here.
        samples: calibration rows.
        seqlen: tokens a row; None: what the model knows, 2048 at most.
        by_layer: as for `act24.tools.pruning.prune.prune_`.

    Raises:
        Act24Error: whatever is wrong with the model, the options or the text; `out` exists.
    """
    _ = METHODS[method], parse_pattern(pattern)  # before anything is read
    began = time.perf_counter()
    with becoming(out) as partial:
        opened = open_any(source)
        dense = _pruned_before(opened, say)
        data = data.model_copy(update={"max_length": window(seqlen, opened.positions)})
        batches, pads = calibration_rows(data, opened.open_tokenizer(), samples, opened.vocab_size)
        asked = {
            "source": source,
            "weights": opened.sha256(),
            "method": method,
            "pattern": pattern,
            "by_layer": dict(by_layer or {}),
            "calibration": {
                "data": data.model_dump(mode="json"),
                "samples": samples,
                "seqlen": data.max_length,
                "tokens": tokens_of(batches, pads),
            },
        }
        done = prune_(
            opened.model,
            batches,
            method=method,
            pattern=pattern,
            by_layer=by_layer,
            pads=pads,
            device=device,
            say=say,
            kept=_Kept(partial, asked),
        )
        report = {**asked, **dense, **done.as_dict(), "seconds": time.perf_counter() - began}
        write_pruned(opened, partial, Masks(done.masks, done.patterns, frozenset(done.transposed)), report)
        _log(partial, done)
    return done


def _pruned_before(opened: AnyModel, say: Callable[[str], None]) -> dict[str, str]:
    """Say that a model is pruned already; what its report says of the dense one."""
    if opened.folder is None or masks_beside(opened.folder, opened.state()) is None:
        return {}
    say(f"{opened.source} is pruned already: new masks take the place of its own, which are not kept")
    name, weights = pruned_from(opened.folder)
    return {"dense": name, "dense_weights": weights} if name and weights else {}


def pruned_from(folder: Path) -> tuple[str | None, str | None]:
    """The dense model that the report in a folder names, and the hash of its weights: of a folder that was
    fitted already the source is a pruned one. None: it does not say.

    Raises:
        Act24Error: the report cannot be read.
    """
    if not (folder / REPORT).is_file():
        return None, None
    content = read_json(folder / REPORT)
    keys = ("dense", "dense_weights") if "dense" in content else ("source", "weights")
    return content.get(keys[0]), content.get(keys[1])


def write_pruned(opened: AnyModel, folder: Path, masks: Masks, report: Mapping[str, Any]) -> None:
    """Verify a pruned model and write it with its masks and a report.

    Raises:
        Act24Error: a weight is not what its mask says, or writing fails.
    """
    check_pruned(opened.state(), masks, opened.source)
    try:
        write_any(opened, folder, masks.pattern)
        if masks.masks:
            write_masks(folder, masks)
        with whole_file(folder / REPORT) as file:
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise Act24Error(f"cannot write {folder}: {error}") from error


class _Kept(BlockFiles):
    """The finished blocks in a partial folder, as `prune_` wants them."""

    def load(self, index: int) -> tuple[dict[str, Tensor], Pruning] | None:
        found = self.read(index)
        if found is None:
            return None
        tensors, content = found
        layers = [LayerReport(**{**x, "shape": tuple(x["shape"])}) for x in content["layers"]]
        done = Pruning(
            content["method"],
            content["pattern"],
            masks={x.name: tensors[f"{x.name}.mask"].bool() for x in layers},
            patterns={x.name: stored_pattern(x.pattern) for x in layers},
            transposed=set(content["transposed"]),
            left=content["left"],
            layers=layers,
            block_errors=content["block_errors"],
        )
        return {x.name: tensors[x.name] for x in layers}, done

    def save(self, index: int, weights: Mapping[str, Tensor], done: Pruning) -> None:
        content = {**done.as_dict(), "transposed": sorted(done.transposed)}
        self.write(index, {**weights, **{f"{n}.mask": m for n, m in done.masks.items()}}, content)


def _log(folder: Path, done: Pruning) -> None:
    """The report by layer for TensorBoard: step 0, a tag for each linear of a block."""
    values: dict[str, dict[int, float]] = {}
    blocks = list(done.block_errors)
    for layer in done.layers:
        block = next(name for name in blocks if layer.name.startswith(f"{name}."))
        leaf = layer.name.removeprefix(f"{block}.").removesuffix(".weight").replace(".", "_")
        for key in ("sparsity", "score_kept", "error"):
            values.setdefault(f"prune_{key}/*/{leaf}", {})[blocks.index(block)] = asdict(layer)[key]
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()  # of a call that was killed here
    log = RunLog(folder, layer_tags=list(values))
    for tag, by_layer in values.items():
        log.layers(tag, by_layer, 0)
    log.layers("prune_block_error/*", dict(enumerate(done.block_errors.values())), 0)
    log.close()
