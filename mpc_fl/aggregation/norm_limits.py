"""The public constants of a norm check: what a bound on the norm means for sketches and their squares.

The protocol that uses them is in `norm_check`, the proof in `norm_proof`; where the bound comes from, in `norm_bound`.
Nothing here is secret: whoever plans a run can refuse a bound that cannot be checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mpc_fl.aggregation.prime_field import PRIME
from mpc_fl.aggregation.sketch import BUCKETS
from mpc_fl.crypto.ring import DTYPE_OF
from mpc_fl.errors import HeadroomError

_TAIL = 2400  # margin^2 M: an honest update is refused with probability 1 / (1 + _TAIL / 2)


@dataclass(frozen=True)
class NormTest:
    """Public constants of a check: bound T in grid units of the summands, ring Z_2^k, buckets M.

    A sketch passes whose squares add up to at most A = T^2 (1 + margin). Raises `HeadroomError` when the ring or the field
    of the proofs is too small for the bound, or the bound is no positive number.
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
        # A bucket that is not found is below 4 sqrt(M A) (`norm_proof`): the squares of M of them must not wrap.
        if 16 * self.buckets**2 * self.largest_square_sum >= PRIME // 2:
            raise HeadroomError(
                f"a norm bound of 2^{math.log2(self.bound):.1f} grid units is too large to be checked",
                "lower aggregation.fraction_bits",
            )

    @classmethod
    def of_sketches(cls, norm: float, ring_bits: Literal[32, 64], buckets: int = BUCKETS) -> NormTest:
        """The test that exactly those pass whose *sketch* has at most this norm."""
        return cls(norm / math.sqrt(1 + math.sqrt(_TAIL / buckets)), ring_bits, buckets)

    @property
    def dtype(self) -> torch.dtype:
        """The ring's integers."""
        return DTYPE_OF[self.ring_bits]

    @property
    def margin(self) -> float:
        """How far above the bound a squared norm may be estimated, relative to it."""
        return math.sqrt(_TAIL / self.buckets)

    @property
    def largest_square_sum(self) -> int:
        """A: what a sum of squares of the centred sketch may be."""
        return math.ceil((1 + self.margin) * self.bound**2)

    def passes(self, sketch: torch.Tensor) -> bool:
        """What the protocol decides of a plaintext sketch (buckets,) of the ring's dtype."""
        return sum(value * value for value in sketch.tolist()) <= self.largest_square_sum
