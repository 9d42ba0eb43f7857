"""What one evaluation of a network consumes, from shapes alone, and how each party holds its part: each piece once.

A `CorrelationPlan` lists, for a batch of records, in order of use:
  masks     for each value that enters linear layers, A, uniform in Z_2^32, drawn by C: what C masks its share with
  products  for each linear layer shares of A * B, B the model owner's mask of the weights: C draws its share u_C, S is
            sent u_S = A * B - u_C
  gates     for each comparison what `gate_correlation` says
C's part is one seed per batch; S's part is a seed per batch and `correction_bytes` from the dealer, who makes them from
the two seeds and B. They may be made and stored long before: nothing of them depends on an image.

`OneTime` hands out each piece once; a second request raises `SecrecyError`, because a mask used twice shows the
difference of what it hid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from mpc_fl.inference.fast.kernels.bit_planes import packed_bytes
from mpc_fl.inference.fast.kernels.linear import LinearMap, product_share_of_hospital
from mpc_fl.inference.fast.kernels.pooling import levels_of, max_pool_counts
from mpc_fl.inference.fast.layers import MaxPool, ReLU, SignExtension
from mpc_fl.inference.fast.network import RING_BITS, Network, Reveal, channels_last, label_bits
from mpc_fl.inference.fast.preprocessing.gate_correction import correction_of
from mpc_fl.inference.fast.preprocessing.gate_correlation import ComparisonGate, GateMaterial, Result

T = TypeVar("T")
_ALIGNMENT = 64


@dataclass(frozen=True)
class LinearProduct:
    """A linear layer's product A * B: the value A masks, and the shape (N, ...) of the result, channels last."""

    value: str
    shape: tuple[int, ...]

    @property
    def correction_bytes(self) -> int:
        """Bytes of S's correction."""
        return 4 * int(np.prod(self.shape))


@dataclass(frozen=True)
class CorrelationPlan:
    """The pieces for `records` records at once, by name: `masks` give the shapes, `pieces` come in order of use."""

    records: int
    masks: Mapping[str, tuple[int, ...]]
    pieces: Mapping[str, ComparisonGate | LinearProduct]

    def extension(self, value: str) -> ComparisonGate | None:
        """The sign extension that makes a masked value, if one does: its r_C is -A, and of E only the high bits are sent."""
        piece = self.pieces.get(value)
        extends = isinstance(piece, ComparisonGate) and piece.result is Result.EXTENDED and value in self.masks
        return piece if isinstance(piece, ComparisonGate) and extends else None

    def masked_bytes(self, value: str) -> int:
        """Bytes of E of a masked value."""
        gate = self.extension(value)
        return 4 * math.prod(self.masks[value]) if gate is None else packed_bytes(RING_BITS - gate.bits, gate.count)

    @property
    def correction_bytes(self) -> int:
        """Bytes that the dealer sends S."""
        return sum(piece.correction_bytes for piece in self.pieces.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the corrections in one buffer, see `split_corrections`."""
        return sum(_aligned(piece.correction_bytes) for piece in self.pieces.values())


def correlation_plan(network: Network, records: int, reveal: Reveal) -> CorrelationPlan:
    """All pieces of one evaluation, named by the output of their layer (and, for maxima, the level). Pure shapes."""
    masks: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, ComparisonGate | LinearProduct] = {}
    for layer in network.layers:
        value, output = network.values[layer.inputs[0]], network.values[layer.output]
        if layer in network.linear_layers:
            masks.setdefault(layer.inputs[0], channels_last(value.shape, records))
            pieces[layer.output] = LinearProduct(layer.inputs[0], channels_last(output.shape, records))
        elif isinstance(layer, ReLU):
            result = Result.WIDE if output.wide else Result.NARROW
            pieces[layer.output] = ComparisonGate(value.bits, records * value.elements, result, layer.ceiling)
        elif isinstance(layer, SignExtension):
            pieces[layer.output] = ComparisonGate(value.bits, records * value.elements, Result.EXTENDED)
        elif isinstance(layer, MaxPool):
            channels, rows, columns = value.shape
            for level, count in enumerate(max_pool_counts(layer, (channels, rows, columns))):
                pieces[level_name(layer.output, level)] = ComparisonGate(value.bits, records * count, Result.NARROW)
    if reveal == "label":
        bits = sum(label_bits(network))
        for level, pairs in enumerate(levels_of(network.values[network.output].elements)):
            pieces[level_name("label", level)] = ComparisonGate(bits, records * pairs, Result.NARROW)
    return CorrelationPlan(records, masks, pieces)


def level_name(name: str, level: int) -> str:
    """The name of one level of a tournament."""
    return f"{name} level {level}"


class OneTime(Generic[T]):
    """Pieces by name, each handed out once."""

    def __init__(self, pieces: dict[str, T]) -> None:
        self._pieces = pieces

    def __repr__(self) -> str:
        return f"OneTime({len(self._pieces)} pieces)"

    def take(self, name: str) -> T:
        """The piece; it is gone then. Raises `SecrecyError` when it was taken before or never existed."""
        if name not in self._pieces:
            raise SecrecyError(f"the correlated randomness '{name}' was used already or was never made")
        return self._pieces.pop(name)

    @property
    def left(self) -> int:
        """Pieces not taken."""
        return len(self._pieces)


@dataclass(frozen=True, repr=False)
class HospitalCorrelations:
    """C's part: `masks` A (int32, channels last) by value, `products` its share of W * A, `gates`."""

    masks: OneTime[torch.Tensor]
    products: OneTime[torch.Tensor]
    gates: OneTime[GateMaterial]


@dataclass(frozen=True, repr=False)
class OwnerCorrelations:
    """S's part: `products` u_S = A * B - u_C (int32, channels last), `gates`."""

    products: OneTime[torch.Tensor]
    gates: OneTime[GateMaterial]


def _mask(seed: Seed, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(seed.stream("mask", name).words(int(np.prod(shape)), np.int32).reshape(shape))


def _value_mask(plan: CorrelationPlan, name: str, masks: Mapping[str, torch.Tensor]) -> np.ndarray | None:
    return None if plan.extension(name) is None else masks[name].numpy()


def hospital_correlations(
    plan: CorrelationPlan,
    seed: Seed,
    masked_weights: Mapping[str, LinearMap],
    stored: Mapping[str, torch.Tensor] | None = None,
) -> HospitalCorrelations:
    """C's part of a batch from its seed and F = W - B of each layer: u_C + F * A is its share of W * A = F * A + B * A.

    `stored` holds these products if they were made before, by layer; F is not read then.
    """
    masks = {name: _mask(seed, name, shape) for name, shape in plan.masks.items()}
    products: dict[str, torch.Tensor] = {}
    gates: dict[str, GateMaterial] = {}
    for name, piece in plan.pieces.items():
        stream = seed.stream("piece", name)
        if isinstance(piece, ComparisonGate):
            gates[name] = GateMaterial(piece, stream, value_mask=_value_mask(plan, name, masks))
        elif stored is not None:
            products[name] = stored[name]
        else:
            products[name] = product_share_of_hospital(masked_weights[name], masks[piece.value], stream)
    return HospitalCorrelations(OneTime(masks), OneTime(products), OneTime(gates))


def owner_correlations(plan: CorrelationPlan, seed: Seed, corrections: Mapping[str, np.ndarray]) -> OwnerCorrelations:
    """S's part of a batch from its seed and the dealer's corrections, uint8 by name of the piece.

    Raises `ValueError` for a correction of another size.
    """
    products: dict[str, torch.Tensor] = {}
    gates: dict[str, GateMaterial] = {}
    for name, piece in plan.pieces.items():
        correction = corrections[name]
        if isinstance(piece, ComparisonGate):
            gates[name] = GateMaterial(piece, seed.stream("piece", name), correction)
            _ = gates[name].drawn  # now: S has no time to spare while an image waits
        else:
            products[name] = torch.from_numpy(correction.view(np.int32).reshape(piece.shape))
    return OwnerCorrelations(OneTime(products), OneTime(gates))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def split_corrections(plan: CorrelationPlan, buffer: np.ndarray) -> dict[str, np.ndarray]:
    """S's corrections as views into one uint8 buffer of `plan.stored_bytes`: what a pool keeps of a batch.

    Pieces lie in order of use, each at a multiple of 64 bytes. Writing to the views fills the buffer.
    """
    if buffer.dtype != np.uint8 or buffer.shape != (plan.stored_bytes,):
        raise ValueError("the buffer has another size than the corrections of this plan")
    views, start = {}, 0
    for name, piece in plan.pieces.items():
        views[name] = buffer[start : start + piece.correction_bytes]
        start += _aligned(piece.correction_bytes)
    return views


def corrections_of(
    plan: CorrelationPlan, hospital: Seed, owner: Seed, weight_masks: Mapping[str, LinearMap]
) -> Iterator[tuple[str, np.ndarray]]:
    """The dealer's work for a batch: S's corrections, uint8, by name, in order of use. `weight_masks` are B."""
    masks = {name: _mask(hospital, name, shape) for name, shape in plan.masks.items()}
    last_use = {piece.value: name for name, piece in plan.pieces.items() if isinstance(piece, LinearProduct)}
    for name, piece in plan.pieces.items():
        if isinstance(piece, ComparisonGate):
            streams = hospital.stream("piece", name), owner.stream("piece", name)
            yield name, correction_of(piece, *streams, _value_mask(plan, name, masks))
            continue
        share = weight_masks[name](masks[piece.value])
        hospital.stream("piece", name).subtract_from(share)
        if last_use[piece.value] == name:
            del masks[piece.value]
        yield name, share.numpy().view(np.uint8).reshape(-1)
