"""Closed sums without an aggregator: each hospital opens a slice, and all find out whether it did so rightly before keys leave.

The sum of `quorum_sum`, with the same masks, transcript, confirmations, keys and records, in the other arrangement: the opener
of the plan is one of its hospitals and only proposes V, and slice k of every summand goes to hospital k (`slices`). U and
T are given: all of U have signed T before this begins.
  1. each hospital masks its summand under T, and signs the hashes of its slices, the commitments to its keys and one to a random
     number. It tells all of U these ("slices"), and sends slice k to hospital k. From the first byte on the summand
     counts as released
  2. each tells the proposer whose slices have come, of the hashes that their hospitals signed ("arrived"). The proposer names
     V, hospitals of which each has a slice of each ("fixed"). Fewer than the quorum end the run (`QuorumError`)
  3. slices of hospitals that are not in V go to the next one of V. Each of V sees that V may be opened and that it holds what
     it must, and signs T, V and everything said in step 1, once ("confirm"), to all of V
  4. when all of V have signed the same, each adds up the slices that it holds and sends the total, still masked, to all of V
     ("total", with signed hashes)
  5. the linear check (`linear_check`): all show their random numbers ("coin"), which make the coin; all tell the combinations of
     their own slices that follow from it ("combinations"), signed; all repeat what they heard, and say which totals do not fit
     ("repeated"). Whoever told two hospitals different things in steps 1, 4 or 5 is found by what others repeat (`signed_words`),
     or of two totals by the hash. Where a total does not fit, its opener shows the slices that it was sent, and who deviates is
     named by all (`ProtocolError`)
  6. each of V records the opening and gives its keys to all of V; each takes the masks away by itself (`opening`)

A loss before step 3 leaves the hospital out, and so does a slice that does not arrive where it should. A loss of the
proposer, and any from step 3 on to the end of step 5, makes the sum void (`SumLostError`; who gives up says so, "void"), for
a V that was signed may not be signed anew for the same summands: they are made anew. In step 6 a lost hospital's keys come
from who else holds them, as long as somebody does. What an opener that is lost after step 3 held of its own summand nobody
else has, so its slice cannot be opened by another one.

Who learns what. All of V learn the sum over V, and U and V. Until step 6 all that anybody receives is uniform.

Rounds and bytes. Slices, "arrived", "fixed", "confirm", totals, "coin", "combinations", "repeated", keys, one after the other. Each
hospital of n sends k/8 (n - 1)/n bytes per element for slices and as many for totals, and to each other one twice 32
bytes for every key, some 500 bytes for each combination of slices, and some hundred for each signature that it repeats. A slice
of a hospital that was left out costs k/8 n bytes per element more, among all. Every hospital expands all closing masks.

Security. That of `closed_sum`, whose opener is here every hospital of V: so at least two closing masks are needed, else one
hospital could open its slice by itself before anybody has confirmed. Against `closing` - 1 hospitals that deviate together,
and |V| - 2 that only pool what they see: no summand shows; nothing opens over a V, or from a model, that not all of V have
signed. No key leaves an honest hospital before the check has passed, so whoever adds an error to a total chooses it without
knowing the sum; it is found with probability 1 - 2^-41 unless its author lies about its own summand, too, as if it had summed
another one (`linear_check`). Nobody is blamed for another: who is named as deviating signed two things, or slices and a total
that do not fit, or did so to the hospital that names it, whose word others only pass on. A loss is no proof. Whoever
says that a slice did not come costs itself or its sender the place in V, and who falsely gives up a sum makes it void.

With a check of norms in the rules, V must be U in step 2, since the masks of whoever is missing are in the other summands: else
the sum is void. After it all tell what they heard of the slices ("heard"), and what they committed to is compared, of all of U.
Then they make the check (`peer_norm_check`); V are those who passed. So that nobody has alone what was checked, the hospital
after i keeps a copy of the slice that i opens of its own summand (`held_slices`): from step 1 on, and in step 3 the next one of
V does; in step 5 it tells its combinations, too. An opened sum that summands within their bounds cannot make ends the run
(`ProtocolError`). A copy costs k/8/n bytes per element, the rest is what `peer_norm_check` states.

Not here: who proposes after whom, and that all sign T and what came of it (a block): the caller's. A circle of masks
(`mask_graph`) is refused: what it holds against was counted for one opener, that none of its hospitals is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mpc_fl.aggregation.held_slices import HeldSlices
from mpc_fl.aggregation.linear_check import COIN_BYTES, commitment
from mpc_fl.aggregation.peer_summands import PeerSummands
from mpc_fl.aggregation.rules import AgreedSum, PeerCheck, Rules, require_hospitals, require_only, require_quorum
from mpc_fl.aggregation.signed_words import (
    DEVIATES,
    NOTHING_SAID,
    Signed,
    Subject,
    heard,
    repeated,
    require_one_version,
    say_signed,
)
from mpc_fl.aggregation.slice_totals import FIRST_STEP, FixedSlices, SaidOfSlices, checked_totals
from mpc_fl.aggregation.slices import Slices, who_has_all
from mpc_fl.aggregation.transcript import confirm, digest_of, require_confirmation
from mpc_fl.aggregation.words import Deadlines, first_to_speak, hear_all, names_in, next_word, say
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.opening_record import Opening
from mpc_fl.crypto.secrecy import Private, Shared
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, PeerLostError, ProtocolError, SumLostError
from mpc_fl.sharing.closed_sum import KeyCommitments, MaskedTotal, SummandMasks
from mpc_fl.sharing.opening import FixedSum, SecretDomain, open_to
from mpc_fl.sharing.sum_plan import SumPlan, require_admissible

log = logging.getLogger(__name__)

_LEAST_CLOSING = 2
# Answers after the deadline for summands. Whoever sends one of two words late can let one hospital begin up to an answer after
# another, and wait for another answer for its slice. So the proposer waits for three until all have said what arrived, and the
# others for it two longer.
_ARRIVED, _FIXED = 3, 5
_HANDED_ON, _CONFIRM = range(FIRST_STEP)
_CONFIRMED = "mpc-fl slices of a peer sum 1"
_CHECKED = "mpc-fl slices of a peer sum to check 1"
_HEX = 64


def peer_sum(
    domain: SecretDomain,
    rules: Rules,
    agreed: AgreedSum,
    plan: SumPlan,
    encoded: Private[torch.Tensor],
    before_summand: Callable[[], None] | None = None,
) -> tuple[tuple[str, ...], torch.Tensor | None]:
    """At a hospital of U: add `encoded` (int32 or int64, of any shape) to the sum; returns V, and the opened sum over V.

    The sum is of the dtype and shape of `encoded`, and `None` where this hospital is not in V. `plan` has U, the proposer as its
    opener, masks between all, at least two closing masks, and T, which all of U have signed. `encoded` itself is masked, to
    save its memory, and is of no use to the caller afterwards. `before_summand` is called before the first byte of it leaves.

    Raises `SumLostError` when the sum is void, naming whom it was lost with where this hospital knows; `QuorumError` when too few
    are left; `ProtocolError` for a U or V that may not be summed over, and naming who deviates; `SecrecyError` for a sum
    that was asked for before. Nothing was opened then, but for a key that does not fit (`ProtocolError`) or is lost in step 6:
    there others may have the sum.
    """
    require_hospitals(rules, plan.hospitals, domain.links.name)
    if plan.circle is not None or rules.bounds(len(plan.hospitals)) is not None:
        raise ProtocolError(
            f"'{agreed.about.why}' cannot be summed among {len(plan.hospitals)} peers with masks in a circle",
            "set aggregation.mask_neighbours to all",
        )
    if plan.closing < _LEAST_CLOSING or plan.opener not in plan.hospitals:
        raise ProtocolError(
            f"'{agreed.about.why}' cannot be summed among peers",
            f"let one of its hospitals propose, with at least {_LEAST_CLOSING} closing masks",
        )
    domain.take_up(plan.transcript)
    part = _Part(domain, rules, agreed, plan, encoded)
    try:
        return part.run(before_summand)
    except PeerLostError as error:
        part.give_up(error.for_peers)
        what = f"'{agreed.about.why}' cannot be opened: {error.what}"
        raise SumLostError(what, "its summands are made anew", error.peer) from None
    except ProtocolError as error:
        part.give_up(error.for_peers)
        raise
    finally:
        part.links.end_scope()


def _said_of_slices(hospital: str, plan: SumPlan, word: Mapping[str, Any], signed: Signed) -> SaidOfSlices:
    hashes, coin = word.get("hashes"), word.get("coin")
    texts = [*hashes, coin] if isinstance(hashes, list) else []
    if len(texts) != len(plan.hospitals) + 1 or not all(isinstance(text, str) and len(text) == _HEX for text in texts):
        raise ProtocolError(f"{hospital} sent no hashes of its slices", SAME_VERSION, hospital)
    hashes = dict(zip(plan.hospitals, texts, strict=False))
    return SaidOfSlices(hashes, word.get("keys"), texts[-1], signed, word.get("check"))


@dataclass
class _Part:
    """A hospital's part in one sum. `admitted` is V once it is known; `said` the words of step 1 by hospital; `held` the slices
    that this hospital has.
    """

    domain: SecretDomain
    rules: Rules
    agreed: AgreedSum
    plan: SumPlan
    encoded: Private[torch.Tensor]
    admitted: tuple[str, ...] = ()
    said: dict[str, SaidOfSlices] = field(default_factory=dict)
    fixed: Signed = NOTHING_SAID

    def __post_init__(self) -> None:
        plan, self.me = self.plan, self.domain.links.name
        self.links = self.domain.links.scoped(f"peers {plan.name}")
        now = time.monotonic()
        self.deadline, self.answer = now + self.rules.seconds, self.links.deadline() - now
        summand = self.encoded.inside_protocol()
        self.dtype, self.shape = summand.dtype, tuple(summand.shape)
        self.masks = SummandMasks(plan, self.me, self.shape, self.domain.sum_seed)
        self.commitments = KeyCommitments(plan)
        self.slices = Slices(plan.hospitals, summand.numel())
        self.held = HeldSlices(self.links, self.slices, self.me, self.agreed.about.why)
        self.number = Seed.from_system().reveal_for_transport()[:COIN_BYTES]
        at = plan.hospitals.index(self.me)
        self.others = (*plan.hospitals[at + 1 :], *plan.hospitals[:at])  # so each begins with another one
        check = self.rules.check
        self.check = None if check is None else check.among_peers(self.domain, self.links, self.masks)

    @property
    def peers(self) -> tuple[str, ...]:
        """The others of V."""
        return tuple(name for name in self.others if name in self.admitted)

    def run(self, before_summand: Callable[[], None] | None) -> tuple[tuple[str, ...], torch.Tensor | None]:
        """All steps."""
        self._send_slices(before_summand)
        self._take_slices()
        why, late = self.agreed.about.why, "a slice came late, or not where it should"
        self._fix()
        now = time.monotonic()
        deadlines = Deadlines(why, now, self.links.deadline() - now)
        if self.check is not None:
            late = "its update was not shown to be within the norm bound"
            deadlines = self._leave_out_unchecked(self.check, deadlines)
        if self.me not in self.admitted:
            log.warning("this hospital was left out of '%s': %s", why, late)
            return self.admitted, None
        self._hand_on(deadlines)
        return self.admitted, self._open(checked_totals(self._confirmed(deadlines)))

    def give_up(self, reason: str) -> None:
        """Tell the others that this sum is void, and why."""
        say(self.links, self.peers if self.admitted else self.others, "void", reason=reason)

    def _send_slices(self, before_summand: Callable[[], None] | None) -> None:
        plan = self.plan
        self.held.own = self.slices.cut(self.masks.masked(self.encoded, in_place=True))
        hashes = {name: tensor_digest(words) for name, words in self.held.own.items()}
        coin = commitment(plan.transcript, self.me, self.number)
        values: dict[str, Any] = {"hashes": list(hashes.values()), "keys": self.masks.commitments(), "coin": coin}
        if self.check is not None:
            values["check"] = self.check.committed
        if before_summand is not None:
            before_summand()
        signed = say_signed(self.domain, self.links, self.others, Subject(plan.transcript, "slices"), values)
        self.held.send(self.others, copy=self.check is not None)
        self.said[self.me] = SaidOfSlices(hashes, values["keys"], coin, signed, values.get("check"))

    def _take_slices(self) -> None:
        """A hospital whose slice does not come, or is not what it signed, is told to the proposer as one that did not come."""
        awaited = list(self.others)
        while awaited:
            name = first_to_speak(self.links, awaited, self.deadline)
            if name is None:
                break
            awaited.remove(name)
            try:
                self._take_slice(name)
            except (PeerLostError, ProtocolError) as error:
                log.warning("no slice of %s in '%s': %s", name, self.agreed.about.why, error)
        for name in awaited:
            log.warning("%s is late: no slice in '%s' within %g s", name, self.agreed.about.why, self.rules.seconds)

    def _take_slice(self, name: str) -> None:
        # However many of them only say that a slice comes, they cost one answer together.
        deadline = min(self.links.deadline(), self.deadline + self.answer)
        word = next_word(self.links, name, ("slices",), deadline)
        signed = heard(self.domain, name, Subject(self.plan.transcript, "slices"), word)
        said = _said_of_slices(name, self.plan, word, signed)
        if self.check is not None:
            self.check.require_committed(name, said.check)
        self.held.take(name, said.hashes, deadline, copy=self.check is not None)
        self.said[name] = said

    def _fix(self) -> None:
        """Step 2. The proposer waits for those alone that can be in V."""
        plan, why, came = self.plan, self.agreed.about.why, list(self.held.held[self.me])
        subject = Subject(plan.transcript, "fixed")
        if self.me == plan.opener:
            reports, deadline = {self.me: set(came)}, self.deadline + _ARRIVED * self.answer
            for name in came[1:]:
                try:
                    reports[name] = set(
                        names_in(next_word(self.links, name, ("arrived",), deadline), "hospitals", name)
                    )
                except (PeerLostError, ProtocolError) as error:
                    log.warning("%s is left out of '%s': %s", name, why, error)
            self.admitted = who_has_all(plan.hospitals, self.me, reports)
            values = {"hospitals": list(self.admitted)}
            self.fixed = say_signed(self.domain, self.links, self.others, subject, values)
        else:
            if plan.opener not in came:
                raise PeerLostError(plan.opener, f"{plan.opener} proposes, and no slice of it came")
            say(self.links, [plan.opener], "arrived", hospitals=came)
            deadlines = Deadlines(why, self.deadline, _FIXED * self.answer)

            def take(name: str, word: dict[str, Any]) -> None:
                self.fixed = heard(self.domain, name, subject, word)
                self.admitted = names_in(word, "hospitals", name)

            hear_all(self.links, [plan.opener], "fixed", take, (deadlines, 0))
        require_quorum(self.rules, self.admitted, plan.hospitals, why)
        require_admissible(plan, self.admitted, self.rules.smallest)
        if self.check is not None and (absent := [name for name in plan.hospitals if name not in self.admitted]):
            # Its masks are in the other summands.
            raise PeerLostError(absent[0], f"{absent[0]} did not come to a sum whose norms are checked")
        if self.me not in self.admitted:
            return
        require_only(self.agreed, self.admitted)
        if missing := [name for name in self.admitted if name not in came]:
            what = f"{plan.opener} fixed '{why}' over {missing[0]}, whose slice did not come"
            raise ProtocolError(what, DEVIATES, plan.opener)

    def _leave_out_unchecked(self, check: PeerCheck, deadlines: Deadlines) -> Deadlines:
        """With a check: V is whoever passes it. The deadlines of what comes then."""
        plan, said, why = self.plan, self.said, self.agreed.about.why
        signed, fixed = {name: said[name].signed for name in plan.hospitals}, {plan.opener: self.fixed}
        say(self.links, self.others, "heard", repeated=repeated(signed), fixed=repeated(fixed))

        def take(name: str, word: dict[str, Any]) -> None:
            self._require_same(name, fixed, signed, word)

        hear_all(self.links, self.others, "heard", take, (deadlines, 0))
        for name in plan.hospitals:  # whoever is left out, too: what it committed to is of masks in the other summands
            self.commitments.take(name, said[name].keys)
        held = {name: {self.me: self.held.held[self.me][name]} for name in self.others}
        for piece, copy in self.held.kept.items():
            held[piece][piece] = copy
        bound = digest_of([_CHECKED, plan.transcript, {name: each.digest for name, each in signed.items()}])
        summands = PeerSummands(
            slices=self.slices,
            own=self.held.own,
            held=held,
            hashes={name: said[name].hashes for name in plan.hospitals},
            commitments=self.commitments,
            committed={name: said[name].check for name in plan.hospitals},
            bound=bound,
            deadlines=deadlines.after(1),
        )
        self.admitted = check.passed(summands)
        if refused := [name for name in plan.hospitals if name not in self.admitted]:
            log.warning("'%s' goes on without %s: not shown to be within the norm bound", why, ", ".join(refused))
        require_quorum(self.rules, self.admitted, plan.hospitals, why)
        if self.me in self.admitted:
            require_only(self.agreed, self.admitted)
        return deadlines.after(1 + check.steps)

    def _require_same(
        self, name: str, fixed: Mapping[str, Signed], signed: Mapping[str, Signed], word: Mapping[str, Any]
    ) -> None:
        """Another one was told the same V, and the same of all slices."""
        transcript = self.plan.transcript
        require_one_version(self.domain, name, Subject(transcript, "fixed"), fixed, word.get("fixed"))
        require_one_version(self.domain, name, Subject(transcript, "slices"), signed, word.get("repeated"))

    def _hand_on(self, deadlines: Deadlines) -> None:
        """Step 3, of slices whose hospitals are not in V."""
        hashes, deadline = {name: said.hashes for name, said in self.said.items()}, deadlines.of(_HANDED_ON)
        self.held.hand_on(self.admitted, hashes, deadline)
        if self.check is not None:
            self.held.hand_on_copies(self.admitted, hashes, deadline)

    def _confirmed(self, deadlines: Deadlines) -> FixedSlices:
        """Step 3: what all of V hold, when all of them have signed the same."""
        plan, said = self.plan, {name: self.said[name] for name in self.admitted}
        signed = {name: each.signed for name, each in said.items()}
        digests = {name: each.digest for name, each in signed.items()}
        bound = digest_of([_CONFIRMED, plan.transcript, list(self.admitted), digests])
        self.domain.confirmed[plan.transcript] = self._opening()
        confirmation = confirm(self.domain, bound, self.admitted)
        fixed = {plan.opener: self.fixed}
        # To all of U: a hospital that was told another V waits for this one, too.
        about_v = repeated(fixed)
        say(self.links, self.others, "confirm", confirmation=confirmation, repeated=repeated(signed), fixed=about_v)

        def take(name: str, word: dict[str, Any]) -> None:
            self._require_same(name, fixed, signed, word)
            require_confirmation(self.domain, name, bound, self.admitted, word)

        hear_all(self.links, self.peers, "confirm", take, (deadlines, _CONFIRM))
        if self.check is None:
            for name, each in said.items():  # the same to all, now
                self.commitments.take(name, each.keys)
        return FixedSlices(
            domain=self.domain,
            links=self.links,
            slices=self.slices,
            transcript=plan.transcript,
            bound=bound,
            admitted=self.admitted,
            peers=self.peers,
            own=self.held.own,
            held=self.held.held,
            said=said,
            number=self.number,
            deadlines=deadlines,
            kept=None if self.check is None else self.held.kept,
        )

    def _opening(self) -> Opening:
        """What all of V record of this sum before they open it."""
        about = self.agreed.about
        what, why, privacy, transcript = about.what, about.why, about.privacy, self.plan.transcript
        return Opening(what, why, self.shape, self.admitted, self.admitted, privacy, transcript)

    def _open(self, totals: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Step 6."""
        about, total = self.agreed.about, self.slices.joined(totals).reshape(self.shape)
        masked = MaskedTotal(self.masks, self.commitments, total)
        self.held.clear()
        fixed = Shared(about.what, FixedSum(masked, self.admitted, self.rules.smallest, 0))
        opened = open_to(self.domain, fixed, list(self.admitted), about.why, about.privacy, decode=False)
        assert opened is not None
        if self.rules.check is not None:
            self.rules.check.require_total(opened, self.admitted, about.why)
        return opened
