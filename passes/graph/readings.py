"""What the forward of a double reads: which modules it calls, and who reads which parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from act24.passes.graph.probe import Arguments
from act24.passes.graph.shadow import Shadow, plain_call


class Readings:
    """Observes a double.

    Attributes:
        readers: by storage of a parameter, the modules whose forward reads it, the innermost ones.
        running: the modules whose forwards run, the innermost last.
        entered: those of `regions` whose forward ran, whoever called it.
    """

    def __init__(self, regions: Collection[nn.Module] = ()) -> None:
        self.readers: dict[int, set[nn.Module]] = {}
        self.running: list[nn.Module] = []
        self.entered: set[nn.Module] = set()
        self._regions = {*regions}
        self._originals: Mapping[nn.Module, nn.Module] = {}

    def observe(self, shadow: Shadow) -> None:
        """Look at a double from now on."""
        self._originals, shadow.observer = shadow.originals, self
        for double, original in shadow.originals.items():
            if original in self._regions:  # which may be called by forward(…) itself, too
                vars(double)["forward"] = self._noted(original, double.forward)

    def _noted(self, region: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.entered.add(region)
            return self._inside(region, lambda: forward(*args, **kwargs))

        return noted

    def _inside(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        self.running.append(module)
        try:
            return call()
        finally:
            self.running.pop()

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._inside(self._originals[module], lambda: plain_call(module, args, kwargs))

    def on_tensor(self, module: nn.Module, name: str, tensor: Tensor) -> Any:
        return tensor

    def on_training(self, module: nn.Module) -> bool:
        return vars(module)["training"]

    def past(self, region: nn.Module, stock: Mapping[int, set[nn.Module]]) -> tuple[str, str]:
        """Which parameter of a region something outside reads in the place of the region: a module that does
        not hold it, and of which the stock model knows nothing, unless the region is never entered.

        Args:
            stock: `readers` of the stock model.

        Returns:
            the local name of the parameter and the class of what reads it; empty strings: there is none.
        """
        inside = {*region.modules()} | self._regions
        for name, parameter in region.named_parameters():
            storage = storage_of(parameter)
            for reader in self.readers.get(storage, set()) - inside:
                known = region in self.entered and reader in stock.get(storage, ())
                own = {storage_of(p) for p in reader._parameters.values() if p is not None}
                if not known and storage not in own:
                    return name, type(reader).__name__
        return "", ""


class Recorder(Readings):
    """Notes too what each module is given when it is first called.

    Attributes:
        given: by module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[nn.Module, Arguments] = {}

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        original = self._originals[module]
        if original not in self.given:
            self.given[original] = Arguments(args, kwargs).map(detached)
        return super().on_call(module, args, kwargs)


class StandIns(Readings):
    """Lets what stood where regions stand compute in their place."""

    def __init__(self, stock: Mapping[nn.Module, nn.Module], regions: Collection[nn.Module]) -> None:
        super().__init__(regions)
        self._stock = stock

    def observe(self, shadow: Shadow) -> None:
        super().observe(shadow)
        self._put_in(shadow)

    def _put_in(self, shadow: Shadow) -> None:
        for double, original in shadow.originals.items():
            if original in self._stock:
                inside = Shadow(self._stock[original], buffers=True)
                for name, buffer in double.named_buffers(remove_duplicate=False):
                    path, _, leaf = name.rpartition(".")
                    owners = dict(inside.root.named_modules())
                    if path in owners and leaf in owners[path]._buffers:
                        dict.__setitem__(owners[path]._buffers, leaf, buffer)  # one, as they were
                self._put_in(inside)  # a layer of PEFT's, in which regions are too
                vars(double)["forward"] = functools.partial(_in_mode_of, double, inside.root)


def _in_mode_of(double: nn.Module, stands_in: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for module in stands_in.modules():
        vars(module)["training"] = vars(double)["training"]
    return stands_in(*args, **kwargs)


class Writes(Exception):
    """A parameter would be written to; its name."""


class Reads(TorchDispatchMode):
    """Notes which storages operations are given, and lets none write to a parameter."""

    def __init__(self, module: nn.Module, readings: Readings) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self._readings = readings
        self._parameters = {storage_of(p): name for name, p in module.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and storage_of(value) in self._parameters:
                    raise Writes(self._parameters[storage_of(value)])
        for value in (*args, *(kwargs or {}).values()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self.storages.add(storage := storage_of(tensor))
                    if storage in self._parameters and self._readings.running:
                        self._readings.readers.setdefault(storage, set()).add(self._readings.running[-1])
        return func(*args, **(kwargs or {}))


def storage_of(tensor: Tensor) -> int:
    """Which storage a tensor lies in."""
    return tensor.untyped_storage()._cdata


def detached(tensor: Tensor) -> Tensor:
    """A copy that remembers nothing of how it came about, for a forward that may write to it."""
    return cloned(tensor.detach(), vars(tensor))


def cloned(tensor: Tensor, hung: Mapping[str, Any] | None = None) -> Tensor:
    """A copy, with the attributes that were hung on it too."""
    clone = tensor.clone()
    vars(clone).update(vars(tensor) if hung is None else hung)
    return clone
