"""Who deviates where a proof was not accepted among peers: the hospital that proved, or one that answered falsely about it?

The hospital that proved knows all right answers. What a verifier had to answer follows from the seed of the proof and the masks
that it has in common with that hospital, from the slices that it was sent, and at a first verifier from the corrections. All of
that both have committed to, or the hospital has signed and the verifier held against what was signed. So the hospital shows it
to all, and everybody computes the answer. The sum in which that happens is never opened with its summand, which other masks
hide yet; what is shown the verifier had. An honest verifier cannot be shown to be wrong, and an honest hospital whose proof was
not accepted can always show somebody. One message, and as many bytes as the accused verifier was sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.aggregation.norm_proof import whole_numbers
from mpc_fl.aggregation.peer_summands import PeerSummands
from mpc_fl.aggregation.prime_field import Vector, from_words, to_words
from mpc_fl.aggregation.proof_steps import PARTS, ProofSteps
from mpc_fl.aggregation.signed_words import DEVIATES
from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.aggregation.words import broadcast, next_word, say
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import KEY_BYTES, SummandMasks


def seed_hash(seed: bytes) -> str:
    """What two hospitals commit to of a seed of a proof, hex."""
    return hashlib.sha256(b"mpc-fl seed of a proof" + seed).hexdigest()


def committed_seed(summands: PeerSummands, hospital: str, prover: str, verifier: str) -> str:
    """What `hospital`, one of the two, committed to as the seed of this proof: after those of its own proof those of the
    others'."""
    said: Any = summands.committed[hospital]
    others = [name for name in summands.hospitals if name != hospital]
    return str(said["seeds"][others.index(verifier) if hospital == prover else len(others) + others.index(prover)])


@dataclass(frozen=True, repr=False)
class ShownAnswers:
    """At a hospital that knows all answers: its `seeds` of its own proof by verifier, the `digests` that all signed of their
    corrections, by part and hospital, and what it has of the check besides; `links` are those of the sum."""

    links: Links
    masks: SummandMasks
    seeds: Mapping[str, Seed]
    summands: PeerSummands
    sign_hash: SignHash
    proofs: ProofSteps
    digests: Mapping[str, Mapping[str, str]]

    def accuse(self, others: Sequence[str], false: Sequence[str]) -> None:
        """Show all others what these verifiers had to answer from."""
        keys = {
            name: {
                "seed": self.seeds[name].reveal_for_transport().hex(),
                "keys": [key.hex() for key in self.masks.own_keys(name)],
            }
            for name in false
        }
        say(self.links, others, "accused", false=keys)
        for verifier in false:
            for piece in self.summands.kept_by(verifier, self.masks.me):
                _show(self.links, others, f"accused {verifier} {piece}", self.summands.own[piece])
            if verifier == self.proofs.first:
                carries, bits, _, products = self.proofs.corrections
                for part, words in zip(PARTS, (carries, bits, products), strict=True):
                    _show(self.links, others, f"accused {part}", to_words(words))

    def shown_by(self, prover: str, answers: Mapping[str, torch.Tensor], until: float) -> list[str]:
        """The verifiers of which a hospital shows that they answered falsely. Raises `ProtocolError` for what shows nothing."""
        said = next_word(self.links, prover, ("accused", "void"), until).get("false")
        found = list[str]()
        for verifier, shown in said.items() if isinstance(said, dict) else ():
            if verifier not in answers or not isinstance(shown, dict):
                raise ProtocolError(f"{prover} accuses nobody who verified its proof", DEVIATES, prover)
            right = to_words(self._right_answer(prover, verifier, shown, until))
            if torch.equal(right, answers[verifier]):
                raise ProtocolError(f"{prover} accuses {verifier}, whose answer was right", DEVIATES, prover)
            found.append(verifier)
        return found

    def _right_answer(self, prover: str, verifier: str, shown: Mapping[str, Any], until: float) -> Vector:
        """What the verifier had to answer, from what the prover shows; all of it is what both had committed to."""
        summands, plan, test = self.summands, self.masks.plan, self.proofs.test
        seed = _key_of(shown.get("seed"), prover)
        if seed_hash(seed) != committed_seed(summands, prover, prover, verifier):
            raise ProtocolError(f"{prover} showed another seed of its proof than it committed to", DEVIATES, prover)
        names = [key for key in plan.keys_known_to(prover) if key[1] == prover and key[2] == verifier]
        values = shown.get("keys")
        keys = [_key_of(value, prover) for value in (values if isinstance(values, list) else [])]
        if len(keys) != len(names):
            raise ProtocolError(f"{prover} did not show the keys of its masks", DEVIATES, prover)
        for name, key in zip(names, keys, strict=True):
            summands.commitments.require(prover, name, key)
        slices = {
            piece: self._taken(
                prover,
                f"accused {verifier} {piece}",
                (test.dtype, (summands.slices.length(piece),), summands.hashes[prover][piece]),
                until,
            )
            for piece in summands.kept_by(verifier, prover)
        }
        corrections = None
        if summands.keeper(prover) == verifier:
            counts = self.proofs.size.of_parts
            corrections = [
                from_words(
                    self._taken(
                        prover, f"accused {part}", (torch.int64, (count, 2), self.digests[part][prover]), until
                    ),
                    prover,
                )
                for part, count in zip(PARTS, counts, strict=True)
            ]
        added = [kind == "closing" or plan.adds(prover, verifier) for kind, _, _ in names]
        masks = [(Seed(key).stream("mask"), not add) for key, add in zip(keys, added, strict=True)]
        share = self.sign_hash.fold_masks(masks, test.dtype) + summands.folded(self.sign_hash, slices)
        return self.proofs.answers_under(Seed(seed), whole_numbers(share), corrections)

    def _taken(
        self, sender: str, tag: str, what: tuple[torch.dtype, tuple[int, ...], str], until: float
    ) -> torch.Tensor:
        """A tensor of this dtype, shape and digest. Raises `ProtocolError` naming the sender for another one."""
        dtype, shape, digest = what
        words = self.links.receive_tensor(sender, tag, dtype, shape, until)
        if tensor_digest(words) != digest:
            raise ProtocolError(f"{sender} showed something else than it signed", DEVIATES, sender)
        return words


def _show(links: Links, others: Sequence[str], tag: str, words: torch.Tensor) -> None:
    broadcast(others, lambda name: links.send_tensor(name, tag, words))


def _key_of(text: object, prover: str) -> bytes:
    """A key or seed that is shown (hex). Two together may have committed to what is none."""
    try:
        key = bytes.fromhex(text) if isinstance(text, str) and len(text) == 2 * KEY_BYTES else b""
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ProtocolError(f"{prover} showed no key or seed of its proof", DEVIATES, prover)
    return key
