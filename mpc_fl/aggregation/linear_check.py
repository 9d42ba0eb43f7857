"""Are the slices of a sum what was added up? All find out from a few numbers of each hospital, before anything is opened.

Slice k of the masked summands y_i, i in V, is with its opener (`slices`), who tells all its total Y_k, still masked. Whoever
holds y_i and is not the opener has only its own. The check, on words of Z_2^32 or Z_2^64:
  1. everything is fixed: all have signed the hashes of their slices, the openers have confirmed that they hold what these
     hashes say, and have told the totals
  2. a coin that nobody could know: the hash of one random number of each hospital of V, committed to before step 1
     (`commitment`) and shown after it (`joint_coin`)
  3. the coin gives a linear map L into a few words (`LinearMap`). Each hospital tells L(slice k of y_i) for all k
  4. L(Y_k) must be their sum. If it is, Y_k is right but for the probability below
  5. if not, the opener shows all the slices that it holds. Against their signed hashes everybody finds (`who_deviates`) the
     opener, if they are not what was signed or do not add up to its total, or else those whose numbers do not fit them

L, and what escapes. An error E in Y_k, E not 0, escapes when L(E) = 0, with L drawn after E is fixed. L is two folds, one after
the other, and then combinations of what they leave:
  - a fold cuts the words into rows E_b of `row` words, shifts each by a random s_b of 0 .. `shifts` - 1 places and adds up, into
    row + shifts - 1 places: the polynomial sum over b of X^s_b E_b(X), over Z_2^32 or Z_2^64. It does so `copies` times, with
    shifts that are all independent. One copy misses E with probability at most 1 / shifts. For take a row E_b that is not 0, and
    all shifts but its own as given: the copy is 0 for one given value of X^s_b E_b(X) alone, and of these no two are equal,
    because the lowest power of X in them differs. So all copies miss it with probability at most shifts^-copies
  - `combinations` combinations of what the second fold leaves, with uniform coefficients. One misses words that are not all 0
    with probability at most 1/2, which is reached by 2^31 (or 2^63): half of all coefficients are even
The second fold and the combinations see something that is not 0 unless the step before missed, and are drawn independently. So
at most 2^-42 + 2^-44 + 2^-44 with the sizes here, less than 2^-41. No range of values enters. (Uniform combinations of the
words themselves need 40 / (h + 1) of them and a range check, h the bits of headroom of the sum: 40 with the default bound and
fraction bits, where h is 0, and each costs a key stream as long as the vector. Folds need a few random bits a row, and three
additions a word.)

Who learns what. What is told is a function of the y_i, which are uniform given their sum (`closed_sum`): nothing of a
summand, and as long as no key has left nothing of the sum. The same holds of slices that step 5 shows: they are what an
aggregator would be sent.

What it does not find. An opener who adds E to its total and L(E) to its own numbers has done what it could do by itself:
nobody else holds its own slice, and E is as if its summand had been another one. It chooses E without knowing the sum,
because keys leave after the check. (Were the slices opened first, as the order of steps suggests, it could choose what its slice
of the result is.) But that summand is no longer what was checked, if norms are: then the next hospital of V keeps a copy of the
opener's own slice (`Slices.keeper`), of the signed hash, and tells L of it in step 3. Where the two differ it shows the copy: if
that is what the hash says, and not what the opener told, the opener is named, else the keeper.

Cost. Three additions a word, for a hospital's own summand and for the totals: under a nanosecond each on one core.
`combinations` words a slice from each hospital to all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError

COIN_BYTES = 32
_WORDS: dict[torch.dtype, type[np.generic]] = {torch.int32: np.int32, torch.int64: np.int64}


@dataclass(frozen=True)
class Fold:
    """How words are folded: rows of `row` words, each shifted by 0 .. `shifts` - 1 places (a power of two), `copies` times."""

    row: int
    shifts: int
    copies: int

    @property
    def escapes(self) -> float:
        """The largest probability with which all copies miss an error."""
        return float(self.shifts) ** -self.copies

    @property
    def length(self) -> int:
        """How many words a folded vector has, whatever its length was."""
        return self.copies * (self.row + self.shifts - 1)

    def rows(self, count: int) -> int:
        """Of a vector of `count` words."""
        return -(-count // self.row)

    def of(self, words: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Words (count,) of int32 or int64, folded by `shifts` (copies, rows): (`length`,) of the same dtype."""
        folded = np.zeros((self.copies, self.row + self.shifts - 1), words.dtype)
        for number, places in enumerate(shifts.T.tolist()):  # all copies of a row while it is in the cache
            row = words[number * self.row : (number + 1) * self.row]
            for copy, place in zip(folded, places, strict=True):
                moved = copy[place : place + len(row)]
                np.add(moved, row, out=moved)
        return folded.reshape(-1)


@dataclass(frozen=True)
class MapSize:
    """The parts of the linear map; see the head of this module."""

    first: Fold = Fold(row=1 << 14, shifts=1 << 14, copies=3)
    second: Fold = Fold(row=1 << 11, shifts=1 << 11, copies=4)
    combinations: int = 44

    @property
    def escapes(self) -> float:
        """The largest probability with which an error in a slice is not found."""
        return self.first.escapes + self.second.escapes + 2.0**-self.combinations


MAP_SIZE = MapSize()


class LinearMap:
    """L, which a coin of 32 bytes defines for vectors of any length over Z_2^32 (int32) and Z_2^64 (int64)."""

    def __init__(self, coin: bytes, size: MapSize = MAP_SIZE) -> None:
        self.size = size
        self._public = Seed(coin)  # known to all: it hides nothing
        self._shifts: dict[tuple[str, int], np.ndarray] = {}
        self._drawn: dict[torch.dtype, np.ndarray] = {}

    def of(self, words: torch.Tensor) -> torch.Tensor:
        """L of int32 or int64 words, shape (count,): (`combinations`,) of the same dtype."""
        if not words.numel():
            return torch.zeros(self.size.combinations, dtype=words.dtype)
        folded = words.detach().numpy()
        for which, fold in (("first", self.size.first), ("second", self.size.second)):
            folded = fold.of(folded, self._places(which, fold, len(folded)))
        return torch.from_numpy(np.einsum("cb,b->c", self._coefficients(words.dtype), folded))

    def _places(self, which: str, fold: Fold, count: int) -> np.ndarray:
        """How far each row of `count` words is shifted in each copy, (copies, rows), uniform."""
        rows = fold.rows(count)
        if (which, rows) not in self._shifts:
            words = self._public.stream("shifts", which, rows).words(fold.copies * rows, np.uint32)
            self._shifts[which, rows] = (words & np.uint32(fold.shifts - 1)).reshape(fold.copies, rows)
        return self._shifts[which, rows]

    def _coefficients(self, dtype: torch.dtype) -> np.ndarray:
        """Of each combination those of all words of the second fold, uniform in the ring."""
        if dtype not in self._drawn:
            shape = (self.size.combinations, self.size.second.length)
            stream = self._public.stream("combinations", str(dtype))
            self._drawn[dtype] = stream.words(math.prod(shape), _WORDS[dtype]).reshape(shape)
        return self._drawn[dtype]


# ---- the coin ----------------------------------------------------------------------------------------------------------


def commitment(transcript: str, hospital: str, number: bytes) -> str:
    """What a hospital says of its random number of 32 bytes before it shows it, hex: it fits this sum and this hospital alone."""
    return hashlib.sha256(f"mpc-fl coin {transcript} {hospital} ".encode() + number).hexdigest()


def require_number(transcript: str, hospital: str, committed: str, shown: object) -> bytes:
    """The random number that a hospital shows (hex). Raises `ProtocolError` naming it when it did not commit to this one."""
    try:
        number = bytes.fromhex(shown) if isinstance(shown, str) else b""
    except ValueError:
        number = b""
    if len(number) != COIN_BYTES or commitment(transcript, hospital, number) != committed:
        raise ProtocolError(
            f"{hospital} showed another part of the coin than it committed to",
            f"{hospital} does not follow the protocol; nothing of this sum was opened",
            hospital,
        )
    return number


def joint_coin(bound: str, numbers: Mapping[str, bytes]) -> bytes:
    """The coin of all of V: 32 bytes. Uniform to all who have committed before they knew the number of one honest hospital."""
    digest = hashlib.sha256(f"mpc-fl joint coin {bound} ".encode())
    for name in sorted(numbers):
        digest.update(hashlib.sha256(name.encode()).digest() + numbers[name])
    return digest.digest()


# ---- the numbers, and who deviates -------------------------------------------------------------------------------------


def as_numbers(words: torch.Tensor) -> list[int]:
    """Words of L for a message."""
    return [int(word) for word in words.tolist()]


def from_numbers(numbers: object, hospital: str, size: MapSize, dtype: torch.dtype) -> torch.Tensor:
    """Words of L from a message of `hospital`. Raises `ProtocolError` naming it when they are none."""
    limits = torch.iinfo(dtype)
    if (
        not isinstance(numbers, list)
        or len(numbers) != size.combinations
        or not all(type(number) is int and limits.min <= number <= limits.max for number in numbers)
    ):
        raise ProtocolError(f"{hospital} sent something else than combinations of its slices", SAME_VERSION, hospital)
    return torch.tensor(numbers, dtype=dtype)


def fits(linear: LinearMap, total: torch.Tensor, told: Sequence[torch.Tensor]) -> bool:
    """Step 4: whether L of a slice's total (count,) is the sum of what the hospitals told of theirs, each (combinations,)."""
    return torch.equal(linear.of(total), torch.stack(list(told)).sum(0, dtype=total.dtype))


@dataclass(frozen=True, repr=False)
class Evidence:
    """What there is to judge one slice by: its opener and total, and of each hospital of V the hash that it signed of its
    slice, the slice that the opener shows, and what the hospital told of it.
    """

    opener: str
    total: torch.Tensor
    signed: Mapping[str, str]
    shown: Mapping[str, torch.Tensor]
    told: Mapping[str, torch.Tensor]


def who_deviates(linear: LinearMap, evidence: Evidence) -> tuple[str, ...]:
    """Step 5: the opener, or else those whose numbers are not those of their slices. Nobody when all fits.

    An opener has confirmed that it holds slices of these hashes, so one that shows others, or none, deviates.
    """
    total = torch.zeros_like(evidence.total)
    for name, digest in evidence.signed.items():
        words = evidence.shown.get(name)
        if words is None or words.shape != total.shape or words.dtype != total.dtype or tensor_digest(words) != digest:
            return (evidence.opener,)
        total += words
    if not torch.equal(total, evidence.total):
        return (evidence.opener,)
    return tuple(
        name for name, words in evidence.shown.items() if not torch.equal(linear.of(words), evidence.told[name])
    )
