"""The public constants of a norm check: what a bound on the norm means for sketches, their squares and their projections.

The protocol that uses them, with the reasons for each, is in `norm_check`; where the bound comes from, in `norm_bound`.
Nothing here is secret, and CrypTen is not needed: whoever plans a run can refuse a bound that cannot be checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mpc_fl.aggregation.sketch import BUCKETS
from mpc_fl.crypto.ring import DTYPE_OF
from mpc_fl.errors import HeadroomError

_DEVIATIONS = 6  # how many times the norm a projection may be
_TAIL = 2400  # margin^2 M: an honest update is refused with probability 1 / (1 + _TAIL / 2)


@dataclass(frozen=True)
class NormTest:
    """Public constants of a check: bound T in grid units of the summands, ring Z_2^k, buckets M.

    Raises `HeadroomError` when the ring is too small for the bound, or the bound is no positive number.
    """

    bound: float
    ring_bits: Literal[32, 64]
    buckets: int = BUCKETS

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise HeadroomError(f"a norm bound must be a positive number, not {self.bound!r}")
        if self.bound > 2.0**self.ring_bits * math.sqrt(self.buckets) / 10:
            raise HeadroomError(
                f"a norm bound of 2^{math.log2(self.bound):.1f} grid units cannot be checked in a ring of {self.ring_bits} bits",
                "use a coarser grid or a ring of 64 bits",
            )
        if self.buckets * (2 * self.range_of_kept) ** 2 >= 1 << 63:
            raise HeadroomError(f"squares of {self.buckets} buckets do not fit the ring", "use fewer buckets")

    @property
    def dtype(self) -> torch.dtype:
        """The ring's integers."""
        return DTYPE_OF[self.ring_bits]

    @property
    def margin(self) -> float:
        """How far above the bound a squared norm may be estimated, relative to it."""
        return math.sqrt(_TAIL / self.buckets)

    @property
    def dropped_bits(self) -> int:
        """s: low bits of a bucket that squares do without. T / 2^s lies in [2^19, 2^20) unless s = 0."""
        return max(0, math.floor(math.log2(self.bound)) - 19)

    @property
    def largest_square_sum(self) -> int:
        """A: what a sum of squares of u may be."""
        s = self.dropped_bits
        rounding = math.sqrt(self.buckets) / 2 if s else 0.0
        return math.floor((math.sqrt(1 + self.margin) * self.bound / 2.0**s + rounding) ** 2)

    @property
    def range_of_kept(self) -> int:
        """R: what a projection of u may be."""
        return _DEVIATIONS * (math.isqrt(self.largest_square_sum) + 1)

    @property
    def range_of_dropped(self) -> int:
        """R': what a projection of V - 2^s u may be; zero when u is V itself."""
        s = self.dropped_bits
        return math.ceil(_DEVIATIONS * math.sqrt(self.buckets) * 2 ** (s - 1)) if s else 0

    def kept(self, sketch: torch.Tensor) -> torch.Tensor:
        """u for a plaintext sketch of the ring's dtype: int64 of the same shape."""
        s = self.dropped_bits
        whole = sketch.long()
        return whole if s == 0 else (whole >> s) + (whole >> (s - 1) & 1)

    def passes(self, sketch: torch.Tensor) -> bool:
        """What the protocol decides of a plaintext sketch (buckets,) whose hospital tells its u truly."""
        u = self.kept(sketch).double()
        return float((u * u).sum()) <= self.largest_square_sum
