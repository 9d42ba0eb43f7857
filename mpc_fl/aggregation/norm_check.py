"""Is each hidden update within its norm bound? Each hospital proves it to all others; one bit of each is opened.

With an aggregator, as this module says; among peers (`peer_norm_check`) the same proofs are verified in another arrangement.

Sketches V_i (`sketch`, M buckets) of the updates of the n hospitals U of a closed sum are shared over Z_2^k, k = 32 or 64: the
opener folds the y_i it was sent, every other hospital the masks that it has in common with i (`closed_sum`). These
are all shares: hospital i has none, and what is checked is what the sum is made of. For every i in U, at the same time:
  1. the opener tells a public seed of the sketch, drawn when all y_i are fixed. i computes V_i from its update. If its
     squares add up to more than A (`norm_limits`), i says so, and is left out
  2. i proves to the opener and the other hospitals that they add up to at most A (`norm_proof`, its steps 2 to 6): in three
     messages to the opener, the other verifiers expand their shares from seeds they have in common with i. Between them the
     opener draws public numbers, as late as the proof demands
  3. the opener draws a point, every verifier answers to it (step 8), the opener accepts or not (step 9)
  4. the opener names those not accepted. To each of these that proved it gives the answers of its verifiers: i knows all their
     shares, and says whose answer is not what it must be

Who learns what. The opener, and in the end all, learn of each hospital whether its update is within the bound. Nobody learns
anything else: see below. No dealer takes part.

Security, against a hospital that deviates. It passes with a sketch above A with probability below 2^-38, whatever it sends,
as long as the opener and the other n-1 hospitals follow the protocol: it holds no share of what is evaluated about it. *Two
hospitals together can pass*, both of them: the masks that hide a summand are known to these two alone, so what the sum is
made of is what both say. Their parts together are bounded by the sum alone: the opener refuses one of m summands that is
longer than m times what one may be, so they add at most 2 m - 2 times that. A hospital that answers falsely about i has i
refused, and no more: i learns who it was, the log of i and that of the opener name both, as nobody else can know which of
them deviates. It cannot have i left out without being named, and cannot be named with i unless i deviates.

Secrecy, against the opener and up to n - 2 hospitals that deviate together. Shares of V_i at the other hospital j are masks
that only i and j know, and so are the key streams from which j expands its share of the proof. Their labels hold a hash of
all that the opener has told until then: told different things, i and j expand different shares, and what is opened
is uniform. Verifiers answer once for each check; told different points they answer with shares that do not fit together, and
an answer alone is uniform. U is the whole of the closed sum, at least two hospitals: without one, its masks would be missing
(a sum that somebody did not come to begins again), and alone with the opener i would give it everything.
So an honest hospital within the bound opens a constant. How likely it is beyond, whatever its data: `norm_bound`.

An honest hospital with |x| <= T passes but for a probability below 1/1201. |V|^2 has mean at most T^2 and variance at most
2 T^4 / M; A is T^2 (1 + margin), margin = sqrt(2400 / M) (Cantelli). For spread ones it is below 1e-9: the margin is 17
standard deviations. A vector with |x| >= 10 T is caught with probability above 0.99, also when it makes sums wrap: what passes
has a centred V of norm at most 1.25 T, see `sketch`. Between T and 1.25 T either may happen.

Rounds and bytes: seven messages between each hospital and the opener, one after the other and the first word apart,
four from the hospital; none between hospitals. A hospital sends 16 bytes for every element of its proof (M carries, the
bits, 66 values of polynomials) and for every answer: 16 (M + bits + 66) + 16 (n - 1) (M / 16 + bits / 16 + 3), where bits are
some 2400 to 3000 (`ProofSize`).
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import (
    ProofSize,
    Transcript,
    VerifierShare,
    accepted,
    answers_of,
    draw_point,
    draw_projections,
    draw_weights,
    whole_numbers,
)
from mpc_fl.aggregation.peer_norm_check import WHAT, PeerNormCheck
from mpc_fl.aggregation.prime_field import Vector, from_words, to_words, zeros
from mpc_fl.aggregation.proof_steps import ProofSteps, proof_seeds, refusal_line, shares_of_masks, stacked
from mpc_fl.aggregation.sketch import SEED_BYTES, SignHash
from mpc_fl.aggregation.words import broadcast
from mpc_fl.audit.opening_record import Opening
from mpc_fl.errors import SAME_VERSION_AND_CONFIGURATION, PeerLostError, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

_PROOF, _ANSWERS, _TOLD, _ACCUSED = "proof", "answers", "told", "accused"  # tags of messages


@dataclass(frozen=True)
class NormCheck:
    """The check of the summands of a closed sum, for vectors of `parameters` elements (`rules.Check`)."""

    test: NormTest
    parameters: int

    def at_hospital(self, domain: SecretDomain, masks: SummandMasks, word: Mapping[str, Any]) -> None:
        """Prove what this hospital's summand is, and verify the proofs of the others.

        Raises `ProtocolError` for an opener that leads another check than that of the whole sum, `PeerLostError` when it is
        lost. Returns when it says that another hospital is lost.
        """
        seed = _seed_in(word, "sketch", masks.plan.opener)
        if word.get("hospitals") != list(masks.plan.hospitals) or len(masks.plan.hospitals) < 2:
            raise ProtocolError(
                f"{masks.plan.opener} began a norm check of other hospitals than those of the sum",
                SAME_VERSION_AND_CONFIGURATION,
            )
        _Hospital(self, domain, masks, seed).run()

    def at_opener(self, domain: SecretDomain, closed: ClosedSum, say_check: Callable[..., None]) -> list[str]:
        """Lead the check of the summands that came, which must be kept; returns the hospitals that passed.

        Raises `PeerLostError` for a hospital of the sum that is missing, lost, late or sends nonsense.
        """
        for name in closed.plan.hospitals:
            if name not in closed.present:  # its masks are in the other summands
                raise PeerLostError(name, f"{name} did not come to a sum whose norms are checked")
        seed = secrets.token_bytes(SEED_BYTES)
        say_check(hospitals=list(closed.plan.hospitals), sketch=seed.hex())
        return _Opener(self, domain, closed, seed).run()

    def among_peers(self, domain: SecretDomain, links: Links, masks: SummandMasks) -> PeerNormCheck:
        """The same check of the summands of a sum among peers, at one of its hospitals."""
        return PeerNormCheck(self.test, self.parameters, domain, links, masks)

    def require_total(self, total: torch.Tensor, admitted: Sequence[str], why: str) -> None:
        """A sum of summands within their bound is no longer than their number times it: what two together can do ends there.

        Raises `ProtocolError` otherwise.
        """
        times = float(total.double().norm()) / math.sqrt(self.test.largest_square_sum)
        if times > len(admitted):
            raise ProtocolError(
                f"'{why}': the sum of {len(admitted)} updates within their norm bound is {times:.3g} times as long as one may be",
                f"two or more of {', '.join(admitted)} deviate together; nothing was made of this sum",
            )


def _seed_in(word: Mapping[str, Any], key: str, opener: str) -> bytes:
    text = word.get(key)
    try:
        seed = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        seed = b""
    if len(seed) != SEED_BYTES:
        raise ProtocolError(f"{opener} led a norm check without a seed", SAME_VERSION_AND_CONFIGURATION)
    return seed


def _about(hospitals: Sequence[str], opener: str, name: str) -> Opening:
    return Opening(WHAT, f"norm check of '{name}'", (len(hospitals),), (opener,), (*hospitals, opener))


class _StoppedError(Exception):
    """The opener said that the check ends here."""


class _Hospital:
    """One check at a hospital, led by the opener, which is the first verifier of its proof."""

    def __init__(self, check: NormCheck, domain: SecretDomain, masks: SummandMasks, seed: bytes) -> None:
        plan = masks.plan
        self.test, self.domain, self.plan, self.me = check.test, domain, plan, masks.me
        self.links = domain.links.scoped(f"check {plan.name}")
        self.told = Transcript(plan.hospitals)
        self.told_first = self.told.add(seed)
        self.size = ProofSize(check.test, len(plan.hospitals))
        sign_hash = SignHash(seed, check.parameters, check.test.buckets)
        seeds = proof_seeds(self.links, plan.hospitals)
        # The opener's share is the sketch of what it was sent.
        shares, of_mine = shares_of_masks(sign_hash, masks, self.test.dtype)
        rest = sign_hash.fold(masks.encoded.inside_protocol().reshape(-1))
        for share in of_mine.values():
            rest = rest - share
        shares_of_mine = {name: whole_numbers(share) for name, share in {**of_mine, plan.opener: rest}.items()}
        self.steps = ProofSteps(self.size, (self.me, plan.opener), seeds, shares, shares_of_mine)

    def run(self) -> None:
        """All steps."""
        try:
            self._steps()
        except _StoppedError:
            log.warning("the norm check of '%s' was stopped: a hospital was lost", self.plan.name)
        finally:
            self.links.end_scope()

    def _hear(self) -> dict[str, Any]:
        told = self.links.receive_object(self.plan.opener, _TOLD)
        if told.get("stopped") is True:
            raise _StoppedError
        return told

    def _send(self, correction: Vector | None) -> None:
        if correction is not None:
            self.links.send_tensor(self.plan.opener, _PROOF, to_words(correction))

    def _steps(self) -> None:
        opener, steps = self.plan.opener, self.steps
        # 1. and 2.
        carries = steps.carries(self.told_first)
        self._send(zeros(0) if carries is None else carries)
        told = self._hear()
        seed, rows = _seed_in(told, "seed", opener), told.get("rows")
        if not isinstance(rows, list) or not all(isinstance(name, str) for name in rows) or not steps.may_be(rows):
            raise ProtocolError(f"{opener} led a norm check of unknown proofs", SAME_VERSION_AND_CONFIGURATION)
        self._send(steps.bits(self.told.add(seed, rows), rows, seed))
        seed = _seed_in(self._hear(), "seed", opener)
        self._send(steps.products(self.told.add(seed), seed))
        # 3.
        answers = steps.answers(_seed_in(self._hear(), "seed", opener))
        self.domain.record.append(_about(self.plan.hospitals, opener, self.plan.name))
        self.links.send_tensor(opener, _ANSWERS, stacked(list(answers.values()), self.size))
        # 4.
        failed = self._hear().get("failed")
        if isinstance(failed, list) and self.me in failed and steps.proves:
            self._accuse()

    def _accuse(self) -> None:
        """Step 4 at a hospital that proved and was not accepted: who answered something else than it had to?"""
        opener = self.plan.opener
        verifiers = [*self.steps.verified, opener]
        given = self.links.receive_tensor(opener, _ANSWERS, torch.int64, (len(verifiers), self.size.answers, 2))
        accused = self.steps.false_answers(dict(zip(verifiers, given, strict=True)))
        log.warning("%s", refusal_line(accused))
        self.links.send_object(opener, _ACCUSED, {"hospitals": accused})


class _Opener:
    """One check at the opener, a verifier of all proofs."""

    def __init__(self, check: NormCheck, domain: SecretDomain, closed: ClosedSum, seed: bytes) -> None:
        self.test, self.domain, self.plan = check.test, domain, closed.plan
        self.hospitals = closed.plan.hospitals
        self.links = domain.links.scoped(f"check {closed.plan.name}")
        self.size = ProofSize(check.test, len(self.hospitals))
        sign_hash = SignHash(seed, check.parameters, check.test.buckets)
        self.shares = {
            name: whole_numbers(sign_hash.fold(closed.summands[name].reshape(-1))) for name in self.hospitals
        }
        self.proofs: dict[str, list[Vector]] = {name: [] for name in self.hospitals}

    def run(self) -> list[str]:
        """All steps; when a hospital is lost, the others are told that the check ends."""
        try:
            return self._steps()
        except PeerLostError:
            broadcast(self.hospitals, lambda name: self.links.send_object(name, _TOLD, {"stopped": True}))
            raise
        finally:
            self.links.end_scope()

    def _tell_seed(self, **more: Any) -> bytes:
        seed = secrets.token_bytes(SEED_BYTES)
        self._tell(seed=seed.hex(), **more)
        return seed

    def _tell(self, **told: Any) -> None:
        for name in self.hospitals:
            self.links.send_object(name, _TOLD, told)

    def _take(self, name: str, tag: str, shapes: Sequence[tuple[int, ...]], deadline: float) -> torch.Tensor:
        """A tensor of one of these shapes; a hospital that sends anything else counts as lost."""
        try:
            words = self.links.receive_tensor(name, tag, torch.int64, None, deadline)
        except ProtocolError as error:
            raise PeerLostError(name, error.what, error.fix) from None
        if tuple(words.shape) not in shapes:
            raise PeerLostError(name, f"{name} sent something else than its part of a norm check")
        return words

    def _elements(self, name: str, words: torch.Tensor) -> Vector:
        try:
            return from_words(words, name)
        except ProtocolError as error:
            raise PeerLostError(name, error.what, error.fix) from None

    def _take_parts(self, names: Sequence[str], count: int) -> None:
        deadline = self.links.deadline()
        for name in names:
            self.proofs[name].append(self._elements(name, self._take(name, _PROOF, [(count, 2)], deadline)))

    def _steps(self) -> list[str]:
        size = self.size
        # 1. and 2.
        rows, deadline = [], self.links.deadline()
        for name in self.hospitals:
            words = self._take(name, _PROOF, [(0, 2), (self.test.buckets, 2)], deadline)
            if len(words):
                rows.append(name)
                self.proofs[name].append(self._elements(name, words))
            else:
                log.warning("%s says that its update is beyond its norm bound", name)
        projections = draw_projections(self._tell_seed(rows=rows), self.test.buckets)
        self._take_parts(rows, size.bits)
        for name in rows:
            self.proofs[name].append(zeros(size.columns))  # of row 0
        weights = draw_weights(self._tell_seed(), size)
        self._take_parts(rows, size.products)
        # 3.
        self.domain.record.append(_about(self.hospitals, self.plan.opener, self.plan.name))
        point = draw_point(self._tell_seed())
        answers: dict[str, dict[str, torch.Tensor]] = {name: {} for name in rows}
        deadline = self.links.deadline()
        for verifier in self.hospitals:
            verified = [name for name in rows if name != verifier]
            given = self._take(verifier, _ANSWERS, [(len(verified), size.answers, 2)], deadline)
            for name, words in zip(verified, given, strict=True):
                self._elements(verifier, words)
                answers[name][verifier] = words
        passed = []
        for name in rows:
            share = VerifierShare.of(self.test, self.shares[name], self.proofs[name])
            answers[name][self.plan.opener] = to_words(answers_of(size, projections, weights, point, share, first=True))
            if accepted(size, weights, [from_words(words, "a verifier") for words in answers[name].values()]):
                passed.append(name)
        # 4.
        failed = [name for name in rows if name not in passed]
        self._tell(failed=failed)
        for name in failed:
            self.links.send_tensor(name, _ANSWERS, torch.stack(list(answers[name].values())))
        deadline = self.links.deadline()
        for name in failed:
            self._hear_accusation(name, list(answers[name]), deadline)
        return passed

    def _hear_accusation(self, name: str, verifiers: Sequence[str], deadline: float) -> None:
        accused = self.links.receive_object(name, _ACCUSED, deadline).get("hospitals")
        named = [each for each in verifiers if isinstance(accused, list) and each in accused]
        log.warning(
            "the proof of %s that its update is within its norm bound was not accepted: %s",
            name,
            f"it says that {', '.join(named)} answered falsely; it or they deviate"
            if named
            else "it blames nobody else, so it deviates",
        )
