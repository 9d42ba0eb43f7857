"""Co-signing the reveal ledger: all parties of a round sign one block about its openings.

After the openings of a round, each party with its own record of them, one of the parties the leader (`CoSigners.sign`):
  1. each party makes the block from what it recorded itself, signs it, and writes down that it has
  2. each sends its signature and its digests to the leader: one message per party and round
  3. the leader compares them; where they differ, the run ends with the name of the party and the number of the opening
  4. the leader keeps the block with all signatures, then sends the signatures to all
  5. each party checks every signature over its own block, and keeps it

The leader keeps a block before it sends it: its ledger is never behind another's, and a party that lacks blocks after a
crash gets them from there (`catch_up`). What was begun and not signed is signed by whoever is left (`settle`).

Security, against a leader that deviates (it opens sums, too) and parties that pool with it. A party signs nothing but
blocks that it made from its own record, that count (`ledger_audit.shortfalls`: a quorum of hospitals among its parties, and
all who learned what was opened), and each that it keeps is signed by all its parties. So the leader alone, or with fewer
than the quorum, extends nobody's ledger, neither by signing nor by blocks that it says others signed (`catch_up`). Nor can
it make an honest party forget: a block without an opening that the party recorded is refused (`RevealLedger.add`), in
`settle` the leader's record must begin with the party's own, and a party signs under the quorum of its own configuration. It can
give two sets of parties two blocks of one number: hospitals that are said to be lost sign later without them. Each set
needs a quorum, so above half of the hospitals no fork goes on; `ledger verify` finds any where copies are compared, and
names who signed both.

Why no honest run refuses. A closed sum is recorded by its opener, which leads here, before it returns the confirmations
without which no other party records it (`quorum_sum`): so the leader's record is never behind. Who was lost and comes back
gets blocks that hold what it had begun, with the same digest, since all describe an opening alike. When all crash, `settle`
takes the longest record, and each begins with all shorter ones, since all record in one order. Openings of shares are recorded
by each party by itself; one that is ahead of the leader there is heard in `settle`, which comes after every restart.
A party whose disk forgot records may be refused: it is then right that the run stops.

Who is lost or late. The leader waits for all in one go, so that it is never silent for longer than one wait. Then all that are
left hear who was lost (`_hear_all`), and so does whoever was late, for when it is there again: each ends with `PeerLostError`
naming it, and who are left may begin again without it.

Whatever is received is bounded before it is kept: lists by their length, blocks by their number and each by its signatures.
Every wait has the deadline of the links; a number of blocks that is false ends with the first that does not come or count.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mpc_fl.audit.ledger_audit import shortfalls
from mpc_fl.audit.ledger_file import RevealLedger, now
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.reveal_ledger import (
    Block,
    Chain,
    ChainedOpening,
    Members,
    Signature,
    block_from,
    opening_from,
    sign_block,
    signature_from,
    to_json,
)
from mpc_fl.crypto.certificates import received_pem, verify_certificate
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import SAME_VERSION, SAME_VERSION_AND_CONFIGURATION, MpcFlError, PeerLostError, ProtocolError
from mpc_fl.links.links import Links

log = logging.getLogger(__name__)

T = TypeVar("T")
_MOST_BLOCKS = 1 << 20  # of a run
_MOST_PENDING = 1 << 12  # openings since the last block
_COMPARE = f"nothing more is opened; compare {OPENINGS_FILE} at the parties"


@dataclass(frozen=True)
class CoSigners:
    """The parties that sign a ledger together, seen from one of them; `leader` is one of `parties`, all in the same order.

    All of them call the same methods in the same order. `ledger` is this party's own copy.
    """

    ledger: RevealLedger
    links: Links
    parties: Sequence[str]
    leader: str

    @property
    def _others(self) -> list[str]:
        """All but the leader."""
        return [name for name in self.parties if name != self.leader]

    def begin(
        self, session: str, configuration: str, quorum: int, resumed: bool = False, goes_on: bool = False
    ) -> Block:
        """Start the ledger of a run, or go on with it (`resumed`), once all parties are connected.

        All get the certificates of all and sign who they are, and how many hospitals make a block count (`quorum`, of the
        configuration). When a run goes on, each also gets the blocks it lacks, and what had been begun and not signed by all
        is settled; if the run had ended, its last block is returned and nothing added, unless this party's own configuration
        has more rounds for it (`goes_on`). Raises `ProtocolError` when a party's
        ledger is not the beginning of the leader's or has another quorum, or not all resume, `IdentityError` for a
        certificate that is not valid, `MpcFlError` when a new run finds the ledger of an earlier one.
        """
        ledger = self.ledger
        if ledger.blocks and not resumed:
            raise MpcFlError(f"{ledger.path} is the ledger of an earlier run", "choose another directory for this run")
        certificates = self._exchange_certificates(resumed)
        if set(certificates) != set(self.parties):
            raise ProtocolError(f"{self.leader} sent other certificates than those of the parties", SAME_VERSION)
        for name in self.parties:
            self._require_certificate(certificates[name], name, self.leader)
        self.catch_up("begin", None if resumed else 0, quorum)
        if ledger.chain.ended and not goes_on:
            return ledger.blocks[-1]
        members = Members(session, configuration, fingerprint(ledger.authority), certificates, quorum)
        if not ledger.blocks:
            return self.sign("start", "the run begins", members=members)
        block = self.sign("resume", "the run goes on", members=members)
        self.settle("what was open at the restart")
        return block

    def _exchange_certificates(self, resumed: bool) -> dict[str, Any]:
        """The certificates of all parties (PEM), by name, as the leader passed them on; not checked yet."""
        links, leader = self.links, self.leader
        own = self.ledger.identity.certificate.decode("ascii")
        if links.name != leader:
            links.send_object(leader, "ledger certificate", {"certificate": own, "resumed": resumed})
            return self._hear("ledger certificates")
        received = self._hear_all("ledger certificate", "ledger certificates")
        for name, greeting in received.items():
            if greeting.get("resumed") is not resumed:
                which = ("a new run", "an earlier one") if resumed else ("an earlier run", "a new one")
                raise ProtocolError(f"{name} wants {which[0]} and {leader} {which[1]}", "start all parties alike")
        certificates = {**{name: greeting.get("certificate") for name, greeting in received.items()}, leader: own}
        for name, certificate in certificates.items():  # before it is passed on, so that its sender answers for it
            self._require_certificate(certificate, name, name)
        self._send_to_all("ledger certificates", certificates)
        return certificates

    def _require_certificate(self, certificate: object, name: str, sender: str) -> None:
        verify_certificate(received_pem(certificate, sender), name, self.ledger.identity)

    def sign(
        self,
        kind: str,
        about: str,
        values: Mapping[str, str] | None = None,
        members: Members | None = None,
    ) -> Block:
        """Sign what was opened since the block before.

        `kind` is "openings", or "end" for the last block of a run. `values` are digests of what every party has itself
        (`ledger_file.tensor_digest`), by name. `about` says which round and attempt; it differs from call to call, so that
        a message of a failed attempt is never taken for one of the next. Raises `ProtocolError` naming the party whose
        record differs, at the leader (the others hear it as the leader's reason); `PeerLostError` at all when a party is lost
        or late: nothing is signed then, and they may sign without it. A block that would not count is signed by nobody.
        """
        # 1. Make and sign the block.
        draft = self.ledger.draft(kind, about, self.parties, values, members)
        for finding in shortfalls(self.ledger.chain, draft):
            raise ProtocolError(f"a block of the reveal ledger would not count: {finding.line}", "nothing was signed")
        own, tag = sign_block(draft, self.ledger.identity, now()), f"ledger {draft.number} {kind} {about}"
        if self.links.name != self.leader:
            return self._follow(draft, own, tag)
        return self._lead(draft, own, tag)

    def _follow(self, draft: Block, own: Signature, tag: str) -> Block:
        """Steps 2 and 5 at all but the leader: send signature and digests, get all signatures."""
        self.ledger.keep_unconfirmed(replace(draft, signatures=(own,)))
        self.links.send_object(self.leader, tag, {"claim": claim_of(draft), "signature": to_json(own)})
        answer = self._hear(tag)
        signatures = _parsed(_list_of(signature_from, len(self.parties)), self.leader, answer.get("signatures"))
        block = replace(draft, signatures=tuple(signatures))
        self.ledger.add(block, self.leader)
        return block

    def _lead(self, draft: Block, own: Signature, tag: str) -> Block:
        """Steps 3 and 4 at the leader: compare, keep, then send. Whoever is lost then gets the block when it is back."""
        received = self._hear_all(tag, tag)
        claims = {**{name: item.get("claim") for name, item in received.items()}, self.leader: claim_of(draft)}
        difference = disagreement(claims)
        if difference is not None:
            raise ProtocolError(difference, _COMPARE)
        signed = {name: _parsed(signature_from, name, item.get("signature")) for name, item in received.items()}
        block = replace(draft, signatures=tuple({**signed, self.leader: own}[name] for name in self.parties))
        self.ledger.add(block, "those who signed it")
        signatures = [to_json(signature) for signature in block.signatures]
        self._send_to_all(tag, {"signatures": signatures})
        return block

    def catch_up(self, about: str, most: int | None = None, quorum: int | None = None) -> None:
        """Give every party the blocks it lacks, from the leader's ledger; `about` differs from call to call.

        A party takes at most `most` of them, and none that counts by another quorum than its own, if given. Raises
        `ProtocolError` when a party's ledger is not the beginning of the leader's, or a block is not signed by all, does not
        count or leaves out what this party began.
        """
        ledger, links, leader, tag = self.ledger, self.links, self.leader, f"ledger catch up {about}"
        if links.name != leader:
            links.send_object(leader, tag, {"blocks": ledger.chain.blocks, "seal": ledger.chain.seal})
            count = self._hear(tag).get("blocks")
            if type(count) is not int or not 0 <= count <= (_MOST_BLOCKS if most is None else most):
                raise ProtocolError(f"{leader} sent no number of blocks that this ledger can lack", SAME_VERSION)
            for _ in range(count):
                block = _parsed(block_from, leader, links.receive_object(leader, tag))
                if quorum is not None and block.members is not None:
                    _require_quorum(block.members.quorum, quorum)
                ledger.add(block, leader)
            return
        if quorum is not None and ledger.chain.quorum:
            _require_quorum(ledger.chain.quorum, quorum)
        places = self._hear_all(tag, tag)
        for name, at in places.items():
            if type(at.get("blocks")) is not int or not self._has_seal(at["blocks"], at.get("seal")):
                raise ProtocolError(
                    f"the reveal ledger of {name} is not the beginning of that of {leader}",
                    "compare the two; if one is of an earlier run, choose another directory for this run",
                )
        for name, at in places.items():
            lacking = ledger.blocks[at["blocks"] :]
            self._send(name, tag, {"blocks": len(lacking)}, *map(to_json, lacking))

    def _has_seal(self, count: int, seal: Any) -> bool:
        """Whether the first `count` blocks of the own ledger end with this seal."""
        blocks = self.ledger.blocks
        return 0 <= count <= len(blocks) and seal == (blocks[count - 1].seal() if count else Chain().seal)

    def settle(self, about: str) -> Block | None:
        """After a party was lost: sign what was opened, or begun to be, since the last block; `None` when nothing was.

        `parties` are those that are left. They may have come to different points of one sequence of openings; the longest
        record is signed as "abandoned", and `among` of its openings still names the lost party. No opening of theirs can be
        missing. Who began less writes down what it signs. Raises `ProtocolError` naming a party whose record is not a
        beginning of the longest one.
        """
        self.catch_up(about)
        ledger, links, leader, tag = self.ledger, self.links, self.leader, f"ledger settle {about}"
        mine = {"pending": [to_json(opening) for opening in ledger.pending]}
        if links.name != leader:
            links.send_object(leader, tag, mine)
            agreed = _openings(self._hear(tag), leader)
            _require_beginning(ledger.pending, agreed, leader)
        else:
            records = {name: _openings(message, name) for name, message in self._hear_all(tag, tag).items()}
            agreed = max([ledger.pending, *records.values()], key=len)
            for name, record in {leader: ledger.pending, **records}.items():
                _require_beginning(record, agreed, name)
            self._send_to_all(tag, {"pending": [to_json(opening) for opening in agreed]})
        ledger.adopt(agreed)
        return self.sign("abandoned", about) if agreed else None

    def _hear_all(self, tag: str, answered_by: str) -> dict[str, dict[str, Any]]:
        """At the leader: a message of each of the others, by one deadline for all.

        When one is lost or late all hear who it is, by the tag that they wait for next, and `PeerLostError` is raised.
        """
        received, deadline = dict[str, dict[str, Any]](), self.links.deadline()
        for name in self._others:
            try:
                received[name] = self.links.receive_object(name, tag, deadline)
            except PeerLostError:
                self._send_to_all(answered_by, {"lost": name})
                raise
        return received

    def _hear(self, tag: str) -> dict[str, Any]:
        """At the others: the leader's message. Raises `PeerLostError` for the party that the leader says it has lost."""
        message = self.links.receive_object(self.leader, tag)
        if "lost" not in message:
            return message
        if message["lost"] not in self._others:
            raise ProtocolError(f"{self.leader} says that a party is lost which does not sign", SAME_VERSION)
        raise PeerLostError(message["lost"], f"{self.leader} lost {message['lost']} before all had signed")

    def _send_to_all(self, tag: str, value: dict[str, Any]) -> None:
        for name in self._others:
            self._send(name, tag, value)

    def _send(self, name: str, tag: str, *values: dict[str, Any]) -> None:
        """Send to a party if it can be reached: its loss is found where it is waited for next."""
        try:
            for value in values:
                self.links.send_object(name, tag, value)
        except PeerLostError as error:
            log.warning("%s", error)


# ---- comparing records -------------------------------------------------------------------------------------------------


def disagreement(claims: Mapping[str, Any]) -> str | None:
    """Who claims something else than most others, and about what; `None` when all claim the same."""
    for name, claim in claims.items():
        if not isinstance(claim, dict) or not all(isinstance(claim.get(part), dict) for part in ("openings", "values")):
            return f"{name} sent no claim about the reveal ledger"
    votes = Counter(str(claim.get("block")) for claim in claims.values())
    if len(votes) == 1:
        return None
    (most, count), (_, second) = votes.most_common(2)
    agreeing = [name for name, claim in claims.items() if str(claim.get("block")) == most]
    odd = [name for name in claims if name not in agreeing]
    what = _first_difference(claims[agreeing[0]], claims[odd[0]])
    if count == second:
        return f"{', '.join(claims)} do not agree on {what}"
    return f"{', '.join(odd)} recorded {what} otherwise than {', '.join(agreeing)}"


def claim_of(draft: Block) -> dict[str, Any]:
    """What a party says it signed, in parts, so that a difference can be named."""
    openings = {str(opening.number): opening.digest for opening in draft.openings}
    return {"block": draft.content_digest(), "openings": openings, "values": dict(draft.values)}


def _first_difference(common: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    for part, word in (("openings", "opening "), ("values", "the value of ")):
        for name in [*common[part], *other[part]]:
            if common[part].get(name) != other[part].get(name):
                return f"{word}{name[:100]}" if name.isprintable() else f"{word}a name that cannot be printed"
    return "the ledger before it or the parties"


def _require_beginning(record: Sequence[ChainedOpening], longest: Sequence[ChainedOpening], name: str) -> None:
    for index, opening in enumerate(record):
        if index >= len(longest):
            raise ProtocolError(
                f"{name} leaves out opening {opening.number}, which was begun ({opening.why})", _COMPARE
            )
        if opening != longest[index]:
            raise ProtocolError(f"{name} recorded opening {opening.number} otherwise than another party", _COMPARE)


def _require_quorum(said: int, own: int) -> None:
    if said != own:
        raise ProtocolError(
            f"the reveal ledger counts by a quorum of {said}, not {own}", SAME_VERSION_AND_CONFIGURATION
        )


# ---- messages ----------------------------------------------------------------------------------------------------------


def _parsed(parse: Callable[[Any], T], sender: str, value: Any) -> T:
    try:
        return parse(value)
    except ValueError:
        raise ProtocolError(f"{sender} sent something else than a part of the reveal ledger", SAME_VERSION) from None


def _list_of(parse: Callable[[Any], T], most: int) -> Callable[[Any], list[T]]:
    def parse_list(value: Any) -> list[T]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError("no list")
        return [parse(item) for item in value]

    return parse_list


def _openings(message: Mapping[str, Any], sender: str) -> list[ChainedOpening]:
    return _parsed(_list_of(opening_from, _MOST_PENDING), sender, message.get("pending"))
