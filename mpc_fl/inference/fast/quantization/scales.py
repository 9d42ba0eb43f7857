"""Scales and widths of an integer network: which forms of each value are needed, and how large they may grow.

Every value has a scale 2^-e / d: e is an exponent, d an odd divisor that averages bring in, and 255 for the input, so that
pictures of 8 bits are exact. Three forms of a value:

  sum     wide, as a convolution, sum or average leaves it; most of its 32 bits are used
  narrow  truncated to 8 .. `gate_bits` bits, for comparisons and to be opened
  wide    the narrow one extended to 32 bits (by ReLU for free), the input of a linear layer

Which forms are needed follows from the readers, last first (`_demanded`). Values that ReLU, max-pool, concatenation and
reshaping connect form a group with one scale and one headroom: H = ceil(log2(safety * largest * d)), one more where
differences are compared or a narrow value is extended. A ceiling (ReLU6) is added to safety * largest, because it is taken away
from values. A gate of 1 + H + e bits then holds values `safety` times as large as any seen.

Before the truncation the exponent is R = 31 - H, so all 32 bits are used, and an input with F fractional bits leaves R - F to
the weights. Rounding weights w disturbs the result by 2^(F - R) / sqrt(12) x, rounding activations at random by 2^-F / sqrt(6)
w; they are equal where 2 F = R + log2(sqrt(2) w / x), w the root mean square of weights, x that of activations less what
`weight_rounding` makes up for. So F is the mean of this over the layers that read a value, no more than `activation_bits`, and
no less than keeps weights within two bytes. An average of n elements adds log2(n) bits to F and divides the second error by
sqrt(n). (Measured in docs/fast_arithmetic.md: 4 times smaller errors than 12 + 12 bits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mpc_fl.errors import HeadroomError
from mpc_fl.inference.fast.network import NARROWEST, WIDEST_GATE
from mpc_fl.inference.graph.tracing import Trace

AVERAGES = ("AvgPool2d", "AdaptiveAvgPool2d", "Mean")
MAX_POOLS = ("MaxPool2d", "AdaptiveMaxPool2d")
SAME_SCALE = ("ReLU", "Hardtanh", "Concat", "Flatten", "Reshape", *MAX_POOLS)
WEIGHTED = ("Conv2d", "Linear", "Affine")
TWO_BYTES = 32639  # 127 * 256 + 127
SMALLEST = 2.0**-16  # a layer that was never larger is treated as if it had been


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
    `headroom` is H, `spare` 1 where differences must fit too, or the value is extended, `reserved` a ceiling that is taken
    away from values, in units of 1 / divisor; `truncated` says whether there are narrow values at all."""

    members: list[str]
    origins: list[str] = field(default_factory=list)
    largest: float = 0.0
    divisor: int = 1
    needed: float = 0.0
    spare: int = 0
    reserved: float = 0.0
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
        return (2.0 ** (self.headroom - self.spare) - self.reserved) / self.divisor


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
