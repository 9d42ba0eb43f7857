"""Who takes part in a round among peers: all say that they are there, one proposes, and all of those sign the proposal.

Members are the parties of the last block, at first all hospitals of the run. Round k is made under view 0, or where that comes to
nothing under view 1, 2, ... Under view v the member k + v, counted round and round, proposes:
  1. each says to all that it is there ("present", `Presence`), signed: for which round and view, after which block, with which
     state and which openings that no block holds yet, with whose keys; and why the view before came to nothing
  2. who proposes waits until all that are linked with it are there, and names U ("proposal"): those with its own block and state
     that hold keys of each other, without whom more than half of them have lost a sum with, unless they are too few without
     those. What they said comes with it
  3. each of U holds the proposal against what it has itself, signs it, and repeats to all what it signed ("agreed"). With the
     signatures of all of U the plan holds
A proposer that is lost, silent, or says two things or something false, is named and the next view begins; nobody is in a proposal
under it who has not signed that the one before is over, and they are a quorum.

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
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpc_fl.aggregation.rules import Rules, require_quorum
from mpc_fl.aggregation.signed_words import has_said, heard, repeated, require_one_version, say_signed
from mpc_fl.aggregation.words import (
    Deadlines,
    broadcast,
    first_to_speak,
    has_spoken,
    hear_all,
    next_word,
    say,
)
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.peer_signing import give_up
from mpc_fl.audit.reveal_ledger import Block, block_from, to_json
from mpc_fl.config.deadlines import PeerDeadlines
from mpc_fl.errors import (
    SAME_VERSION,
    LeftOutError,
    MpcFlError,
    PeerLostError,
    ProtocolError,
    QuorumError,
    SumLostError,
)
from mpc_fl.federation.peer_proposal import (
    DEVIATES,
    Complete,
    Presence,
    Proposal,
    Proposals,
    Reason,
    Standing,
    require_of_this_run,
)
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

_WORDS = ("present", "proposal", "block")
_AT_ONCE = 16


@dataclass
class PeerAttendance:
    """A hospital's part in who takes part. `members` are the parties of the last block; `complete` a block that has all signatures
    and was not kept. A run that goes on after all have stopped `needs_all` members for its first
    plan: one that is missing may be the only one that has kept a block."""

    domain: SecretDomain
    ledger: RevealLedger
    rules: Rules
    deadlines: PeerDeadlines
    about_run: tuple[str, str]  # session and digest of the configuration
    members: tuple[str, ...] = ()
    complete: Complete | None = None
    needs_all: bool = False
    _began: bool = False
    _latest: dict[str, tuple[Presence, dict[str, Any]]] = field(default_factory=dict)
    _proposed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _given: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.me, self._links = self.domain.links.name, self.domain.links.scoped("attendance")
        self.members = self.members or self.rules.hospitals
        self.proposals = Proposals(self.domain, self.rules, self.about_run)

    def proposer(self, number: int, view: int) -> str:
        """Who proposes round `number` under a view."""
        return self.members[(number + view) % len(self.members)]

    def agree(self, standing: Standing, view: int, reason: Reason) -> Proposal | None:
        """The proposal that all its hospitals have signed, the attempt of its plan the view; `None` where a block came that this
        one lacked.

        `view` and `reason` are where this hospital goes on from. Raises `QuorumError` when too few are left, `LeftOutError` where
        the others go on without this one.
        """
        number = standing.number
        for tried in range(view, 2 * len(self.rules.hospitals)):
            if tried < view:
                continue  # the others are further
            proposer = self.proposer(number, tried)
            self._require_enough(number, reason)
            self._say_present(standing, tried, reason)
            try:
                word = self._await_proposal(standing, tried)
                if word is None:
                    return None
                proposal = self.proposals.sound(standing, proposer, word, self._latest[self.me][0])
                self._require_all(number, proposal.plan.hospitals)
                self._require_no_difference(standing, proposal, proposer)
                self._sign_together(proposal, proposer)
                if self.me not in proposal.plan.hospitals:
                    raise LeftOutError(self.me, f"round {number}, which {proposer} proposed")
                self._began, self.needs_all = True, False
                if absent := [name for name in self.members if name not in proposal.plan.hospitals]:
                    log.warning("round %d goes on without %s", number, ", ".join(absent))
                return proposal
            except _Behind as further:
                view, reason = further.view, Reason("the others are under a later view")
                say(
                    self._agreeing(number, tried), self._alive, "void", reason=reason.why
                )  # or it passes for late there
                continue
            except LeftOutError:
                raise
            except (PeerLostError, ProtocolError) as error:
                reason = Reason(error.what, lost_with(error))
                say(self._agreeing(number, tried), self._alive, "void", reason=error.for_peers)
            next_one = self.proposer(number, tried + 1)
            log.warning("round %d under %s came to nothing: %s; %s is next", number, proposer, reason.why, next_one)
        raise SumLostError(f"round {number} came to nothing under every hospital", "see the logs of the hospitals")

    def void(self, number: int, view: int, reason: Reason) -> None:
        """Tell all that this hospital gives up what was agreed under a view, wherever they wait for it next."""
        for what in ("start", "finish", "block") if number == 0 else ("finish", "block"):
            give_up(self.signing(number, view, what), self._alive, reason.why)
        for links in (self.signing(number, view, "finishing"), self.signing(number, view, "begun").scoped("settle")):
            say(links, self._alive, "void", reason=reason.why)

    def signing(self, number: int, view: int, what: str = "block") -> Links:
        """Links for the signatures of a block under a view."""
        return self.domain.links.scoped(f"{what} {number} {view}")

    def finish_together(self, view_of: tuple[int, int], block: Block, names: Sequence[str]) -> Complete:
        """Before a complete block of an earlier view is finished: all of `names`, its parties that are there, sign that it is
        under this view, so that whoever has it can show that later. Raises like any word that all say."""
        links, subject = self.signing(*view_of, "finishing"), self.proposals.subject("finish", view_of)
        values, signed, now = {"seal": block.seal()}, dict[str, str](), time.monotonic()

        def take(name: str, word: dict[str, Any]) -> None:
            if not has_said(self.domain, name, subject, values, word.get("signature")):
                raise ProtocolError(f"{name} does not finish the block that it agreed to finish", DEVIATES, name)
            signed[name] = str(word["signature"])

        try:
            own = say_signed(self.domain, links, names, subject, values)
            # Another one may still wait for the block, in vain, and say so.
            deadlines = Deadlines(f"round {view_of[0]}", now, 2 * self.deadlines.answer)
            hear_all(links, names, "finish", take, (deadlines, 0))
        finally:
            links.end_scope()
        return Complete(view_of[1], block, {**signed, self.me: own.signature})

    def _agreeing(self, number: int, view: int) -> Links:
        return self.domain.links.scoped(f"agreed {number} {view}")

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
    def _others(self) -> tuple[str, ...]:
        return tuple(name for name in self.members if name != self.me)

    @property
    def _alive(self) -> tuple[str, ...]:
        return tuple(name for name in self._others if self._links.alive(name))

    def _require_enough(self, number: int, reason: Reason) -> None:
        present = (self.me, *self._alive)
        if len(present) < self.rules.smallest == len(self.rules.hospitals) and reason.lost:
            raise PeerLostError(reason.lost, reason.why, f"see the log of {reason.lost}")
        require_quorum(self.rules, present, self.rules.hospitals, f"round {number}")

    def _require_all(self, number: int, hospitals: Collection[str]) -> None:
        missing = [name for name in self.members if name not in hospitals]
        if self.needs_all and missing:
            raise QuorumError(
                f"round {number}: to go on after all have stopped takes all hospitals of the last block; {missing[0]} is missing",
                "start it too, with --resume",
            )

    def _require_no_difference(self, standing: Standing, proposal: Proposal, proposer: str) -> None:
        """An exact sum that was opened is not made anew without somebody who was in it and is there: the difference would be that
        one's summand. Raises `ProtocolError` naming who proposed it. Whether it has spoken under this view already is no matter,
        for who proposes may be quicker."""
        plan, lost = proposal.plan, Counter(one.lost for one in proposal.present.values())
        mine = self._latest[self.me][0]
        for name in () if plan.normalised else standing.among:
            said = self._latest[name][0] if name in self._latest and name in self._alive else None
            is_there = said is not None and (said.number, said.place) == (standing.number, mine.place)
            if name not in plan.hospitals and is_there and 2 * lost[name] <= len(proposal.present):
                what = f"{proposer} would make a sum of round {standing.number} anew without {name}, which is there"
                raise ProtocolError(what, "nothing was sent under its proposal: the difference would be one summand")

    # ---- step 1 ----------------------------------------------------------------------------------------------------

    def _say_present(self, standing: Standing, view: int, reason: Reason) -> None:
        mine = self.proposals.own_presence(standing, view, reason, self.ledger, self.complete)
        values, subject = asdict(mine), self.proposals.subject("present", mine.view_of)
        signed = say_signed(self.domain, self._links, self._alive, subject, values)
        self._latest[self.me] = mine, {**values, "signature": signed.signature}

    def _take_words(self) -> None:
        """What has come; what is no word of this protocol is passed over, and said. Of one that speaks faster than it is heard
        no more than a few words at once: deadlines go on meanwhile."""
        for name in self._others:
            for _ in range(_AT_ONCE):
                if not has_spoken(self._links, name):
                    break
                try:
                    word = next_word(self._links, name, _WORDS)
                    if word["word"] == "present":
                        self._take_presence(name, word)
                    elif word["word"] == "proposal":
                        self._proposed[name] = word
                    else:
                        self._take_block(name, word)
                except ProtocolError as error:
                    log.warning("%s", error)

    def _take_presence(self, name: str, word: dict[str, Any]) -> None:
        said = Presence.from_word(name, word)
        if not set(said.held) <= set(self.rules.hospitals):
            raise ProtocolError(
                f"{name} says that it holds keys of others than the hospitals of this run", SAME_VERSION
            )
        heard(self.domain, name, self.proposals.subject("present", said.view_of), word)
        if name not in self._latest or self._latest[name][0].view_of <= said.view_of:
            self._latest[name] = said, word
        if 0 < self.ledger.chain.blocks - said.blocks <= 2:
            for block in self.ledger.blocks[said.blocks :]:
                self.give(name, block)

    def give(self, name: str, block: Block) -> None:
        """Give a block to a hospital that lacks it, once."""
        if (name, block.number) not in self._given:
            self._given.add((name, block.number))
            broadcast([name], lambda to: say(self._links, [to], "block", block=to_json(block)))

    def _take_block(self, name: str, word: Mapping[str, Any]) -> None:
        try:
            block = block_from(word.get("block"))
        except ValueError:
            raise ProtocolError(f"{name} sent no block of the reveal ledger", SAME_VERSION) from None
        if block.number != self.ledger.chain.blocks:
            return
        require_of_this_run(block, name, self.about_run, self.rules.smallest)
        self.ledger.add(block, name)
        if self.me not in block.parties:
            raise LeftOutError(self.me, f"{block.about}, whose block {name} sent")

    def _is_present(self, name: str, view_of: tuple[int, int]) -> bool:
        return name in self._latest and self._latest[name][0].view_of == view_of

    def _is_past(self, name: str, number: int) -> bool:
        return name in self._latest and self._latest[name][0].number >= number

    # ---- step 2 ----------------------------------------------------------------------------------------------------

    def _await_proposal(self, standing: Standing, view: int) -> dict[str, Any] | None:
        """The proposal under this view, made here or heard; `None` where a block came.

        Raises `PeerLostError` naming the proposer."""
        number, blocks, proposer = standing.number, self.ledger.chain.blocks, self.proposer(standing.number, view)
        seconds = self.deadlines.presence if self._began or view else self.deadlines.beginning
        until = time.monotonic() + seconds + (0 if proposer == self.me else self.deadlines.beyond)
        while True:
            self._take_words()
            if self.ledger.chain.blocks > blocks:
                return None
            self._require_not_behind(number, view)
            alive, late = self._alive, time.monotonic() >= until
            if proposer == self.me:
                if late or all(self._is_present(name, (number, view)) for name in alive):
                    values = self._own_proposal(standing, alive)
                    self._require_all(number, values["hospitals"])
                    subject = self.proposals.subject("proposal", (number, view))
                    signed = say_signed(self.domain, self._links, self._alive, subject, values)
                    return {**values, "signature": signed.signature}
            elif (word := self._proposed.get(proposer)) and (word.get("number"), word.get("view")) == (number, view):
                return word
            elif late or proposer not in alive:
                how = "was lost before it proposed" if not late else f"proposed nothing within {seconds:g} s"
                raise PeerLostError(proposer, f"{proposer} {how}", f"see the log of {proposer}")
            require_quorum(self.rules, (self.me, *alive), self.rules.hospitals, f"round {number}")
            first_to_speak(self._links, alive, until)

    def _own_proposal(self, standing: Standing, alive: Collection[str]) -> dict[str, Any]:
        """Raises `SumLostError` where too few are under this view with this hospital: others may be enough under the next one."""
        try:
            return self.proposals.proposed(standing, self.members, alive, self._latest)
        except QuorumError as error:
            raise SumLostError(error.what, error.fix) from None

    def _require_not_behind(self, number: int, view: int) -> None:
        """Raise `_Behind` when a quorum, this hospital with it, is under a later view."""
        later = sorted((said.view for said, _ in self._latest.values() if said.number == number), reverse=True)
        reached = later[self.rules.smallest - 2] if len(later) >= self.rules.smallest - 1 else 0
        if reached > view:
            raise _Behind(reached)

    # ---- step 3 ----------------------------------------------------------------------------------------------------

    def _sign_together(self, proposal: Proposal, proposer: str) -> None:
        """Sign a proposal that this hospital is in, and hear that all that are in it have. One that is left out hears it, too: what
        a proposer tells it alone is no proposal."""
        domain, plan, mine = self.domain, proposal.plan, {proposer: proposal.signed}
        links, (about, agreed) = (
            self._agreeing(*plan.round_of),
            (self.proposals.subject(word, plan.round_of) for word in ("proposal", "agreed")),
        )
        others = [name for name in plan.hospitals if name != self.me]

        def take(name: str, word: dict[str, Any]) -> None:
            heard(domain, name, agreed, word)
            require_one_version(domain, name, about, mine, word.get("repeated"))

        try:
            if self.me in plan.hospitals:  # to all: a hospital that was told another proposal waits for this one, too
                say_signed(domain, links, self._alive, agreed, {"repeated": repeated(mine)})
            now = time.monotonic()
            hear_all(links, others, "agreed", take, (Deadlines(f"round {plan.number}", now, self.deadlines.answer), 0))
        finally:
            links.end_scope()


class _Behind(Exception):  # noqa: N818 - no error
    """The others are under this later view."""

    def __init__(self, view: int) -> None:
        self.view = view
        super().__init__(view)


def lost_with(error: MpcFlError) -> str:
    """Whom a view came to nothing with, lost or deviating; "" where that is not known."""
    if isinstance(error, PeerLostError):
        return error.peer
    if isinstance(error, SumLostError):
        return error.lost
    return error.by if isinstance(error, ProtocolError) else ""
