"""Public scales and widths of an integer network, found by running calibration data, and the risk that they leave.

An activation beyond its range wraps around, and nobody can see that on shares. So ranges are found beforehand, on data of
the model owner or public ones, and hold 4 times the largest value seen, and twice the largest that stress patterns (noise,
blocks, constants) bring about. What this leaves is stated in figures, from the largest magnitude of each layer in each of
the N calibration images:

  beyond_seen   distribution-free: of N + 1 exchangeable images the last is the largest with probability 1 / (N + 1)
  gumbel        the law that maxima of light-tailed values approach, fitted by moments (Fisher and Tippett 1928)
  power_law     a heavier tail, P(X > x) = (k / N) (x / x_k)^-alpha, by Hill's estimator on the k = N / 10 largest
                (Hill 1975); for data like the calibration data this errs on the safe side

These hold for images like the calibration images: ranges of phantoms say little about X-rays (docs/fast_arithmetic.md has
figures). `self_check` tells for any image that the model owner may look at. Scales are public: they show each layer's
largest value up to a factor of two, and by the balance of bits about how large its weights are. Nothing else that calibration
found is public (`docs/protocols/diagnosis_fast.md`, what the public network shows).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import HeadroomError
from mpc_fl.inference.fast.network import IntegerModel
from mpc_fl.inference.fast.quantization.float_graph import evaluate, prepare
from mpc_fl.inference.fast.quantization.lowering import RangeLimit, lower
from mpc_fl.inference.fast.quantization.rescaling import rescaled
from mpc_fl.inference.fast.quantization.risk import Approach, Range, Risk
from mpc_fl.inference.fast.quantization.scale_plan import ScalePlan
from mpc_fl.inference.fast.quantization.scales import WEIGHTED, Precision, Seen
from mpc_fl.inference.fast.quantization.weight_rounding import InputsSum
from mpc_fl.inference.graph.tracing import Trace

_BATCH = 16


@dataclass(frozen=True)
class Calibration(IntegerModel):
    """An integer model with what it was made from: the float network `graph`, rescaled, its `limits`, and the `ranges` that the
    owner's data have."""

    precision: Precision
    ranges: tuple[Range, ...]
    graph: Private[Trace]
    limits: tuple[RangeLimit, ...]

    @property
    def integers(self) -> IntegerModel:
        """What a session needs of it: the float network takes as much memory again."""
        return IntegerModel(self.network, self.weights)

    @property
    def risk(self) -> Risk:
        """What the calibration images say about values beyond the limits."""

        def total(name: str) -> float:
            return min(1.0, sum(getattr(each, name) for each in self.ranges))

        closest = max(self.ranges, key=lambda each: each.largest / each.limit)
        count = len(closest.maxima)
        return Risk(count, total("beyond_seen"), total("gumbel"), total("power_law"), closest)


def _batches(graph: Trace, records: torch.Tensor) -> Iterator[tuple[int, str, torch.Tensor]]:
    """First record of a batch, operation, and its value in that batch."""
    for first in range(0, len(records), _BATCH):
        for name, value in evaluate(graph, records[first : first + _BATCH]):
            yield first, name, value


def _magnitudes(value: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each record and channel, float32 (N, channels)."""
    return value.reshape(*value.shape[:2], -1).abs().amax(dim=2)


def stress_records(records: torch.Tensor) -> torch.Tensor:
    """Patterns between the smallest and largest input that drive layers further than images do, (M, ...) like `records`.

    Constant low and high, uniform noise, and for images black and white pixels and blocks. Always the same.
    """
    draw = torch.Generator().manual_seed(0)
    shape, low, high = tuple(records.shape[1:]), records.min(), records.max()
    patterns = [torch.zeros(1, *shape), torch.ones(1, *shape), torch.rand(4, *shape, generator=draw)]
    if len(shape) == 3:
        for block in (1, 4, 16):
            size = [-(-length // block) for length in shape[1:]]
            coarse = torch.randint(0, 2, (4, 1, *size), generator=draw).float()
            blocks = functional.interpolate(coarse, scale_factor=block)[..., : shape[1], : shape[2]]
            patterns.append(blocks.expand(-1, shape[0], -1, -1))
    return low + (high - low) * torch.cat(patterns)


def calibrate(model: nn.Module, records: torch.Tensor, precision: Precision | None = None) -> Calibration:
    """The integer network of a float network in evaluation mode, for records of the shape of `records`.

    `records`, float32 (N, C, H, W), are images of the model owner or public ones, of all kinds that will be asked about;
    some hundred make the figures of risk meaningful. `stress_records` are added for the ranges, not for those figures.
    Raises `HeadroomError` naming a layer that does not fit or is not finite, `UnsupportedLayerError` for a layer the engine
    does not know.
    """
    precision = precision or Precision()
    graph = prepare(model)
    if not len(records):
        raise HeadroomError("calibration needs at least one record", "pass images of the model owner or public ones")
    maxima, plan = _observed(graph, records, precision)
    full = rescaled(plan)
    del graph, plan  # its weights are not needed beside the rescaled ones
    network, weights, limits = lower(full.graph, full.seen, full.inputs, precision)
    ranges = []
    for limit in limits:
        widest = full.seen[limit.operation].factor
        largest = (maxima[limit.operation] * full.factors[limit.operation]).amax(dim=1) / widest
        ranges.append(Range(limit.path, limit.limit / widest, largest))
    secret = Private("integer weights", weights), Private("network", full.graph)
    return Calibration(network, secret[0], precision, tuple(ranges), secret[1], limits)


def _observed(graph: Trace, records: torch.Tensor, precision: Precision) -> tuple[dict[str, torch.Tensor], ScalePlan]:
    """The largest magnitudes of every value in each record and channel, float64 (N, channels), and a plan with room for them."""
    paths = {operation.name: operation.path for operation in graph.operations}
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = {each.name: InputsSum(each, len(records)) for each in graph.operations if each.kind in WEIGHTED}
    readers: dict[str, list[InputsSum]] = defaultdict(list)
    for each in inputs.values():
        readers[each.operation.inputs[0]].append(each)
    for _, name, value in _batches(graph, records):
        shapes[name] = tuple(value.shape[1:])
        found[name].append(_magnitudes(value))
        if not bool(found[name][-1].isfinite().all()):
            raise HeadroomError(f"layer '{paths.get(name, name)}' is not finite on calibration data", "check the model")
        for reader in readers[name]:
            reader.add(value)
    maxima = {name: torch.cat(parts).double() for name, parts in found.items()}
    peaks = {name: each.amax(dim=0) for name, each in maxima.items()}
    for _, name, value in _batches(graph, stress_records(records)):
        stressed = _magnitudes(value).amax(dim=0).double() * (precision.stress_safety / precision.safety)
        peaks[name] = torch.maximum(peaks[name], stressed)
    seen = {name: Seen(shapes[name], peaks[name]) for name in shapes}
    return maxima, ScalePlan(graph, seen, {name: each.result() for name, each in inputs.items()}, precision)


def self_check(calibration: Calibration, records: torch.Tensor) -> Approach:
    """The closest approach to any limit of plaintext records, float32 (N, C, H, W), of somebody who may look at them.

    Raises `HeadroomError` naming the layer if a value lies beyond its limit: its encrypted diagnosis would be wrong.
    """
    limits = {limit.operation: limit for limit in calibration.limits}
    closest = Approach("", 0, 0.0)
    for first, name, value in _batches(calibration.graph.inside_protocol(), records):
        if name in limits:
            maxima = _magnitudes(value).amax(dim=1)
            fraction = float(maxima.max()) / limits[name].limit
            if not fraction <= closest.fraction:  # also when it is not a number
                closest = Approach(limits[name].path, first + int(maxima.argmax()), fraction)
                if not fraction < 1:
                    raise HeadroomError(
                        f"record {closest.image} leaves the range of layer '{closest.path}' ({fraction:.3g} times)",
                        "calibrate with records like this one; the diagnosis of this record would be wrong",
                    )
    return closest
