"""From a network to a list of operations that have an encrypted counterpart. No CrypTen here, no secret.

`trace` records one forward pass with torch.fx (Reed et al., MLSys 2022) as a tuple of `Operation`, and `simplify`
rewrites it with passes that take a `Trace` and return one:

1. dropout and identity go; 2. a final softmax goes, because logits are what is opened; 3. BatchNorm and other
per-channel affine maps are folded into the convolution or linear layer before them; 4. ReLU before MaxPool becomes
MaxPool before ReLU: both are monotone, so they commute, and fewer elements are compared; 5. what nobody uses goes.

Weights only enter through their shapes: with other weights the same network gives the same operations and shapes. So
the hospital, which knows the architecture alone, builds the same graph from zeros (or on the meta device).
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mpc_fl.errors import ModelError, UnsupportedLayerError
from mpc_fl.inference.graph.meanings import ADVICE, FUNCTIONS, MODULES, BatchSize, Meaning, nearest_supported
from mpc_fl.learning.models.rewriting import ThreadTracer

_MONOTONE = frozenset({"ReLU", "Hardtanh"})
_MAX_POOLS = frozenset({"MaxPool2d", "AdaptiveMaxPool2d"})


@dataclass(frozen=True, eq=False)
class Operation:
    """One step: `kind` names its meaning, `path` the layer as the user knows it, `inputs` its operands."""

    name: str
    path: str
    kind: str
    inputs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trace:
    """A network as operations in order of execution; `input` and `output` name values."""

    input: str
    operations: tuple[Operation, ...]
    output: str


@dataclass(frozen=True)
class _Secret:
    """A value that is secret-shared during inference."""

    name: str


@dataclass(frozen=True)
class _Sizes:
    """`x.shape` of a secret value: all we know before the run is that entry 0 is the batch size."""


class _Tracer(ThreadTracer):
    """Stops at layers of torch.nn, also where a subclass keeps their forward (a frozen BatchNorm, say)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        home = type(m).forward.__module__
        own = home.startswith("torch.nn.modules") and home != "torch.nn.modules.container"
        return own or super().is_leaf_module(m, module_qualified_name)


def _record(model: nn.Module) -> fx.Graph:
    if model.training:
        raise ModelError("the network is in training mode", "call model.eval() before building the encrypted graph")
    try:
        return _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0][:160]
        raise ModelError(
            f"{type(model).__name__} cannot be traced: {first}",
            "its forward must not branch or loop on values or shapes of tensors",
        ) from None


def _function_name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name in ("iadd", "imul", "isub"):
        return name[1:]
    return name.removesuffix("_")


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    owners = [path for path in node.meta.get("nn_module_stack", {}) if path]
    return f"{owners[-1]}.{node.name}" if owners else node.name


def _unsupported(node: fx.Node, kind: str, reason: str = "") -> UnsupportedLayerError:
    detail = f" with {reason}" if reason else ""
    near = nearest_supported(kind)
    otherwise = ADVICE.get(kind, "no supported layer comes near; leave it out")
    fix = f"the nearest supported layer is {near}" if near else otherwise
    return UnsupportedLayerError(f"layer '{_path(node)}' of type {kind}{detail} has no encrypted counterpart", fix)


def _is_public(values: Iterable[Any]) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate(tuple(values), lambda value: found.append(value))
    return not any(isinstance(value, (_Secret, _Sizes, BatchSize)) for value in found)


class _Reader:
    """Walks the recorded graph once and keeps what every node stands for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[fx.Node, Any] = {}
        self.operations: list[Operation] = []
        self.input = ""

    def read(self, graph: fx.Graph) -> Trace:
        for node in graph.nodes:
            if node.op == "output":
                result = self._value(node.args[0])
                if not isinstance(result, _Secret):
                    raise ModelError("the network does not return one tensor", "return the logits alone")
                return Trace(self.input, tuple(self.operations), result.name)
            self.values[node] = self._read_node(node)
        raise ModelError("the network returns nothing", "return the logits")

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.values[node])

    def _read_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if not self.input:
                self.input = node.name
                return _Secret(node.name)
            if node.args:
                return node.args[0]
            raise ModelError("the network takes several inputs", "encrypted inference passes one image tensor")
        if node.op == "get_attr":
            value: Any = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value.detach() if isinstance(value, torch.Tensor) else value
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        if node.op == "call_module":
            return self._read_module(node, args)
        # What no secret enters (standardised weights, frozen statistics) is computed now and becomes a weight.
        if _is_public((args, kwargs)):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return self._read_function(node, args, kwargs)

    def _read_module(self, node: fx.Node, args: Any) -> _Secret:
        module = self.model.get_submodule(str(node.target))
        kind = type(module).__name__
        # A subclass counts as its base only while it keeps the base's forward.
        bases = [base for base in type(module).__mro__ if getattr(base, "forward", None) is type(module).forward]
        meanings = [MODULES[base] for base in bases if base in MODULES]
        if not meanings or len(args) != 1 or not isinstance(args[0], _Secret):
            raise _unsupported(node, kind)
        return self._append(node, kind, meanings[0](module), (args[0],))

    def _read_function(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = _function_name(node)
        if name == "size" or (name == "getattr" and args[1] == "shape"):
            dimension = kwargs.get("dim", args[1] if name == "size" and len(args) > 1 else None)
            return _Sizes() if dimension is None else BatchSize(dimension)
        if isinstance(args[0], _Sizes) and node.target is operator.getitem and isinstance(args[1], int):
            return BatchSize(args[1])
        if isinstance(args[0], (_Sizes, BatchSize)):
            raise UnsupportedLayerError(
                f"'{_path(node)}' ({name}) computes with the input's shape, which encrypted inference does not trace",
                "write the sizes as numbers, or use torch.flatten(x, 1)",
            )
        if name not in FUNCTIONS:
            raise _unsupported(node, name)
        parameters, meaning = FUNCTIONS[name]
        if parameters and parameters[-1].startswith("*") and not (len(args) > 1 and isinstance(args[1], (list, tuple))):
            args = (*args[: len(parameters) - 1], args[len(parameters) - 1 :])
        names = [parameter.lstrip("*") for parameter in parameters]
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or not set(bound) <= set(names):
            raise _unsupported(node, name, "these arguments")
        secrets: list[_Secret] = []
        for value in bound.values():
            secrets += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, _Secret)]
        return self._append(node, name, meaning(**bound), tuple(secrets))

    def _append(self, node: fx.Node, kind: str, meaning: Meaning | str, inputs: tuple[_Secret, ...]) -> _Secret:
        if isinstance(meaning, str):
            raise _unsupported(node, kind, meaning)
        names = tuple(secret.name for secret in inputs)
        tensors = {key: tensor.detach() for key, tensor in meaning.tensors.items() if tensor is not None}
        for key, tensor in tensors.items():
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"layer '{_path(node)}' has a {key} that is not finite", "use another model file")
        self.operations.append(Operation(node.name, _path(node), meaning.kind, names, meaning.options, tensors))
        return _Secret(node.name)


def trace(model: nn.Module) -> Trace:
    """Record the operations of `model`, which must be in evaluation mode and take and return one tensor.

    Raises `UnsupportedLayerError` for a layer without encrypted counterpart, naming it and the nearest supported
    one, and `ModelError` if the network cannot be traced at all.
    """
    with torch.no_grad():
        return _Reader(model).read(_record(model))


def _renamed(operation: Operation, names: Mapping[str, str]) -> Operation:
    return dataclasses.replace(operation, inputs=tuple(names.get(name, name) for name in operation.inputs))


def _users(graph: Trace) -> Counter[str]:
    return Counter([name for operation in graph.operations for name in operation.inputs] + [graph.output])


def remove_identities(graph: Trace) -> Trace:
    """Drop operations that return their input: dropout in evaluation mode, identity."""
    names: dict[str, str] = {}
    kept = []
    for operation in graph.operations:
        operation = _renamed(operation, names)
        if operation.kind == "Identity":
            names[operation.name] = operation.inputs[0]
        else:
            kept.append(operation)
    return Trace(graph.input, tuple(kept), names.get(graph.output, graph.output))


def remove_final_softmax(graph: Trace) -> Trace:
    """Drop a softmax at the end; its input, the logits, is opened instead. Elsewhere it has no counterpart."""
    output = graph.output
    last = {operation.name: operation for operation in graph.operations}
    while output in last and last[output].kind == "Softmax":
        output = last[output].inputs[0]
    kept = remove_unused(Trace(graph.input, graph.operations, output))
    for operation in kept.operations:
        if operation.kind == "Softmax":
            raise UnsupportedLayerError(
                f"layer '{operation.path}' of type Softmax has no encrypted counterpart inside a network",
                f"the nearest supported layer is {nearest_supported('Softmax')}",
            )
    return kept


def _fold(before: Operation, affine: Operation) -> Operation | None:
    """scale * (W x + b) + shift = (scale W) x + (scale b + shift), or None where the shapes do not allow it."""
    weight = before.tensors["weight"]
    width = weight.shape[0]
    axis = -3 if before.kind == "Conv2d" else -1

    def per_channel(tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.numel() == 1:
            return tensor.reshape(1).expand(width)
        aligned = tensor.dim() >= -axis and tensor.shape[axis] == tensor.numel() == width
        return tensor.reshape(width) if aligned else None

    ones, zeros = weight.new_ones(width), weight.new_zeros(width)
    scale = per_channel(affine.tensors["weight"]) if "weight" in affine.tensors else ones
    shift = per_channel(affine.tensors["bias"]) if "bias" in affine.tensors else zeros
    if scale is None or shift is None:
        return None
    bias = before.tensors.get("bias", zeros)
    folded = {
        "weight": weight.double() * scale.double().reshape(width, *[1] * (weight.dim() - 1)),
        "bias": bias.double() * scale.double() + shift.double(),
    }
    tensors = {key: tensor.to(weight.dtype) for key, tensor in folded.items()}
    return dataclasses.replace(before, tensors=tensors, options={**before.options, **affine.options})


def fold_affine(graph: Trace) -> Trace:
    """Fold BatchNorm and per-channel maps into the convolution or linear layer whose only user they are."""
    users = _users(graph)
    names: dict[str, str] = {}
    kept: dict[str, Operation] = {}
    for operation in graph.operations:
        operation = _renamed(operation, names)
        before = kept.get(operation.inputs[0])
        if operation.kind == "Affine" and before is not None and users[before.name] == 1:
            folded = _fold(before, operation) if before.kind in ("Conv2d", "Linear") else None
            if folded is not None:
                kept[before.name] = folded
                names[operation.name] = before.name
                users[before.name] = users[operation.name]
                continue
        kept[operation.name] = operation
    return Trace(graph.input, tuple(kept.values()), names.get(graph.output, graph.output))


def commute_max_pool(graph: Trace) -> Trace:
    """max(relu(a), relu(b)) = relu(max(a, b)): pool first where ReLU has no other user. Also for Hardtanh and ReLU6."""
    users = _users(graph)
    operations = list(graph.operations)
    output = graph.output
    place = {operation.name: index for index, operation in enumerate(operations)}
    for start in range(len(operations)):
        pool, index = operations[start], start
        while pool.kind in _MAX_POOLS and (at := place.get(pool.inputs[0], -1)) >= 0:
            gate = operations[at]
            if gate.kind not in _MONOTONE or users[gate.name] != 1:
                break
            # The two trade places, so that names keep pointing at operations that come earlier.
            pool = dataclasses.replace(pool, inputs=gate.inputs)
            operations[at], operations[index] = pool, dataclasses.replace(gate, inputs=(pool.name,))
            names = {pool.name: gate.name}
            for later in range(index + 1, len(operations)):
                operations[later] = _renamed(operations[later], names)
            output = names.get(output, output)
            place[pool.name], place[gate.name] = at, index
            users[pool.name], users[gate.name] = 1, users[pool.name]
            index = at
    return Trace(graph.input, tuple(operations), output)


def remove_unused(graph: Trace) -> Trace:
    """Drop operations that the output does not depend on."""
    needed = {graph.output}
    kept = []
    for operation in reversed(graph.operations):
        if operation.name in needed:
            needed.update(operation.inputs)
            kept.append(operation)
    return Trace(graph.input, tuple(reversed(kept)), graph.output)


PASSES: tuple[Callable[[Trace], Trace], ...] = (
    remove_identities,
    remove_final_softmax,
    fold_affine,
    commute_max_pool,
    remove_unused,
)


def simplify(graph: Trace) -> Trace:
    """Apply all passes in order. The result computes the same logits with fewer secure operations."""
    for rewrite in PASSES:
        graph = rewrite(graph)
    return graph
