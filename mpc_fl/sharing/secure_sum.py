"""Secure sums: every party adds its private tensor, only the sum can be opened.

Protocol (`secure_sum`), party i of n:
  1. encode x_i in Z_2^64 (refused when it does not fit), multiply by the integer weight w_i if there is one
  2. add a share of zero (`zero_shares`): masks expanded from the pairwise seeds of a complete graph
  3. the result is party i's additive share of sum_i w_i x_i

Who learns what. Nobody anything before an opening; then those to whom `open_to` opens it learn the sum.

Security. Pairwise seeds are X25519 secrets made for this run, masks are an AES-256 key stream under labels used once.
To anyone who lacks the seed of at least one pair of honest parties the shares of that pair are uniform given their sum
(Bonawitz et al., CCS 2017, section 4, with all parties present), so n-2 colluding parties learn the sum of the other
two and nothing else. Semi-honest parties; a party may lie about its own input.

Rounds and bytes. Steps 1 to 3 are local: 0 rounds, 0 bytes. Opening to one party costs one message of 8 bytes per
element from each other party (`opening.open_to`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpc_fl.audit.opening_record import Scalar
from mpc_fl.crypto.memory_layout import own_copy
from mpc_fl.crypto.ring import FixedPoint, Headroom, RingShare
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.sharing.opening import SecretDomain, open_to


def secure_sum(
    domain: SecretDomain, encoded: Private[torch.Tensor], fraction_bits: int, what: str = "a sum over parties"
) -> Shared[RingShare]:
    """This party's share of the sum of all parties' tensors of one shape, `fraction_bits` kept with it; steps 2 and 3.

    `encoded` is int64 for a sum over Z_2^64, or int32 for one over Z_2^32, which only the zero-share of `open_to` masks.
    It stays as it is. `what` names the sum, alike at all parties: they sign it when it is opened. Nothing is sent, nobody
    learns anything.
    """
    share = own_copy(encoded.inside_protocol())
    if share.dtype == torch.int64:
        domain.zero_shares.add_zero_share(share)
    return Shared(what, RingShare(share, fraction_bits))


@dataclass(frozen=True, repr=False)
class WeightedUpdate:
    """One party's summands of a weighted mean: weight * update, int64 of shape (P,), and weight, int64 of shape (1,)."""

    update: Private[torch.Tensor]
    weight: Private[torch.Tensor]
    fraction_bits: int


def encode_weighted(update: Private[torch.Tensor], weight: Private[int], headroom: Headroom) -> WeightedUpdate:
    """Encode weight * update and weight, with the headroom checked first; step 1, of `update` of shape (P,).

    Raises `HeadroomError` for NaN or infinity, for a coordinate beyond the bound, or for a weight beyond its bound.
    """
    headroom.require()
    count = weight.inside_protocol()
    counts = FixedPoint(0, float(headroom.weight_bound))
    encoded_count = counts.encode(torch.tensor([count], dtype=torch.float64), weight.label)
    encoded = headroom.fixed_point.encode(update.inside_protocol(), update.label) * count
    return WeightedUpdate(
        Private(f"weighted {update.label}", encoded),
        Private(weight.label, encoded_count),
        headroom.fixed_point.fraction_bits,
    )


def weighted_mean(
    domain: SecretDomain,
    own: WeightedUpdate,
    opener: str,
    why: str,
    privacy: Mapping[str, Scalar] | None = None,
) -> torch.Tensor | None:
    """The weighted mean of all updates, opened to `opener` alone (float64 of shape (P,)); `None` elsewhere.

    Opens exactly two sums: of weight * update and of weight, which `opener` learns. No party's weight or update can be
    told from them. Two rounds, 8 (P + 1) bytes from each other party. Raises like `open_to`.
    """
    weighted = secure_sum(domain, own.update, own.fraction_bits, "sum of weighted updates")
    total = secure_sum(domain, own.weight, 0, "sum of weights")
    opened_sum = open_to(domain, weighted, [opener], why, privacy)
    opened_weight = open_to(domain, total, [opener], f"{why} (divisor)")
    if opened_sum is None or opened_weight is None:
        return None
    return opened_sum / float(opened_weight)
