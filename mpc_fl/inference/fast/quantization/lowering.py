"""From a float network with its plan of scales to the integer network of `network` and the owner's integer weights.

Operations are translated in order, each into the forms that its readers need (`scales`). A convolution's weights are
rounded (`weight_rounding`) at the exponent that its result shall have less that of its input. They keep within two signed
bytes, the fastest for `integer_linear`, unless fewer than 12 fractional bits would remain. BatchNorm that could not be folded
is a depthwise 1 x 1 convolution. At the end a truncation moves into the layer before it where that has no other reader.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpc_fl.errors import HeadroomError
from mpc_fl.inference.fast import layers
from mpc_fl.inference.fast.network import RING_BITS, IntegerWeights, Network, Value
from mpc_fl.inference.fast.quantization.scale_plan import ScalePlan
from mpc_fl.inference.fast.quantization.scales import (
    AVERAGES,
    MAX_POOLS,
    TWO_BYTES,
    WEIGHTED,
    Precision,
    Scale,
    Seen,
    odd_part,
    two_byte_fraction,
)
from mpc_fl.inference.fast.quantization.weight_rounding import Inputs, as_convolution, rounded
from mpc_fl.inference.graph.tracing import Operation, Trace

_FRACTION = 12  # fractional bits that weights get even if they take a third byte
_WIDTHS = ((16, TWO_BYTES), (24, (1 << 23) - 1), (RING_BITS, (1 << 31) - 1))
_LEAST_WEIGHT = 32  # what the largest integer weight of a layer must reach


@dataclass(frozen=True)
class RangeLimit:
    """The operation `operation` (`path` for the user) gives wrong results beyond magnitude `limit`."""

    operation: str
    path: str
    limit: float


def lower(
    graph: Trace, seen: Mapping[str, Seen], inputs: Mapping[str, Inputs], precision: Precision
) -> tuple[Network, IntegerWeights, tuple[RangeLimit, ...]]:
    """The integer network, its weights, and the range of every truncated value.

    `seen` is keyed by operation and input, `inputs` by operation with weights. Raises `HeadroomError` naming a layer whose range
    leaves too few bits, `UnsupportedLayerError` for one that integers cannot express.
    """
    return _Lowering(ScalePlan(graph, seen, inputs, precision)).run()


class _Lowering:
    def __init__(self, plan: ScalePlan) -> None:
        self.plan = plan
        self.layers: list[layers.Layer] = []
        self.values: dict[str, Value] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.biases: dict[str, torch.Tensor] = {}
        self.forms: dict[tuple[str, str], tuple[str, Scale]] = {}
        self.limits: list[RangeLimit] = []

    def run(self) -> tuple[Network, IntegerWeights, tuple[RangeLimit, ...]]:
        graph = self.plan.graph
        scale = self.plan.group[graph.input].scale
        self._value(graph.input, graph.input, RING_BITS, scale)
        self.forms[graph.input, "wide"] = (graph.input, scale)
        if "narrow" in self.plan.demands[graph.input]:
            self._narrow(graph.input, graph.input, scale)
        for operation in graph.operations:
            self._translate(operation)
        output = self.forms[graph.output, "narrow"][0]
        fused, values = _fused(self.layers, self.values, self.weights, self.biases)
        network = Network(fused, values, graph.input, output)
        return network, IntegerWeights(self.weights, self.biases), tuple(self.limits)

    def _value(
        self, operation: str, output: str, bits: int, scale: Scale, shape: tuple[int, ...] | None = None
    ) -> None:
        self.values[output] = Value(shape or self.plan.seen[operation].shape, bits, scale.value)

    def _append(
        self, operation: str, layer: layers.Layer, bits: int, scale: Scale, shape: tuple[int, ...] | None = None
    ) -> str:
        self.layers.append(layer)
        self._value(operation, layer.output, bits, scale, shape)
        return layer.output

    def _form(self, name: str, form: str) -> tuple[str, Scale]:
        if form == "sum" and (name, "sum") not in self.forms:
            form = "wide"
        return self.forms[name, form]

    def _narrow(self, operation: str, source: str, scale: Scale) -> None:
        """The narrow form of a wide value `source`: scaled up so that 31 - H bits are used, then truncated."""
        group, path = self.plan.group[operation], self.plan.path(operation)
        lift = 31 - group.headroom - scale.exponent
        if lift < 0:
            raise HeadroomError(f"layer '{path}' does not fit 32 bits", "calibrate with less safety or fewer bits")
        target = group.scale
        layer = layers.Add(path, (source,), f"{operation}.narrow", RING_BITS - group.bits, (1 << lift,))
        self.forms[operation, "narrow"] = (self._append(operation, layer, group.bits, target), target)

    def _extend(self, operation: str) -> None:
        source, scale = self.forms[operation, "narrow"]
        layer = layers.SignExtension(self.plan.path(operation), (source,), f"{operation}.wide")
        self.forms[operation, "wide"] = (self._append(operation, layer, RING_BITS, scale), scale)

    def _translate(self, operation: Operation) -> None:
        name, kind, demanded = operation.name, operation.kind, self.plan.demands[operation.name]
        if self.plan.is_sum(name):
            self._sum(operation)
        elif kind in ("ReLU", "Hardtanh"):
            self._relu(operation)
        elif kind in MAX_POOLS:
            kernel, stride, padding = self.plan.window(operation)
            source, scale = self._form(operation.inputs[0], "narrow")
            layer = layers.MaxPool(operation.path, (source,), f"{name}.narrow", 0, kernel, stride, padding)
            self.forms[name, "narrow"] = (self._append(name, layer, self.values[source].bits, scale), scale)
            if demanded - {"narrow"}:
                self._extend(name)
        else:
            for form in sorted(demanded):
                sources = [self._form(source, form) for source in operation.inputs]
                (source, scale), names = sources[0], tuple(source for source, _ in sources)
                output = f"{name}.{form}"
                joined: layers.Layer = layers.Concatenate(operation.path, names, output)
                if kind != "Concat":
                    joined = layers.Flatten(operation.path, names, output)
                self.forms[name, form] = (self._append(name, joined, self.values[source].bits, scale), scale)

    def _relu(self, operation: Operation) -> None:
        name, demanded = operation.name, self.plan.demands[operation.name]
        source, scale = self._form(operation.inputs[0], "narrow")
        form = "wide" if demanded - {"narrow"} else "narrow"
        bits = RING_BITS if form == "wide" else self.values[source].bits
        layer = layers.ReLU(operation.path, (source,), f"{name}.{form}")
        if operation.kind == "Hardtanh":
            # Rescaling left it as it is: it follows from the architecture and the public scale.
            layer = dataclasses.replace(layer, ceiling=round(operation.options["max_val"] / scale.value))
        self.forms[name, form] = (self._append(name, layer, bits, scale), scale)
        if form == "wide" and "narrow" in demanded:
            self._narrow(name, f"{name}.wide", scale)

    def _sum(self, operation: Operation) -> None:
        name, group, demanded = operation.name, self.plan.group[operation.name], self.plan.demands[operation.name]
        if operation.kind in WEIGHTED:
            source, scale = self._weighted(operation)
        elif operation.kind == "Add":
            source, scale = self._addition(operation)
        else:
            source, scale = self._average(operation)
        self.forms[name, "sum"] = (source, scale)
        narrow_needed = any("narrow" in self.plan.demands[member] for member in group.members)
        small = scale.exponent + math.log2(scale.divisor) <= self.plan.precision.activation_bits + 2
        if operation.kind in AVERAGES and group.origins == [name] and small and not narrow_needed:
            group.exponent = scale.exponent  # as precise as a truncated value already
            self.forms[name, "wide"] = (source, scale)
            return
        if demanded - {"sum"}:
            self._narrow(name, source, scale)
            self.limits.append(RangeLimit(name, operation.path, group.limit))
        if "wide" in demanded:
            self._extend(name)

    def _weighted(self, operation: Operation) -> tuple[str, Scale]:
        """A convolution or linear layer with rounded weights, not truncated."""
        name, path, output = operation.name, operation.path, f"{operation.name}.sum"
        source, scale = self._form(operation.inputs[0], "wide")
        shape = self.plan.seen[operation.inputs[0]].shape
        weight, bias, geometry = as_convolution(operation, shape[0])
        integers, correction, exponent, bits = self._rounded(operation, weight, scale)
        result, flat = Scale(exponent), operation.kind == "Affine" and len(shape) == 1
        if flat:  # as an image of one pixel
            inside = layers.Flatten(path, (source,), f"{name}.pixel")
            source = self._append(name, inside, RING_BITS, scale, (*shape, 1, 1))
            output = f"{name}.channels"
        if operation.kind == "Linear":
            layer: layers.Linear | layers.Convolution = layers.Linear(
                path, (source,), output, 0, (weight.shape[0], weight.shape[1]), bits
            )
        else:
            outputs, inputs, height, width = weight.shape
            layer = layers.Convolution(path, (source,), output, 0, (outputs, inputs, height, width), *geometry, bits)
        self.weights[output] = integers.reshape(layer.weight_shape).to(torch.int32)
        # A unit of weights times the real input is this much of the result.
        units = bias.double() * 2.0**exponent + correction / scale.value
        self.biases[output] = torch.round(units).to(torch.int64).to(torch.int32)
        self._append(name, layer, RING_BITS, result, (*shape, 1, 1) if flat else None)
        if flat:
            output = self._append(name, layers.Flatten(path, (output,), f"{name}.sum"), RING_BITS, result)
        return output, result

    def _rounded(
        self, operation: Operation, weight: torch.Tensor, scale: Scale
    ) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Integer weights (int64), what they leave to the bias, the exponent of the result, the public width of weights."""
        precision = self.plan.precision
        before = scale.exponent + math.log2(scale.divisor)  # a weight w becomes round(w 2^(exponent - before))
        fraction = precision.weight_bits or max(_FRACTION, two_byte_fraction(weight))
        exponent = min(self.plan.targets[operation.name], math.floor(before + fraction))
        real = weight.double() * 2.0**exponent * scale.value
        largest = int(real.round().abs().max())
        if largest < _LEAST_WEIGHT and bool(weight.any()):
            seen = self.plan.seen[operation.name]
            raise HeadroomError(
                f"layer '{operation.path}' leaves its weights too few bits: its largest result, {seen.largest / seen.factor:.4g}, "
                "is far beyond what small weights can give exactly",
                "normalise that layer, or calibrate with fewer activation_bits or less safety",
            )
        if largest >= 1 << 31:
            raise HeadroomError(f"layer '{operation.path}' has weights beyond 32 bits", "normalise that layer")
        width, most = next((width, most) for width, most in _WIDTHS if largest <= most)
        integers, correction = rounded(real, self.plan.inputs[operation.name], most)
        return integers, correction, exponent, width

    def _addition(self, operation: Operation) -> tuple[str, Scale]:
        sources = [self._form(name, "sum") for name in operation.inputs]
        exponent = max(scale.exponent for _, scale in sources)
        scale = Scale(exponent, self.plan.group[operation.name].divisor)
        multipliers = tuple(1 << (exponent - each.exponent) for _, each in sources)
        names = tuple(name for name, _ in sources)
        layer = layers.Add(operation.path, names, f"{operation.name}.sum", 0, multipliers)
        return self._append(operation.name, layer, RING_BITS, scale), scale

    def _average(self, operation: Operation) -> tuple[str, Scale]:
        name = operation.name
        kernel, stride, padding = self.plan.window(operation)
        source, before = self._form(operation.inputs[0], "sum")
        twos, odd = odd_part(math.prod(kernel))
        scale = Scale(before.exponent + twos, before.divisor * odd)
        shape = self.plan.seen[name].shape
        flat = len(shape) == 1
        layer = layers.AveragePool(
            operation.path, (source,), f"{name}.{'window' if flat else 'sum'}", 0, kernel, stride, padding
        )
        output = self._append(name, layer, RING_BITS, scale, (*shape, 1, 1) if flat else None)
        if flat:
            output = self._append(name, layers.Flatten(operation.path, (output,), f"{name}.sum"), RING_BITS, scale)
        return output, scale


def _fused(
    lowered: list[layers.Layer],
    values: dict[str, Value],
    weights: dict[str, torch.Tensor],
    biases: dict[str, torch.Tensor],
) -> tuple[tuple[layers.Layer, ...], dict[str, Value]]:
    """A truncation whose input nobody else reads happens in the layer that made it."""
    readers = Counter(name for layer in lowered for name in layer.inputs)
    kept: dict[str, layers.Layer] = {}
    for layer in lowered:
        before = kept.get(layer.inputs[0])
        merged: layers.Layer | None = None
        if (
            isinstance(layer, layers.Add)
            and len(layer.inputs) == 1
            and before is not None
            and readers[before.output] == 1
        ):
            merged = _merged(before, layer.multipliers[0])
        if before is None or merged is None:
            kept[layer.output] = layer
            continue
        del kept[before.output], values[before.output]
        kept[layer.output] = dataclasses.replace(merged, output=layer.output, shift=layer.shift)
        for tensors in (weights, biases):
            if before.output in tensors:
                tensors[layer.output] = tensors.pop(before.output)
    return tuple(kept.values()), values


def _merged(layer: layers.Layer, factor: int) -> layers.Layer | None:
    """A layer whose result is `factor` times that of `layer`, or None."""
    if layer.shift:
        return None
    if isinstance(layer, layers.AveragePool):
        return dataclasses.replace(layer, multiplier=factor * layer.multiplier)
    if isinstance(layer, layers.Add):
        multipliers = tuple(factor * each for each in layer.multipliers)
        return dataclasses.replace(layer, multipliers=multipliers, constant=factor * layer.constant)
    return layer if factor == 1 and isinstance(layer, (layers.Convolution, layers.Linear)) else None
