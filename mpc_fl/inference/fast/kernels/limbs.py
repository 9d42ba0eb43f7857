"""Matrix products modulo 2^32 by signed limbs, and the self-test that they must pass.

Elements of Z_2^32 are int32. Processors multiply bytes far faster than words (AVX-512 VNNI, AMX), so both factors are
written in signed digits ("limbs"), x = x_0 + 2^8 x_1 + 2^16 x_2 + 2^24 x_3 with -128 <= x_i < 128, and
    W x = sum over i + j <= 3 of 2^(8 (i + j)) W_i x_j   modulo 2^32,
because higher pairs vanish. All pairs of one i + j are one product of 8-bit matrices, with the limbs side by side along
the summed dimension: [x_j x_(j+1)] [W_(j+1); W_j]. 32-bit sums may wrap there: that is the modulus. Weights of 16 bits
have two limbs, so 7 of 16 pairs remain.

`halves` are limbs of 16 bits in float64, whose sums below 2^53 are exact: for processors whose 8-bit products saturate, or
are slow (AVX2 alone: one tenth of the speed of halves).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

log = logging.getLogger(__name__)
LimbMethod = Literal["bytes", "halves"]


@dataclass(frozen=True)
class Limbs:
    """A way to write elements of Z_2^32: `count` signed digits of `bits` bits each, held in `dtype` for `multiply`."""

    bits: int
    count: int
    digit: torch.dtype
    dtype: torch.dtype
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]

    def shifted(self, elements: torch.Tensor) -> torch.Tensor:
        """An int32 tensor whose bits, digit by digit, are the signed limbs: ((x + h) xor h) with h = half a digit each."""
        half = sum(1 << (self.bits * (index + 1) - 1) for index in range(self.count))
        constant = torch.tensor(half - (1 << 32), dtype=torch.int32)
        return (elements + constant).bitwise_xor_(constant)

    def limb(self, shifted: torch.Tensor, index: int) -> torch.Tensor:
        """Limb number `index` of what `shifted` returned."""
        return (shifted >> (self.bits * index)).to(self.digit)


def _multiply_bytes(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    if left.shape[1] == 1:  # torch 2.13 misreads a right factor of one row with strides (1, 1)
        torch.mul(left.to(torch.int32), right.to(torch.int32), out=out)
    else:
        torch._int_mm(left, right, out=out)


def _multiply_halves(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    # Products of two limbs are at most 2^30, and two limbs stand side by side.
    if left.shape[1] > 1 << 22:
        raise ValueError("sums of more than 2^22 products of 16-bit limbs may not be exact")
    out.copy_((left @ right).to(torch.int64))


LIMBS = {
    "bytes": Limbs(8, 4, torch.int8, torch.int8, _multiply_bytes),
    "halves": Limbs(16, 2, torch.int16, torch.float64, _multiply_halves),
}


def bytes_needed(elements: torch.Tensor) -> int:
    """How many signed bytes, 1 to 4, hold every element."""
    low, high = (int(bound) for bound in torch.aminmax(elements)) if elements.numel() else (0, 0)
    ones = (1, 0x101, 0x10101)
    return next((count for count, one in enumerate(ones, 1) if -128 * one <= low and high <= 127 * one), 4)


class PreparedMatrix:
    """The transposed right factor of `elements @ matrix^T`, (N, K): its limbs side by side, the higher ones first."""

    def __init__(self, matrix: torch.Tensor, kind: Limbs) -> None:
        self.kind = kind
        self.columns, self.inner = matrix.shape
        shifted = kind.shifted(matrix)
        limbs = [kind.limb(shifted, index) for index in range(kind.count)]
        while len(limbs) > 1 and not bool(limbs[-1].any()):
            limbs.pop()
        self.limbs = len(limbs)
        self.stacked = torch.cat(limbs[::-1], dim=1).to(kind.dtype)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, scratch: torch.Tensor) -> None:
        """out = rows @ matrix^T; `rows` (M, count * K) hold the limbs side by side, `out` and `scratch` are int32 (M, N)."""
        for total in range(self.kind.count):  # i + j
            lowest = max(0, total - self.limbs + 1)
            left = rows[:, lowest * self.inner : (total + 1) * self.inner]
            first = (self.limbs - 1 - (total - lowest)) * self.inner
            right = self.stacked[:, first:].t()
            if total == 0:
                self.kind.multiply(left, right, out)
            else:
                self.kind.multiply(left, right, scratch)
                out.add_(scratch, alpha=1 << (self.kind.bits * total))


def limbs_side_by_side(elements: torch.Tensor, kind: Limbs) -> torch.Tensor:
    """int32 (M, K) to limbs (M, count * K)."""
    shifted = kind.shifted(elements)
    rows = torch.empty(len(elements), kind.count, elements.shape[1], dtype=kind.dtype)
    for index in range(kind.count):
        rows[:, index] = kind.limb(shifted, index)
    return rows.view(len(elements), -1)


@functools.cache
def usable() -> tuple[LimbMethod, ...]:
    """The methods with limbs that pass the self-test in this process, the fastest first; runs once, within some 50 ms.

    Which one that is depends on the processor alone: bytes with 8-bit dot products, by far halves without.
    """
    methods: list[LimbMethod] = ["bytes", "halves"]
    return tuple(sorted((method for method in methods if passes_self_test(method)), key=trial_seconds))


def trial_factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (M, K) and a matrix (N, K) of a usual size, on which methods are compared."""
    return torch.full((128, 288), 0x01020304, dtype=torch.int32), torch.full((64, 288), 0x0506, dtype=torch.int32)


def trial_seconds(method: LimbMethod) -> float:
    """How long that product takes by a method: the better of two."""
    kind, taken, (elements, factor) = LIMBS[method], [], trial_factors()
    rows, matrix = limbs_side_by_side(elements, kind), PreparedMatrix(factor, kind)
    out = torch.empty(len(rows), matrix.columns, dtype=torch.int32)
    for _ in range(2):
        start = time.perf_counter()
        matrix.multiply_into(out, rows, torch.empty_like(out))
        taken.append(time.perf_counter() - start)
    return min(taken)


def passes_self_test(method: LimbMethod) -> bool:
    """Whether a method agrees with torch's int64 arithmetic on random and extreme values. Logs a warning if not."""
    draw = torch.Generator().manual_seed(0)
    extremes = torch.tensor(
        [-(1 << 31), (1 << 31) - 1, -1, 0x7F7F7F7F, 0x80808080 - (1 << 32), 0x7FFF8000, 0x80 << 8, 0, 1, 0x00FF00FF],
        dtype=torch.int32,
    )

    def values(*shape: int, only: int | None = None) -> torch.Tensor:
        drawn = torch.randint(-(1 << 31), 1 << 31, shape, generator=draw).to(torch.int32)
        places = torch.randint(0, 3 * len(extremes), shape, generator=draw) if only is None else torch.full(shape, only)
        return torch.where(places < len(extremes), extremes[places.clamp(max=len(extremes) - 1)], drawn)

    try:
        for rows, inner, columns in ((1, 512, 3), (49, 1155, 40), (200, 64, 64)):
            for left, right in ((values(rows, inner), values(columns, inner)), *_constant_pairs(values, rows, inner)):
                exact = (left.to(torch.int64) @ right.to(torch.int64).t()).to(torch.int32)
                matrix, out = PreparedMatrix(right, LIMBS[method]), torch.empty_like(exact)
                matrix.multiply_into(out, limbs_side_by_side(left, LIMBS[method]), torch.empty_like(exact))
                if not torch.equal(out, exact):
                    raise ArithmeticError(f"a product of {rows} x {inner} x {columns} is wrong")
    except (ArithmeticError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("integer convolution by %s is not usable on this machine, a slower way is: %s", method, reason)
        return False
    return True


def _constant_pairs(
    values: Callable[..., torch.Tensor], rows: int, inner: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Matrices of one extreme value each: all limbs -128, or all 127 and -128, where a saturating kernel fails."""
    most_negative, most_positive = 4, 3
    return (
        (values(rows, inner, only=most_negative), values(8, inner, only=most_negative)),
        (values(rows, inner, only=most_positive), values(8, inner, only=most_negative)),
    )
