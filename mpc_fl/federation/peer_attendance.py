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
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mpc_fl.aggregation.rules import Rules, require_quorum
from mpc_fl.aggregation.signed_words import heard, repeated, require_one_version, say_signed
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
from mpc_fl.federation.peer_proposal import Presence, Proposal, Proposals, Reason, Standing
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

_WORDS = ("present", "proposal", "block")


@dataclass
class PeerAttendance:
    """A hospital's part in who takes part. `members` are the parties of the last block; `complete` a block that has all signatures
    and was not kept, with the view of which it is. A run that goes on after all have stopped `needs_all` members for its first
    plan: one that is missing may be the only one that has kept a block."""

    domain: SecretDomain
    ledger: RevealLedger
    rules: Rules
    deadlines: PeerDeadlines
    about_run: tuple[str, str]  # session and digest of the configuration
    members: tuple[str, ...] = ()
    complete: tuple[int, Block] | None = None
    needs_all: bool = False
    _began: bool = False
    _latest: dict[str, tuple[Presence, dict[str, Any]]] = field(default_factory=dict)
    _proposed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _given: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.me, self._links = self.domain.links.name, self.domain.links.scoped("attendance")
        self.members = self.members or self.rules.hospitals
        self._proposals = Proposals(self.domain, self.rules, self.about_run)

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
            self._say_present(standing, tried, reason)
            try:
                word = self._await_proposal(standing, tried)
                if word is None:
                    return None
                proposal = self._proposals.sound(standing, proposer, word, self._latest[self.me][0])
                self._require_all(number, proposal.plan.hospitals)
                self._sign_together(proposal, proposer)
                if standing.leaves:
                    return proposal
                if self.me not in proposal.plan.hospitals:
                    raise LeftOutError(self.me, f"round {number}, which {proposer} proposed")
                self._began, self.needs_all = True, False
                if absent := [name for name in self.members if name not in proposal.plan.hospitals]:
                    log.warning("round %d goes on without %s", number, ", ".join(absent))
                return proposal
            except _Behind as further:
                view, reason = further.view, Reason("the others are under a later view")
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
        give_up(self.signing(number, view), self._alive, reason.why)

    def signing(self, number: int, view: int, what: str = "block") -> Links:
        """Links for the signatures of a block under a view."""
        return self.domain.links.scoped(f"{what} {number} {view}")

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

    # ---- step 1 ----------------------------------------------------------------------------------------------------

    def _say_present(self, standing: Standing, view: int, reason: Reason) -> None:
        mine = self._proposals.own_presence(standing, view, reason, self.ledger, self.complete)
        values, subject = asdict(mine), self._proposals.subject("present", mine.view_of)
        signed = say_signed(self.domain, self._links, self._alive, subject, values)
        self._latest[self.me] = mine, {**values, "signature": signed.signature}

    def _take_words(self) -> None:
        """All that has come; what is no word of this protocol is passed over, and said."""
        for name in self._others:
            while has_spoken(self._links, name):
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
        heard(self.domain, name, self._proposals.subject("present", said.view_of), word)
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
            if proposer in self._latest and self._latest[proposer][0].leaves_in(number):
                raise PeerLostError(proposer, f"{proposer} leaves", "the others go on")
            alive, late = self._alive, time.monotonic() >= until
            if proposer == self.me:
                if late or all(self._is_present(name, (number, view)) for name in alive):
                    values = self._own_proposal(standing, alive)
                    self._require_all(number, values["hospitals"])
                    subject = self._proposals.subject("proposal", (number, view))
                    signed = say_signed(self.domain, self._links, self._alive, subject, values)
                    return {**values, "signature": signed.signature}
            elif (word := self._proposed.get(proposer)) and (word.get("number"), word.get("view")) == (number, view):
                return word
            elif late or proposer not in alive:
                how = "was lost before it proposed" if not late else f"proposed nothing within {seconds:g} s"
                raise PeerLostError(proposer, f"{proposer} {how}", f"see the log of {proposer}")
            if not standing.leaves:
                require_quorum(self.rules, (self.me, *alive), self.rules.hospitals, f"round {number}")
            first_to_speak(self._links, alive, until)

    def _own_proposal(self, standing: Standing, alive: Collection[str]) -> dict[str, Any]:
        """Raises `SumLostError` where too few are under this view with this hospital: others may be enough under the next one."""
        try:
            return self._proposals.proposed(standing, self.members, alive, self._latest)
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
            (self._proposals.subject(word, plan.round_of) for word in ("proposal", "agreed")),
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
    """Whom a view came to nothing with, "" where that is not known."""
    if isinstance(error, PeerLostError):
        return error.peer
    return error.lost if isinstance(error, SumLostError) else ""
