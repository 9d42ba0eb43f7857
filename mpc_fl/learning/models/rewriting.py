"""Rewriting a network's graph: operations that overwrite their input become pure, BatchNorm is folded into weights.

Per-sample gradients and encrypted tensors both need every intermediate value to stay as it was. `torch.fx` records the
operations of one forward pass (Reed et al., MLSys 2022); the functions here return a rewritten copy and leave the
network they are given as it is.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from mpc_fl.errors import ModelError

_PURE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}
# Results that may share memory with their input.
_ALIAS_METHODS = frozenset(
    (
        *("chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "float", "movedim", "narrow"),
        *("permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "to", "transpose", "type", "unbind"),
        *("unflatten", "unfold", "unsqueeze", "view", "view_as"),
    )
)
_ALIAS_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


_TRACING = threading.Lock()


class ThreadTracer(fx.Tracer):
    """A tracer that leaves the modules of other threads alone. fx changes what every module of the process does while it traces."""

    _thread: int | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As fx does, one thread at a time."""
        with _TRACING:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call, or make it where another thread does."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As fx does; what it is for another thread."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _LayerTracer(ThreadTracer):
    """Keeps layers whole: those of torch.nn, and classes derived from its BatchNorm and its convolutions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | _ConvNd) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a deep copy of `model`, for the mode (training, evaluation) the model is in.

    Raises `ModelError` with the reason if the forward pass depends on values, or does something fx cannot record.
    """
    original = copy.deepcopy(model)
    try:
        graph = _LayerTracer().trace(original)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(model).__name__} cannot be traced: {reason}",
            "its forward pass must not branch on values; choose another model.architecture",
        ) from None
    return fx.GraphModule(original, graph, class_name=type(model).__name__)


def _pure_name(name: str) -> str | None:
    """`relu_` -> `relu`; None for names that do not say "in place"."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else None


def _pure_function(node: fx.Node) -> Any:
    """The out-of-place counterpart of a called function, or None if the function is pure already."""
    function = node.target
    if function in _PURE_FUNCTIONS:
        return _PURE_FUNCTIONS[function]
    name = _pure_name(getattr(function, "__name__", ""))
    if name is None:
        return None
    for namespace in (torch, nn.functional, torch.Tensor):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    raise ModelError(f"node '{node.name}' calls {name}_, which has no out-of-place form", "rewrite that layer")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, so that `relu(x, True)` shows its inplace=True; those given by name if unknown."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in, without a signature: has no `inplace`
        return dict(node.kwargs)
    kinds = {parameter.kind for parameter in bound.signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}:
        return dict(node.kwargs)
    return dict(bound.arguments)


def _make_pure(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Rewrite one node to its out-of-place form. True if it did overwrite its first argument before."""
    if node.kwargs.get("out") is not None or node.target in (operator.setitem, torch.Tensor.__setitem__):
        raise ModelError(f"node '{node.name}' writes into part of a tensor", "rewrite that layer out of place")
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        name = _pure_name(str(node.target))
        if name is None:
            return False
        if name == "requires_grad" or not hasattr(torch.Tensor, name):
            raise ModelError(f"node '{node.name}' calls {name}_, which has no out-of-place form", "rewrite that layer")
        node.target = name
        return True
    if node.op != "call_function":
        return False
    pure = _pure_function(node)
    if pure is not None:
        node.target = pure
        return True
    arguments = _arguments(node)
    if not arguments.get("inplace", False):
        return False
    node.args, node.kwargs = (), {**arguments, "inplace": False}
    return True


def _shares_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _ALIAS_MODULES)
    if node.op == "call_method":
        return str(node.target) in _ALIAS_METHODS
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (name in _ALIAS_METHODS or name in ("getitem", "dropout", "getattr"))


def _aliases(node: fx.Node, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """All nodes that may share memory with `node`, itself included."""
    found, pending = {node}, [node]
    while pending:
        current = pending.pop()
        neighbours = [user for user in current.users if _shares_memory(user, modules)]
        if _shares_memory(current, modules):
            neighbours += current.all_input_nodes
        for neighbour in neighbours:
            if neighbour not in found:
                found.add(neighbour)
                pending.append(neighbour)
    return found


def without_in_place(model: nn.Module) -> fx.GraphModule:
    """A copy of the network in which no operation overwrites its input; outputs are equal bit for bit.

    `relu(inplace=True)` as layer or function, `relu_`, `add_` and `out += identity` become out-of-place. Parameters
    keep their names. Later readers of an overwritten tensor read the new value, as they did before. Raises
    `ModelError` if the network cannot be traced, or writes into a part or a view of a tensor that is read again.
    """
    traced = trace(model)
    modules = dict(traced.named_modules())
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if not _make_pure(node, modules):
            continue
        overwritten = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
        if not isinstance(overwritten, fx.Node):
            continue
        for alias in _aliases(overwritten, modules) - {overwritten, node}:
            if any(order[user] > order[node] for user in alias.users):
                raise ModelError(
                    f"node '{node.name}' overwrites a view of a tensor that is read again", "rewrite it out of place"
                )
        for user in list(overwritten.users):
            if order[user] > order[node]:
                user.replace_input_with(overwritten, node)
    for layer in modules.values():
        if getattr(layer, "inplace", False):
            layer.inplace = False
    traced.graph.lint()
    traced.recompile()
    return traced


def _plain_batchnorm(layer: _BatchNorm) -> _BatchNorm:
    """A torch.nn BatchNorm with the same state, in evaluation mode, for whoever dispatches on exact types."""
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        if isinstance(layer, kind) and type(layer) is not kind:
            plain = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
            plain.load_state_dict(layer.state_dict())
            return plain.eval()
    return layer


def _fused(first: nn.Module, norm: _BatchNorm) -> nn.Module | None:
    """`first` with the following BatchNorm folded in, or None if it is no layer that can take it up."""
    if isinstance(first, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return fuse_linear_bn_eval(first, norm)
    if isinstance(first, _ConvNd):
        return fuse_conv_bn_eval(first, norm, transpose=isinstance(first, _ConvTransposeNd))
    return None


def fold_batchnorm(model: nn.Module) -> fx.GraphModule:
    """A copy of the network, in evaluation mode, with BatchNorm folded into the convolution or linear layer before it.

    W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta. Outputs agree up to rounding. A
    BatchNorm that follows anything else (DenseNet normalises before it convolves), or whose input is read elsewhere,
    stays as an ordinary `nn.BatchNorm` in evaluation mode. Raises `ModelError` if the network cannot be traced.
    """
    traced = trace(copy.deepcopy(model).eval())
    modules = dict(traced.named_modules())
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1

    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        norm = modules[node.target]
        source = node.args[0]
        foldable = (
            norm.track_running_stats
            and source.op == "call_module"
            and len(source.users) == 1
            and calls[source.target] == 1  # a layer used twice may be followed by different statistics
        )
        fused = _fused(modules[source.target], norm) if foldable else None
        if fused is None:
            traced.set_submodule(node.target, _plain_batchnorm(norm))
            continue
        traced.set_submodule(source.target, fused)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    return tidied(traced)


def tidied(traced: fx.GraphModule) -> fx.GraphModule:
    """The network itself after its graph was changed: without submodules that no operation calls, checked, compiled anew."""
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced
