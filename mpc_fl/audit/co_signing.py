"""Co-signing the reveal ledger: all parties of a round sign one block about its openings.

After the openings of a round, each party with its own record of them, one of the parties the leader (`CoSigners.sign`):
  1. each party makes the block from what it recorded itself, and signs it
  2. each sends its signature and its digests to the leader: one message per party and round
  3. the leader compares them; where they differ, the run ends with the name of the party and the number of the opening
  4. the leader keeps the block with all signatures, then sends the signatures to all
  5. each party checks every signature over its own block, and keeps it

So nobody, the leader included, can have two parties sign different histories. The leader keeps a block before it sends
it: its ledger is never behind another's, and a party that lacks blocks after a crash gets them from there (`catch_up`).
What was begun and not signed is signed by whoever is left (`settle`). Every wait has the deadline of the links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mpc_fl.audit.ledger_file import OPENINGS_FILE, RevealLedger, now
from mpc_fl.audit.reveal_ledger import (
    Block,
    Chain,
    ChainedOpening,
    Members,
    Signature,
    block_from,
    fingerprint,
    opening_from,
    sign_block,
    signature_from,
    to_json,
)
from mpc_fl.crypto.certificates import verify_certificate
from mpc_fl.errors import SAME_VERSION, MpcFlError, PeerLostError, ProtocolError
from mpc_fl.links.links import Links

T = TypeVar("T")
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

    def begin(self, session: str, configuration: str, resumed: bool = False) -> Block:
        """Start the ledger of a run, or go on with it (`resumed`), once all parties are connected.

        All get the certificates of all and sign who they are. When a run goes on, each also gets the blocks it lacks, and
        what had been begun and not signed by all is settled; if the run had ended, its last block is returned and nothing
        added. Raises `ProtocolError` when a party's ledger is not the beginning of the leader's or not all resume,
        `IdentityError` for a certificate that is not valid, `MpcFlError` when a new run finds the ledger of an earlier one.
        """
        ledger = self.ledger
        if ledger.blocks and not resumed:
            raise MpcFlError(f"{ledger.path} is the ledger of an earlier run", "choose another directory for this run")
        certificates = self._exchange_certificates(resumed)
        if set(certificates) != set(self.parties):
            raise ProtocolError(f"{self.leader} sent other certificates than those of the parties", SAME_VERSION)
        for name in self.parties:
            verify_certificate(str(certificates[name]).encode(), name, ledger.identity)
        self.catch_up("begin")
        if ledger.chain.ended:
            return ledger.blocks[-1]
        members = Members(session, configuration, fingerprint(ledger.authority), certificates)
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
            return links.receive_object(leader, "ledger certificates")
        received = {name: links.receive_object(name, "ledger certificate") for name in self._others}
        for name, greeting in received.items():
            if greeting.get("resumed") is not resumed:
                which = ("a new run", "an earlier one") if resumed else ("an earlier run", "a new one")
                raise ProtocolError(f"{name} wants {which[0]} and {leader} {which[1]}", "start all parties alike")
        certificates = {**{name: greeting.get("certificate") for name, greeting in received.items()}, leader: own}
        self._send_to_all(self._others, "ledger certificates", certificates)
        return certificates

    def sign(
        self,
        kind: str,
        about: str,
        values: Mapping[str, str] | None = None,
        members: Members | None = None,
        tolerant: bool = False,
    ) -> Block:
        """Sign what was opened since the block before.

        `kind` is "openings", or "end" for the last block of a run. `values` are digests of what every party has itself
        (`ledger_file.tensor_digest`), by name. `about` says which round and attempt; it differs from call to call, so that
        a message of a failed attempt is never taken for one of the next. Raises `ProtocolError` naming the party whose
        record differs, at the leader (the others hear it as the leader's reason); `PeerLostError` when a party is lost or
        late. With `tolerant` all that are left get that error, nothing is signed, and they may sign without the lost party.
        """
        # 1. Make and sign the block.
        draft = self.ledger.draft(kind, about, self.parties, values, members)
        own, tag = sign_block(draft, self.ledger.identity, now()), f"ledger {draft.number} {kind} {about}"
        if self.links.name != self.leader:
            return self._follow(draft, own, tag)
        return self._lead(draft, own, tag, tolerant)

    def _follow(self, draft: Block, own: Signature, tag: str) -> Block:
        """Steps 2 and 5 at all but the leader: send signature and digests, get all signatures."""
        self.links.send_object(self.leader, tag, {"claim": _claim(draft), "signature": to_json(own)})
        answer = self.links.receive_object(self.leader, tag)
        if "lost" in answer:
            raise PeerLostError(str(answer["lost"])[:64], f"{self.leader} lost a party before all had signed")
        signatures = _parsed(_list_of(signature_from), self.leader, answer.get("signatures"))
        block = replace(draft, signatures=tuple(signatures))
        self.ledger.add(block)
        return block

    def _lead(self, draft: Block, own: Signature, tag: str, tolerant: bool) -> Block:
        """Steps 3 and 4 at the leader: compare, keep, then send."""
        received: dict[str, Mapping[str, Any]] = {}
        for name in self._others:
            try:
                received[name] = self.links.receive_object(name, tag)
            except PeerLostError:
                if tolerant:
                    left = [other for other in self._others if other != name]
                    self._send_to_all(left, tag, {"lost": name}, tolerant)
                raise
        claims = {**{name: item.get("claim") for name, item in received.items()}, self.leader: _claim(draft)}
        difference = disagreement(claims)
        if difference is not None:
            raise ProtocolError(difference, _COMPARE)
        signed = {name: _parsed(signature_from, name, item.get("signature")) for name, item in received.items()}
        block = replace(draft, signatures=tuple({**signed, self.leader: own}[name] for name in self.parties))
        self.ledger.add(block)
        signatures = [to_json(signature) for signature in block.signatures]
        self._send_to_all(self._others, tag, {"signatures": signatures}, tolerant)
        return block

    def catch_up(self, about: str) -> None:
        """Give every party the blocks it lacks, from the leader's ledger; `about` differs from call to call.

        Raises `ProtocolError` when a party's ledger is not the beginning of the leader's, or a block is not signed by all.
        """
        ledger, links, leader, tag = self.ledger, self.links, self.leader, f"ledger catch up {about}"
        if links.name != leader:
            links.send_object(leader, tag, {"blocks": ledger.chain.blocks, "seal": ledger.chain.seal})
            count = links.receive_object(leader, tag).get("blocks")
            if not isinstance(count, int):
                raise ProtocolError(f"{leader} sent no number of blocks", SAME_VERSION)
            for _ in range(count):
                ledger.add(_parsed(block_from, leader, links.receive_object(leader, tag)))
            return
        for name in self._others:
            at = links.receive_object(name, tag)
            count = at.get("blocks")
            if not isinstance(count, int) or not self._has_seal(count, at.get("seal")):
                raise ProtocolError(
                    f"the reveal ledger of {name} is not the beginning of that of {leader}",
                    "compare the two; if one is of an earlier run, choose another directory for this run",
                )
            links.send_object(name, tag, {"blocks": len(ledger.blocks) - count})
            for block in ledger.blocks[count:]:
                links.send_object(name, tag, to_json(block))

    def _has_seal(self, count: int, seal: Any) -> bool:
        """Whether the first `count` blocks of the own ledger end with this seal."""
        blocks = self.ledger.blocks
        return 0 <= count <= len(blocks) and seal == (blocks[count - 1].seal() if count else Chain().seal)

    def settle(self, about: str) -> Block | None:
        """After a party was lost: sign what was opened, or begun to be, since the last block; `None` when nothing was.

        `parties` are those that are left. They may have come to different points of one sequence of openings; the longest
        record is signed as "abandoned", and `among` of its openings still names the lost party. No opening can be missing:
        it needs the shares of all, its opener is one of them, and each records it first. Raises `ProtocolError` naming a
        party whose record is not a beginning of the longest one.
        """
        self.catch_up(about)
        ledger, links, leader, tag = self.ledger, self.links, self.leader, f"ledger settle {about}"
        mine = {"pending": [to_json(opening) for opening in ledger.pending]}
        if links.name != leader:
            links.send_object(leader, tag, mine)
            agreed = _openings(links.receive_object(leader, tag), leader)
            _require_beginning(ledger.pending, agreed, leader)
        else:
            records = {name: _openings(links.receive_object(name, tag), name) for name in self._others}
            agreed = max([ledger.pending, *records.values()], key=len)
            for name, record in {leader: ledger.pending, **records}.items():
                _require_beginning(record, agreed, name)
            self._send_to_all(self._others, tag, {"pending": [to_json(opening) for opening in agreed]})
        if not ledger.continues(agreed):
            raise ProtocolError("openings to settle do not continue the reveal ledger", "compare the reveal ledgers")
        ledger.pending = list(agreed)
        return self.sign("abandoned", about) if agreed else None

    def _send_to_all(self, names: Sequence[str], tag: str, value: dict[str, Any], tolerant: bool = False) -> None:
        """Send to every party that can be reached; only then raise the first loss, unless losses are tolerated."""
        lost: list[PeerLostError] = []
        for name in names:
            try:
                self.links.send_object(name, tag, value)
            except PeerLostError as error:
                lost.append(error)
        if lost and not tolerant:
            raise lost[0]


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


def _claim(draft: Block) -> dict[str, Any]:
    """What a party says it signed, in parts, so that a difference can be named."""
    openings = {str(opening.number): opening.digest for opening in draft.openings}
    return {"block": draft.content_digest(), "openings": openings, "values": dict(draft.values)}


def _first_difference(common: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    for part, word in (("openings", "opening "), ("values", "the value of ")):
        for name in [*common[part], *other[part]]:
            if common[part].get(name) != other[part].get(name):
                return f"{word}{str(name)[:100]}"
    return "the ledger before it or the parties"


def _require_beginning(record: Sequence[ChainedOpening], longest: Sequence[ChainedOpening], name: str) -> None:
    for index, opening in enumerate(record):
        if index >= len(longest) or opening != longest[index]:
            raise ProtocolError(f"{name} recorded opening {opening.number} otherwise than another party", _COMPARE)


# ---- messages ----------------------------------------------------------------------------------------------------------


def _parsed(parse: Callable[[Any], T], sender: str, value: Any) -> T:
    try:
        return parse(value)
    except ValueError:
        raise ProtocolError(f"{sender} sent something else than a part of the reveal ledger", SAME_VERSION) from None


def _list_of(parse: Callable[[Any], T]) -> Callable[[Any], list[T]]:
    def parse_list(value: Any) -> list[T]:
        if not isinstance(value, list):
            raise ValueError("no list")
        return [parse(item) for item in value]

    return parse_list


def _openings(message: Mapping[str, Any], sender: str) -> list[ChainedOpening]:
    return _parsed(_list_of(opening_from), sender, message.get("pending"))
