"""The plan of scales: which forms every value of a network needs, which values share a scale, and how many bits each gets.

The rules and their reasons are in `scales`; here they are applied to a whole network, once on what calibration saw and once
more after `rescaling`. `lowering` then follows the plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from mpc_fl.errors import HeadroomError, UnsupportedLayerError
from mpc_fl.inference.fast.network import NARROWEST
from mpc_fl.inference.fast.quantization.scales import (
    AVERAGES,
    MAX_POOLS,
    SAME_SCALE,
    SMALLEST,
    WEIGHTED,
    Group,
    Precision,
    Seen,
    connected,
    odd_part,
    two_byte_fraction,
)
from mpc_fl.inference.fast.quantization.weight_rounding import Inputs
from mpc_fl.inference.graph.tracing import Operation, Trace

_LEAST_FRACTION = 4  # fractional bits of an activation
_GREY_LEVELS = 255
# How much more the rounding of weights disturbs the logits than that of what they multiply, for equal disturbance of one result.
# Rounding of activations is fresh in every pixel and averages out on the way, that of weights does not; the input is exact as a
# rule (pictures of 8 bits). Measured in docs/fast_arithmetic.md.
_SYSTEMATIC = 1.4
_EXACT = 4.0
_SMALL_WEIGHT = 32  # what the largest integer weight of a layer should reach

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]


class ScalePlan:
    """Forms, groups and exponents of every value of a network, by operation and input.

    Raises `HeadroomError` naming a layer whose values do not fit a gate, `UnsupportedLayerError` for averages that have no
    common scale.
    """

    def __init__(
        self, graph: Trace, seen: Mapping[str, Seen], inputs: Mapping[str, Inputs], precision: Precision
    ) -> None:
        self.graph, self.seen, self.inputs, self.precision = graph, seen, inputs, precision
        self.operations = {operation.name: operation for operation in graph.operations}
        self.users: dict[str, list[Operation]] = defaultdict(list)
        for operation in graph.operations:
            for name in operation.inputs:
                self.users[name].append(operation)
        self.demands = self._demanded()
        self.groups = [Group(members) for members in connected(graph, SAME_SCALE.__contains__)]
        self.group = {name: group for group in self.groups for name in group.members}
        self._set_origins()
        for group in self.groups:
            self._set_headroom(group)
        self.targets = self._targets()
        for group in self.groups:
            self._set_exponent(group)

    def is_sum(self, name: str) -> bool:
        """Whether a value is computed by a linear layer, a sum or an average."""
        return name in self.operations and self.operations[name].kind not in SAME_SCALE

    def _demanded(self) -> dict[str, set[str]]:
        """The forms that readers need of every value."""
        demands: dict[str, set[str]] = defaultdict(set)
        demands[self.graph.output].add("narrow")
        for operation in reversed(self.graph.operations):
            for name in operation.inputs:
                if operation.kind in WEIGHTED:
                    demands[name].add("wide")
                elif operation.kind in ("ReLU", "Hardtanh", *MAX_POOLS):
                    demands[name].add("narrow")
                elif operation.kind in SAME_SCALE:
                    demands[name] |= demands[operation.name]
                else:  # a sum takes a sum as it is
                    demands[name].add("sum" if self.is_sum(name) else "wide")
        return demands

    def path(self, name: str) -> str:
        """An operation's name as the user knows it."""
        return self.operations[name].path if name in self.operations else name

    def _set_origins(self) -> None:
        """Origins and divisor of every group."""
        for name in (self.graph.input, *self.operations):  # in order: an average's divisor needs that of its input
            if name == self.graph.input or self.is_sum(name):
                group, divisor = self.group[name], self._divisor(name)
                if group.origins and divisor != group.divisor:
                    raise UnsupportedLayerError(
                        f"layer '{self.path(name)}' gives an average over a window whose size is no power of two to a "
                        "concatenation",
                        "set the engine to reference",
                    )
                group.divisor = divisor
                group.origins.append(name)

    def _divisor(self, name: str) -> int:
        if name == self.graph.input:
            return _GREY_LEVELS if self._is_image(self.group[name]) else 1
        if self.operations[name].kind in WEIGHTED:
            return 1
        operation = self.operations[name]
        divisors = {self.group[source].divisor for source in operation.inputs}
        if len(divisors) > 1:
            raise UnsupportedLayerError(
                f"layer '{operation.path}' adds averages over different windows", "set the engine to reference"
            )
        divisor = divisors.pop()
        if operation.kind in AVERAGES:
            divisor *= odd_part(math.prod(self.window(operation)[0]))[1]
        return divisor

    def _is_image(self, group: Group) -> bool:
        """Whether only layers with weights read the input, directly or flattened: they can take any scale."""
        readers = [user for name in group.members for user in self.users[name]]
        return bool(readers) and all(each.kind in (*WEIGHTED, "Flatten", "Reshape") for each in readers)

    def _set_headroom(self, group: Group) -> None:
        group.largest = max(self.seen[name].largest for name in group.members)
        inside = [self.operations[name] for name in group.members if name in self.operations]
        compared = any(operation.kind in MAX_POOLS for operation in inside)
        extended = any(self.is_sum(name) and "wide" in self.demands[name] for name in group.members)
        group.spare = int(compared or extended or self.graph.output in group.members)
        group.needed = self.precision.safety * max(group.largest, SMALLEST) * group.divisor
        ceilings = [each.options["max_val"] for each in inside if each.kind == "Hardtanh"]
        ceiling = max(ceilings, default=0.0) * group.divisor
        group.reserved = 0.0 if group.spare else ceiling
        # A ceiling stays below what the width holds when it is rounded.
        group.headroom = math.ceil(math.log2(max(group.needed + group.reserved, 1.01 * ceiling))) + group.spare
        group.truncated = any("narrow" in self.demands[name] for name in group.members) or any(
            "wide" in self.demands[name] and name != self.graph.input for name in group.origins
        )

    def _set_exponent(self, group: Group) -> None:
        least = _LEAST_FRACTION - self._gain(group)
        small = max(0, -math.ceil(math.log2(max(group.largest, SMALLEST))))
        balanced = self._balanced(group)
        wanted = self.precision.activation_bits + small - self._gain(group)
        if balanced is not None and self.precision.weight_bits is None:
            # A value that is never compared, like the input, takes what the balance gives: no gate has to hold it.
            most = self.precision.activation_bits + small if group.truncated else balanced
            wanted = min(most, max(least, balanced))
        if self.graph.input in group.members:
            group.exponent = max(0, wanted - round(math.log2(group.divisor)))
        else:
            group.exponent = wanted - max(0, math.ceil(math.log2(group.divisor)) - 1)
        if not group.truncated:
            return
        fits = self.precision.gate_bits - 1 - group.headroom
        if fits + math.log2(group.divisor) < least:
            worst = max(group.members, key=lambda name: self.seen[name].largest)
            raise HeadroomError(
                f"layer '{self.path(worst)}' reaches {group.largest / self.seen[worst].factor:.4g}: with a safety factor of "
                f"{self.precision.safety:g} and {_LEAST_FRACTION} fractional bits it does not fit a comparison of "
                f"{self.precision.gate_bits} bits",
                "normalise that layer, or calibrate with more gate_bits or less safety",
            )
        group.exponent = max(min(group.exponent, fits), NARROWEST - 1 - group.headroom)

    def _balanced(self, group: Group) -> int | None:
        """Fractional bits for which weights and activations disturb the results of all readers alike."""
        bits, most = [], []
        for reader, window in self._weighted_readers(group):
            if "weight" in reader.tensors:
                weight = reader.tensors["weight"].double()
                typical = max(float(weight.square().mean().sqrt()), SMALLEST)
                peak = max(float(weight.abs().max()), SMALLEST)
                effective = self.inputs[reader.name].effective
                effective *= _EXACT if self.graph.input in group.members else _SYSTEMATIC
                ratio = math.sqrt(2 * window) * typical / max(effective, SMALLEST)
                target = self.targets[reader.name]
                # Weights in two bytes have no use for more.
                useful = math.ceil(target - two_byte_fraction(weight))
                bits.append(max((target + math.log2(ratio)) / 2, useful) - math.log2(window))
                most.append(target + math.log2(peak / _SMALL_WEIGHT) - math.log2(window))
        return min(round(sum(bits) / len(bits)), math.floor(min(most))) if bits else None

    def _weighted_readers(self, group: Group) -> list[tuple[Operation, int]]:
        """Layers with weights that read a group, directly or averaged, and over how many elements."""
        found = []
        pending = [(name, 1) for name in group.members]
        while pending:
            name, window = pending.pop()
            for user in self.users[name]:
                if user.kind in WEIGHTED:
                    found.append((user, window))
                elif user.kind in AVERAGES:
                    pending.append((user.name, window * math.prod(self.window(user)[0])))
                elif user.kind in ("Flatten", "Reshape") and user.name not in group.members:
                    pending.append((user.name, window))
        return found

    def _gain(self, group: Group) -> int:
        """Bits that averaging gives back, if all readers of the group average: log2 of the smallest window."""
        readers = [user for name in group.members for user in self.users[name] if user.name not in group.members]
        if self.graph.output in group.members or not all(reader.kind in AVERAGES for reader in readers):
            return 0
        windows = [math.prod(self.window(reader)[0]) for reader in readers]
        return min((int(math.log2(window)) for window in windows), default=0)

    def _targets(self) -> dict[str, int]:
        """Largest exponent of every sum: what fits where it is truncated at last."""
        targets: dict[str, int] = {}
        for operation in reversed(self.graph.operations):
            name, group = operation.name, self.group[operation.name]
            found = [31 - group.headroom] if self.demands[name] - {"sum"} else []
            for user in self.users[name]:
                if user.kind == "Add":
                    found.append(targets[user.name])
                elif user.kind in AVERAGES:
                    found.append(targets[user.name] - odd_part(math.prod(self.window(user)[0]))[0])
            targets[name] = min(found, default=31 - group.headroom)
        return targets

    def window(self, operation: Operation) -> Window:
        """Kernel, stride and padding (top, bottom, left, right) of a pool."""
        options, sizes = operation.options, self.seen[operation.inputs[0]].shape[1:]
        if operation.kind == "Mean":
            return (sizes[0], sizes[1]), (sizes[0], sizes[1]), (0, 0, 0, 0)
        results = self.seen[operation.name].shape[1:]
        if operation.kind.startswith("Adaptive"):
            if any(size % result for size, result in zip(sizes, results, strict=True)):
                raise UnsupportedLayerError(
                    f"layer '{operation.path}' pools {sizes[0]} x {sizes[1]} pixels into {results[0]} x {results[1]}, "
                    "windows that differ in size",
                    "use images of another size, or set the engine to reference",
                )
            kernel = (sizes[0] // results[0], sizes[1] // results[1])
            return kernel, kernel, (0, 0, 0, 0)
        kernel, stride, padding = options["kernel_size"], options["stride"], options["padding"]
        ends = [
            max(padding[axis], (results[axis] - 1) * stride[axis] + kernel[axis] - sizes[axis] - padding[axis])
            for axis in (0, 1)
        ]
        return tuple(kernel), tuple(stride), (padding[0], ends[0], padding[1], ends[1])
