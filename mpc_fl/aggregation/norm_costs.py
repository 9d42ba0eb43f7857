"""What a norm check costs a hospital in bytes and messages, before it, in both arrangements (`norm_check`, `peer_norm_check`).

Of a check in which all hospitals pass: whoever is accused shows more. Among peers words are signed, and each repeats what all said
before it; with an aggregator the words are its own, some hundred bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import ProofSize

_ELEMENT = 16  # bytes of an element of the field, as it is sent
_PARTS = 3  # of a proof: each a tensor to the first verifier
# Among peers: words that are said to each other hospital, "heard" with them; bytes of one, and for each hospital of what it repeats
# (a digest and a signature, hex); of a commitment, of which there are four and two for each proof between two hospitals.
_WORDS = 7
_WORD, _REPEATED, _COMMITMENT = 350, 235, 68
_COINS = 4
_COMBINATIONS = 500  # of the copy that a hospital keeps


@dataclass(frozen=True)
class CheckCosts:
    """Bytes and messages that each hospital sends for one check, beyond those of its sum."""

    bytes_sent: int
    messages: int


def costs_with_aggregator(test: NormTest, hospitals: int) -> CheckCosts:
    """Of a check that the opener of the sum leads: a proof in three parts, and the answers about all others."""
    size, others = ProofSize(test, hospitals), hospitals - 1
    return CheckCosts(_ELEMENT * (sum(size.of_parts) + others * size.answers), _PARTS + 1)


def costs_among_peers(test: NormTest, hospitals: int, summand_bytes: int) -> CheckCosts:
    """Of a check among peers of summands of so many bytes: a proof to one hospital, answers to all, and the copy of a slice."""
    size, others = ProofSize(test, hospitals - 1), hospitals - 1
    proof, answers = _ELEMENT * sum(size.of_parts), _ELEMENT * others * size.answers
    words = _WORDS * (_WORD + _REPEATED * hospitals) + _COMMITMENT * (_COINS + 2 * others) + _COMBINATIONS
    return CheckCosts(
        proof + others * (answers + words) + summand_bytes // hospitals, _PARTS + 1 + others * (_WORDS + 1)
    )
