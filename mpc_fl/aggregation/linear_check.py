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

L, and what escapes. An error E in Y_k, E not 0, escapes when L(E) = 0, with L drawn after E is fixed. L is two maps:
  - the words fall into `buckets` buckets under `hashes` public hashes (`sketch.SignHash`) that are independent. One misses E
    with probability at most 1 / buckets, in any ring. For take a block with E_b not 0 and condition on all but its shift, signs
    and sides: what it adds must be one given pattern. With w words of E_b not 0, at most w of the m = buckets / 2 shifts bring
    them to the places of that pattern, and each of the w falls on its side there with probability 1/2. w 2^-w / m is at
    most 1 / (2 m) for every w of at least 1
  - `combinations` uniform combinations of all buckets. One misses buckets that are not all 0 with probability at most 1/2,
    which is reached by 2^31 (or 2^63): half of all coefficients are even
So at most buckets^-hashes + 2^-combinations, 2^-41.6 here. No range of values enters. (Uniform combinations of the words
themselves need 40 / (h + 1) of them and a range check, h the bits of headroom of the sum: 40 with the default bound and
fraction bits, where h is 0, and each costs a key stream as long as the vector. Here three hashes of two bits a word do.)

Who learns what. What is told is a function of the y_i, which are uniform given their sum (`closed_sum`): nothing of a
summand, and as long as no key has left nothing of the sum. The same holds of slices that step 5 shows: they are what an
aggregator would be sent.

What it does not find. An opener who adds E to its total and L(E) to its own numbers has done what it could do by itself:
nobody else holds its own slice, and E is as if its summand had been another one. It chooses E without knowing the sum,
because keys leave after the check. (Were the slices opened first, as the order of steps suggests, it could choose what its slice
of the result is.) But that summand is no longer what was checked, if norms are: with a norm check the hospital's own
slice has to be with another one, too.

Cost. Some nanoseconds a word, twice; `combinations` words a slice from each hospital to all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError

COIN_BYTES = 32
_WORDS: dict[torch.dtype, type[np.generic]] = {torch.int32: np.int32, torch.int64: np.int64}


@dataclass(frozen=True)
class MapSize:
    """How long the parts of the linear map are; see the head of this module."""

    buckets: int = 1 << 14
    hashes: int = 3
    combinations: int = 44

    @property
    def escapes(self) -> float:
        """The largest probability with which an error in a slice is not found."""
        return float(self.buckets) ** -self.hashes + 2.0**-self.combinations


MAP_SIZE = MapSize()


class LinearMap:
    """L, which a coin of 32 bytes defines for vectors of any length over Z_2^32 (int32) and Z_2^64 (int64)."""

    def __init__(self, coin: bytes, size: MapSize = MAP_SIZE) -> None:
        self.size = size
        self._public = Seed(coin)  # known to all: it hides nothing
        self._hash_seeds = [self._public.derive("hash", number).reveal_for_transport() for number in range(size.hashes)]
        self._hashes: dict[int, list[SignHash]] = {}
        self._drawn: dict[torch.dtype, np.ndarray] = {}

    def of(self, words: torch.Tensor) -> torch.Tensor:
        """L of int32 or int64 words, shape (count,): (`combinations`,) of the same dtype."""
        if not words.numel():
            return torch.zeros(self.size.combinations, dtype=words.dtype)
        buckets = torch.cat([sign_hash.fold(words) for sign_hash in self._of_length(words.numel())])
        return torch.from_numpy(np.einsum("cb,b->c", self._coefficients(words.dtype), buckets.numpy()))

    def _coefficients(self, dtype: torch.dtype) -> np.ndarray:
        """Of each combination those of all buckets, uniform in the ring."""
        if dtype not in self._drawn:
            shape = (self.size.combinations, self.size.hashes * self.size.buckets)
            stream = self._public.stream("combinations", str(dtype))
            self._drawn[dtype] = stream.words(math.prod(shape), _WORDS[dtype]).reshape(shape)
        return self._drawn[dtype]

    def _of_length(self, length: int) -> list[SignHash]:
        if length not in self._hashes:
            self._hashes[length] = [SignHash(seed, length, self.size.buckets) for seed in self._hash_seeds]
        return self._hashes[length]


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
