"""What is watched while a run trains: sums kept on the device, read once a logging interval, written out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from act24.passes import Activation24, Weight24
from act24.passes.activation_statistics import BUFFER
from act24.passes.graph.region import buffers_of
from act24.recipes.load import dump_recipe
from act24.recipes.records import as_table
from act24.recipes.schema import Recipe
from act24.tools.run.build import Built
from act24.tools.run.evaluate import Evaluation
from act24.tools.run.processes import Processes
from act24.tools.run.step import StepResult
from act24.tools.watch.fp8_watch import take_underflow_
from act24.tools.watch.sparsity_watch import alarms, take_flip_rates_
from act24.tools.watch.statistics import (
    SiteStatistics,
    block_weights,
    read_activation_statistics_,
    split_layer,
    weight_sparsity,
)
from act24.tools.watch.tensorboard import RunLog, flat

#: Tags of values by layer, and the statistic that each shows: of the feed-forward networks as they stand, of
#: the activations inside low-rank linears (CoLA's, LoST's) with the linear's name behind,
#: `sparsity_relu/*/q_proj`. TensorBoard sorts groups by name: these come behind `loss`, `optim` and `perf`.
SITE_TAGS = {
    "sparsity_relu/*": "sparsity",
    "sparsity_crowded_groups/*": "crowded_groups",
    "sparsity_dropped_nonzeros/*": "dropped_nonzeros",
    "sparsity_dropped_energy/*": "dropped_energy",
}
#: The same of 2:4 along the tokens, which only some backwards have, and of scales, for some methods.
_ALONG_TOKENS_TAGS = {
    "sparsity_feature_dropped_nonzeros/*": "feature_dropped_nonzeros",
    "sparsity_feature_dropped_energy/*": "feature_dropped_energy",
    "sparsity_dense_feature_energy/*": "dense_feature_energy",
}
_SCALE_TAGS = {"sparsity_scale/*": "scale"}

#: The keys that only one source of data reads; the others are of all.
_DATA_KEYS: dict[str, tuple[str, ...]] = {
    "hf": ("dataset", "subset", "train_split", "heldout_split", "revision", "retry_seconds"),
    "files": ("train_files", "heldout_files", "encoding"),
    "shards": ("shards",),
    "builtin": (),
}


@dataclass(frozen=True)
class Window:
    """Averages over the steps since the last flush."""

    step: int
    tokens: int
    loss: float
    grad_norm: float
    rate: float
    tokens_per_second: float
    first_bad_step: int | None
    alarms: tuple[str, ...] = ()

    def shown(self) -> dict[str, str]:
        """The figures for the terminal."""
        return {
            "loss": f"{self.loss:.4f}",
            "lr": f"{self.rate:.2e}",
            "grad": f"{self.grad_norm:.2f}",
            "tokens/s": f"{self.tokens_per_second:,.0f}",
        }


class Monitor:
    """Sums over steps on the device; scalars, layers and text for TensorBoard on the main process.

    Attributes:
        seconds: spent in training steps so far, by this process.
        tokens: trained on so far, by all processes since this one began.
        loss: of the last window.
        sites: activation statistics of the last window.
        skipped: batches left out in all, because loss or gradient were not finite.
    """

    def __init__(
        self,
        recipe: Recipe,
        built: Built,
        optimizer: Optimizer,
        processes: Processes,
        run_dir: Path | None,
        resumed_at: int | None,
        state: dict[str, Any] | None,
    ) -> None:
        """Open the log; `run_dir` None writes none. `state` is what `state()` returned at the checkpoint."""
        self._recipe, self._built, self._processes = recipe, built, processes
        self._optimizer = optimizer
        self._cosines: dict[str, Tensor] = {}
        self._alarmed, self.skipped = bool((state or {}).get("alarmed")), int((state or {}).get("skipped", 0))
        self.seconds, self.tokens, self.loss = 0.0, 0, float("nan")
        self.sites: list[SiteStatistics] = []
        self._groups = _site_groups(built)
        self._epoch, self._faults = 0, dict[str, float]()
        self._log: RunLog | None = None
        if run_dir is not None and processes.is_main:
            self._log = RunLog(
                run_dir,
                layer_tags=_layer_tags(recipe, built, self._groups.values()),
                resumed_from=resumed_at,
                state=(state or {}).get("histories"),
            )
            if resumed_at is None:
                self._describe(self._log)
        self._restart()

    def add(
        self,
        step: int,
        result: StepResult,
        rate: float,
        waited: float,
        epoch: int = 0,
        faults: Mapping[str, float] | None = None,
    ) -> None:
        """Take in one step; `epoch` is that of the text, `faults` counts what was wrong with it so far.
        Nothing is read from the device."""
        self._epoch, self._faults = epoch, faults or {}
        if result.skipped:
            self.skipped += 1
            return
        # A gradient that overflows has already spoiled the weights, although its loss was finite.
        bad = ~torch.isfinite(result.loss + result.grad_norm)
        self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)
        self._sums += torch.stack((result.loss.double(), result.grad_norm.double(), result.tokens.double()))
        self._steps += 1
        self._rate, self._waited = rate, self._waited + waited

    def add_cosines(self, cosines: dict[str, Tensor]) -> None:
        """Keep cosines of 2:4 to exact weight gradients for the next flush."""
        self._cosines = cosines

    def flush(self, step: int) -> Window:
        """Read the window, write it out, begin the next. The one place where the host waits."""
        sums = torch.cat((self._sums, self._first_bad.double()[None])).tolist()
        elapsed = time.perf_counter() - self._began
        steps = max(self._steps, 1)
        sites = read_activation_statistics_(self._built.model, self._processes)
        window = Window(
            step=step,
            tokens=int(sums[2]),
            loss=sums[0] / steps if self._steps else float("nan"),  # every batch was left out
            grad_norm=sums[1] / steps if self._steps else float("nan"),
            rate=self._rate,
            tokens_per_second=sums[2] / elapsed,
            first_bad_step=int(sums[3]) if sums[3] >= 0 else None,
            alarms=self._new_alarms(sites),
        )
        self.seconds += elapsed
        self.tokens += window.tokens
        self.loss = window.loss if self._steps else self.loss
        occasional = self._occasional(steps)
        if self._log is not None and self._steps:
            self._log.scalars(self._scalars(window, elapsed) | occasional, step)
            for alarm in window.alarms:
                self._log.text("alarms", alarm, step)
            self._write_sites(self._log, sites, step)
        self.sites = sites or self.sites
        self._restart()
        return window

    def weigh(self, step: int) -> None:
        """Write how many weights are zero. Collective; it waits for the device, and is no training time."""
        began = time.perf_counter()
        shares = weight_sparsity(self._built.model)
        if self._log is not None:
            self._write_weights(self._log, shares, step)
        self._began += time.perf_counter() - began

    def remark(self, lines: Sequence[str], step: int, tag: str = "changes") -> None:
        """Write what changed when a run went on, or what else is said at its start."""
        if self._log is not None and lines:
            self._log.text(tag, "\n\n".join(lines), step)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Write a held-out measure; its time is no training time."""
        if self._log is not None:
            scalars = {
                "loss/val": evaluation.loss,
                "loss/val_perplexity": evaluation.perplexity,
                "loss/val_bits_per_byte": evaluation.bits_per_byte,
            }
            self._log.scalars(scalars, step)
            if evaluation.tokens < evaluation.asked:
                self._log.text("evaluation", f"over {evaluation.extent}", step)
        self._began = time.perf_counter()

    def saved(self) -> None:
        """A checkpoint was written; its time is no training time."""
        self._began = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the log needs to go on after a checkpoint; everything logged so far is on disk then."""
        state: dict[str, Any] = {"alarmed": self._alarmed, "skipped": self.skipped}
        if self._log is not None:
            self._log.flush()
            state["histories"] = self._log.state()
        return state

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _restart(self) -> None:
        device = self._processes.device
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._steps, self._rate, self._waited = 0, 0.0, 0.0
        self._began = time.perf_counter()

    def _scalars(self, window: Window, elapsed: float) -> dict[str, float]:
        world_size = self._processes.world_size
        scalars = {
            "loss/train": window.loss,
            "optim/lr": window.rate,
            "optim/grad_norm": window.grad_norm,
            "perf/tokens_per_s": window.tokens_per_second,
            "perf/data_wait_share": self._waited / elapsed,
            "perf/step_ms": 1000 * elapsed / self._steps,
            "text/epoch": self._epoch,
            # Counts of what is wrong: there is nothing to see before the first.
            **{f"text/{name}": value for name, value in self._faults.items() if value},
        }
        if world_size > 1:
            scalars["perf/tokens_per_s_per_device"] = window.tokens_per_second / world_size
        if self.skipped:
            scalars["optim/skipped_batches"] = self.skipped
        if self._processes.device.type == "cuda":
            scalars["perf/max_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            scalars["perf/max_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return scalars

    def _occasional(self, steps: int) -> dict[str, float]:
        """What only some passes and optimizers have: flip rates, the state of factors, gradient cosines."""
        rates = take_flip_rates_(self._built.pipeline, steps)
        scalars = {f"flip_rate/{name}": rate for name, rate in rates.items()}
        lost = take_underflow_(self._built.pipeline)
        scalars |= {f"underflow_fp8/{name}": share for name, share in lost.items()}
        tensors = {f"sparsity_gradient_cosine/{name}": value for name, value in self._cosines.items()}
        tensors |= self._recipe.optimizer.diagnostics_(self._optimizer)
        self._cosines = {}
        if tensors:
            read = torch.stack([value.double() for value in tensors.values()]).tolist()
            scalars |= dict(zip(tensors, read, strict=True))
        return scalars

    def _new_alarms(self, sites: list[SiteStatistics]) -> tuple[str, ...]:
        """Alarms while 2:4 is in force, once until it was quiet again."""
        sparse = any(isinstance(p, Activation24) for p in self._built.pipeline.active)
        texts = tuple(alarms(sites)) if sparse else ()
        new = () if self._alarmed else texts
        self._alarmed = bool(texts)
        return new

    def _write_sites(self, log: RunLog, sites: Sequence[SiteStatistics], step: int) -> None:
        groups: dict[str, list[SiteStatistics]] = {}
        for site in sorted(sites, key=lambda site: site.layer or 0):
            groups.setdefault(self._groups[site.layer, site.site], []).append(site)
        for group, among in groups.items():
            for tag, field in _site_tags(self._recipe).items():
                values = {site.layer or 0: getattr(site, field) for site in among}
                if None not in values.values():
                    log.layers(tag + group, values, step)
        named = {
            f"layer_{site.layer}.{group[1:]}": site.sparsity
            for group, among in groups.items()
            for site in among
            if group
        }
        if named:  # as run_c4.py calls them
            named["average"] = sum(named.values()) / len(named)
            log.scalars({f"lowrank_relu2_sparsity/{name}": value for name, value in named.items()}, step)

    def _write_weights(self, log: RunLog, weights: Mapping[str, float], step: int) -> None:
        by_module: dict[str, dict[int, float]] = {}
        for name, share in weights.items():
            layer, _, module = name.removeprefix("layer_").partition("/")
            by_module.setdefault(module, {})[int(layer)] = share
        for module, shares in by_module.items():
            tag = f"weight_sparsity/*/{module}"
            if any(shares.values()) or log.shown(tag):  # dense weights have no chart
                log.layers(tag, shares, step)

    def _describe(self, log: RunLog) -> None:
        log.text("recipe", f"```toml\n{dump_recipe(self._recipe)}```")
        log.text("plan", "\n".join(f"    {line}" for line in str(self._built.pipeline).splitlines()))
        log.hparams(hyperparameters(self._recipe))


def hyperparameters(recipe: Recipe) -> dict[str, Any]:
    """The recipe by dotted names, what people vary first: passes (`passes.cola.mlp_rank`), optimizer, then
    schedule; no keys of another data source than the run's."""
    counted = Counter(p.name for p in recipe.passes)
    passes = {
        p.name if counted[p.name] == 1 else f"{p.name}.{index}": as_table(p, "use")
        for index, p in enumerate(recipe.passes)
    }
    tables = recipe.model_dump(exclude={"passes", "description"}, exclude_none=True)
    own = _DATA_KEYS[recipe.data.source]
    foreign = {key for keys in _DATA_KEYS.values() for key in keys} - {*own}
    tables["data"] = {key: value for key, value in tables["data"].items() if key not in foreign}
    order = ("passes", "optimizer", "schedule", "train", "model")
    values = flat({"passes": passes} | {name: tables[name] for name in order[1:]} | tables)
    return {name: value for name, value in values.items() if not name.endswith((".use", ".optional"))}


def _site_groups(built: Built) -> dict[tuple[int | None, str], str]:
    """What stands behind the tags of each watched activation, by layer and site: nothing for the networks,
    `/q_proj` for what is inside a linear, with more of its name where two of a layer end alike."""
    sites = [split_layer(name) for name in buffers_of(dict(built.model.named_modules()), BUFFER)]
    ends = Counter((layer, site.rpartition(".")[2]) for layer, site in sites if site != "mlp")
    return {
        (layer, site): ""
        if site == "mlp"
        else "/" + (end if ends[layer, end := site.rpartition(".")[2]] == 1 else site)
        for layer, site in sites
    }


def _site_tags(recipe: Recipe) -> dict[str, str]:
    """Tags by layer of every watched activation, and the statistic of each."""
    sparse = [p for p in recipe.passes if isinstance(p, Activation24)]
    along_tokens = any(p.backward != "dense" for p in sparse)
    scaled = any(p.record.scaled for p in sparse)
    return SITE_TAGS | (_ALONG_TOKENS_TAGS if along_tokens else {}) | (_SCALE_TAGS if scaled else {})


def _layer_tags(recipe: Recipe, built: Built, groups: Iterable[str]) -> list[str]:
    """Those that will have values: each gets its charts, the networks' first."""
    tags = [
        tag + group for group in sorted(set(groups), key=lambda g: (g != "", g)) for tag in _site_tags(recipe)
    ]
    if recipe.log.weight_sparsity_every and any(isinstance(p, Weight24) for p in recipe.passes):
        modules = dict.fromkeys(name.partition("/")[2] for name in block_weights(built.model))
        tags += [f"weight_sparsity/*/{module}" for module in modules]
    return tags
