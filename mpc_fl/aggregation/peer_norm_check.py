"""The norm check without an aggregator: each hospital proves that its summand is short to all others, who find out together.

What is proven, shares and answers are those of `norm_check` (`proof_steps`, `norm_proof`), in the other arrangement. The y_i of a
peer sum (`peer_sum`) lie cut into slices with the hospitals U, of which the one after i keeps i's own slice, too
(`Slices.keeper`): that one is the first verifier of i. Each other hospital j folds the slices of y_i that it keeps and the masks
that it has in common with i. These are all shares of the sketch V_i, and i has none. For every i in U, at the same time:
  1. all show the first of four random numbers that they have committed to with the hashes of their slices ("sketch"); hashed
     together they are the seed of the sketch. i folds its y_i and learns V_i. If it is too long, i says so and is left out
  2. i sends the correction of its carries to its first verifier, and when that has come signs its hash and shows the next number
     ("carries"); so it does with bits ("bits") and products ("products"). So each public number is drawn when the step before it is
     fixed at all verifiers: a first verifier shows its part of the next one only when it has what it is for
  3. all have recorded the opening, and tell all their answers to the point that the last numbers make ("answers", signed hashes),
     then what they have heard ("judged"). All know of every i, alike, whether it passed
  4. who proved and did not pass knows all right answers. It shows whose was false ("accused"): the seed and the masks that it
     has in common with that verifier, and the slices and corrections that it sent to it, all of which are committed to.
     Everybody computes the right answer: a verifier that is shown to have answered falsely is named by all (`ProtocolError`)
     and nothing is opened; who cannot show that deviates itself, and is left out (`shown_answers`)
Each word repeats what was heard before it (`signed_words`), so whoever tells two hospitals different things is named.

Who learns what. All of U learn of each hospital whether its update is within the bound; nothing else.

Security, against a hospital that deviates. As in `norm_check`: it passes with a sketch that is too long with probability below
2^-38, whatever it sends, as long as the others follow the protocol. It cannot choose what is drawn, because one honest number
is unknown when the others are committed to; whoever does not show its own makes the sum void, and that is lost with it. What
passed is what is summed: the hashes of all slices are signed before anything is drawn, keys of masks and seeds of proofs
committed to by both who have them, and the copies of own slices are compared in the linear check (`slice_totals`). *Two
hospitals together can pass*, both, as with an aggregator, and the sum is held against the bounds of all by each of V. An honest
hospital within its bound cannot be left out by false answers: who gave them is. It cannot be accused either: what it answered
follows from what both committed to.

Secrecy, against n - 2 hospitals that deviate together. Shares of proofs are key streams at all verifiers and what is sent is
what these do not add up to: uniform to all who lack one honest stream, row 0 of the polynomials with it. Streams are under the
digest of all that was drawn and said: who was told different things holds shares that do not fit. Answers are given once. So an
honest hospital within the bound opens a constant. What an accusation shows the accused knew; the summands that it is about are
masked by others yet, and are never opened.

A hospital that is lost or late makes the sum void (`SumLostError`), for a check needs all of U: the caller goes on without it.
One that sends its first verifier nothing, and the others their words, is named by that verifier alone.

Rounds and bytes. `steps` messages one after the other. A hospital sends 16 (M + bits + 66) bytes to its first verifier and 16
(n - 1) (M / 16 + bits / 16 + 3) of answers to each other one (`ProofSize`), and six words of a few hundred bytes for each
hospital.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpc_fl.aggregation.linear_check import COIN_BYTES, commitment, joint_coin, require_number
from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import ProofSize, Transcript, accepted, whole_numbers
from mpc_fl.aggregation.peer_summands import PeerSummands
from mpc_fl.aggregation.prime_field import Vector, from_words, to_words, zeros
from mpc_fl.aggregation.proof_steps import PARTS, ProofSteps, proof_seeds, refusal_line, shares_of_masks, stacked
from mpc_fl.aggregation.shown_answers import ShownAnswers, committed_seed, seed_hash
from mpc_fl.aggregation.signed_words import DEVIATES, Signed, Subject, heard, repeated, require_one_version, say_signed
from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.aggregation.words import broadcast, hear_all
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.opening_record import Opening
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import SummandMasks
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

WHAT = "whether each update is within its norm bound"
_COINS = ("sketch", *PARTS)
# A part of a proof goes to one hospital before all wait for the word of that one, so it has a step of its own.
_SKETCH, _CARRIES, _BITS, _PRODUCTS, _ANSWERS, _JUDGED, _ACCUSED = 0, 1, 3, 5, 7, 8, 9
_STEPS = 10
_HEX = 64


class PeerNormCheck:
    """One check at a hospital (`rules.PeerCheck`), for vectors of `parameters` elements, over `links` of this sum alone."""

    steps = _STEPS

    def __init__(
        self, test: NormTest, parameters: int, domain: SecretDomain, links: Links, masks: SummandMasks
    ) -> None:
        self.test, self.parameters, self.domain, self.links, self.masks = test, parameters, domain, links, masks
        self.plan, self.me = masks.plan, masks.me
        hospitals = self.plan.hospitals
        at = hospitals.index(self.me)
        self.others = (*hospitals[at + 1 :], *hospitals[:at])
        self.size = ProofSize(test, len(hospitals) - 1)
        self.seeds = proof_seeds(links, hospitals)
        self.numbers = {word: Seed.from_system().reveal_for_transport()[:COIN_BYTES] for word in _COINS}
        self._before: tuple[Subject, dict[str, Signed]] | None = None
        self._digests: dict[str, dict[str, str]] = {}  # of the corrections of each part, by hospital; "" for none

    # ---- what is committed to ------------------------------------------------------------------------------------------

    @property
    def committed(self) -> object:
        """Commitments to this hospital's four numbers, and to the seeds of proofs: its own with each other one, then theirs."""
        pairs = [self.seeds[name] for name in self._others_of(self.me)]
        return {
            "coins": [commitment(self._label(word), self.me, self.numbers[word]) for word in _COINS],
            "seeds": [
                seed_hash(seed.reveal_for_transport()) for seed in [*(p[0] for p in pairs), *(p[1] for p in pairs)]
            ],
        }

    def require_committed(self, hospital: str, said: object) -> None:
        """Raise `ProtocolError` naming the hospital where this cannot be what it has committed to."""
        lengths = {"coins": len(_COINS), "seeds": 2 * len(self.others)}
        if not isinstance(said, dict) or not all(_are_hashes(said.get(key), count) for key, count in lengths.items()):
            raise ProtocolError(f"{hospital} did not commit to what a norm check draws", SAME_VERSION, hospital)

    def _others_of(self, hospital: str) -> list[str]:
        return [name for name in self.plan.hospitals if name != hospital]

    def _label(self, word: str) -> str:
        return f"{self.plan.transcript} {word}"

    def _require_one_seed(self) -> None:
        for prover in self.plan.hospitals:
            for verifier in self._others_of(prover):
                one, other = (committed_seed(self.summands, name, prover, verifier) for name in (prover, verifier))
                if one != other:
                    raise ProtocolError(
                        f"{prover} and {verifier} committed to different seeds of a proof of '{self.plan.name}'",
                        "one of these two does not follow the protocol; nothing was opened",
                    )

    # ---- the steps -----------------------------------------------------------------------------------------------------

    def passed(self, summands: PeerSummands) -> tuple[str, ...]:
        """All steps; the hospitals that passed, in the order of U.

        Raises `ProtocolError` naming who deviates, `PeerLostError`, and `SumLostError` where another hospital gave up.
        """
        self.summands, hospitals = summands, self.plan.hospitals
        self.first = summands.keeper(self.me)
        self.before_me = next(name for name in self.others if summands.keeper(name) == self.me)
        self._require_one_seed()
        opening = Opening(
            WHAT, f"norm check of '{self.plan.name}'", (len(hospitals),), hospitals, hospitals, None, summands.bound
        )
        self.domain.confirmed[summands.bound] = opening
        told = Transcript((summands.bound, *hospitals))
        # 1.
        seed = self._draw("sketch", _SKETCH, {})
        self.sign_hash = SignHash(seed, self.parameters, self.test.buckets)
        self.proofs = self._begun()
        # 2.
        rows: tuple[str, ...] = hospitals
        correction = self.proofs.carries(told.add(seed))
        if correction is None:
            log.warning("the update of this hospital is beyond its norm bound")
        seed = self._prove("carries", _CARRIES, correction, rows)
        rows = tuple(name for name in hospitals if self._digests["carries"][name])
        for name in self.others:
            if name not in rows:
                log.warning("%s says that its update is beyond its norm bound", name)
        seed = self._prove("bits", _BITS, self.proofs.bits(told.add(seed, rows), rows, seed), rows)
        seed = self._prove("products", _PRODUCTS, self.proofs.products(told.add(seed), seed), rows)
        # 3.
        answers = self._answers(self.proofs.answers(seed), rows, opening)
        passed = [name for name in rows if self._is_accepted(answers[name])]
        # 4.
        failed = {name: answers[name] for name in rows if name not in passed}
        if failed:
            self._settle(failed)
        return tuple(passed)

    def _begun(self) -> ProofSteps:
        """With this hospital's shares of all sketches."""
        summands = self.summands
        shares, of_mine = shares_of_masks(self.sign_hash, self.masks, self.test.dtype)
        for name in self.others:
            shares[name] = shares[name] + summands.folded(self.sign_hash, summands.held[name])
            mine = {piece: summands.own[piece] for piece in summands.kept_by(name, self.me)}
            of_mine[name] = of_mine[name] + summands.folded(self.sign_hash, mine)
        whole = {name: whole_numbers(share) for name, share in of_mine.items()}
        seeds = {name: self.seeds[name] for name in self._others_of(self.me)}
        return ProofSteps(self.size, (self.me, self.first), seeds, shares, whole)

    def _draw(self, word: str, step: int, values: dict[str, Any], take: Callable[..., None] | None = None) -> bytes:
        """All say `values` and their number of this word: what these make, uniform, and known to nobody before."""
        numbers = {self.me: self.numbers[word]}

        def hear(name: str, said: dict[str, Any]) -> None:
            committed: Any = self.summands.committed[name]
            coin = committed["coins"][_COINS.index(word)]
            numbers[name] = require_number(self._label(word), name, coin, said.get("number"))
            if take is not None:
                take(name, said)

        self._all_say(word, step, {**values, "number": self.numbers[word].hex()}, hear)
        return joint_coin(f"{self.summands.bound} {word}", numbers)

    def _all_say(
        self, word: str, step: int, values: dict[str, Any], take: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        """A word of all, signed, that repeats what was heard before it."""
        subject, before = Subject(self.summands.bound, word), self._before
        again = {} if before is None else {"repeated": repeated(before[1])}
        said = {self.me: say_signed(self.domain, self.links, self.others, subject, {**values, **again})}

        def hear(name: str, told: dict[str, Any]) -> None:
            said[name] = heard(self.domain, name, subject, told)
            if before is not None:
                require_one_version(self.domain, name, before[0], before[1], told.get("repeated"))
            if take is not None:
                take(name, told)

        hear_all(self.links, self.others, word, hear, (self.summands.deadlines, step))
        self._before = subject, said

    def _prove(self, part: str, step: int, correction: Vector | None, rows: Sequence[str]) -> bytes:
        """The corrections of a part of the proofs of `rows` to their first verifiers, then the word about them; what it draws."""
        mine = to_words(zeros(0) if correction is None else correction)
        digests = self._digests[part] = {self.me: "" if correction is None else tensor_digest(mine)}
        if self.me in rows:
            broadcast([self.first], lambda name: self.links.send_tensor(name, f"proof {part}", mine))
        taken = None
        if self.before_me in rows:
            until = self.summands.deadlines.of(step)
            taken = self.links.receive_tensor(self.before_me, f"proof {part}", torch.int64, None, until)

        def take(name: str, said: dict[str, Any]) -> None:
            digest = said.get("digest")
            is_one = (
                _are_hashes([digest], 1) if name in rows and part != "carries" else digest == "" or _is_hash(digest)
            )
            if not is_one or (name not in rows and digest):
                raise ProtocolError(f"{name} did not say what it proves in '{self.plan.name}'", SAME_VERSION, name)
            digests[name] = str(digest)

        seed = self._draw(part, step + 1, {"digest": digests[self.me]}, take)
        if taken is not None:
            self._take_correction(part, taken)
        return seed

    def _take_correction(self, part: str, words: torch.Tensor) -> None:
        """At a first verifier: what came must be what was signed, and a part of a proof."""
        name, digest = self.before_me, self._digests[part][self.before_me]
        if digest == "" and not words.numel():
            return
        count = self.size.of_parts[PARTS.index(part)]
        if tuple(words.shape) != (count, 2) or tensor_digest(words) != digest:
            raise ProtocolError(f"{name} sent another part of its proof than it signed", DEVIATES, name)
        self.proofs.take(name, from_words(words, name))

    def _answers(
        self, mine: Mapping[str, Vector], rows: Sequence[str], opening: Opening
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Step 3: all answers about each proof, by verifier, as words for a link; the same to all."""
        words = stacked(list(mine.values()), self.size)
        answers: dict[str, dict[str, torch.Tensor]] = {name: {} for name in rows}

        def keep(verifier: str, given: torch.Tensor) -> None:
            for name, about in zip((name for name in rows if name != verifier), given, strict=True):
                from_words(about, verifier)
                answers[name][verifier] = about

        def take(name: str, said: dict[str, Any]) -> None:
            shape = (len([row for row in rows if row != name]), self.size.answers, 2)
            until = self.summands.deadlines.of(_ANSWERS)
            given = self.links.receive_tensor(name, "answers", torch.int64, shape, until)
            if tensor_digest(given) != said.get("digest"):
                raise ProtocolError(f"{name} sent other answers about proofs than it signed", DEVIATES, name)
            keep(name, given)

        self.domain.record.append(opening)
        keep(self.me, words)
        broadcast(self.others, lambda name: self.links.send_tensor(name, "answers", words))
        self._all_say("answers", _ANSWERS, {"digest": tensor_digest(words)}, take)
        self._all_say("judged", _JUDGED, {})
        return answers

    def _is_accepted(self, answers: Mapping[str, torch.Tensor]) -> bool:
        return accepted(self.size, self.proofs.weights, [from_words(words, name) for name, words in answers.items()])

    # ---- who deviates --------------------------------------------------------------------------------------------------

    def _settle(self, failed: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Step 4. Raises `ProtocolError` naming a verifier that answered falsely."""
        seeds, false = {name: mine for name, (mine, _) in self.seeds.items()}, list[str]()
        shown_answers = ShownAnswers(
            self.links, self.masks, seeds, self.summands, self.sign_hash, self.proofs, self._digests
        )
        if self.me in failed:
            false = self.proofs.false_answers(failed[self.me])
            log.warning("%s", refusal_line(false))
            shown_answers.accuse(self.others, false)
        until = self.summands.deadlines.of(_ACCUSED)
        for name in [name for name in failed if name != self.me]:
            try:
                shown = shown_answers.shown_by(name, failed[name], until)
            except (PeerLostError, ProtocolError) as error:
                log.warning("%s", error)
                shown = []
            if not shown:
                log.warning(
                    "the proof of %s that its update is within its norm bound was not accepted, and it shows no false answer: "
                    "it deviates",
                    name,
                )
            false += shown
        if false:
            names = ", ".join(name for name in self.plan.hospitals if name in false)
            by = next(name for name in self.plan.hospitals if name in false)
            raise ProtocolError(
                f"false answers about a proof of '{self.plan.name}' were given by {names}", DEVIATES, by
            )


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == _HEX


def _are_hashes(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(_is_hash(value) for value in values)
