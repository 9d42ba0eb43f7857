"""The plaintext network that becomes integers: which operations the engine `fast` knows, and their values in float.

`prepare` records and simplifies a network (`mpc_fl.inference.graph.tracing`), and moves ReLU behind concatenation and max-pool,
where it costs fewer comparisons. `evaluate` runs the result on plaintext, operation by operation. Both are for the model
owner and for public data.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from mpc_fl.errors import UnsupportedLayerError
from mpc_fl.inference.graph.tracing import Operation, Trace, commute_max_pool, remove_unused, simplify, trace

MONOTONE = ("ReLU", "Hardtanh")


def prepare(model: nn.Module) -> Trace:
    """The operations of a network in evaluation mode. Raises `UnsupportedLayerError` naming a layer that does not fit."""
    graph = simplify(trace(model))
    for operation in graph.operations:
        reason = _unsupported(operation)
        if reason:
            raise UnsupportedLayerError(
                f"layer '{operation.path}' ({operation.kind}{reason}) has no counterpart in the engine fast",
                "set the engine to reference",
            )
    return remove_unused(commute_max_pool(concatenate_first(graph)))


def _unsupported(operation: Operation) -> str:
    """Why an operation cannot be computed; '' if it can."""
    kind, options = operation.kind, operation.options
    if kind not in _EVALUATE:
        return ": not known"
    if kind == "Hardtanh" and (options["min_val"] != 0 or options["max_val"] <= 0):
        return " that does not start at 0"
    if kind == "MaxPool2d" and options["dilation"] != (1, 1):
        return " with dilation"
    if kind == "AvgPool2d" and options["ceil_mode"]:
        return " with ceil_mode"
    if kind == "AvgPool2d" and any(options["padding"]) and not options["count_include_pad"]:
        return " that does not count its padding"
    if kind == "Mean" and sorted(d % 4 for d in options["dim"]) != [2, 3]:
        return " over other dimensions than height and width"
    if kind == "Concat" and options["dim"] not in (1, -3):
        return " along another dimension than channels"
    if kind == "Reshape" and options["shape"][0] != 0:
        return " of the batch dimension"
    if kind == "Flatten" and options["start_dim"] != 1:
        return " that does not keep the batch dimension"
    if kind == "Affine" and any(not _per_channel(tensor) for tensor in operation.tensors.values()):
        return " that differs within a channel"
    return ""


def _per_channel(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds one number, or one per channel of (N, C, H, W) or (N, F)."""
    shape = tuple(tensor.shape)
    return tensor.numel() == 1 or len(shape) == 1 or (tensor.dim() >= 3 and shape[-3] == tensor.numel())


def concatenate_first(graph: Trace) -> Trace:
    """relu(a), relu(b) concatenated = relu(concatenation of a and b): one gate for both. Also for equal Hardtanh."""
    users = Counter([name for operation in graph.operations for name in operation.inputs] + [graph.output])
    known = {operation.name: operation for operation in graph.operations}
    operations: list[Operation] = []
    names: dict[str, str] = {}
    for operation in graph.operations:
        operation = dataclasses.replace(operation, inputs=tuple(names.get(name, name) for name in operation.inputs))
        gates = [known.get(name) for name in operation.inputs]
        first = gates[0]
        if operation.kind != "Concat" or first is None or first.kind not in MONOTONE:
            operations.append(operation)
            continue
        if any(gate is None or (gate.kind, gate.options) != (first.kind, first.options) for gate in gates) or any(
            users[name] != 1 for name in operation.inputs
        ):
            operations.append(operation)
            continue
        sources = tuple(gate.inputs[0] for gate in gates if gate is not None)
        before = dataclasses.replace(operation, name=f"{operation.name}.before", inputs=sources)
        operations += [before, dataclasses.replace(first, name=operation.name, inputs=(before.name,))]
    return remove_unused(Trace(graph.input, tuple(operations), names.get(graph.output, graph.output)))


def affine(operation: Operation, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift per channel (width,) of an Affine operation."""
    scale, shift = (operation.tensors.get(key) for key in ("weight", "bias"))
    ones, zeros = torch.ones(width), torch.zeros(width)
    return (
        ones if scale is None else scale.reshape(-1).expand(width),
        zeros if shift is None else shift.reshape(-1).expand(width),
    )


def _affine(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    scale, shift = affine(operation, x.shape[1])
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.reshape(shape) + shift.reshape(shape)


def _convolution(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    geometry = {key: operation.options[key] for key in ("stride", "padding", "dilation", "groups")}
    return functional.conv2d(x, operation.tensors["weight"], operation.tensors.get("bias"), **geometry)


def _flatten(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    return torch.flatten(x, operation.options["start_dim"], operation.options["end_dim"])


_EVALUATE: dict[str, Callable[..., torch.Tensor]] = {
    "Conv2d": _convolution,
    "Linear": lambda o, x: functional.linear(x, o.tensors["weight"], o.tensors.get("bias")),
    "Affine": _affine,
    "ReLU": lambda o, x: x.clamp(min=0),
    "Hardtanh": lambda o, x: x.clamp(o.options["min_val"], o.options["max_val"]),
    "MaxPool2d": lambda o, x: functional.max_pool2d(x, **o.options),
    "AvgPool2d": lambda o, x: functional.avg_pool2d(x, **o.options),
    "AdaptiveMaxPool2d": lambda o, x: functional.adaptive_max_pool2d(x, o.options["output_size"]),
    "AdaptiveAvgPool2d": lambda o, x: functional.adaptive_avg_pool2d(x, o.options["output_size"]),
    "Mean": lambda o, x: x.mean(**o.options),
    "Flatten": _flatten,
    "Reshape": lambda o, x: x.reshape(len(x), *o.options["shape"][1:]),
    "Concat": lambda o, *x: torch.cat(x, dim=1),
    "Add": lambda o, *x: x[0] + x[1],
}


def evaluate(graph: Trace, records: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float value (N, ...) of the input and of every operation, each dropped after its last use."""
    last = {name: index for index, operation in enumerate(graph.operations) for name in operation.inputs}
    values = {graph.input: records}
    yield graph.input, records
    for index, operation in enumerate(graph.operations):
        with torch.no_grad():
            result = _EVALUATE[operation.kind](operation, *(values[name] for name in operation.inputs))
        yield operation.name, result
        values[operation.name] = result
        for name in operation.inputs:
            if last[name] == index:
                values.pop(name, None)
