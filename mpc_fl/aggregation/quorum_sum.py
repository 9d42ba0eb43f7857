"""Closed sums over links: who contributes, who is left out, what all confirm, and when a sum is opened.

One sum, hospitals U and the aggregator (`contribute` at a hospital, `collect` at the aggregator), after `closed_sum`. Where a
hospital may be left out (closing masks):
  1. each hospital sees that U may be summed over, computes the transcript T of all it was told (`transcript`), masks its
     summand under T and is ready, committed to its keys, by the deadline of the sum; the aggregator takes the summands, two at
     a time so that it never holds more. From the first byte of its summand on a hospital counts it as released
  2. with a check: the word "check" starts the check of the norms of what the aggregator holds (`norm_check`). It needs all
     of U: if somebody has not come, the word "again" names who has, and all begin at 1, with fresh masks and another T
  3. the word "fixed" names V, those who came in time and passed, and who was late; fewer than the quorum end the run
     (`QuorumError`). Each hospital of V sees that V may be opened and signs (T, V), once
  4. the aggregator checks the signatures, records the opening and returns them all with the word "confirmed"; in a circle
     of masks to each hospital those of its neighbours
  5. each hospital of V sees that all of V signed its own T and V, records the opening, and gives its keys; the aggregator
     opens the sum over V and says "opened"
Where nobody may be left out (no closing masks) V is U: hospitals are ready with their signature over (T, U), and steps 4
and 5 come before the summands, which take the place of the keys.

A loss in step 1 leaves the hospital out. A loss from step 2 on makes the sum void (the word "void" with who was lost;
`SumLostError`): a V that
was signed may not be signed anew for the same summands, and what some have recorded and others not has to be settled
first, so the summands are made anew. In a sum without closing masks a loss ends the run.

All words of the aggregator to one hospital come in one order under one tag (`words`), so that a hospital which was late
finds in them what it has missed.

Who learns what. The aggregator learns the sum over V and, with a check, one bit per hospital; the hospitals learn U and V.

Rounds and bytes. With closing masks and without a check: "ready", "send", summand, "fixed", signature, "confirmed", keys,
"opened", one after the other; without them "ready", "confirmed", summand, "opened". Each hospital sends k/8 bytes per
element and twice 32 for every key, the words are some hundred bytes. A check adds what `norm_check` states.

Security. That of `closed_sum` and `transcript`. Against an aggregator that deviates at will, together with up to
`closing` - 1 hospitals and |V| - 2 of V: it learns at most one sum over one V for each T, of at least the quorum of
hospitals, all of which were told the same. What it adds up otherwise is uniform. Every such sum is in the record of each
honest hospital of V before it opens, and charged before the summand leaves. It can make a sum fail, and is then named. A
hospital that deviates can choose its summand (within the norm, if that is checked) and can make a sum fail; of a false key
it is named, or one of two.

Many hospitals. Beyond 16 masks go to neighbours in a circle that T draws (`mask_graph`), except in sums that are checked: the
bound is then `Rules.colluders`. A V that leaves somebody too few of them is signed by nobody; the run ends, and names whom.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpc_fl.aggregation.mask_graph import mask_circle
from mpc_fl.aggregation.rules import (
    AgreedSum,
    Description,
    Rules,
    require_followed,
    require_hospitals,
    require_only,
    require_quorum,
)
from mpc_fl.aggregation.transcript import (
    Fingerprints,
    confirm,
    require_all_confirmed,
    require_confirmation,
    transcript_of,
)
from mpc_fl.aggregation.words import names_in, next_word, say
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError, SumLostError
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import FixedSum, SecretDomain, open_to
from mpc_fl.sharing.sum_plan import SumPlan, require_admissible

log = logging.getLogger(__name__)

_AT_A_TIME = 2


def plan_of(links: Fingerprints, rules: Rules, agreed: AgreedSum, hospitals: tuple[str, ...], attempt: int) -> SumPlan:
    """What is public of attempt `attempt` at a sum over U, `hospitals`, as this party has it."""
    transcript = transcript_of(links, rules, agreed, hospitals, attempt)
    closing, circle, bounds = min(rules.closing, len(hospitals) - 1), None, rules.bounds(len(hospitals))
    if bounds is not None:
        closing, circle = bounds.closing if rules.closing else 0, mask_circle(hospitals, transcript, bounds)
    return SumPlan(
        hospitals, rules.opener, (*agreed.label, attempt), closing, transcript, circle, rules.check is not None
    )


# ---- at a hospital -----------------------------------------------------------------------------------------------------


def contribute(
    domain: SecretDomain,
    rules: Rules,
    agreed: AgreedSum,
    encoded: Private[torch.Tensor],
    before_summand: Callable[[], None] | None = None,
) -> tuple[str, ...]:
    """At a hospital of U: add `encoded` (int32 or int64, of any shape) to the sum; returns V, perhaps without this hospital.

    Without a check in the rules `encoded` itself is masked, to save its memory, and is of no use to the caller afterwards.
    Nobody learns the summand; the aggregator learns the sum over V. `before_summand` is called before the first byte of a
    summand leaves: from then on it counts as released, whatever becomes of the sum. Raises `PeerLostError` when the
    aggregator is lost or late, `SumLostError` when the sum is void, `ProtocolError` for a U or V that may not be summed over
    and where not all of V confirmed what this hospital saw, `SecrecyError` for a sum that was asked for before.
    """
    links, hospitals = domain.links, agreed.hospitals
    shape = encoded.inside_protocol().shape
    for attempt in range(len(hospitals)):
        require_hospitals(rules, hospitals, links.name)
        plan = plan_of(links, rules, agreed, hospitals, attempt)
        domain.take_up(plan.transcript)
        part = _Part(domain, rules, agreed, SummandMasks(plan, links.name, shape, domain.sum_seed), before_summand)
        if not plan.closing:
            return part.to_all(encoded)
        again = part.until_fixed(encoded)
        if again is None:
            return part.admitted
        if not set(again) < set(hospitals):
            raise ProtocolError(f"{plan.opener} began a sum again without leaving anybody out", SAME_VERSION)
        if links.name not in again:
            return again
        hospitals = again
    raise ProtocolError("a sum began again too often", SAME_VERSION)


@dataclass
class _Part:
    """A hospital's part in one attempt at one sum. `admitted` is V once it is known."""

    domain: SecretDomain
    rules: Rules
    agreed: AgreedSum
    masks: SummandMasks
    before_summand: Callable[[], None] | None
    admitted: tuple[str, ...] = ()

    def to_all(self, encoded: Private[torch.Tensor]) -> tuple[str, ...]:
        """Without closing masks: V is U, confirmed before the summand leaves."""
        plan, links = self.masks.plan, self.domain.links
        summand = self.masks.masked(encoded, in_place=True)
        confirmation = confirm(self.domain, plan.transcript, plan.hospitals)
        links.send_object(plan.opener, f"ready {plan.name}", {"confirmation": confirmation})
        self.admitted = plan.hospitals
        require_only(self.agreed, plan.hospitals)
        word = next_word(links, plan.opener, ("confirmed",))
        self._open(word, functools.partial(self._send, summand))
        return self.admitted

    def until_fixed(self, encoded: Private[torch.Tensor]) -> tuple[str, ...] | None:
        """With closing masks: U of the next attempt, or `None` when V is known and, with this hospital in it, opened."""
        plan, links, me = self.masks.plan, self.domain.links, self.domain.links.name
        # Only a check can make the sum begin again, and need the summand without these masks.
        summand = self.masks.masked(encoded, in_place=self.rules.check is None)
        links.send_object(plan.opener, f"ready {plan.name}", {"keys": self.masks.commitments()})
        word = next_word(links, plan.opener, ("send", "fixed", "again"))  # a check comes when the summand has been sent
        if word["word"] == "send":
            self._send(summand)
            word = next_word(links, plan.opener, ("check", "fixed", "again"))
        del summand
        if word["word"] == "check":
            self._take_part_in_check(word)
            word = next_word(links, plan.opener, ("fixed", "void"))
        if word["word"] == "void":
            raise self._void(word)
        self.admitted = names_in(word, "hospitals")
        if word["word"] == "again":
            return self.admitted
        if me not in self.admitted:
            log.warning("%s", self._left_out(word))
            return None
        require_admissible(plan, self.admitted, self.rules.smallest)
        require_only(self.agreed, self.admitted)
        confirmation = confirm(self.domain, plan.transcript, self.admitted)
        links.send_object(plan.opener, f"confirm {plan.name}", {"confirmation": confirmation})
        word = next_word(links, plan.opener, ("confirmed", "void"))
        if word["word"] == "void":
            raise self._void(word)
        self._open(word)
        return None

    def _left_out(self, word: Mapping[str, Any]) -> str:
        why, me = self.agreed.about.why, self.domain.links.name
        if not self.admitted:
            return f"'{why}' is not opened: too few hospitals are left"
        if me in names_in(word, "late"):
            return f"this hospital was left out of '{why}': it was late"
        return f"this hospital was left out of '{why}': its update was not shown to be within the norm bound"

    def _send(self, summand: torch.Tensor) -> None:
        if self.before_summand is not None:
            self.before_summand()
        plan = self.masks.plan
        self.domain.links.send_tensor(plan.opener, f"summand {plan.name}", summand)

    def _open(self, word: Mapping[str, Any], recorded: Callable[[], None] = lambda: None) -> None:
        """Step 5: nothing that opens the sum leaves before all of V have confirmed it, and before it is recorded."""
        plan, about, rules = self.masks.plan, self.agreed.about, self.rules
        require_all_confirmed(self.domain, plan, self.admitted, word)
        fixed = Shared(about.what, FixedSum(self.masks, self.admitted, rules.smallest, 0, recorded))
        open_to(self.domain, fixed, [rules.opener], about.why, about.privacy)
        word = next_word(self.domain.links, plan.opener, ("opened", "void"))
        if word["word"] == "void":
            raise self._void(word)

    def _void(self, word: Mapping[str, Any]) -> SumLostError:
        why, late = self.agreed.about.why, word.get("late")
        late = late if late in self.masks.plan.hospitals else "a hospital"
        return SumLostError(f"'{why}' was lost with {late}, which was in it", "its summands are made anew", str(late))

    def _take_part_in_check(self, word: Mapping[str, Any]) -> None:
        """Step 2. Another hospital that is lost ends the check, not the sum: the aggregator says how it goes on."""
        opener = self.masks.plan.opener
        if self.rules.check is None:
            raise ProtocolError(f"{opener} began a check that was not agreed", "give all parties one file")
        try:
            self.rules.check.at_hospital(self.domain, self.masks, word)
        except PeerLostError as error:
            if error.peer == opener:
                raise
            log.warning("%s; the sum is void", error)


# ---- at the aggregator -------------------------------------------------------------------------------------------------


def collect(
    domain: SecretDomain,
    rules: Rules,
    agreed: AgreedSum,
    starts: Mapping[str, str],
    dtype: torch.dtype,
    shape: Sequence[int],
) -> tuple[tuple[str, ...], torch.Tensor]:
    """At the aggregator: V, and the opened sum over V as ring elements of `dtype` (int32 or int64) and `shape`.

    `starts` says by key fingerprints which start of each hospital is meant: one that has started again since is left
    out. Raises `QuorumError` when too few are left, `SumLostError` when the sum can no longer be opened, which those in it
    have then been told; `ProtocolError` naming a hospital that confirmed something else, or for a sum that is too long.
    """
    links, about, hospitals = domain.links, agreed.about, agreed.hospitals
    for attempt in range(len(hospitals)):
        plan = plan_of(links, rules, agreed, hospitals, attempt)
        intake = _Intake(
            domain, rules, about.why, ClosedSum(plan, dtype, tuple(shape), rules.check is not None), starts
        )
        if not plan.closing:
            require_only(agreed, plan.hospitals)
            return intake.from_all(about)
        try:
            intake.take_summands(dict.fromkeys(plan.hospitals, intake.ready))
        finally:
            intake.forget_late()
        present = intake.closed.present
        require_quorum(rules, present, agreed.hospitals, about.why)
        require_followed(plan, present, about.why)
        if rules.check is None or present == hospitals:
            break
        log.warning("'%s' begins again without %s", about.why, ", ".join(set(hospitals) - set(present)))
        say(links, hospitals, "again", hospitals=list(present))
        hospitals = present
    told_void = present
    try:
        if rules.check is not None:
            passed = rules.check.at_opener(domain, intake.closed, functools.partial(say, links, present, "check"))
            present = tuple(name for name in present if name in passed)
            require_quorum(rules, present, agreed.hospitals, about.why)
        require_only(agreed, present)
        late = [name for name in hospitals if name not in intake.closed.present]
        say(links, hospitals, "fixed", hospitals=list(present), late=late)
        told_void = present
        signatures = intake.confirmations(present, "confirm")
        total = intake.open(about, present, functools.partial(intake.say_confirmed, signatures))
        if rules.check is not None:
            rules.check.require_total(total, present, about.why)
        return present, total
    except PeerLostError as error:
        say(links, told_void, "void", late=error.peer)
        raise SumLostError(
            f"'{about.why}' cannot be opened: {error.what}", "its summands are made anew", error.peer
        ) from None


@dataclass
class _Intake:
    """The aggregator's part in one attempt at one sum, `why`: what it takes from the hospitals, in which order."""

    domain: SecretDomain
    rules: Rules
    why: str
    closed: ClosedSum
    starts: Mapping[str, str]

    def __post_init__(self) -> None:
        name = self.closed.plan.name
        self.ready, self.summand = f"ready {name}", f"summand {name}"
        self._deadline = time.monotonic() + self.rules.seconds

    def from_all(self, about: Description) -> tuple[tuple[str, ...], torch.Tensor]:
        """Without closing masks: all confirm U, then all send. Returns U and the opened sum."""
        plan = self.closed.plan
        for name in plan.hospitals:
            self._require_start(name)
        signatures = self.confirmations(plan.hospitals, "ready")

        def take() -> None:
            self.take_summands(dict.fromkeys(plan.hospitals, self.summand), signatures)

        return plan.hospitals, self.open(about, plan.hospitals, take)

    def confirmations(self, admitted: tuple[str, ...], message: str) -> dict[str, str]:
        """The signatures of all of V over (T, V), checked, by name."""
        plan, signatures = self.closed.plan, {}
        deadline = self._deadline if message == "ready" else self.domain.links.deadline()
        for name in admitted:
            word = self.domain.links.receive_object(name, f"{message} {plan.name}", deadline)
            signatures[name] = require_confirmation(self.domain, name, plan.transcript, admitted, word)
        return signatures

    def say_confirmed(self, signatures: Mapping[str, str], to: Sequence[str] | None = None) -> None:
        """Step 4: all of V, or those named of it, hear the signatures that they must see."""
        for name in signatures if to is None else to:
            seen = self.closed.plan.confirmed_by(name, signatures)
            say(self.domain.links, [name], "confirmed", signatures={each: signatures[each] for each in seen})

    def open(self, about: Description, admitted: tuple[str, ...], recorded: Callable[[], None]) -> torch.Tensor:
        """Steps 4 and 5, `recorded` in between; all of V are told that the sum is opened."""
        fixed = Shared(about.what, FixedSum(self.closed, admitted, self.rules.smallest, 0, recorded))
        total = open_to(self.domain, fixed, [self.rules.opener], about.why, about.privacy, decode=False)
        assert total is not None
        say(self.domain.links, admitted, "opened")
        return total

    def take_summands(self, awaited: dict[str, str], signatures: Mapping[str, str] | None = None) -> None:
        """Take what is awaited of each hospital: the tag of its "ready", or of its summand where it is ready already.

        Those that are ready are told to send, by the `signatures` where these come first, at most two of them at a time. Each
        has the time of an answer for it from then on: whoever stops there does not cost those that wait for its place theirs.
        """
        links, closed = self.domain.links, self.closed
        queue, asked = [name for name, tag in awaited.items() if tag == self.summand], set[str]()
        deadlines = dict.fromkeys(awaited, self._deadline)
        while awaited:
            while queue and len(asked) < _AT_A_TIME:
                name = queue.pop(0)
                awaited[name] = self.summand
                asked.add(name)
                if signatures is None:
                    say(links, [name], "send")
                else:
                    self.say_confirmed(signatures, [name])
                deadlines[name] = links.deadline()
            expected = {name: tag for name, tag in awaited.items() if name not in queue}
            first = min(expected, key=lambda name: deadlines[name])
            arrived = links.await_any(expected, deadlines[first])
            name = arrived or first
            try:
                if arrived is None:
                    raise self._late(name, awaited[name])
                self._require_start(name)
                if awaited[name] == self.ready:
                    message = links.receive_object(name, self.ready, deadlines[name])
                    closed.commitments.take(name, message.get("keys"))
                    queue.append(name)
                else:
                    tensor = links.receive_tensor(name, self.summand, closed.dtype, closed.shape, deadlines[name])
                    closed.take(name, tensor)
                    asked.discard(name)
                    del awaited[name]
            except PeerLostError as error:
                if self.rules.closing == 0:
                    raise
                log.warning("%s is left out of '%s': %s", name, self.why, error)
                asked.discard(name)
                del awaited[name]

    def _late(self, name: str, tag: str) -> PeerLostError:
        if tag == self.ready:
            what, longer = f"not ready for '{self.why}' within {self.rules.seconds:g} s", "federation.round_timeout"
        else:
            what, longer = f"its part of '{self.why}' did not arrive in time", "runtime.receive_timeout"
        return PeerLostError(name, f"{name} is late: {what}", f"see the log of {name}, or raise {longer}")

    def forget_late(self) -> None:
        """What those that were left out still send: a summand each, which would stay in memory for good."""
        for tag in (self.ready, self.summand):
            self.domain.links.forget(tag)

    def _require_start(self, name: str) -> None:
        if self.domain.links.key_fingerprint(name) != self.starts[name]:
            raise PeerLostError(name, f"{name} has started again")
