"""Who may be in a proposal beside the parties of the last block: by whose vote, and on top of which others.

A hospital that is no founder and in no block is admitted by `federation.admission`: by the votes of all members in the proposal,
of a quorum of them, or by its name. A vote ("admits") is a member's signature over the newcomer's name and this start of it
(`start_of`). The newcomer passes the votes on when it says that it is there, so all of the proposal check them; and before that to
whom it asks for the state of the run, which nobody gives to who is not admitted. Who was in a block before, or is a founder, comes
back without votes.

Nobody is counted on who may have forgotten. A block is kept when a quorum has it complete (`audit.peer_signing`), and the next
quorum has one of those: but not if that one has started again since. So of each proposal a quorum must be members that recall all
they signed; or else all are there that could have kept a block (`required_by`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cryptography import x509

from mpc_fl.aggregation.rules import Rules
from mpc_fl.aggregation.signed_words import Subject, heard, say_signed
from mpc_fl.aggregation.transcript import digest_of, signatory_of
from mpc_fl.errors import ProtocolError
from mpc_fl.federation.peer_presence import Presence
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

_PURPOSE = "mpc-fl admission among peers 1"


@dataclass(frozen=True)
class Membership:
    """Who is what before a round, by a hospital's own ledger: `members` are the parties of the last block, or the founders; `known`
    are those that need no votes."""

    members: tuple[str, ...]
    known: frozenset[str]


@dataclass(frozen=True)
class Admission:
    """The rule of a run, as a hospital votes and checks by it. `about_run`: session and digest of the configuration. `allows` says
    whether the rules of this site allow the holder of a certificate."""

    domain: SecretDomain
    rules: Rules
    about_run: tuple[str, str]
    rule: str | tuple[str, ...]
    allows: Callable[[x509.Certificate], bool]

    def vote(self, links: Links, name: str, certificate: x509.Certificate) -> None:
        """Answer a hospital that asks to be admitted: with a vote, or "refuses" where the rules of this site do not allow it."""
        subject = self._subject(name, start_of(self.domain, name), "admits" if self.allows(certificate) else "refuses")
        say_signed(self.domain, links, [name], subject, {})

    def taken(self, voter: str, word: Mapping[str, object]) -> str:
        """At the newcomer: the vote in a member's answer. Raises `ProtocolError` for one that is not its own."""
        me = self.domain.links.name
        return heard(self.domain, voter, self._subject(me, start_of(self.domain, me), "admits"), word).signature

    def objection(self, of: Membership, said: Mapping[str, Presence]) -> str:
        """What keeps these hospitals, by what each said of itself, from being in one proposal; "" where nothing does."""
        voters = [name for name in said if name in of.members]
        for name, one in said.items():
            if what := self.lacking(of, voters, (name, one.held.get(name, "")), one.votes):
                return what
        return ""

    def lacking(
        self, of: Membership, voters: Sequence[str], start: tuple[str, str], votes: Mapping[str, object]
    ) -> str:
        """What keeps a hospital from being admitted by these voters, "" where nothing does. `start`: its name, and which start
        of it (`start_of`)."""
        name, _ = start
        if name in of.known:
            return ""
        if not isinstance(self.rule, str):
            return "" if name in self.rule else f"named {name}, which federation.admission does not"
        needed = len(voters) if self.rule == "all" else self.rules.smallest
        genuine = sum(self._is_vote(voter, start, votes.get(voter)) for voter in voters)
        return "" if genuine >= needed else f"admitted {name} with {genuine} votes, and it needs {needed}"

    def _is_vote(self, voter: str, start: tuple[str, str], vote: object) -> bool:
        try:
            heard(self.domain, voter, self._subject(*start, "admits"), {"signature": vote})
        except ProtocolError:
            return False
        return True

    def _subject(self, name: str, start: str, word: str) -> Subject:
        return Subject(digest_of([_PURPOSE, *self.about_run, name, start]), word)


def start_of(domain: SecretDomain, name: str) -> str:
    """Which start of a hospital this one is linked with, as a digest: of its key, and of the certificate that it has shown.

    Who shows two hospitals two certificates of its own is so known to them by two starts, and in no proposal with both.
    """
    return digest_of([domain.links.key_fingerprint(name), signatory_of(domain).fingerprint_of(name)])


def required_by(
    rules: Rules, of: Membership, said: Mapping[str, Presence], unconfirmed: Collection[str] = ()
) -> Sequence[str]:
    """Who is missing of those that a proposal needs: nobody where a quorum of it are members that recall all they signed; else all
    members, and all parties of a block of which this hospital cannot say whether it was kept (`unconfirmed`)."""
    recalling = [name for name in said if name in of.members and said[name].recalls]
    if len(recalling) >= rules.smallest:
        return ()
    return [name for name in rules.hospitals if name in (*of.members, *unconfirmed) and name not in said]
