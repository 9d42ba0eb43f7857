"""Who takes part in a round among peers: all say that they are there, one proposes, and all of those sign the proposal.

Members are the parties of the last block, at first the founders of the run. Round k is made under view 0, or where that comes to
nothing under view 1, 2, ... Under view v the member k + v, counted round and round, proposes:
  1. each says to all that it is there ("present", `Presence`), signed: for which round and view, after which block, with which
     state and which openings that no block holds yet, with whose keys; and why the view before came to nothing
  2. who proposes waits until all members that are linked with it are there, and names U ("proposal"): those with its own block and
     state that hold keys of each other, without whom more than half of them have lost a sum with, unless they are too few
     without those. What they said comes with it
  3. each of U holds the proposal against what it has itself, signs it, and repeats to all what it signed ("agreed"). With the
     signatures of all of U the plan holds
A proposer that is lost, silent, or says two things or something false, is named and the next view begins; nobody is in a proposal
under it who has not signed that the one before is over, and they are a quorum.

Joining. A hospital that is no member, because it comes later, comes back, or was left out, says that it would join ("asks"). The
members answer with their votes (`peer_admission`), and one that it chooses gives it the blocks and the state that it lacks
(`peer_joining`). Then it says that it is there like all others; who proposes waits for that a little, once. So it has checked by
itself what it goes on from, and has it from no more than one.

Blocks. Whoever has kept a block that others lack gives it to them when they say that they are there ("block"): it is signed by
all its parties, so it needs no trust. What else was begun comes to its end under the plan (`peer_settling`).

Security. A proposal of which two versions exist is signed by nobody, or its proposer is named by two signatures
(`aggregation.signed_words`). U is at least the quorum, which is more than half of the hospitals, so no two plans of one round
and view hold. Nothing is taken from a proposer but U: all else each hospital has itself, or refuses. What a proposer can do: leave
hospitals out, and cost time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mpc_fl.aggregation.rules import require_quorum
from mpc_fl.aggregation.signed_words import heard, say_signed
from mpc_fl.aggregation.words import first_to_speak, has_spoken, next_word, say
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.config.deadlines import PeerDeadlines
from mpc_fl.errors import (
    SAME_VERSION,
    LeftOutError,
    PeerLostError,
    ProtocolError,
    QuorumError,
    SumLostError,
)
from mpc_fl.federation.peer_admission import Admission, Membership, required_by
from mpc_fl.federation.peer_agreeing import Agreeing, require_no_difference
from mpc_fl.federation.peer_asking import WORDS as ASKING_WORDS
from mpc_fl.federation.peer_asking import Asking, Further, further_than
from mpc_fl.federation.peer_blocks import GIVEN, PassingOn
from mpc_fl.federation.peer_certificates import Certificates
from mpc_fl.federation.peer_presence import Presence, Reason, Standing, lost_with
from mpc_fl.federation.peer_proposal import DEVIATES, Complete, Proposal, Proposals
from mpc_fl.federation.peer_views import Views
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

_WORDS = ("present", "proposal", "block", *ASKING_WORDS)
_AT_ONCE = 16
_LOOK = 5.0  # seconds between looks for who has linked, and has not heard this hospital yet
_NO_ROUND = (-1, -1)  # of a word that is about the whole run


@dataclass
class PeerAttendance:
    """A hospital's part in who takes part. `members` are the parties of the last block, first the founders; `complete` a block that
    has all signatures and was not kept.

    It `recalls` what it signed, but for a block that it signed before it started and does not have: then it is not counted on until
    another block is kept. `give` gives a hospital that asks for it what it lacks.
    """

    domain: SecretDomain
    ledger: RevealLedger
    deadlines: PeerDeadlines
    admission: Admission
    certificates: Certificates
    members: tuple[str, ...]
    give: Callable[[str, Mapping[str, Any], str], None]
    complete: Complete | None = None
    recalls: bool = True
    _began: bool = False
    _starts: Mapping[str, str] = field(default_factory=dict)  # of the last plan
    _heard_by: set[tuple[str, str, tuple[int, int]]] = field(default_factory=set)
    _latest: dict[str, tuple[Presence, dict[str, Any]]] = field(default_factory=dict)
    _proposed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.me, self._links = self.domain.links.name, self.domain.links.scoped("attendance")
        self._views = Views(self.domain)
        self.rules, self.founders = self.admission.rules, frozenset(self.members)
        self.proposals = Proposals(self.domain, self.rules, self.admission.about_run, self.admission)
        subject = self.proposals.subject("asks", _NO_ROUND)
        self.asking = Asking(self._links, subject, self.admission, self.certificates, self.give)
        self.agreeing = Agreeing(self.domain, self.proposals, self.deadlines.answer)
        self._passing_on = PassingOn(self._links, self.ledger, self.admission.about_run, self.rules.smallest)
        self._unconfirmed = self.ledger.signed_before()
        self.recalls = not self._unconfirmed

    def proposer(self, number: int, view: int) -> str:
        """Who proposes round `number` under a view."""
        return self.members[(number + view) % len(self.members)]

    def agree(self, standing: Standing, view: int, reason: Reason) -> Proposal | None:
        """The proposal that all its hospitals have signed, the attempt of its plan the view; `None` where a block came that this
        one lacked.

        `view` and `reason` are where this hospital goes on from. One that leaves has the proposal of the others. Raises
        `QuorumError` when too few are left, `LeftOutError` where the others go on without this one.
        """
        number = standing.number
        for tried in range(view, 2 * len(self.rules.hospitals)):
            if tried < view:
                continue  # the others are further
            proposer = self.proposer(number, tried)
            if not standing.leaves:
                self._require_enough(number, reason)
            self._views.enter(number, tried)
            self._say_present(standing, tried, reason)
            said_at = time.monotonic()
            try:
                word = self._await_proposal(standing, tried, reason)
                if word is None:
                    return None
                proposal = self.proposals.sound(standing, proposer, word, self._latest[self.me][0], self._membership)
                self._require_recalled(number, proposal.present, proposer)
                was_time = time.monotonic() - said_at >= self.deadlines.presence - self.deadlines.beyond
                alive = self._said_by(self._alive)
                require_no_difference(standing, proposal, self._latest[self.me][0], alive, was_time)
                self.agreeing.sign_together(proposal, self._linked)
                if standing.leaves:
                    return proposal
                if self.me not in proposal.plan.hospitals:
                    raise LeftOutError(self.me, f"round {number}, which {proposer} proposed")
                self._begin(proposal)
                if absent := [name for name in self.members if name not in proposal.plan.hospitals]:
                    log.warning("round %d goes on without %s", number, ", ".join(absent))
                return proposal
            except _Behind as further:
                view, reason = further.view, Reason("the others are under a later view")
                self.void(number, tried, reason)  # or it passes for late there
                continue
            except LeftOutError:
                raise
            except (PeerLostError, ProtocolError) as error:
                reason = Reason(error.what, lost_with(error))
                self.void(number, tried, Reason(error.for_peers))
            next_one = self.proposer(number, tried + 1)
            log.warning("round %d under %s came to nothing: %s; %s is next", number, proposer, reason.why, next_one)
        raise SumLostError(f"round {number} came to nothing under every hospital", "see the logs of the hospitals")

    def void(self, number: int, view: int, reason: Reason) -> None:
        """Tell all that this hospital gives up what was agreed under a view, wherever they wait for it in that."""
        self._views.give_up((number, view), self._linked, reason.why)

    def signing(self, number: int, view: int, what: str = "block") -> Links:
        """Links for the signatures of a block under a view."""
        return self.domain.links.scoped(f"{what} {number} {view}")

    def conclude(self, number: int) -> None:
        """After the last block: stay until all others that are linked have it, and give it to who lacks it."""
        self._say_present(Standing(number, "", 1), 0, Reason())
        deadline = time.monotonic() + self.deadlines.answer
        while time.monotonic() < deadline:
            self._take_words()
            late = [name for name in self._alive if not self._is_past(name, number)]
            if not late or first_to_speak(self._links, late, deadline) is None:
                return

    @property
    def _linked(self) -> tuple[str, ...]:
        return tuple(name for name in self.rules.hospitals if name != self.me and self._links.alive(name))

    @property
    def _alive(self) -> tuple[str, ...]:
        return tuple(name for name in self._linked if name in self.members)

    def _staying(self, number: int) -> list[str]:
        """The members that are linked, without those that leave before this round."""
        leaving = [name for name, (said, _) in self._latest.items() if said.leaves_in(number)]
        return [name for name in self._alive if name not in leaving]

    @property
    def _membership(self) -> Membership:
        known = self.founders.union(*(block.parties for block in self.ledger.blocks))
        return Membership(self.members, known)

    def _begin(self, proposal: Proposal) -> None:
        """A plan with this hospital holds."""
        self._began, self._starts = True, dict(proposal.plan.starts)
        self.asking.take_part(proposal.plan.hospitals)
        if self._unconfirmed and {*self.members, *self._unconfirmed} <= set(proposal.plan.hospitals):
            self.recalls = True  # all that could have kept another block are there, and have not

    def kept(self, block: Block) -> None:
        """A block was kept that this hospital signed in this start: its parties are the members now."""
        self.members, self.recalls, self._unconfirmed = block.parties, True, ()

    def _require_enough(self, number: int, reason: Reason) -> None:
        present = (self.me, *self._staying(number))
        if len(present) < self.rules.smallest == len(self.rules.hospitals) and reason.lost:
            raise PeerLostError(reason.lost, reason.why, f"see the log of {reason.lost}")
        require_quorum(self.rules, present, self.rules.hospitals, f"round {number}")

    def _require_recalled(self, number: int, said: Mapping[str, Presence], proposer: str) -> None:
        own = () if self.recalls else self._unconfirmed
        if missing := required_by(self.rules, self._membership, said, own):
            is_there = missing[0] == self.me or missing[0] in self._linked
            if proposer != self.me and is_there:  # another one may propose it
                raise ProtocolError(f"{proposer} left out {missing[0]}, which is there and needed", DEVIATES)
            raise QuorumError(
                f"round {number}: to go on after all have stopped takes all hospitals of the last block; {missing[0]} is missing",
                "start it too, with --resume",
            )

    # ---- step 1 ----------------------------------------------------------------------------------------------------

    def _say_present(self, standing: Standing, view: int, reason: Reason) -> None:
        self.certificates.exchange()
        standing = replace(standing, recalls=self.recalls, votes=self.asking.votes)
        mine = self.proposals.own_presence(standing, view, reason, self.ledger, self.complete)
        values, subject, linked = asdict(mine), self.proposals.subject("present", mine.view_of), self._linked
        signed = say_signed(self.domain, self._links, linked, subject, values)
        self._latest[self.me] = mine, {**values, "signature": signed.signature}
        self._heard_by |= {self._hearing(name, mine) for name in linked}

    def _hearing(self, name: str, mine: Presence) -> tuple[str, str, tuple[int, int]]:
        return name, self._links.key_fingerprint(name), mine.view_of

    def _say_again(self, name: str) -> None:
        """To one that has linked since: what this hospital said of itself last. It may have spoken to nobody here, either."""
        if self.me not in self._latest or not self.certificates.has_told(name):
            return
        mine, word = self._latest[self.me]
        if self._links.alive(name) and self._hearing(name, mine) not in self._heard_by:
            self._heard_by.add(self._hearing(name, mine))
            say(self._links, [name], "present", **word)

    def _take_words(self) -> None:
        """What has come; what is no word of this protocol is passed over, and said. Of one that speaks faster than it is heard
        no more than a few words at once: deadlines go on meanwhile."""
        self.certificates.exchange()
        for name in self.rules.hospitals:
            for _ in range(_AT_ONCE):
                if name == self.me or not has_spoken(self._links, name):
                    break
                self.certificates.exchange()  # what it showed came before its word
                try:
                    self._take_word(name, next_word(self._links, name, _WORDS))
                except ProtocolError as error:
                    log.warning("%s", error)
        for name in self._linked:
            self._say_again(name)
        self._take_blocks()

    def _await_word(self, until: float) -> None:
        """Until somebody speaks, or may have linked."""
        first_to_speak(self._links, self._linked, min(until, time.monotonic() + _LOOK))

    def _take_word(self, name: str, word: dict[str, Any]) -> None:
        match word["word"]:
            case "present":
                self._take_presence(name, word)
            case "proposal":
                self._proposed[name] = word
            case "block":
                self._passing_on.take(name, word)
            case _:
                self.asking.take(name, word, self._membership)

    def _take_presence(self, name: str, word: dict[str, Any]) -> None:
        said = Presence.from_word(name, word)
        if not {*said.held, *said.votes} <= set(self.rules.hospitals):
            raise ProtocolError(
                f"{name} says that it holds keys of others than the hospitals of this run", SAME_VERSION
            )
        heard(self.domain, name, self.proposals.subject("present", said.view_of), word)
        if name not in self._latest or self._latest[name][0].view_of <= said.view_of:
            self._latest[name] = said, word
        self._passing_on.give(name, said.blocks)

    def _take_blocks(self) -> None:
        """Those that others gave, where a quorum says that it has kept them."""
        while True:
            try:
                taken = self._passing_on.believed(self._said_by(self._linked), self.members)
            except ProtocolError as error:
                log.warning("%s", error)
                continue
            if taken is None:
                return
            name, block = taken
            if self._unconfirmed and not self.ledger.signed_before():  # what it signed was kept, or can be kept no more
                self.recalls, self._unconfirmed = True, ()
            if self.me not in block.parties:
                raise LeftOutError(self.me, f"{block.about}, whose block {name} sent")

    def _is_present(self, name: str, view_of: tuple[int, int]) -> bool:
        return name in self._latest and self._latest[name][0].view_of == view_of

    def _is_past(self, name: str, number: int) -> bool:
        return name in self._latest and self._latest[name][0].number >= number

    # ---- joining ---------------------------------------------------------------------------------------------------

    def ask(self, giver: str = "", request: int = 0) -> None:
        """Say to all that this hospital would take part, and to `giver` that it shall give what this one lacks."""
        self.asking.ask(self._linked, self.ledger.chain.blocks, giver, request)

    def begins_anew(self) -> bool:
        """This hospital is given what it goes on from, so it is not counted on; whether it has been in a plan before."""
        began, self._began, self.recalls, self._unconfirmed = self._began, False, False, ()
        return began

    def further(self) -> Further | None:
        """Where a quorum of others is, if that is further than this hospital, or as far with another state."""
        said = self._said_by(self._linked)
        mine = self._latest[self.me][0] if self.me in self._latest else None
        return further_than(mine, said, self.rules.smallest)

    def _said_by(self, names: Sequence[str]) -> dict[str, Presence]:
        return {name: self._latest[name][0] for name in names if name in self._latest}

    def look(self, until: float) -> bool:
        """Take what comes, waiting for it until then (of `time.monotonic`); False where fewer than a quorum of others are left."""
        if len(self._linked) < self.rules.smallest:
            return False
        self._await_word(until)
        try:
            self._take_words()
        except LeftOutError as error:  # a block that it was given, of a round that it was not in: it knows
            log.info("%s", error)
        self.asking.ask_those_that_linked(self._linked, self.ledger.chain.blocks)
        return True

    def answered(self, givers: Collection[str]) -> bool:
        """Whether all members that are linked, `givers` with them, have answered this one that asks, where it needs votes."""
        return self.asking.answered(self._membership, {*self._alive, *givers})

    # ---- step 2 ----------------------------------------------------------------------------------------------------

    def _await_proposal(self, standing: Standing, view: int, reason: Reason) -> dict[str, Any] | None:
        """The proposal under this view, made here or heard; `None` where a block came.

        Raises `PeerLostError` naming the proposer."""
        number, blocks, proposer = standing.number, self.ledger.chain.blocks, self.proposer(standing.number, view)
        seconds = self.deadlines.presence if self._began or view else self.deadlines.beginning
        until, patience = time.monotonic() + seconds + (0 if proposer == self.me else self.deadlines.beyond), 0.0
        while True:
            self._take_words()
            if self.ledger.chain.blocks > blocks:
                return None
            self._require_not_behind(number, view)
            ahead = self.further()
            if ahead is not None and not 0 < ahead.blocks - blocks <= GIVEN:  # those are given to it
                raise LeftOutError(self.me, f"round {number} (the others are before round {ahead.number})")
            if proposer in self._latest and self._latest[proposer][0].leaves_in(number):
                raise PeerLostError(proposer, f"{proposer} leaves", "the others go on")
            alive, late = self._alive, time.monotonic() >= until
            if proposer == self.me:
                waits = [
                    name for name in alive if self._is_same_start(name) and not self._is_present(name, (number, view))
                ]
                newcomers = () if waits else self.asking.awaited(self._present_in(number, view), number)
                patience = patience or (0.0 if waits else time.monotonic() + self.deadlines.answer)
                if late or (not waits and (not newcomers or time.monotonic() >= patience)):
                    self.asking.were_waited_for(newcomers, number)
                    values = self._own_proposal(standing)
                    there = {name: self._latest[name][0] for name in values["hospitals"]}
                    self._require_recalled(number, there, self.me)
                    subject = self.proposals.subject("proposal", (number, view))
                    signed = say_signed(self.domain, self._links, self._linked, subject, values)
                    return {**values, "signature": signed.signature}
            elif (word := self._proposed.get(proposer)) and (word.get("number"), word.get("view")) == (number, view):
                return word
            elif late or proposer not in alive:
                how = "was lost before it proposed" if not late else f"proposed nothing within {seconds:g} s"
                raise PeerLostError(proposer, f"{proposer} {how}", f"see the log of {proposer}")
            if not standing.leaves:
                self._require_enough(number, reason)
            self._await_word(min(until, patience or until))

    def _is_same_start(self, name: str) -> bool:
        """Whether it is that of the last plan: one that has started again is waited for once it asks."""
        return self._starts.get(name) in (None, self.proposals.start_of(name))

    def _present_in(self, number: int, view: int) -> list[str]:
        return [name for name, (said, _) in self._latest.items() if said.view_of == (number, view)]

    def _own_proposal(self, standing: Standing) -> dict[str, Any]:
        """Raises `SumLostError` where too few are under this view with this hospital: others may be enough under the next one."""
        try:
            return self.proposals.proposed(standing, self._membership, self._linked, self._latest)
        except QuorumError as error:
            raise SumLostError(error.what, error.fix) from None

    def _require_not_behind(self, number: int, view: int) -> None:
        """Raise `_Behind` when a quorum, this hospital with it, is under a later view."""
        there = [said for name, (said, _) in self._latest.items() if name in self.members and said.number == number]
        later = sorted((said.view for said in there), reverse=True)
        reached = later[self.rules.smallest - 2] if len(later) >= self.rules.smallest - 1 else 0
        if reached > view:
            raise _Behind(reached)


class _Behind(Exception):  # noqa: N818 - no error
    """The others are under this later view."""

    def __init__(self, view: int) -> None:
        self.view = view
        super().__init__(view)
