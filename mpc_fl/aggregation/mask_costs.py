"""What the masks of one sum cost for any number of hospitals, before it: neighbours, keys, key streams, bytes.

Bytes are those beyond the summand itself, as JSON and tensors have them: commitments, confirmations and keys. What grows with
their number in any case is counted apart, since whoever opens or records a sum must know who was in it: the names of V.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpc_fl.aggregation.rules import Rules
from mpc_fl.sharing.closed_sum import KEY_BYTES

_COMMITMENT = 2 * KEY_BYTES + 4  # hex, quoted, with comma and space
_SIGNATURE = 144  # hex of a P-256 signature in DER, at most
_MESSAGE = 60  # a frame and its word
_QUOTED = 4
_ENTRY = _SIGNATURE + 2 * _QUOTED


@dataclass(frozen=True)
class MaskCosts:
    """Of one sum over n hospitals of which n - quorum are lost; per hospital, but for what the opener does.

    `keys` it holds and commits to, `streams` it expands over its summand, `opener_streams` the opener expands when all are
    there and `opener_streams_at_quorum` otherwise. `bytes_sent` and `bytes_received` beyond the summand and without
    `bytes_of_names`. `against`: so many hospitals of the sum may pool with the aggregator.
    """

    neighbours: int
    keys: int
    streams: int
    opener_streams: int
    opener_streams_at_quorum: int
    bytes_sent: int
    bytes_received: int
    bytes_of_names: int
    against: int


def mask_costs(rules: Rules, hospitals: int) -> MaskCosts:
    """Of a sum by these rules over so many hospitals with names as long as the longest of the federation."""
    bounds, quorum = rules.bounds(hospitals), min(rules.smallest, hospitals)
    closing = min(rules.closing, hospitals - 1)
    neighbours, against = hospitals - 1, quorum - 2
    if bounds is not None:
        assert rules.colluders is not None
        closing, neighbours, against = bounds.closing if rules.closing else 0, bounds.neighbours, rules.colluders
    joint = closing if rules.check is not None else min(closing, 1)
    name = max(map(len, rules.hospitals))
    missing = -(-neighbours * (hospitals - quorum) // hospitals) if rules.closing else 0
    keys = neighbours + 2 * closing
    confirmations = hospitals if bounds is None else min(neighbours + 1, hospitals)
    sent = 2 * _MESSAGE + _SIGNATURE  # "ready" and the header of the summand; confirmation and keys
    if rules.closing:
        sent += 2 * _MESSAGE + _COMMITMENT * keys + KEY_BYTES * (2 * closing + missing)
    return MaskCosts(
        neighbours=neighbours,
        keys=keys,
        streams=neighbours + joint,
        opener_streams=hospitals * joint,
        opener_streams_at_quorum=quorum * (joint + missing),
        bytes_sent=sent,
        bytes_received=(4 if rules.closing else 2) * _MESSAGE + confirmations * (name + _ENTRY),
        bytes_of_names=hospitals * (name + _QUOTED) if rules.closing else 0,
        against=against,
    )
