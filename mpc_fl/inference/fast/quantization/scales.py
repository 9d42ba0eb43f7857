"""Scales and widths of an integer network: which forms of each value are needed, and how large they may grow.

Every value has a scale 2^-e / d: e is an exponent, d an odd divisor that averages bring in, and 255 for the input, so that
pictures of 8 bits are exact. Three forms of a value:

  sum     wide, as a convolution, sum or average leaves it; most of its 32 bits are used
  narrow  truncated to 8 .. `gate_bits` bits, for comparisons and to be opened
  wide    the narrow one extended to 32 bits (by ReLU for free), the input of a linear layer

Which forms are needed follows from the readers, last first (`_demanded`). Values that ReLU, max-pool, concatenation and
reshaping connect form a group with one scale and one headroom: H = ceil(log2(safety * largest * d)), one more where
differences are compared. A gate of 1 + H + e bits then holds values `safety` times as large as any seen.

Before the truncation the exponent is R = 31 - H, so all 32 bits are used, and an input with F fractional bits leaves R - F to
the weights. Rounding weights w disturbs the result by 2^(F - R) / sqrt(12) x, rounding activations at random by 2^-F / sqrt(6)
w; they are equal where 2 F = R + log2(sqrt(2) w / x), w the root mean square of weights, x that of activations less what
`weight_rounding` makes up for. So F is the mean of this over the layers that read a value, no more than `activation_bits`, and
no less than keeps weights within two bytes. An average of n elements adds log2(n) bits to F and divides the second error by
sqrt(n). (Measured in docs/fast_arithmetic.md: 4 times smaller errors than 12 + 12 bits.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from mpc_fl.errors import HeadroomError, UnsupportedLayerError
from mpc_fl.inference.fast.network import NARROWEST, WIDEST_GATE
from mpc_fl.inference.fast.quantization.weight_rounding import Inputs
from mpc_fl.inference.graph.tracing import Operation, Trace

AVERAGES = ("AvgPool2d", "AdaptiveAvgPool2d", "Mean")
MAX_POOLS = ("MaxPool2d", "AdaptiveMaxPool2d")
SAME_SCALE = ("ReLU", "Hardtanh", "Concat", "Flatten", "Reshape", *MAX_POOLS)
WEIGHTED = ("Conv2d", "Linear", "Affine")
TWO_BYTES = 32639  # 127 * 256 + 127
_LEAST_FRACTION = 4
_GREY_LEVELS = 255
# How much more the rounding of weights disturbs the logits than that of what they multiply, for equal disturbance of one result.
# Rounding of activations is fresh in every pixel and averages out on the way, that of weights does not; the input is exact as a
# rule (pictures of 8 bits). Measured in docs/fast_arithmetic.md.
_SYSTEMATIC = 1.4
_EXACT = 4.0
_SMALL_WEIGHT = 32  # what the largest integer weight of a layer should reach
SMALLEST = 2.0**-16  # a layer that was never larger is treated as if it had been

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]


@dataclass(frozen=True)
class Precision:
    """How many fractional bits, and how much room.

    Activations get at most `activation_bits` fractional bits (values below 1 in magnitude more), fewer where the weights need
    them; weights get what is left, in two signed bytes. With `weight_bits`, both are fixed. `safety` times the largest
    value of calibration records and `stress_safety` times that of stress records fit; gates have at most `gate_bits`.
    """

    activation_bits: int = 12
    weight_bits: int | None = None
    gate_bits: int = 20
    safety: float = 4.0
    stress_safety: float = 2.0

    def __post_init__(self) -> None:
        if not NARROWEST <= self.gate_bits <= WIDEST_GATE or not 4 <= self.activation_bits < self.gate_bits:
            raise HeadroomError("gates have 8 to 24 bits, activations at least 4 and fewer", "correct the precision")
        if not (self.safety >= 1 and self.stress_safety >= 1):
            raise HeadroomError("a safety factor below 1 cannot hold what was seen", "take 4 or more")


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a value: shape of one record, and the magnitude to make room for in each channel, `peaks`
    float64 (channels,), `factor` times what the user's network has (`rescaling`)."""

    shape: tuple[int, ...]
    peaks: torch.Tensor
    factor: float = 1.0

    @property
    def largest(self) -> float:
        """The magnitude to make room for."""
        return float(self.peaks.max())

    def multiplied(self, factors: torch.Tensor) -> Seen:
        """The same of channels that are `factors`, float64 (channels,), times as large."""
        return Seen(self.shape, self.peaks * factors, self.factor * float(factors.min()))


@dataclass(frozen=True)
class Scale:
    """2^-exponent / divisor."""

    exponent: int
    divisor: int = 1

    @property
    def value(self) -> float:
        """As a float."""
        return 2.0**-self.exponent / self.divisor


@dataclass
class Group:
    """Values of one scale. `origins` are no views of others; `needed` is the magnitude that must fit, in units of 1 / divisor,
    `headroom` is H, `spare` 1 where differences must fit too; `truncated` says whether there are narrow values at all."""

    members: list[str]
    origins: list[str] = field(default_factory=list)
    largest: float = 0.0
    divisor: int = 1
    needed: float = 0.0
    spare: int = 0
    headroom: int = 0
    truncated: bool = True
    exponent: int = 0

    @property
    def scale(self) -> Scale:
        """Of the input, and of narrow values."""
        return Scale(self.exponent, self.divisor)

    @property
    def bits(self) -> int:
        """Width of a narrow value."""
        return 1 + self.headroom + self.exponent

    @property
    def limit(self) -> float:
        """Results are wrong beyond this magnitude."""
        return 2.0 ** (self.headroom - self.spare) / self.divisor


def odd_part(number: int) -> tuple[int, int]:
    """(a, odd) with number = 2^a * odd."""
    twos = (number & -number).bit_length() - 1
    return twos, number >> twos


def connected(graph: Trace, kinds: Callable[[str], bool]) -> list[list[str]]:
    """Input and operations in sets, each joined by the operations of such `kinds` with what they read."""
    sets = {name: [name] for name in (graph.input, *(operation.name for operation in graph.operations))}
    for operation in graph.operations:
        for name in operation.inputs if kinds(operation.kind) else ():
            first, second = sets[name], sets[operation.name]
            if first is not second:
                first += second
                sets.update(dict.fromkeys(second, first))
    return list({id(members): members for members in sets.values()}.values())


def two_byte_fraction(weight: torch.Tensor) -> float:
    """The most fractional bits, not rounded down, with which weights fit two signed bytes."""
    return math.log2(TWO_BYTES / max(float(weight.abs().max()), SMALLEST))


class Plan:
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
        compared = any(operation.kind in (*MAX_POOLS, "Hardtanh") for operation in inside)
        group.spare = int(compared or self.graph.output in group.members)
        group.needed = self.precision.safety * max(group.largest, SMALLEST) * group.divisor
        group.headroom = math.ceil(math.log2(group.needed)) + group.spare
        for operation in inside:
            if operation.kind == "Hardtanh":
                ceiling = operation.options["max_val"] * group.divisor
                group.headroom = max(group.headroom, math.ceil(math.log2(ceiling)) + 2)
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
