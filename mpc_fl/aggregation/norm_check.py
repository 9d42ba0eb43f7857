"""Is each hidden update within its norm bound? Decided on shares; one bit per hospital is opened, to one party.

Input: sketches V_i (`sketch`, M buckets) of the updates of n hospitals, additively shared over Z_2^k, k = 32 or 64: the
opener folds the y_i it was sent, every other hospital the masks it has in common with i, hospital i itself has share zero.
So what is checked is what the sum is made of (`closed_sum`). T is the bound in grid units. For every i:
  1. all send hospital i their shares of V_i: nothing it could not compute itself from its summand and its masks
  2. i shares u_i, V_i divided by 2^s and rounded, over Z_2^64. A zero-share hides it, nothing is sent
  3. squares of u_i with the dealer's tuples; their sum is F_i (Beaver opens u_i - r, which fixes u_i)
  4. the opener draws K = 40 public vectors p over {-1, 0, 1} (1/4, 1/2, 1/4)
  5. comparisons on shares: |<p, u_i>| <= R and |<p, V_i - 2^s u_i>| <= R' modulo 2^k for every p, and F_i <= A
  6. every comparison that failed lets a random shared word through; their exclusive or is opened to the opener alone. It is
     zero if none failed, and otherwise uniform (zero with probability 2^-64), whichever failed: one bit

Who learns what. The opener learns for each hospital whether its update is within the bound; hospital i learns its own V_i,
which it could compute; the dealer learns shapes; nobody learns anything else.

Why i says what V_i is. Squares need a larger ring than the shares have. CrypTen's division by 2^s is wrong with probability
|V| / 2^32 per bucket for shares lifted from Z_2^32 by multiplying by 2^32: among thousands of buckets one would often fail an
honest update. Conversion to bits and back is exact and costs many times the bytes. So i supplies u_i, and steps 4 and 5 check
it. If a bucket of u_i is not within 2 R (modulo 2^64), or one of V_i - 2^s u_i not within 2 R' (modulo 2^k), then each p
finds it with probability 1/2, because p without this bucket cannot be within R together with p plus it or p minus it. A lie
passes with probability 2^-39. Within 2 R the squares cannot wrap: M (2 R)^2 < 2^63 is proven when the test is planned.

An honest hospital with |x| <= T passes. F has mean at most T^2 and variance at most 2 T^4 / M; with A for T^2 (1 + margin),
margin = sqrt(2400 / M), it is refused with probability below 1/1201 by Cantelli's inequality, whatever x is (below 1e-9 for
spread ones: the margin is 17 standard deviations). s is the largest with which u still has about 19 bits, so rounding
adds sqrt(M) / 2 of 2^19. R and R' are six times the norm that must pass: exceeded with probability below
2 exp(-36) per vector (|p|, 0 with 1/2, is sub-Gaussian of variance 1/2).

A vector with |x| >= 10 T is caught with probability above 0.99, also when it makes sums wrap: what passes has a centred
V of norm below 1.34 T, 1.8 T^2 squared, see `sketch`. Between T and 1.34 T either may happen.

Security. Semi-honest parties, except that a hospital may choose x_i as it likes before the hash is drawn and u_i after.
Messages are Beaver's openings (uniform), step 1, and one bit per hospital: that its update is within the bound, which holds
of honest ones, up to the probabilities above. The dealer sees shapes. The opener must not tell the seed to a hospital before
its summand is fixed. Not covered: a hospital that changes its shares within the computation; CrypTen's shares carry no MACs.

Rounds and bytes, N = n + 1 parties: 12 rounds and log N to the base 3/2, less one, about (14 for N = 4, 17 for N = 10). Sent to
every other party: 8 n M + 1288 n (24 + 2 N); to each other hospital k/8 M more (step 1). From the dealer to the last party:
8 n M + 1288 n (12 + N).
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.sketch import SEED_BYTES, SignHash
from mpc_fl.crypto.secrecy import Shared
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION_AND_CONFIGURATION, ProtocolError, SecrecyError
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.correlated_randomness import Request
from mpc_fl.sharing.crypten_parts import crypten, mpc_tensor_from_share, ring_share_of
from mpc_fl.sharing.crypten_runtime import CrypTenDomain
from mpc_fl.sharing.dry_run import record_requests, shape_share
from mpc_fl.sharing.opening import open_to

PROJECTIONS = 40
_WHAT = "whether each update is within its norm bound"


def projections(seed: bytes, buckets: int) -> torch.Tensor:
    """The public vectors p of step 4, int64 of shape (K, buckets), values -1, 0 and 1."""
    words = Seed(seed).stream("projections").words(PROJECTIONS * buckets, np.uint8)
    values = (words & 1).astype(np.int64) - (words >> 1 & 1)
    return torch.from_numpy(values.reshape(PROJECTIONS, buckets))


def _negative(values: torch.Tensor) -> Any:
    """Whether int64 shares hold negative values: `BinarySharedTensor` of their shape, 1 or 0 in bit 0.

    CrypTen's conversion to bits adds the parties' shares in pairs, 7 rounds for each level. Here they are reduced three
    to two without carrying, one round for each level, and two are added in the end (Wallace 1964). The result is exact.
    """
    words = crypten.mpc.primitives.BinarySharedTensor
    count = crypten.communicator.get().get_world_size()
    rest = words.stack([words(values, src=rank) for rank in range(count)])
    while rest.size(0) > 2:
        third = rest.size(0) // 3
        a, b, c = (rest[part * third : (part + 1) * third] for part in range(3))
        majority = ((a ^ c) & (b ^ c)) ^ c
        total = a ^ b ^ c
        total.share = torch.cat([total.share, majority.share << 1, rest.share[3 * third :]])
        rest = total
    return (rest[0] + rest[1] if count > 1 else rest[0]) >> 63 & 1


def _verdict(
    test: NormTest,
    u: torch.Tensor,
    folded: torch.Tensor,
    first: bool,
    draw: Callable[[], torch.Tensor],
    random_words: Callable[[tuple[int, ...]], torch.Tensor],
) -> Any:
    """Steps 3 to 6 on shares u (int64) and V, shape (n, M): an `MPCTensor` of n words. `first`: this is rank 0."""
    # 3. Squares.
    squares = crypten.mpc.primitives.beaver.square(mpc_tensor_from_share(u, 0)._tensor).share.sum(1, keepdim=True)
    # 4. and 5. What must not be negative. V - 2^s u in Z_2^k, lifted to Z_2^64; rank 0 adds what is public.
    vectors = draw().t()
    lift = 64 - test.ring_bits
    dropped = (folded.long() << lift) - (u << (lift + test.dropped_bits))
    of_kept, of_dropped = u @ vectors, dropped @ vectors
    values = torch.cat([of_kept, -of_kept, of_dropped, -of_dropped, -squares], dim=1)
    if first:
        ranges = [test.range_of_kept] * (2 * PROJECTIONS) + [test.range_of_dropped << lift] * (2 * PROJECTIONS)
        values = values + torch.tensor([*ranges, test.largest_square_sum])
    failed = _negative(values)
    # 6. The bit of each failed comparison becomes a word of ones, and lets a word through that nobody knows.
    failed.share = -(failed.share & 1)
    words = crypten.mpc.primitives.BinarySharedTensor.from_shares(random_words(tuple(failed.share.shape)), precision=0)
    let_through = (failed & words).share
    total = let_through[:, 0]
    for column in range(1, let_through.size(1)):
        total = total ^ let_through[:, column]
    return crypten.mpc.MPCTensor.from_shares(total, precision=0, ptype=crypten.mpc.binary)


@functools.lru_cache(maxsize=64)
def requests_of(test: NormTest, candidates: int, parties: int) -> tuple[Request, ...]:
    """What the check of so many candidates among so many computing parties asks of the dealer, in order."""
    shape = (candidates, test.buckets)

    def computation() -> Any:
        share = shape_share(shape, 0).share
        vectors = torch.zeros(PROJECTIONS, test.buckets, dtype=torch.int64)
        return _verdict(test, share, share, True, lambda: vectors, lambda size: shape_share(size, 0).share)

    return tuple(record_requests(computation, parties, 0))


def _program(domain: CrypTenDomain, test: NormTest, candidates: int) -> str:
    """The name of the dealer's program for this check, which is declared if it was not."""
    client = domain.runtime.dealer_client
    if client is None:
        raise SecrecyError("a norm check needs a dealer: it multiplies shares")
    name = f"norm check {candidates} {test.buckets}"
    if not client.declares(name):
        client.declare(name, requests_of(test, candidates, len(domain.runtime.world)))
    return name


def prepare_norm_check(domain: CrypTenDomain, test: NormTest, candidates: int) -> None:
    """Let the dealer make the tuples of the next check ahead of need. All parties of the world must call it alike."""
    name = _program(domain, test, candidates)
    assert domain.runtime.dealer_client is not None
    domain.runtime.dealer_client.prepare(name)


def norm_check(
    domain: CrypTenDomain, test: NormTest, folded: torch.Tensor, candidates: Sequence[str], opener: str, why: str
) -> list[bool] | None:
    """For each candidate whether its update is within the bound, at `opener`; `None` elsewhere.

    `folded` is this party's shares of all sketches, shape (candidates, buckets), of the test's dtype, rows in the order of
    `candidates`, which belong to the world as the opener does. All parties of the world call this alike; the runtime needs a
    dealer. One opening is recorded, of shape (candidates,). Raises `ProtocolError` for shares of another shape,
    `SecrecyError` without a dealer, `PeerLostError` when a party or the dealer is gone or late.
    """
    runtime, links = domain.runtime, domain.runtime.links
    shape = (len(candidates), test.buckets)
    if folded.shape != shape or folded.dtype != test.dtype or not candidates:
        raise ProtocolError(
            "shares of sketches have another shape or ring than their check", SAME_VERSION_AND_CONFIGURATION
        )
    if not {*candidates, opener} <= set(runtime.world):
        raise ProtocolError("a norm check names parties outside of its world", SAME_VERSION_AND_CONFIGURATION)
    name = _program(domain, test, len(candidates))
    # 1. To each candidate its own sketch.
    for row, candidate in enumerate(candidates):
        if candidate != links.name:
            links.send_tensor(candidate, "own sketch", folded[row])
    u = runtime.zero_share(shape)
    if links.name in candidates:
        row = candidates.index(links.name)
        own = folded[row].clone()
        for other in runtime.world:
            if other != links.name:
                own += links.receive_tensor(other, "own sketch", test.dtype, (test.buckets,))
        # 2.
        u[row] += test.kept(own)

    def draw() -> torch.Tensor:
        if links.name == opener:
            drawn = secrets.token_bytes(SEED_BYTES)
            for other in runtime.world:
                if other != opener:
                    links.send_tensor(other, "projections", torch.frombuffer(bytearray(drawn), dtype=torch.uint8))
        else:
            received = links.receive_tensor(opener, "projections", torch.uint8, (SEED_BYTES,))
            drawn = received.numpy().tobytes()
        return projections(drawn, test.buckets)

    # 3. to 6.
    assert runtime.dealer_client is not None
    with runtime.dealer_client.program(name), torch.no_grad():
        verdict = _verdict(test, u, folded, runtime.rank == 0, draw, lambda size: runtime.elements(size, 64))
    opened = open_to(domain, Shared(_WHAT, ring_share_of(verdict)), [opener], why)
    return None if opened is None else [float(word) == 0 for word in opened]


@dataclass(frozen=True)
class NormCheck:
    """The check of the summands of a closed sum, for vectors of `parameters` elements.

    The world of the runtime must be those whose summands came, and the opener; `norm_check_session` makes it for each sum.
    """

    test: NormTest
    parameters: int

    def at_opener(self, domain: CrypTenDomain, closed: ClosedSum, say_check: Callable[..., None]) -> list[str]:
        """Draw the hash, tell it, fold the summands that came; returns the hospitals that passed. They must be kept."""
        candidates, seed = closed.present, secrets.token_bytes(SEED_BYTES)
        say_check(hospitals=list(candidates), sketch=seed.hex())
        sign_hash = SignHash(seed, self.parameters, self.test.buckets)
        folded = torch.stack([sign_hash.fold(closed.summands[name].reshape(-1)) for name in candidates])
        passed = self._run(domain, folded, candidates, closed.plan.opener, closed.plan.name)
        assert passed is not None
        return [name for name, within in zip(candidates, passed, strict=True) if within]

    def at_hospital(self, domain: CrypTenDomain, masks: SummandMasks, word: Mapping[str, Any]) -> None:
        """Fold the masks this hospital has in common with each other one, and take part."""
        candidates, seed = word.get("hospitals"), word.get("sketch")
        if (
            not isinstance(candidates, list)
            or not isinstance(seed, str)
            or not set(candidates) <= {*masks.plan.hospitals}
        ):
            raise ProtocolError(
                f"{masks.plan.opener} began a check without hospitals or seed", SAME_VERSION_AND_CONFIGURATION
            )
        try:
            sign_hash = SignHash(bytes.fromhex(seed), self.parameters, self.test.buckets)
        except ValueError:
            raise ProtocolError(
                f"{masks.plan.opener} began a check without a seed", SAME_VERSION_AND_CONFIGURATION
            ) from None
        folded = torch.zeros(len(candidates), self.test.buckets, dtype=self.test.dtype)
        for row, name in enumerate(candidates):
            if name != masks.me:  # its own share is zero: it cannot show the check anything but what it sent
                # What i added to its summand is taken away here.
                shares = ((stream, not added) for stream, added in masks.shared_masks(name))
                folded[row] = sign_hash.fold_masks(shares, self.test.dtype)
        self._run(domain, folded, candidates, masks.plan.opener, masks.plan.name)

    def _run(
        self, domain: CrypTenDomain, folded: torch.Tensor, candidates: Sequence[str], opener: str, name: str
    ) -> list[bool] | None:
        if set(domain.runtime.world) != {*candidates, opener}:
            raise ProtocolError("a norm check needs a world of those whose summands came", "begin the sum again")
        return norm_check(domain, self.test, folded, list(candidates), opener, f"norm check of '{name}'")
