"""Rescaling a float network so that its ranges are full.

A range holds `safety` times the largest value of any channel, rounded up to a power of two; what channels leave unused is lost
to their precision. Convolutions, linear layers, ReLU, pools, sums and concatenation commute with positive factors, so the
values between layers with weights may be multiplied by any c > 0, one for each channel, when the weights that make them are
too, and those that read them are divided by it (Nagel et al., ICCV 2019, section 4.1). Two parts:

  of a layer    1 to 2, so that its largest value fills a power of two
  of a channel  1 to 2, so that one with smaller values comes nearer to the largest: every channel still holds `safety` times
                its own largest value, and half of what the layer's largest channel holds

Values that sums or pools connect have their factors in common; those of the input and of the logits are 1, and concatenation
leaves one for all channels. Factors are part of the owner's weights: public scales stay powers of two.

Values with a ceiling (ReLU6) keep the factor 1. A gate needs a public ceiling, and one that was multiplied would show what
calibration saw. It costs these layers half a bit of what weights and activations have together, on average.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpc_fl.inference.fast.quantization.float_graph import affine
from mpc_fl.inference.fast.quantization.scale_plan import ScalePlan
from mpc_fl.inference.fast.quantization.scales import SMALLEST, WEIGHTED, Group, Seen, connected
from mpc_fl.inference.fast.quantization.weight_rounding import Inputs
from mpc_fl.inference.graph.tracing import Operation, Trace

_LARGEST = 2.0  # factor of a channel: its limit is at least half the layer's
_BELOW = 1 - 2.0**-20  # so that rounding does not push a largest value over its power of two
_KEEP_CHANNELS = ("ReLU", "MaxPool2d", "AvgPool2d", "AdaptiveMaxPool2d", "AdaptiveAvgPool2d", "Mean", "Add", "Flatten")


@dataclass(frozen=True, repr=False)
class Rescaled:
    """A network with its values multiplied, and what calibration saw, multiplied alike. `factors`, float64 (channels,), by
    operation and input."""

    graph: Trace
    seen: Mapping[str, Seen]
    inputs: Mapping[str, Inputs]
    factors: Mapping[str, torch.Tensor]


def rescaled(plan: ScalePlan) -> Rescaled:
    """The network of a plan with full ranges."""
    factors = _factors(plan)
    graph = plan.graph
    operations = tuple(_multiplied(each, factors, plan.seen) for each in graph.operations)
    inputs = {
        each.name: plan.inputs[each.name].multiplied(factors[each.inputs[0]])
        for each in graph.operations
        if each.name in plan.inputs
    }
    seen = {name: each.multiplied(factors[name]) for name, each in plan.seen.items()}
    return Rescaled(dataclasses.replace(graph, operations=operations), seen, inputs, factors)


def _factors(plan: ScalePlan) -> dict[str, torch.Tensor]:
    """What every channel of every value is multiplied by; 1 where a ceiling would be multiplied with it."""
    factors = {}
    for members in connected(plan.graph, lambda kind: kind not in WEIGHTED):
        inside = set(members)
        groups = [each for each in plan.groups if each.truncated and each.members[0] in inside]
        channels = min(plan.seen[name].shape[0] for name in members)
        common = torch.ones(channels, dtype=torch.float64)
        capped = any(name in plan.operations and plan.operations[name].kind == "Hardtanh" for name in members)
        if groups and not capped and plan.graph.input not in members and plan.graph.output not in members:
            common = _fullest(groups) * _of_channels(plan, members, groups, channels)
        for name in members:
            # Flattened channels keep their factors.
            factors[name] = _repeated(common, plan.seen[name].shape[0])
    return factors


def _fullest(groups: list[Group]) -> float:
    """The factor, 1 to 2, that leaves the fewest bits of these groups unused."""
    unused = [-math.log2(group.needed) % 1 for group in groups]
    return 2.0 ** min(unused, key=lambda chosen: sum((each - chosen) % 1 for each in unused)) * _BELOW


def _of_channels(plan: ScalePlan, members: list[str], groups: list[Group], channels: int) -> torch.Tensor:
    """Factors, 1 to 2, that bring every channel as near to its layer's largest as all groups allow, float64 (channels,)."""
    factors = torch.full((channels,), _LARGEST, dtype=torch.float64)
    for name in members:
        operation = plan.operations[name]
        spread = 1 if operation.kind != "Flatten" else plan.seen[name].shape[0] // channels
        if operation.kind not in (*_KEEP_CHANNELS, *WEIGHTED) or plan.seen[name].shape[0] != spread * channels:
            return torch.ones_like(factors)
    for group in groups:
        whole = max(group.largest, SMALLEST)
        for name in group.members:
            peaks = plan.seen[name].peaks.reshape(channels, -1).amax(dim=1)
            factors = torch.minimum(factors, whole / peaks.clamp(min=whole / _LARGEST))
    return factors


def _repeated(factors: torch.Tensor, channels: int) -> torch.Tensor:
    """As many factors as there are channels; one where they do not match."""
    if channels % len(factors):
        return factors[:1].expand(channels)
    return factors.repeat_interleave(channels // len(factors))


def _multiplied(operation: Operation, factors: Mapping[str, torch.Tensor], seen: Mapping[str, Seen]) -> Operation:
    """The same operation on multiplied values."""
    after = factors[operation.name]
    if operation.kind not in WEIGHTED:
        return operation
    before, tensors = factors[operation.inputs[0]], dict(operation.tensors)
    if operation.kind == "Affine":
        tensors = dict(zip(("weight", "bias"), affine(operation, seen[operation.name].shape[0]), strict=True))
        weight = tensors["weight"] * (after / before)
    else:
        # (O, I / groups, ...): outputs in as many runs as there are groups, each with inputs of its own.
        groups = operation.options.get("groups", 1)
        weight = tensors["weight"].reshape(groups, -1, *tensors["weight"].shape[1:])
        spread = (1,) * (weight.dim() - 3)
        between = after.reshape(groups, -1, 1, *spread) / before.reshape(groups, 1, -1, *spread)
        weight = weight * between.float()
    tensors["weight"] = weight.reshape(tensors["weight"].shape).float()
    if "bias" in tensors:
        tensors["bias"] = (tensors["bias"] * after).float()
    return dataclasses.replace(operation, tensors=tensors)
