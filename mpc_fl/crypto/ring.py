"""Fixed-point numbers in the ring Z_2^k, k = 64 or 32, and the proof that a sum of them cannot wrap.

A real x is encoded as round(x * 2^f) modulo 2^k, held in int64 or int32; sums of encodings are exact. Encoding is
refused (never clamped, never wrapped) where a value does not fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mpc_fl.errors import HeadroomError

RING_BITS = 64
EXACT_IN_FLOAT64 = 1 << 53  # openings are decoded through float64: whole numbers below this stay exact
_PIECE = 1 << 18
DTYPE_OF = {32: torch.int32, 64: torch.int64}


@dataclass(frozen=True, repr=False)
class RingShare:
    """One party's share of a tensor over Z_2^32 (int32) or Z_2^64 (int64), of any shape.

    The value has `fraction_bits` fractional bits. Shares combine by addition, or by exclusive or if `exclusive_or`.
    """

    elements: torch.Tensor
    fraction_bits: int
    exclusive_or: bool = False


@dataclass(frozen=True)
class FixedPoint:
    """Fixed point with `fraction_bits` fractional bits for values of magnitude at most `bound`."""

    fraction_bits: int
    bound: float

    def encode(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Encode float values of any shape as int64 ring elements, rounding half to even.

        `what` names the tensor in errors (never its values). Raises `HeadroomError` when a value is NaN or infinite,
        or its magnitude exceeds `bound`.
        """
        self.require_fit(values, what)
        return torch.round(values.double() * float(1 << self.fraction_bits)).to(torch.int64)

    def require_fit(self, values: torch.Tensor, what: str) -> None:
        """Raise `HeadroomError` when a value is NaN or infinite, or its magnitude exceeds `bound`."""
        if not values.numel():
            return
        low, high = (float(end) for end in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise HeadroomError(f"{what} holds NaN or infinite values", "lower the learning rate or check the data")
        if max(high, -low) > self.bound:
            raise HeadroomError(
                f"{what} exceeds the headroom: a coordinate is larger than {self.bound:g}",
                "raise aggregation.update_bound or lower the learning rate",
            )

    def decode(self, elements: torch.Tensor) -> torch.Tensor:
        """Decode int64 ring elements (read as signed) to float64 of the same shape."""
        return elements.double() / float(1 << self.fraction_bits)


@dataclass(frozen=True)
class MeanHeadroom:
    """Proof that a weighted mean over `parties` hospitals fits a ring, weights at least 0 that add up to at most 1.

    Each party encodes weight * update with `fixed_point`. The sum has a magnitude of at most bound * 2^f + parties / 2,
    half a unit of rounding for each, and must stay below 2^(k-1): k = 32 where that holds, else 64.
    """

    fixed_point: FixedPoint
    parties: int

    @property
    def bits_needed(self) -> float:
        """log2 of the largest possible magnitude of the sum."""
        return math.log2(self.fixed_point.bound * (1 << self.fixed_point.fraction_bits) + self.parties / 2)

    @property
    def ring_bits(self) -> int:
        """k, the ring of the sum."""
        return 32 if self.bits_needed < 31 else 64

    @property
    def dtype(self) -> torch.dtype:
        """Of ring elements."""
        return DTYPE_OF[self.ring_bits]

    @property
    def bits_spare(self) -> float:
        """Bits left below the sign bit; negative when a wrap is possible."""
        return self.ring_bits - 1 - self.bits_needed

    def require(self) -> None:
        """Raise `HeadroomError` before a run whose sums could wrap."""
        if self.bits_spare <= 0:
            raise HeadroomError(
                f"the mean of {self.parties} updates needs {self.bits_needed:.1f} bits and the ring has 63",
                "lower aggregation.fraction_bits or update_bound",
            )

    def encode(self, update: torch.Tensor, weight: float, what: str) -> torch.Tensor:
        """weight * update as ring elements of the same shape, in pieces, so that memory stays at one copy.

        Raises `HeadroomError` for NaN, infinity, or a coordinate of the update beyond the bound; `ValueError` for a weight
        outside of [0, 1].
        """
        if not 0 <= weight <= 1:
            raise ValueError("a weight lies between 0 and 1")
        elements = torch.empty(update.shape, dtype=self.dtype)
        for piece, place in zip(update.reshape(-1).split(_PIECE), elements.reshape(-1).split(_PIECE), strict=True):
            self.fixed_point.require_fit(piece, what)
            place.copy_(
                piece.to(torch.float64, copy=True).mul_(weight * (1 << self.fixed_point.fraction_bits)).round_()
            )
        return elements

    def decode(self, elements: torch.Tensor, factor: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """factor * decoded elements, computed in float64 and rounded once to `dtype`, of the same shape (P,)."""
        scale, result = factor / (1 << self.fixed_point.fraction_bits), torch.empty(elements.shape, dtype=dtype)
        for piece, place in zip(elements.split(_PIECE), result.split(_PIECE), strict=True):
            place.copy_(piece.double().mul_(scale))
        return result


@dataclass(frozen=True)
class Headroom:
    """Proof that `parties` encodings, each multiplied by an integer of at most `weight_bound`, sum without wrapping.

    The largest magnitude of the sum is parties * weight_bound * (bound * 2^f + 1/2) and must stay below 2^63.
    """

    fixed_point: FixedPoint
    parties: int
    weight_bound: int

    @property
    def bits_needed(self) -> float:
        """log2 of the largest possible magnitude of the sum."""
        largest = self.fixed_point.bound * (1 << self.fixed_point.fraction_bits) + 0.5
        return math.log2(self.parties * self.weight_bound * largest)

    @property
    def bits_spare(self) -> float:
        """Bits left below the sign bit; negative when a wrap is possible."""
        return RING_BITS - 1 - self.bits_needed

    def require(self) -> None:
        """Raise `HeadroomError` before a run whose sums could wrap."""
        if self.bits_spare <= 0:
            raise HeadroomError(
                f"the sum of {self.parties} updates needs {self.bits_needed:.1f} bits and the ring has 63",
                "lower aggregation.fraction_bits, update_bound or count_bound",
            )
