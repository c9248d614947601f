"""An optimizer's state by parameter name: tensors for torch.distributed.checkpoint, and JSON for all the
rest.

PyTorch's own two ways do not give back what was there: `Optimizer.load_state_dict` casts every state tensor
to its parameter's dtype, which rounds the float32 moments of bfloat16 parameters, and
`get_optimizer_state_dict` fills an empty state by taking a real optimizer step. So the state is read from and
put into `optimizer.state` and `optimizer.param_groups`, which by torch.optim's contract are all there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from act24.tools.checkpoints.manifest import CheckpointError


def capture(parameters: dict[str, Tensor], optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state's tensors and its table, given the model's parameters by name (more than those do no harm).

    The tensors are the optimizer's own, under `parameter.key` (`layers.0.up.weight.exp_avg`). The table holds
    the class, the groups with their options and parameter names, and for each parameter and key the value or,
    of a tensor, shape, dtype and kind of device; it fits into JSON if the options do.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    state = {names[parameter]: values for parameter, values in optimizer.state.items()}
    tensors = {
        f"{name}.{key}": value
        for name, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    table = {
        "class": type(optimizer).__name__,
        "groups": [
            {
                "parameters": [names[parameter] for parameter in group["params"]],
                "options": {key: _plain(value) for key, value in group.items() if key != "params"},
            }
            for group in optimizer.param_groups
        ],
        "state": {
            name: {key: _described(value) for key, value in values.items()} for name, values in state.items()
        },
    }
    return tensors, table


def check(parameters: dict[str, Tensor], optimizer: Optimizer, table: dict[str, Any]) -> None:
    """Raises CheckpointError unless the optimizer's class and groups of parameters are those of the table."""
    _, here = capture(parameters, optimizer)

    def grouping(table: dict[str, Any]) -> list[list[str]]:
        return [group["parameters"] for group in table["groups"]]

    def summary(table: dict[str, Any]) -> str:
        return f"{table['class']} over {' + '.join(str(len(names)) for names in grouping(table))} parameters"

    if here["class"] != table["class"] or grouping(here) != grouping(table):
        raise CheckpointError(
            f"the checkpoint is of another optimizer: {summary(table)} there, {summary(here)} in this run"
        )


def allocate(parameters: dict[str, Tensor], table: dict[str, Any]) -> dict[str, Tensor]:
    """Uninitialised tensors, named as `capture` names them, into which a checkpoint's state is loaded.

    What has its parameter's shape is placed, and under FSDP2 sharded, like the parameter. Other tensors, such
    as AdamW's 0-D `step`, go back to the CPU if they were there, unless the optimizer wants them beside the
    parameter.
    """
    tensors = {}
    for group in table["groups"]:
        beside = group["options"].get("fused") or group["options"].get("capturable")
        for name in group["parameters"]:
            parameter = parameters[name]
            for key, entry in table["state"].get(name, {}).items():
                if "shape" in entry:
                    shape, dtype = torch.Size(entry["shape"]), getattr(torch, entry["dtype"])
                    if shape == parameter.shape and shape:
                        tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                    else:
                        device = "cpu" if entry["device"] == "cpu" and not beside else parameter.device
                        tensor = torch.empty(shape, dtype=dtype, device=device)
                    tensors[f"{name}.{key}"] = tensor
    return tensors


def assign_(
    parameters: dict[str, Tensor], optimizer: Optimizer, tensors: dict[str, Tensor], table: dict[str, Any]
) -> None:
    """Makes `tensors`, as they are, and the table's values the optimizer's whole state and options."""
    optimizer.state.clear()
    for name, values in table["state"].items():
        optimizer.state[parameters[name]] = {
            key: tensors[f"{name}.{key}"] if "shape" in entry else entry["value"]
            for key, entry in values.items()
        }
    for group, saved in zip(optimizer.param_groups, table["groups"], strict=True):
        for key, value in saved["options"].items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)  # compiled steps and schedulers hold on to the tensor
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "dtype": dtype, "device": value.device.type}
    return {"value": value}
