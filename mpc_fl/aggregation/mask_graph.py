"""Who shares masks with whom in a sum of many hospitals, and how many neighbours that takes.

Up to 16 hospitals all share masks with all: whoever leads a sum learns nothing more than the sum, together with all
hospitals of it but two. That costs each hospital n - 1 masks. Beyond, hospitals stand in a circle (`sharing.mask_circle`) in
the order of SHA-256(T, name), and share masks with `reach` others to each side: the Harary graph under a random permutation
of Bell, Bonawitz, Gascon, Lepoint and Raykova (CCS 2020). Theirs is counted for hospitals lost by chance; here whoever leads
may choose V with the graph before it. What holds, holds against it with at most C hospitals, C a number fixed before.

The seed of the permutation is the transcript T (`transcript`): it holds the fingerprints of the keys of all hospitals of the
sum, so each of them has a part in it, and what all were told. Nobody proposes it. But whoever leads knows all of that before
it says the last of it (a model, say), and a hospital that comes last before it makes its key: each could try many until a
permutation suits it. So the bounds leave room for that: each permutation fails with probability at most 2^-120, in two
ways of 2^-121, and 2^80 tries, each of a hash of T and one for every hospital, leave 2^-40.

The numbers, for n hospitals U of which C collude and of which at least `quorum` are in the set V that is opened:
  `most_colluding` c: among `reach` hospitals that follow each other more than c collude with probability at most 2^-121, for
      any of the n places (hypergeometric tails, times n)
  `least` = c + 1: so many of any `reach` hospitals that follow one of V must be in V, or nobody signs V. Then one of them is
      honest, whoever chose V, and all honest hospitals of V hang together by masks (`mask_circle`)
  `reach`: the smallest for which n - quorum hospitals, lost by chance, leave fewer than `least` anywhere with probability at
      most 2^-20. Such a sum stops
  `closing`: with so many following hospitals i shares the masks that close its summand; all of them collude with probability
      at most 2^-121. These have the place of Bell et al.'s shares of self masks: each of the two who know such a key can
      give it, so no threshold of shares is needed, and a key that both lost closes the sum for ever (`closed_sum`)

All tails are sums of whole numbers, compared exactly. reach grows with log n for fixed fractions C / n and quorum / n.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

from mpc_fl.config.protocols import MASKS_BETWEEN_ALL_UP_TO
from mpc_fl.sharing.mask_circle import MaskCircle

COLLUDING = 5  # one in so many hospitals may collude, or privacy.colluders, if these are more
SECURITY_BITS = 40
TRIES_BITS = 80
CORRECTNESS_BITS = 20
_UNSAFE_BITS = SECURITY_BITS + TRIES_BITS + 1  # there are two ways to fail
_PURPOSE = b"mpc-fl place in a circle of masks 1"


def most_colluding(hospitals: int, colluders: int) -> int:
    """C, how many of a federation's hospitals may collude where masks form a graph: a fifth of them, at least `colluders`."""
    return max(colluders, hospitals // COLLUDING)


@dataclass(frozen=True)
class MaskBounds:
    """Of the graph of masks over n hospitals: see the module. Each has 2 `reach` neighbours."""

    reach: int
    most_colluding: int
    closing: int

    @property
    def least(self) -> int:
        """How many of the `reach` hospitals that follow one of V must be in V."""
        return self.most_colluding + 1

    @property
    def neighbours(self) -> int:
        """k, of each hospital."""
        return 2 * self.reach


@functools.lru_cache(maxsize=64)
def mask_bounds(hospitals: int, colluders: int, quorum: int) -> MaskBounds | None:
    """The graph for n hospitals, of which at most `colluders` collude, and at least `quorum` are in the sum.

    `None` where all share masks with all: up to 16 hospitals, and where these bounds leave no smaller graph.
    """
    if hospitals <= MASKS_BETWEEN_ALL_UP_TO or colluders > quorum - 2:
        return None
    closing = next(count for count in range(1, hospitals + 1) if _rarely_all(hospitals, colluders, count))
    quorum = min(quorum, hospitals)
    for reach in range(closing, hospitals // 2):
        most = _most_among(reach, hospitals, colluders)
        if _rarely_fewer(hospitals, quorum, reach, most + 1):
            return MaskBounds(reach, most, closing)
    return None


def _ways(reach: int, of_these: int, others: int) -> Iterator[int]:
    """In how many ways `reach` hospitals hold 0, 1, 2 ... of these, and the rest of the others."""
    least, most = max(0, reach - others), min(reach, of_these)
    yield from (0 for _ in range(least))
    ways = comb(of_these, least) * comb(others, reach - least)
    for count in range(least, most + 1):
        yield ways
        ways = ways * (of_these - count) * (reach - count) // ((count + 1) * (others - reach + count + 1))
    yield from (0 for _ in range(most, reach))


def _within(ways: int, hospitals: int, reach: int, bits: int) -> bool:
    """Whether at any of n places one of so many choices is met with probability at most 2^-bits."""
    return (ways * hospitals) << bits <= comb(hospitals, reach)


def _rarely_all(hospitals: int, colluders: int, count: int) -> bool:
    return _within(comb(colluders, count), hospitals, count, _UNSAFE_BITS)


def _most_among(reach: int, hospitals: int, colluders: int) -> int:
    """The smallest c such that more collude among `reach` hospitals with probability at most 2^-121 at any place."""
    more, most = 0, reach
    for ways in reversed(list(_ways(reach, colluders, hospitals - colluders))):
        more += ways
        if most == 0 or not _within(more, hospitals, reach, _UNSAFE_BITS):
            break
        most -= 1
    return most


def _rarely_fewer(hospitals: int, quorum: int, reach: int, least: int) -> bool:
    """Whether of any `reach` hospitals at least `least` are in V, but for 2^-20, when all but `quorum` are lost by chance."""
    if least > reach:
        return False
    fewer = sum(ways for ways, _ in zip(_ways(reach, quorum, hospitals - quorum), range(least), strict=False))
    return _within(fewer, hospitals, reach, CORRECTNESS_BITS)


def circle_order(hospitals: Sequence[str], transcript: str) -> tuple[str, ...]:
    """The hospitals in the order that the transcript T, in hex, puts them in: a uniform permutation to whoever has not tried."""

    def place(name: str) -> bytes:
        return hashlib.sha256(b"\0".join((_PURPOSE, transcript.encode("ascii"), name.encode()))).digest()

    return tuple(sorted(hospitals, key=place))


def mask_circle(hospitals: Sequence[str], transcript: str, bounds: MaskBounds) -> MaskCircle:
    """The graph of the sum with this transcript."""
    return MaskCircle(circle_order(hospitals, transcript), bounds.reach, bounds.least)
