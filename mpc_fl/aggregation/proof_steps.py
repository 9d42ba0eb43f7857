"""What a hospital computes in a norm check, step by step: its own proof, and its shares of those of the others.

It sends nothing. The same for both arrangements, which differ in who verifies, who tells what is public, and how messages
travel: with an aggregator (`norm_check`) it is the first verifier of all proofs; among peers (`peer_norm_check`) that of each
hospital is the next one. A verifier's share of a proof is a key stream that it has in common with the hospital that proves; the
first verifier's has a correction added, which the hospital sends: what the streams do not add up to. An aggregator has no
stream, so its share is the correction alone. The steps are those of `norm_proof`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mpc_fl.aggregation.norm_proof import (
    ProofSize,
    VerifierShare,
    Witness,
    answers_of,
    bits_of,
    centred_sketch,
    draw_point,
    draw_projections,
    draw_weights,
    products_of,
    square_sum,
    whole_numbers,
)
from mpc_fl.aggregation.prime_field import PRIME, Vector, to_words, zeros
from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import SummandMasks

PARTS = ("carries", "bits", "products")  # of a proof, in order


def proof_seeds(links: Links, hospitals: Sequence[str]) -> dict[str, tuple[Seed, Seed]]:
    """With each other hospital the seeds of the proof of this one and of the other's, which the two alone have; once per links."""
    pairs = {name: links.pairwise_seed(name, "norm check") for name in hospitals if name != links.name}
    return {name: (pair.derive("proof", links.name), pair.derive("proof", name)) for name, pair in pairs.items()}


def shares_of_masks(
    sign_hash: SignHash, masks: SummandMasks, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sketches of what the masks take away, (buckets,) of `dtype`, by other hospital: of its summand what this one knows, and of
    this one's what the other knows. What a hospital added to its summand, a verifier takes away."""

    def folded(streams: Iterable[tuple[Stream, bool]]) -> torch.Tensor:
        return sign_hash.fold_masks(((stream, not added) for stream, added in streams), dtype)

    others = [name for name in masks.plan.hospitals if name != masks.me]
    return {name: folded(masks.shared_masks(name)) for name in others}, {
        name: folded(masks.own_masks(name)) for name in others
    }


def stacked(answers: Sequence[Vector], size: ProofSize) -> torch.Tensor:
    """Answers about several proofs for a link: int64 (proofs, answers, 2)."""
    words = [to_words(answer) for answer in answers]
    return torch.stack(words) if words else torch.zeros(0, size.answers, 2, dtype=torch.int64)


def refusal_line(accused: Sequence[str]) -> str:
    """What a hospital says in its log whose proof was not accepted."""
    why = f"false answers of {', '.join(accused)}" if accused else "all answers are right, so the proof is wrong"
    return f"the proof of this hospital that its update is within its norm bound was not accepted: {why}"


class ProofSteps:
    """One check at a hospital: its own proof, and those of the others, of which it verifies what is in `rows`.

    `names`: its own, and that of the first verifier of its proof. `seeds`: with each other hospital that of its own proof, and
    of the other's. `shares` are this hospital's of the sketches of the others (int32 or int64, (buckets,)), `shares_of_mine` those
    of its own sketch at all its verifiers, as whole numbers. `given` has of the hospitals whose first verifier this one is the
    corrections that came.
    """

    def __init__(
        self,
        size: ProofSize,
        names: tuple[str, str],
        seeds: Mapping[str, tuple[Seed, Seed]],
        shares: Mapping[str, torch.Tensor],
        shares_of_mine: Mapping[str, Vector],
    ) -> None:
        self.size, self.test, (self.me, self.first) = size, size.test, names
        self.proof = Witness(size, {name: mine for name, (mine, _) in seeds.items()})
        self.verified = {name: Witness(size, {name: theirs}) for name, (_, theirs) in seeds.items()}
        self.shares, self.shares_of_mine = dict(shares), dict(shares_of_mine)
        self.corrections: list[Vector] = []
        self.given: dict[str, list[Vector]] = {}
        self.rows: tuple[str, ...] = ()
        self.within = self.proves = False
        self._told: list[str] = []

    def carries(self, told: str) -> Vector | None:
        """Step 2: the correction; `None` where the own sketch is too long, so that nothing can be proven."""
        self._expand(told)
        self._sketch, self._carries = centred_sketch(self.test, list(self.shares_of_mine.values()))
        self.within = square_sum(self._sketch) <= self.test.largest_square_sum
        return self._correction(self._carries % PRIME) if self.within else None

    def may_be(self, rows: Sequence[str]) -> bool:
        """Whether a check of these proofs can be: of each hospital once, of this one where it can prove something."""
        known = {*self.verified, self.me} if self.within else set(self.verified)
        return len(set(rows)) == len(rows) and set(rows) <= known

    def bits(self, told: str, rows: Sequence[str], seed: bytes) -> Vector | None:
        """Steps 3 and 4, for the proofs of `rows`: the correction; `None` where that of this hospital is not among them."""
        self.rows, self.proves = tuple(rows), self.me in rows
        self._projections = draw_projections(seed, self.test.buckets)
        self._expand(told)
        if not self.proves:
            return None
        self._bits = bits_of(self.size, self._projections, self._sketch, self._carries)
        correction = self._correction(self._bits)
        self.corrections.append(zeros(self.size.columns))  # of row 0
        return correction

    def products(self, told: str, seed: bytes) -> Vector | None:
        """Steps 5 and 6: the correction; `None` where this hospital proves nothing."""
        self.weights = draw_weights(seed, self.size)
        self._expand(told)
        if not self.proves:
            return None
        row_0 = self.proof.total(2)
        return self._correction(products_of(self.size, self.weights, self._sketch, self._bits, row_0))

    def take(self, name: str, correction: Vector) -> None:
        """The next correction of a hospital whose first verifier this one is."""
        given = self.given.setdefault(name, [])
        given.append(correction)
        if len(given) == 2:
            given.append(zeros(self.size.columns))

    def answers(self, seed: bytes) -> dict[str, Vector]:
        """Steps 7 and 8: this hospital's answers about each other hospital that proves, in the order of these."""
        self._point = draw_point(seed)
        return {
            name: self._answers(self.shares[name], witness.shares[name], self.given.get(name))
            for name, witness in self.verified.items()
            if name in self.rows
        }

    def false_answers(self, given: Mapping[str, torch.Tensor]) -> list[str]:
        """Of all who answered about this hospital (by name, as words for a link) those whose answers are not what they must be."""
        return [name for name, words in given.items() if not torch.equal(to_words(self._expected_of(name)), words)]

    def answers_under(self, seed: Seed, share: Vector, corrections: Sequence[Vector] | None) -> Vector:
        """What a verifier must answer that has this seed in common with the hospital that proves, this share of its sketch (whole
        numbers), and, where it is the first one, these corrections of three parts."""
        witness = Witness(self.size, {"verifier": seed})
        for part, told in zip(PARTS, self._told, strict=True):
            witness.expand(part, told)
        if corrections is not None:
            corrections = [*corrections[:2], zeros(self.size.columns), *corrections[2:]]
        return self._of_whole(share, witness.shares["verifier"], corrections)

    def _expected_of(self, name: str) -> Vector:
        corrections = self.corrections if name == self.first else None
        streams = self.proof.shares.get(name)
        if streams is None:
            assert corrections is not None
            streams = [zeros(len(piece)) for piece in corrections]
        return self._of_whole(self.shares_of_mine[name], streams, corrections)

    def _answers(self, share: torch.Tensor, streams: Sequence[Vector], corrections: Sequence[Vector] | None) -> Vector:
        return self._of_whole(whole_numbers(share), streams, corrections)

    def _of_whole(self, share: Vector, streams: Sequence[Vector], corrections: Sequence[Vector] | None) -> Vector:
        pieces = list(streams)
        if corrections is not None:
            pieces = [(stream + more) % PRIME for stream, more in zip(streams, corrections, strict=True)]
        held = VerifierShare.of(self.test, share, pieces)
        return answers_of(self.size, self._projections, self.weights, self._point, held, corrections is not None)

    def _expand(self, told: str) -> None:
        part = PARTS[len(self._told)]
        self._told.append(told)
        self.proof.expand(part, told)
        for name, witness in self.verified.items():
            if part == "carries" or name in self.rows:
                witness.expand(part, told)

    def _correction(self, values: Vector) -> Vector:
        """The next piece of the own proof: what the key streams of its verifiers do not add up to."""
        correction = (values - self.proof.total(len(self.corrections))) % PRIME
        self.corrections.append(correction)
        return correction
