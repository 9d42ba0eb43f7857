"""Gradients of single records layer by layer: one forward and one backward pass of many records, then a product for each layer.

What a layer's weights get of a record follows from what went into the layer and the gradient of what came out (Goodfellow,
arXiv 1510.01799; Rochette, Manoel and Tramel, arXiv 1912.06015, for convolutions). So the network runs as in plain training, but no
gradient of weights is added up over records: for each record, all its copies together, it is one matrix product.

Frozen BatchNorm that follows a convolution is folded into its weights, W' = W s and b' = b s + beta - mean s with
s = gamma / sqrt(var + eps), and the gradients of W', b' are carried back to W, b, gamma and beta by the chain rule: exact but for
rounding, and the network does without its most wasteful layer. Images lie in memory channels last, and few are in the network
at once, so that they stay in the processor's cache.

Rows do not mix: every operation here treats records by themselves (`per_sample_gradients.rounded_sum`).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.func import vmap

from mpc_fl.errors import ModelError
from mpc_fl.exhaustion import exhaustion
from mpc_fl.learning.device import OnDevice
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d
from mpc_fl.learning.models.parameters import trainable_parameters
from mpc_fl.learning.models.rewriting import without_in_place

_CACHED_BYTES = 1 << 19  # of copies that are in the network at once


@dataclass
class _Recorded:
    """A trained layer of one pass: the BatchNorm folded into it, and what gradients follow from."""

    layer: nn.Conv2d | nn.Linear
    norm: FrozenBatchNorm2d | None = None
    inputs: torch.Tensor | None = field(default=None, repr=False)
    gradients: torch.Tensor | None = field(default=None, repr=False)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W' and b' of the layer and its BatchNorm together."""
        weight, bias = self.layer.weight.detach(), None if self.layer.bias is None else self.layer.bias.detach()
        if self.norm is None:
            return weight, bias
        spread, scale = _scale(self.norm)
        shift = -_mean(self.norm) if bias is None else bias - _mean(self.norm)
        offset = shift * scale if self.norm.bias is None else shift * scale + self.norm.bias.detach()
        return weight * scale.view(-1, 1, 1, 1), offset


def _mean(norm: FrozenBatchNorm2d) -> torch.Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _scale(norm: FrozenBatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / sqrt(var + eps), and that times gamma."""
    assert norm.running_var is not None
    spread = (norm.running_var + norm.eps).rsqrt()
    return spread, spread if norm.weight is None else spread * norm.weight.detach()


class _Layer(torch.autograd.Function):
    """A convolution or linear layer that keeps what gradients of its weights follow from, instead of adding them up.

    `anchor` asks autograd to come by even where nothing before the layer is trained.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, anchor: torch.Tensor, recorded: _Recorded) -> torch.Tensor:
        weight, bias = recorded.folded()
        layer = recorded.layer
        if isinstance(layer, nn.Conv2d) and inputs.dim() == 4:
            weight = weight.to(memory_format=torch.channels_last)
            outputs = torch.conv2d(inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            outputs = nn.functional.linear(inputs, weight, bias)
        recorded.inputs, ctx.recorded = inputs.detach(), recorded
        ctx.save_for_backward(weight)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (weight,), recorded = ctx.saved_tensors, ctx.recorded
        layer, inputs = recorded.layer, recorded.inputs
        recorded.gradients = of_outputs = gradients[0].to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        if isinstance(layer, nn.Linear):
            return (of_outputs @ weight).to(inputs.dtype), None, None
        geometry = (layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
        of_inputs, _, _ = torch.ops.aten.convolution_backward(
            of_outputs, inputs.to(weight.dtype), weight, None, *geometry, (True, False, False)
        )
        return of_inputs.to(inputs.dtype), None, None


class _Recording(fx.Interpreter):
    """Runs a network's graph, its trained layers by `_Layer`."""

    def __init__(self, network: fx.GraphModule, recorded: dict[str, _Recorded], folded: set[str]) -> None:
        super().__init__(network)
        self._recorded, self._folded, self._anchor = recorded, folded, torch.zeros((), requires_grad=True)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self._folded:
            return args[0]
        if target in self._recorded:
            return _Layer.apply(args[0], self._anchor, self._recorded[target])
        return super().call_module(target, args, kwargs)

    def go_back(self, loss: torch.Tensor) -> None:
        """From the summed loss to the gradients of what came out of each trained layer."""
        if loss.requires_grad:
            torch.autograd.grad(loss, self._anchor, allow_unused=True)


def _unsuitable(reason: str) -> ModelError:
    return ModelError(
        f"gradients cannot be taken layer by layer: {reason}", "set training.per_sample_gradients=auto, or loop"
    )


def _is_known(layer: nn.Module) -> bool:
    """Whether this is a layer of which `_of_layer` knows the gradients."""
    return type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _plan(network: fx.GraphModule) -> tuple[dict[str, _Recorded], set[str]]:
    """The trained layers, by the names of their calls, and the BatchNorm that is folded into them. Raises `ModelError`."""
    modules = dict(network.named_modules())
    calls = collections.Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    recorded, folded = dict[str, _Recorded](), set[str]()
    for node in network.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not any(parameter.requires_grad for parameter in layer.parameters()):
            continue
        name, before = str(node.target), node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if calls[name] > 1 or not isinstance(before, fx.Node):
            raise _unsuitable(f"'{name}' is called twice, or with more than its input")
        if _is_known(layer):
            recorded[name] = _Recorded(layer)
            continue
        source = modules.get(str(before.target)) if before.op == "call_module" else None
        alone = len(before.users) == 1 and calls[str(before.target)] == 1
        if not (isinstance(layer, FrozenBatchNorm2d) and type(source) is nn.Conv2d and _is_known(source) and alone):
            raise _unsuitable(f"'{name}' ({type(layer).__name__}) is trained")
        recorded[str(before.target)] = _Recorded(source, layer)
        folded.add(name)
    own = [item for record in recorded.values() for item in (record.layer, record.norm) if item is not None]
    places = [id(parameter) for layer in own for parameter in layer.parameters(recurse=False)]
    if len(set(places)) < len(places) or any(id(p) not in places for _, p in trainable_parameters(network)):
        raise _unsuitable("a parameter is used outside a layer of its own")
    return recorded, folded


def _patches(images: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """What each place of a convolution's output sees, (M, places, rows * columns of the filter, C), of images (M, C, H, W)."""
    assert not isinstance(layer.padding, str)  # `_is_known`
    (down, across), (top, left) = layer.padding, layer.kernel_size
    padded = nn.functional.pad(images.permute(0, 2, 3, 1), (0, 0, across, across, down, down))
    count, height, width, channels = padded.shape
    steps, gaps = layer.stride, layer.dilation
    rows = (height - gaps[0] * (top - 1) - 1) // steps[0] + 1
    columns = (width - gaps[1] * (left - 1) - 1) // steps[1] + 1
    image, row, column, channel = padded.stride()
    strides = (image, row * steps[0], column * steps[1], row * gaps[0], column * gaps[1], channel)
    seen = padded.as_strided((count, rows, columns, top, left, channels), strides)
    return seen.reshape(count, rows * columns, top * left, channels)


def _products(recorded: _Recorded, records: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of W' and b' for each record, (N, *shape) and (N, outputs), summed over its copies and places."""
    layer, inputs, gradients = recorded.layer, recorded.inputs, recorded.gradients
    assert inputs is not None and gradients is not None
    if isinstance(layer, nn.Linear):
        above, below = (
            gradients.reshape(records, -1, layer.out_features),
            inputs.reshape(records, -1, layer.in_features),
        )
        return above.transpose(1, 2) @ below.to(above.dtype), above.sum(dim=1)
    groups, filters = layer.groups, layer.out_channels // layer.groups
    above = gradients.permute(0, 2, 3, 1).reshape(records, -1, groups, filters)
    seen = _patches(inputs, layer).to(above.dtype)
    below = seen.reshape(records, -1, seen.shape[2], groups, layer.in_channels // groups).permute(0, 3, 1, 2, 4)
    weights = above.permute(0, 2, 3, 1) @ below.flatten(3)
    of_weight = weights.unflatten(3, (*layer.kernel_size, -1)).flatten(1, 2).permute(0, 1, 4, 2, 3)
    return of_weight, above.sum(dim=1).flatten(1)


def _of_layer(recorded: _Recorded, records: int) -> dict[int, torch.Tensor]:
    """Gradients (N, *shape) of the layer's parameters and of its BatchNorm's, by the identity of the parameter."""
    layer, norm = recorded.layer, recorded.norm
    if recorded.gradients is None:  # nothing of the loss depends on it
        own = [*layer.parameters(), *(norm.parameters() if norm is not None else ())]
        return {id(parameter): parameter.new_zeros(records, *parameter.shape) for parameter in own}
    of_weight, of_offset = _products(recorded, records)
    found = dict[int, torch.Tensor]()
    if norm is None:
        found[id(layer.weight)], of_bias = of_weight, of_offset
    else:
        spread, scale = _scale(norm)
        found[id(layer.weight)], of_bias = of_weight * scale.view(-1, 1, 1, 1), of_offset * scale
        if norm.weight is not None:
            shift = -_mean(norm) if layer.bias is None else layer.bias.detach() - _mean(norm)
            of_scale = (of_weight * layer.weight.detach()).flatten(2).sum(dim=2) + of_offset * shift
            found[id(norm.weight)] = of_scale * spread
        if norm.bias is not None:
            found[id(norm.bias)] = of_offset
    if layer.bias is not None:
        found[id(layer.bias)] = of_bias
    return found


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_layers(
    model: nn.Module, loss: Loss, copies: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Gradients (N, *shape) of the summed loss over the copies (N, K, ...) of each record, for each trainable parameter of
    `model`, and that loss (N,); in chunks of records.

    Raises `ModelError` if something else is trained than convolutions, linear layers, and frozen BatchNorm behind a convolution.
    """
    if isinstance(model, OnDevice):
        raise _unsuitable("that is for the processor in float32")
    network = model if isinstance(model, fx.GraphModule) else without_in_place(model)
    of_name = dict(network.named_parameters())
    trained = [of_name[name] for name, _ in trainable_parameters(model)]
    at_once = max(1, _CACHED_BYTES // max(1, 4 * math.prod(copies.shape[1:])))
    for own, own_labels in zip(copies.split(at_once), labels.split(at_once), strict=True):
        recorded, folded = _plan(network)
        inputs, repeated = own.flatten(0, 1), own_labels.repeat_interleave(own.shape[1])
        if inputs.dim() == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        try:
            run = _Recording(network, recorded, folded)
            losses = vmap(lambda logit, label: loss(logit[None], label[None]))(run.run(inputs), repeated)
            run.go_back(losses.sum())
            found = dict[int, torch.Tensor]()
            for record in recorded.values():
                found |= _of_layer(record, len(own))
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise exhaustion(error) or _unsuitable((str(error).splitlines() or [""])[0][:120]) from None
        yield [found[id(parameter)] for parameter in trained], losses.detach().unflatten(0, (len(own), -1)).sum(dim=1)
