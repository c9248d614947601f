"""What tracing and rewriting are checked on: numbers.

The stock model runs once, as a double, on a small input; a region's module and its graph then run on what the
region was given there, in evaluation mode, in training mode with gradients, and under autocast, and have to
agree bit for bit (gradients to rounding: some kernels of GPUs add in any order). After a rewrite the model
runs on the same input again: what passes made is read, nothing that they replaced is, and nothing runs past
what was rewritten. And it runs with the stock forwards in rewritten regions: the numbers are the stock
model's, unless something outside asks what stands there.

That costs six forwards of the model, and of each region six and two backwards, on the few tokens of the
probe; of memory, what those tokens need and a copy of the buffers. No module, buffer or generator of the
model is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from act24.errors import PassError
from act24.passes.graph.normal_form import is_known_linear, is_linear
from act24.passes.graph.outcomes import Outcome, difference_of, has_nothing_finite, outline_of
from act24.passes.graph.probe import (
    Arguments,
    Probe,
    arguments_of,
    device_of,
    features,
    guesses,
    obstacle,
    wanted_text,
)
from act24.passes.graph.proxies import PLAIN, Unclean
from act24.passes.graph.readings import (
    Readings,
    Reads,
    Recorder,
    StandIns,
    Writes,
    cloned,
    detached,
    storage_of,
)
from act24.passes.graph.shadow import Shadow
from act24.passes.graph.surroundings import random_state, set_random_state
from act24.passes.graph.writes import buffer_writes

#: For a linear that computes something else.
_LINEAR = "write it as an nn.Linear, and what it does besides in the module around it"


class Check:
    """The numbers that one model is checked on.

    Attributes:
        not_run: why the whole model is not run, or the empty string.
        agreeing: how many regions were found to compute what their modules do.
        unchecked: by class of the module, why a region could not be run.
        not_entered: the rewritten regions that the probe does not enter, by full name.
    """

    def __init__(self, model: nn.Module, probe: Probe | None = None) -> None:
        """Run the model.

        Raises:
            PassError: it cannot be called with the probe that the user gave.
        """
        self.agreeing = 0
        self.unchecked: dict[str, str] = {}
        self.not_entered: tuple[str, ...] = ()
        self._given: dict[nn.Module, Arguments] = {}
        self._entered: set[nn.Module] = set()
        self._readers: dict[int, set[nn.Module]] = {}
        self._probe: Arguments | None = None
        self.not_run = obstacle(model)
        if self.not_run:
            return
        failures = []
        for arguments in [arguments_of(probe)] if probe is not None else guesses(model):
            recorder = Recorder()
            try:
                self._output, self._read = _run(model, arguments, recorder)
            except _Shares as error:
                self.not_run = f"it holds {error}, which cannot be copied, and its forward might write to it"
                return
            except Writes as error:
                raise PassError(
                    f"the model writes to its parameter {error} in forward, which a rewritten one could "
                    "not: switch that off (rescale_every = 0 of RWKV, altup_coef_clip = None of Gemma 3n), "
                    "or check=False if it does not matter"
                ) from error
            except Exception as error:  # whatever a foreign model raises
                failures.append(f"{arguments}: {_line(error)}")
                continue
            self._probe, self._given, self._readers = arguments, recorder.given, recorder.readers
            self._entered = recorder.entered
            return
        if probe is not None:
            raise PassError(
                f"the model cannot be called with the probe: {failures[0]}. Give what model(…) takes: a "
                "tensor, positional arguments, or a mapping of keyword arguments"
            )
        tried = f" ({failures[0][:160]})" if failures else ""
        self.not_run = f"no input was found that it takes{tried}: give one, probe={wanted_text(model)}"

    def __str__(self) -> str:
        if self.not_run and not self.agreeing and {*self.unchecked.values()} <= {self.not_run}:
            return f"nothing was checked: {self.not_run}"
        lines = []
        if self._probe is None:
            lines.append(f"the model as a whole was not checked: {self.not_run}")
        elif not (self.agreeing or self.unchecked):
            lines.append(
                f"checked on {self._probe}: only single linears are traced, which need no comparison"
            )
        if self.agreeing:
            on = "random features" if self._probe is None else str(self._probe)
            computes = "1 region computes what its module does, before passes change it"
            if self.agreeing > 1:
                computes = f"{self.agreeing} regions compute what their modules do, before passes change them"
            lines.append(f"checked on {on}: {computes}")
        lines += [
            f"not checked: {kind}: {why}" for kind, why in self.unchecked.items() if why != self.not_run
        ]
        if self.not_entered:
            first, *others = self.not_entered
            kind = f"{first} and {len(others)} more" if others else first
            why = "the model runs on the probe without it"
            lines.append(f"not checked: {kind}: {why}")
        return "\n".join(lines)

    def region(self, module: nn.Module, graph: fx.Graph) -> None:
        """Compare a graph with the module that it was traced from.

        Raises:
            Unclean: the two do not agree.
        """
        if is_known_linear(module):
            return
        if part := self._part_of(module):
            raise Unclean(
                f"the model calls {part} in it and never its forward, so that its linears are taken alone: "
                "call the module itself to have it whole"
            )
        kind = type(module).__name__
        arguments = self._given.get(module) or features(module, graph)
        if arguments is None or obstacle(module):
            self.unchecked[kind] = (
                obstacle(module) or "the probe does not reach it, and its inputs are unknown"
            )
            return
        for mode in ("evaluation", "training", "autocast"):
            try:
                expected = _outcome(module, None, arguments, mode)
            except Exception as error:  # whatever a foreign forward raises
                if module in self._given:
                    self.unchecked[kind] = f"its forward fails in {mode}: {_line(error)}"
                elif _line(error)[:100] in self.not_run:
                    self.unchecked[kind] = self.not_run
                else:
                    self.unchecked[kind] = f"no input was found that it takes ({_line(error)}): give a probe"
                return
            if has_nothing_finite(expected):
                self.unchecked[kind] = f"it gives no finite number in {mode}"
                return
            try:
                found = _outcome(module, graph, arguments, mode)
            except Unclean:
                raise
            except Exception as error:
                raise Unclean(f"its graph fails where it runs ({mode}): {_line(error)}: {PLAIN}") from error
            if difference := difference_of(expected, found):
                remedy = _LINEAR if is_linear(module) else PLAIN
                raise Unclean(f"its graph {difference} in {mode}: {remedy}")
        self.agreeing += 1

    def _part_of(self, module: nn.Module) -> str:
        """What the model calls in a module whose forward it passes by, or the empty string."""
        if module in self._entered:
            return ""
        called = (name for name, child in module.named_modules() if name and child in self._given)
        return next(called, "")

    def forget_inputs(self) -> None:
        """Let go of what modules were given, once all regions are compared."""
        self._given = {}

    def read_past(self, module: nn.Module, tensor: Tensor) -> str:
        """What reads a parameter of a module past the module, as `ParameterSpec.read_by` has it."""
        storage = storage_of(tensor)
        for reader in self._readers.get(storage, set()) - {*module.modules()}:
            # Or it reads a parameter of its own that lies on the same memory.
            if storage not in {storage_of(p) for p in reader._parameters.values() if p is not None}:
                return f"{type(reader).__name__}{'.forward' if 'forward' in vars(reader) else ''}"
        return ""

    def was_read(self, tensor: Tensor) -> bool:
        """Whether the stock model read a tensor when it ran on the probe."""
        return self._probe is not None and storage_of(tensor) in self._read

    def rewritten(
        self,
        model: nn.Module,
        regions: Mapping[str, nn.Module],
        made: Mapping[str, Mapping[str, Tensor]],
        replaced: Mapping[str, Tensor],
        stock: Mapping[nn.Module, nn.Module],
        same: bool,
    ) -> None:
        """Run the rewritten model.

        Args:
            regions: what stands in it for the rewritten regions, by full name.
            made: by the name of a region and the full name, what passes made and the region has to read
                where the probe enters it. A router may send the probe to other experts than before.
            replaced: by full name, what it may read no more.
            stock: what stood where a new module stands.
            same: nothing changes the function yet, so that it has to give the same numbers.

        Raises:
            PassError: it does not.
        """
        if self._probe is None:
            return
        readings = Readings(regions.values())
        try:
            output, read = _run(model, self._probe, readings, replaced.values())
        except Exception as error:
            failed = next((fqn for fqn, region in regions.items() if region is readings.failed), "")
            if failed:
                raise PassError(
                    f"{failed} fails where the stock one runs: {_line(error)}. Leave it out with ignore=[…], "
                    "or give a probe of other shapes if those are at fault"
                ) from error
            raise PassError(
                f"the rewritten model fails where the stock one runs: {_line(error)}. Something outside a "
                "rewritten module reads what stood in it: leave that out with ignore=[…]"
            ) from error
        entered = (fqn for fqn in made if regions[fqn] in readings.entered)
        for name, tensor in (one for fqn in entered for one in made[fqn].items()):
            if storage_of(tensor) not in read:
                raise PassError(
                    f"{name} is made by a pass, and the rewritten model does not read it: something holds "
                    "the module that stood there (a compiled copy, a list). Apply passes before that is "
                    "made"
                )
        for name, tensor in replaced.items():
            if storage_of(tensor) in read:
                raise PassError(
                    f"{name} was replaced by a pass, and the model reads it all the same: something holds "
                    "the old module. Leave it out with ignore=[…], or apply passes before that is made"
                )
        for fqn, region in regions.items():
            name, reader = readings.past(region, self._readers)
            if name:
                raise PassError(
                    f"{fqn} was rewritten, and the model runs past it: {reader} reads its {name} all the "
                    "same, through the old module in a list, a bound method or a closure, or itself. Leave "
                    "it out with ignore=[…], or apply passes before that is made"
                )
        self.not_entered = tuple(fqn for fqn, region in regions.items() if region not in readings.entered)
        self._check_outside(model, regions, stock, replaced)
        if same and (difference := difference_of(Outcome(self._output), Outcome(output))):
            raise PassError(f"no pass is in force, and the rewritten model {difference}: please report this")

    def _check_outside(
        self,
        model: nn.Module,
        regions: Mapping[str, nn.Module],
        stock: Mapping[nn.Module, nn.Module],
        replaced: Mapping[str, Tensor],
    ) -> None:
        """Run the rewritten model with the forwards of what stood in it.

        Raises:
            PassError: it gives other numbers than the stock model.
        """
        new = [fqn for fqn, region in regions.items() if region in stock and region is not model]
        if not new or self._probe is None:
            return
        try:
            output, _ = _run(model, self._probe, StandIns(stock, regions.values()), replaced.values())
            other = bool(difference_of(Outcome(self._output), Outcome(output)))
        except Exception:  # whatever a foreign model raises
            other = True
        if other:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            raise PassError(
                f"the model asks what stands at {new[0]} [{type(stock[regions[new[0]]]).__name__}]{more} "
                "(isinstance, hasattr, getattr, len, a count of modules), and a graph in its place gives "
                "another answer, and the model other numbers. Ask where the model is made, or leave that out "
                "with ignore=[…]"
            )


class _Shares(Exception):
    """A double would share something with the model; what."""


def _run(
    model: nn.Module, arguments: Arguments, readings: Readings, kept: Iterable[Tensor] = ()
) -> tuple[Any, set[int]]:
    """What the double of a model returns in evaluation mode and in training mode, and the storages that it
    reads. What happens between the modes shows only there."""
    shadow = Shadow(model, buffers=True, kept=kept)
    if shadow.uncopied:
        raise _Shares(shadow.uncopied)
    _set_mode(shadow.root, False)
    readings.observe(shadow)
    with _undisturbed(model), torch.no_grad(), Reads(model, readings) as reads:
        given = arguments.map(detached)
        output = shadow.root(*given.args, **given.kwargs)
        _set_mode(shadow.root, True)
        given = arguments.map(detached)
        trained = shadow.root(*given.args, **given.kwargs)
    leaves = tree_leaves((output, trained))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], reads.storages


def _outcome(module: nn.Module, graph: fx.Graph | None, arguments: Arguments, mode: str) -> Outcome:
    """What a module or its graph gives."""
    shadow = Shadow(module, buffers=True)
    training = mode == "training"
    _set_mode(shadow.root, training)
    own = arguments.map(detached)
    leaves = [v for v in tree_leaves((own.args, own.kwargs)) if isinstance(v, Tensor)]
    inputs = [v.requires_grad_() for v in leaves if training and v.is_floating_point()]
    device = device_of(module).type
    autocast = torch.autocast(device, torch.bfloat16, enabled=mode == "autocast")
    with _undisturbed(module), torch.set_grad_enabled(training), autocast, Reads(module, Readings()):
        # No leaves: autograd lets nobody write to those, and callers hand over what they have computed.
        given = own.map(cloned)
        if graph is None:
            output = shadow.root(*given.args, **given.kwargs)
        else:
            names = [node.target for node in graph.nodes if node.op == "placeholder"]
            named = dict(zip(names, given.args, strict=False)) | given.kwargs
            interpreter = _Interpreter(shadow.root, graph)
            output = interpreter.run(*(named[name] for name in names))
            if interpreter.writes:
                raise Unclean(f"{interpreter.writes} writes into what it is given: make a new tensor there")
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        differentiable = [v for v in outputs if v.requires_grad]
        gradients: Any = ()
        if training and inputs and differentiable:
            total = sum(v.float().sin().sum() for v in differentiable)
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)  # type: ignore[arg-type]
    held = [leaf for leaf in tree_leaves((given.args, given.kwargs)) if isinstance(leaf, Tensor)]
    return Outcome(outputs, gradients, [*held, *shadow.root.buffers()], outline_of(output))


class _Interpreter(fx.Interpreter):
    """Runs a graph, of which no node may write into what another one gives: passes repeat and move them.

    Attributes:
        writes: a node that does, or the empty string. Buffers are the module's own, and what is written to
            there is not looked at.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.writes = ""
        self._own = buffer_writes(graph, module)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a module holds, as it will be held in a region: past a property or a `__getattr__` of its
        own."""
        path, _, name = target.rpartition(".")
        owner = self.module.get_submodule(path)
        return (owner._parameters if name in owner._parameters else owner._buffers)[name]

    def run_node(self, n: fx.Node) -> Any:
        read = (i for i in n.all_input_nodes if i not in self._own and i.target != "clone")
        given = [v for v in tree_leaves([self.env[i] for i in read]) if isinstance(v, Tensor)]
        before = [(v, v._version) for v in given if not v.is_inference()]
        result = super().run_node(n)
        if any(tensor._version != version for tensor, version in before):
            self.writes = self.writes or n.name
        return result


def _set_mode(root: nn.Module, training: bool) -> None:
    for module in root.modules():
        vars(module)["training"] = training


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Within, random numbers are the same each time; afterwards generators are where they were."""
    device, drawn = device_of(module), random_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Not torch.manual_seed, which reaches generators of other devices too.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(0)
        try:
            yield
        finally:
            set_random_state(drawn)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
