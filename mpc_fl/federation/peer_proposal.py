"""What hospitals say before a round among peers: that they are there, and who shall take part. Who says what when is
`peer_attendance`; this module makes these words and holds them against what a hospital has itself.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from mpc_fl.aggregation.rules import Rules, require_hospitals, require_quorum
from mpc_fl.aggregation.signed_words import Signed, Subject, has_said, heard
from mpc_fl.aggregation.transcript import digest_of, signatory_of
from mpc_fl.aggregation.words import names_in
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.peer_record import values_of
from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.errors import ProtocolError, printable
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.peer_admission import Admission, Membership, start_of
from mpc_fl.federation.peer_presence import LONGEST_REASON, Presence, Reason, Standing
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

_PURPOSE = "mpc-fl round among peers 1"
_VIEW = re.compile(r" \(([0-9]{1,9})\)$")
DEVIATES = "it does not follow the protocol; nothing was sent under its proposal"


@dataclass(frozen=True)
class Complete:
    """A block with all signatures that a hospital has and has not kept, and the `view` under which that came about. Where that
    is a later one than the block was made under, it was finished then, and `signed` has of each that said so the signature (hex).
    """

    view: int
    block: Block
    signed: Mapping[str, str] = field(default_factory=dict)

    @property
    def made_under(self) -> int:
        """The view that its parties signed, in words, with the block."""
        view = _VIEW.search(self.block.about)
        return int(view[1]) if view else 0


@dataclass(frozen=True)
class Proposal:
    """A sound proposal: the plan in it, what its proposer signed, what each of its hospitals said of itself; who joins and who
    leaves, with the digest of what it signed about that."""

    plan: RoundPlan
    signed: Signed
    present: Mapping[str, Presence]
    proposer: str
    joining: Mapping[str, str]
    leaving: Mapping[str, str]

    def told(self, members: Collection[str]) -> dict[str, str]:
        """What a block under this plan tells of it (`audit.peer_record`): `members` signed the one before, or are founders."""
        joined = {name: digest for name, digest in self.joining.items() if name not in members}
        left = {name: digest for name, digest in self.leaving.items() if name in members}
        return values_of((self.proposer, self.signed.digest), joined, left)


Heard = Mapping[str, tuple[Presence, Mapping[str, Any]]]  # what each hospital said last of itself, and the word


@dataclass(frozen=True)
class Proposals:
    """How a hospital makes and checks these words. `about_run`: session and digest of the configuration."""

    domain: SecretDomain
    rules: Rules
    about_run: tuple[str, str]
    admission: Admission

    def subject(self, word: str, view_of: tuple[int, int]) -> Subject:
        """What a word of a round and view is about."""
        return Subject(digest_of([_PURPOSE, *self.about_run, *view_of]), word)

    def own_presence(
        self, standing: Standing, view: int, reason: Reason, ledger: RevealLedger, complete: Complete | None
    ) -> Presence:
        """What this hospital says of itself. `complete`: a block that it has not kept."""
        chain, pending = ledger.chain, ledger.pending
        complete_view, seal = (0, "") if complete is None else (complete.view, complete.block.seal())
        return Presence(
            number=standing.number,
            view=view,
            state=standing.state,
            made=standing.made,
            blocks=chain.blocks,
            seal=chain.seal,
            pending=len(pending),
            last=pending[-1].digest if pending else "",
            complete=seal,
            complete_view=complete_view,
            held={name: self.start_of(name) for name in self.rules.hospitals if self._hears(name)},
            why=printable(reason.why, LONGEST_REASON),
            lost=reason.lost,
            leaves=standing.leaves,
            recalls=standing.recalls,
            votes=dict(standing.votes),
        )

    def is_of_its_view(self, number: int, complete: Complete) -> bool:
        """Whether a block that somebody shows is of the view that it says: made under it, or finished under it by a quorum."""
        subject, values = self.subject("finish", (number, complete.view)), {"seal": complete.block.seal()}
        if complete.view <= complete.made_under:
            return complete.view == complete.made_under
        parties = complete.block.parties
        those = [name for name in parties if has_said(self.domain, name, subject, values, complete.signed.get(name))]
        return len(those) >= self.rules.smallest

    def start_of(self, name: str) -> str:
        """Which start of a hospital this one is linked with."""
        return start_of(self.domain, name)

    def _hears(self, name: str) -> bool:
        """Whether this hospital can check what `name` says: it is linked, and has shown a certificate."""
        links, signatory = self.domain.links, signatory_of(self.domain)
        return name == links.name or (links.alive(name) and signatory.knows(name))

    def proposed(self, standing: Standing, of: Membership, alive: Collection[str], latest: Heard) -> dict[str, Any]:
        """At who proposes: the values of its proposal, from what all said. Raises `QuorumError` where too few members are left.

        Others are taken in beside them, where they are admitted, unless this round was made already.
        """
        links, (mine, _) = self.domain.links, latest[self.domain.links.name]
        there = {name: said for name, (said, _) in latest.items() if said.view_of == mine.view_of}
        members = {name: said for name, said in there.items() if name in of.members}
        named = Counter(said.lost for said in members.values())
        alike, blamed = list[str](), list[str]()
        for name in of.members:
            if name not in there or name not in alive or there[name].leaves:
                continue
            if there[name].place != mine.place:
                log.warning("%s is left out: it has another block or model before round %d", name, mine.number)
            else:
                (blamed if 2 * named[name] > len(members) else alike).append(name)
        chosen = _holding_keys([links.name, *alike], there, self.start_of)
        if len(chosen) < self.rules.smallest:  # those that the quorum needs are tried again
            chosen = _holding_keys([*chosen, *blamed], there, self.start_of)
        for name in blamed:
            if name not in chosen:
                log.warning("%s is left out of round %d: sums were lost with it", name, mine.number)
        require_quorum(self.rules, chosen, of.members, f"round {standing.number}")
        if not any(there[name].made for name in chosen):
            chosen = self._with_newcomers(chosen, of, alive, there, mine)
        hospitals = [name for name in self.rules.hospitals if name in chosen]
        return {
            "number": mine.number,
            "view": mine.view,
            "hospitals": hospitals,
            "starts": {name: self.start_of(name) for name in hospitals},
            "weight_total": standing.weight_total,
            "present": {name: _signed_part(latest[name][1]) for name in hospitals},
            "leaving": {
                name: _signed_part(word) for name, (said, word) in latest.items() if said.leaves_in(mine.number)
            },
        }

    def _with_newcomers(
        self, chosen: list[str], of: Membership, alive: Collection[str], there: Mapping[str, Presence], mine: Presence
    ) -> list[str]:
        for name in self.rules.hospitals:
            if name in of.members or name not in alive or name not in there or there[name].leaves:
                continue
            if there[name].place != mine.place:
                continue  # it does not have what it was given yet
            with_it = _holding_keys([*chosen, name], there, self.start_of)
            if name not in with_it:
                log.info("%s is not linked with all others yet", name)
            elif objection := self.admission.objection(of, {each: there[each] for each in with_it}):
                log.info("%s is not in the proposal, which would have %s", name, objection)
            else:
                chosen = with_it
        return chosen

    def sound(
        self, standing: Standing, proposer: str, word: Mapping[str, Any], mine: Presence, of: Membership
    ) -> Proposal:
        """At a hospital: a proposal held against what it has itself, which it is in or not.

        Raises `ProtocolError` naming who proposed. `mine` is what it said of itself under this view.
        """
        me, view_of = self.domain.links.name, mine.view_of
        signed = heard(self.domain, proposer, self.subject("proposal", view_of), word)
        hospitals, starts, present = names_in(word, "hospitals", proposer), word.get("starts"), word.get("present")
        if proposer not in hospitals:
            _refuse(proposer, "left itself out")
        if not isinstance(present, dict) or set(present) != set(hospitals):
            _refuse(proposer, "did not say who is present")
        require_hospitals(replace(self.rules, opener=proposer), hospitals, me if me in hospitals else proposer)
        said = {name: self._presence(name, present[name], view_of, proposer) for name in hospitals}
        if said.get(me, mine) != mine:
            _refuse(proposer, f"says of {me} what it said before")
        if len({one.place for one in said.values()}) > 1 or said.get(me, said[proposer]).place != said[proposer].place:
            _refuse(proposer, "named hospitals that have another block or model")
        if starts != {name: self.start_of(name) for name in hospitals}:
            _refuse(proposer, "named other starts of the hospitals than are linked here")
        if old := next((name for name, one in said.items() if one.held.get(name) != self.start_of(name)), None):
            _refuse(proposer, f"says of {old} what it said at an earlier start")
        if me in hospitals and word.get("weight_total") != standing.weight_total:
            _refuse(proposer, "sent another total of weights than was opened")
        if leaver := next((name for name, one in said.items() if one.leaves), None):
            _refuse(proposer, f"named {leaver}, which leaves")
        if objection := self.admission.objection(of, said):
            _refuse(proposer, objection)
        joining = {
            name: heard(self.domain, name, self.subject("present", view_of), present[name]).digest
            for name in hospitals
            if name not in of.members
        }
        leaving = self._leaving(word.get("leaving"), hospitals, mine.number, proposer)
        made = {one.made for one in said.values()}
        is_made = len(made) == 1 and "" not in made
        plan = RoundPlan(*view_of, hospitals, dict(starts), (), standing.weight_total, True, is_made)
        return Proposal(plan, signed, said, proposer, joining, leaving)

    def _leaving(self, words: object, hospitals: Sequence[str], number: int, proposer: str) -> dict[str, str]:
        """Who leaves, and the digest of what it signed about that, for this round under whichever view."""
        digests = dict[str, str]()
        for name, value in words.items() if isinstance(words, dict) else [("somebody", None)]:
            if not isinstance(value, dict):
                _refuse(proposer, f"says that {name} leaves, and not what it signed about that")
            said = Presence.from_word(proposer, value)
            if not said.leaves_in(number) or name in hospitals:
                _refuse(proposer, f"says that {name} leaves, which did not say so")
            try:
                digests[name] = heard(self.domain, name, self.subject("present", said.view_of), value).digest
            except ProtocolError:
                _refuse(proposer, f"says that {name} leaves, which did not sign that")
        return digests

    def _presence(self, name: str, value: object, view_of: tuple[int, int], proposer: str) -> Presence:
        if not isinstance(value, dict):
            _refuse(proposer, f"did not say that {name} is present")
        said = Presence.from_word(proposer, value)
        try:
            heard(self.domain, name, self.subject("present", view_of), value)
        except ProtocolError:
            _refuse(proposer, f"says of {name} what it did not sign")
        return said


def require_of_this_run(block: Block, sender: str, about_run: tuple[str, str], quorum: int) -> None:
    """Raise `ProtocolError` naming who sent a block that begins a ledger of another session, configuration or quorum than those of
    this run: it may be of an earlier run, or of hospitals that made it by themselves."""
    of = block.members
    if of is not None and (of.session, of.configuration, of.quorum) != (*about_run, quorum):
        raise ProtocolError(f"{sender} sent a block that begins the ledger of another run", DEVIATES)


def _signed_part(word: Mapping[str, Any]) -> dict[str, Any]:
    """What a hospital said, as it is passed on to others."""
    return {key: value for key, value in word.items() if key != "word"}


def _holding_keys(names: Sequence[str], there: Mapping[str, Presence], start_of: Callable[[str], str]) -> list[str]:
    """The first of `names`, and of the others, in order, those that are linked with the present starts of all before them, and
    these with theirs."""
    chosen = list[str]()
    for name in names:
        both = (*chosen, name)
        if not chosen or all(there[one].held.get(other) == start_of(other) for one in both for other in both):
            chosen.append(name)
    return chosen


def _refuse(proposer: str, what: str) -> NoReturn:
    raise ProtocolError(f"{proposer} {what}", DEVIATES)
