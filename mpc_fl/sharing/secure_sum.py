"""Secure sums: every party adds its private tensor, only the sum can be opened.

Protocol (`secure_sum`), party i of n:
  1. encode x_i in Z_2^64 (refused when it does not fit), multiply by the integer weight w_i if there is one
  2. add a share of zero: the signed sum of masks expanded from the pairwise seeds of a complete graph
  3. the result is party i's CrypTen arithmetic share of sum_i w_i x_i

Security. Pairwise seeds are X25519 secrets made for this run, masks are an AES-256 key stream under labels used once.
To anyone who lacks the seed of at least one pair of honest parties the shares of that pair are uniform given their sum
(Bonawitz et al., CCS 2017, section 4, with all parties present), so n-2 colluding parties learn the sum of the other
two and nothing else. Semi-honest parties; a party may lie about its own input.

Rounds and bytes. Steps 1 to 3 are local: 0 rounds, 0 bytes. Opening to one party costs one message of 8 bytes per
element from each other party (`opening.open_to`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mpc_fl.audit.reveal_ledger import Scalar
from mpc_fl.crypto.ring import FixedPoint, Headroom, RingShare
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.sharing.crypten_parts import mpc_tensor_from_share
from mpc_fl.sharing.opening import SecretDomain, open_to


def secure_sum(
    domain: SecretDomain, encoded: Private[torch.Tensor], fraction_bits: int, what: str = "a sum over parties"
) -> Shared[Any]:
    """This party's share of the sum of all parties' tensors of one shape, `fraction_bits` kept with it.

    `what` names the sum, alike at all parties: they sign it when it is opened.
    int64: a CrypTen tensor over Z_2^64. int32: a `RingShare` over Z_2^32, masked by the zero-share that `open_to` adds.
    """
    elements = encoded.inside_protocol()
    if elements.dtype == torch.int32:
        return Shared(what, RingShare(elements, fraction_bits))
    share = elements + domain.runtime.zero_share(elements.shape)
    return Shared(what, mpc_tensor_from_share(share, fraction_bits))


def encode_weighted(
    update: Private[torch.Tensor], weight: Private[int], headroom: Headroom
) -> tuple[Private[torch.Tensor], Private[torch.Tensor]]:
    """Encode weight * update (shape (P,)) and weight (shape (1,)) as int64, with the headroom checked first.

    Raises `HeadroomError` for NaN or infinity, for a coordinate beyond the bound, or for a weight beyond its bound.
    """
    headroom.require()
    count = weight.inside_protocol()
    counts = FixedPoint(0, float(headroom.weight_bound))
    encoded_count = counts.encode(torch.tensor([count], dtype=torch.float64), weight.label)
    encoded = headroom.fixed_point.encode(update.inside_protocol(), update.label) * count
    return Private(f"weighted {update.label}", encoded), Private(weight.label, encoded_count)


def weighted_mean(
    domain: SecretDomain,
    encoded_update: Private[torch.Tensor],
    encoded_weight: Private[torch.Tensor],
    fraction_bits: int,
    opener: str,
    why: str,
    privacy: Mapping[str, Scalar] | None = None,
) -> torch.Tensor | None:
    """The weighted mean of all updates, opened to `opener` alone (float64 of shape (P,)); `None` elsewhere.

    Opens exactly two sums: of weight * update and of weight. No party's weight or update can be told from them.
    """
    weighted = secure_sum(domain, encoded_update, fraction_bits, "sum of weighted updates")
    total = secure_sum(domain, encoded_weight, 0, "sum of weights")
    opened_sum = open_to(domain, weighted, [opener], why, privacy)
    opened_weight = open_to(domain, total, [opener], f"{why} (divisor)")
    if opened_sum is None or opened_weight is None:
        return None
    return opened_sum / float(opened_weight)
