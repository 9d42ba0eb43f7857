"""Asking to take part in a run among peers that goes on: who asks, who is waited for, what the members answer, and where they are.

A hospital says to all that it would take part ("asks"), and to one of them that it shall give what this one lacks. Each member
notes that and answers once for each start of it: with its vote ("admits"), or that it gives none ("refuses"). Who proposes next
waits for it a little, and not often in vain.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpc_fl.aggregation.signed_words import Subject, heard, say_signed
from mpc_fl.federation.peer_admission import Admission, Membership, start_of
from mpc_fl.federation.peer_certificates import Certificates
from mpc_fl.federation.peer_presence import Presence
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

WORDS = ("asks", "admits", "refuses")
_PATIENCE = 3  # times that a hospital is waited for in vain, round after round; then in half of them, a quarter, ...
_MOST_DOUBLINGS = 10


@dataclass
class Asking:
    """A hospital's part in it, over the `links` of the attendance. `give` gives one that asks for it what it lacks, or says
    why it is not admitted; `votes` are those that this hospital was given."""

    links: Links
    subject: Subject
    admission: Admission
    certificates: Certificates
    give: Callable[[str, Mapping[str, Any], str], None]
    votes: dict[str, str] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _asked: set[tuple[str, str]] = field(default_factory=set)  # whom this hospital asked, by which start of it
    _starts: dict[str, str] = field(default_factory=dict)  # who asks, and by which start of it
    _in_vain: Counter[str] = field(default_factory=Counter)  # how often one was waited for, since it took part last
    _waits_again: dict[str, int] = field(default_factory=dict)  # before which round it is waited for again

    def ask(self, linked: Sequence[str], blocks: int, giver: str = "", request: int = 0) -> None:
        """Say to all that this hospital, which has so many blocks, would take part; `giver` shall give it what it lacks."""
        self.certificates.exchange()
        values = {"from": giver, "request": request, "blocks": blocks, "votes": dict(self.votes)}
        say_signed(self.admission.domain, self.links, linked, self.subject, values)
        self._asked |= {(name, self.links.key_fingerprint(name)) for name in linked}

    def ask_those_that_linked(self, linked: Sequence[str], blocks: int) -> None:
        """Say that to those, too, that have linked since: without it they would give no vote."""
        if new := [name for name in linked if (name, self.links.key_fingerprint(name)) not in self._asked]:
            self.ask(new, blocks)

    def take(self, name: str, word: Mapping[str, Any], of: Membership) -> None:
        """One of `WORDS`. Raises `ProtocolError` for one that was not signed."""
        if word["word"] == "admits":
            self.votes[name] = self.admission.taken(name, word)
        elif word["word"] == "refuses":
            if name not in self._refused:
                log.warning("%s gives no vote: the rules of its site do not allow this hospital's certificate", name)
            self._refused.add(name)
        else:
            self._take_asking(name, word, of)

    def _take_asking(self, name: str, word: Mapping[str, Any], of: Membership) -> None:
        heard(self.admission.domain, name, self.subject, word)
        start, rule = self.links.key_fingerprint(name), self.admission.rule
        may_come = name in of.known or isinstance(rule, str) or name in rule
        if may_come and self._starts.get(name) != start:
            self._starts[name] = start
            if name not in of.known:
                self.admission.vote(self.links, name, self.certificates.known[name])
        if word.get("from") == self.links.name:
            self.give(name, word, self._lacking(name, word.get("votes"), of))

    def _lacking(self, name: str, votes: object, of: Membership) -> str:
        """Why one that asks for the model is not given it, "" where it is: it is for those that take part."""
        start = name, start_of(self.admission.domain, name)
        return self.admission.lacking(of, of.members, start, votes if isinstance(votes, dict) else {})

    def answered(self, of: Membership, members: Collection[str]) -> bool:
        """Whether all of these have answered this hospital, where it needs their votes."""
        needs_votes = self.links.name not in of.known and isinstance(self.admission.rule, str)
        return not needs_votes or all(name in self.votes or name in self._refused for name in members)

    def awaited(self, present: Collection[str], number: int) -> tuple[str, ...]:
        """Who asks, and may still come to be `present` before round `number`."""
        return tuple(
            name
            for name, start in self._starts.items()
            if self.links.alive(name)
            and self.links.key_fingerprint(name) == start
            and self._waits_again.get(name, 0) <= number
            and name not in present
        )

    def were_waited_for(self, names: Sequence[str], number: int) -> None:
        """They did not come in time before round `number`. However often one starts again, it is waited for ever more seldom."""
        for name in names:
            self._in_vain[name] += 1
            beyond = self._in_vain[name] - _PATIENCE
            self._waits_again[name] = number if beyond < 0 else number + 2 ** min(beyond + 1, _MOST_DOUBLINGS)

    def take_part(self, names: Sequence[str]) -> None:
        """A plan with these holds."""
        for name in names:
            self._starts.pop(name, None)
            self._in_vain.pop(name, None)


@dataclass(frozen=True)
class Further:
    """Where the others are: before round `number`, after so many `blocks`, with this `state`; `givers` say so."""

    number: int
    blocks: int
    seal: str
    state: str
    givers: tuple[str, ...]


def further_than(mine: Presence | None, others: Mapping[str, Presence], quorum: int) -> Further | None:
    """Where a quorum of others is, if that is further than where this hospital said it is, or as far with another state."""
    at = dict[tuple[int, int, str, str], list[str]]()
    for name, said in others.items():
        at.setdefault((said.number, *said.place), []).append(name)
    enough = {each: names for each, names in at.items() if len(names) >= quorum}
    if not enough:
        return None
    where = max(enough)
    if mine is not None and (where == (mine.number, *mine.place) or where[:2] < (mine.number, mine.blocks)):
        return None
    return Further(*where, tuple(enough[where]))
