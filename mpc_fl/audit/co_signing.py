"""Co-signing the reveal ledger: all parties of a round sign one block about its openings.

After the openings of a round, each party with its own record of them, one of the parties the leader (`co_sign`):
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
from dataclasses import replace
from typing import Any, TypeVar

from mpc_fl.audit.ledger_file import OPENINGS_FILE, RevealLedger, now
from mpc_fl.audit.reveal_ledger import (
    Block,
    Chain,
    Members,
    Opening,
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
_SAME = SAME_VERSION
_COMPARE = f"nothing more is opened; compare {OPENINGS_FILE} at the parties"


def co_sign(
    ledger: RevealLedger,
    links: Links,
    parties: Sequence[str],
    leader: str,
    kind: str,
    about: str,
    values: Mapping[str, str] | None = None,
    members: Members | None = None,
    tolerant: bool = False,
) -> Block:
    """Sign, with all `parties`, what was opened since the block before. All call this alike; the leader is one of them.

    `kind` is "openings", or "end" for the last block of a run. `values` are digests of what every party has itself
    (`ledger_file.tensor_digest`), by name. `about` says which round and attempt; it differs from call to call, so that a
    message of a failed attempt is never taken for one of the next. Raises `ProtocolError` naming the party whose record
    differs, at the leader (the others hear it as the leader's reason); `PeerLostError` when a party is lost or late.
    With `tolerant` all that are left get that error, nothing is signed, and they may sign without the lost party.
    """
    # 1. Make and sign the block.
    draft, others = ledger.draft(kind, about, parties, values, members), [name for name in parties if name != leader]
    own, tag = sign_block(draft, ledger.identity, now()), f"ledger {draft.number} {kind} {about}"

    # 2. and 5. Send signature and digests, get all signatures.
    if links.name != leader:
        links.send_object(leader, tag, {"claim": _claim(draft), "signature": to_json(own)})
        answer = links.receive_object(leader, tag)
        if "lost" in answer:
            raise PeerLostError(str(answer["lost"])[:64], f"{leader} lost a party before all had signed")
        signatures = _parsed(_list_of(signature_from), leader, answer.get("signatures"))
        block = replace(draft, signatures=tuple(signatures))
        ledger.add(block)
        return block

    # 3. Compare.
    received: dict[str, Mapping[str, Any]] = {}
    for name in others:
        try:
            received[name] = links.receive_object(name, tag)
        except PeerLostError:
            if tolerant:
                _send_to_all(links, [other for other in others if other != name], tag, {"lost": name}, tolerant)
            raise
    difference = disagreement({**{name: item.get("claim") for name, item in received.items()}, leader: _claim(draft)})
    if difference is not None:
        raise ProtocolError(difference, _COMPARE)

    # 4. Keep, then send.
    signed = {name: _parsed(signature_from, name, item.get("signature")) for name, item in received.items()}
    block = replace(draft, signatures=tuple({**signed, leader: own}[name] for name in parties))
    ledger.add(block)
    _send_to_all(links, others, tag, {"signatures": [to_json(signature) for signature in block.signatures]}, tolerant)
    return block


def begin(
    ledger: RevealLedger,
    links: Links,
    parties: Sequence[str],
    leader: str,
    session: str,
    configuration: str,
    resumed: bool = False,
) -> Block:
    """Start the ledger of a run, or go on with it (`resumed`); all parties call this alike once they are connected.

    All get the certificates of all and sign who they are. When a run goes on, each also gets the blocks it lacks, and
    what had been begun and not signed by all is settled; if the run had ended, its last block is returned and nothing
    added. Raises `ProtocolError` when a party's ledger is not the beginning of the leader's or not all resume,
    `IdentityError` for a certificate that is not valid, `MpcFlError` when a new run finds the ledger of an earlier one.
    """
    if ledger.blocks and not resumed:
        raise MpcFlError(f"{ledger.path} is the ledger of an earlier run", "choose another directory for this run")
    own, others = ledger.identity.certificate.decode("ascii"), [name for name in parties if name != leader]
    if links.name != leader:
        links.send_object(leader, "ledger certificate", {"certificate": own, "resumed": resumed})
        certificates = links.receive_object(leader, "ledger certificates")
    else:
        received = {name: links.receive_object(name, "ledger certificate") for name in others}
        for name, greeting in received.items():
            if greeting.get("resumed") is not resumed:
                which = ("a new run", "an earlier one") if resumed else ("an earlier run", "a new one")
                raise ProtocolError(f"{name} wants {which[0]} and {leader} {which[1]}", "start all parties alike")
        certificates = {**{name: greeting.get("certificate") for name, greeting in received.items()}, leader: own}
        _send_to_all(links, others, "ledger certificates", certificates)
    if set(certificates) != set(parties):
        raise ProtocolError(f"{leader} sent other certificates than those of the parties", _SAME)
    for name in parties:
        verify_certificate(str(certificates[name]).encode(), name, ledger.identity)
    catch_up(ledger, links, parties, leader, "begin")
    if ledger.chain.ended:
        return ledger.blocks[-1]
    members = Members(session, configuration, fingerprint(ledger.authority), certificates)
    if not ledger.blocks:
        return co_sign(ledger, links, parties, leader, "start", "the run begins", members=members)
    block = co_sign(ledger, links, parties, leader, "resume", "the run goes on", members=members)
    settle(ledger, links, parties, leader, "what was open at the restart")
    return block


def catch_up(ledger: RevealLedger, links: Links, parties: Sequence[str], leader: str, about: str) -> None:
    """Give every party the blocks it lacks, from the leader's ledger; `about` differs from call to call.

    Raises `ProtocolError` when a party's ledger is not the beginning of the leader's, or a block is not signed by all.
    """
    tag = f"ledger catch up {about}"
    if links.name != leader:
        links.send_object(leader, tag, {"blocks": ledger.chain.blocks, "seal": ledger.chain.seal})
        count = links.receive_object(leader, tag).get("blocks")
        if not isinstance(count, int):
            raise ProtocolError(f"{leader} sent no number of blocks", _SAME)
        for _ in range(count):
            ledger.add(_parsed(block_from, leader, links.receive_object(leader, tag)))
        return
    for name in parties:
        if name == leader:
            continue
        at = links.receive_object(name, tag)
        count = at.get("blocks")
        if not isinstance(count, int) or not 0 <= count <= len(ledger.blocks) or at.get("seal") != _seal(ledger, count):
            raise ProtocolError(
                f"the reveal ledger of {name} is not the beginning of that of {leader}",
                "compare the two; if one is of an earlier run, choose another directory for this run",
            )
        links.send_object(name, tag, {"blocks": len(ledger.blocks) - count})
        for block in ledger.blocks[count:]:
            links.send_object(name, tag, to_json(block))


def settle(ledger: RevealLedger, links: Links, parties: Sequence[str], leader: str, about: str) -> Block | None:
    """After a party was lost: sign what was opened, or begun to be, since the last block; `None` when nothing was.

    `parties` are those that are left. They may have come to different points of one sequence of openings; the longest
    record is signed as "abandoned", and `among` of its openings still names the lost party. No opening can be missing:
    it needs the shares of all, its opener is one of them, and each records it first. Raises `ProtocolError` naming a
    party whose record is not a beginning of the longest one.
    """
    catch_up(ledger, links, parties, leader, about)
    others, tag = [name for name in parties if name != leader], f"ledger settle {about}"
    mine = {"pending": [to_json(opening) for opening in ledger.pending]}
    if links.name != leader:
        links.send_object(leader, tag, mine)
        agreed = _openings(links.receive_object(leader, tag), leader)
        _require_beginning(ledger.pending, agreed, leader)
    else:
        records = {name: _openings(links.receive_object(name, tag), name) for name in others}
        agreed = max([ledger.pending, *records.values()], key=len)
        for name, record in {leader: ledger.pending, **records}.items():
            _require_beginning(record, agreed, name)
        _send_to_all(links, others, tag, {"pending": [to_json(opening) for opening in agreed]})
    if not ledger.continues(agreed):
        raise ProtocolError("openings to settle do not continue the reveal ledger", "compare the reveal ledgers")
    ledger.pending = list(agreed)
    return co_sign(ledger, links, parties, leader, "abandoned", about) if agreed else None


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


def _require_beginning(record: Sequence[Opening], longest: Sequence[Opening], name: str) -> None:
    for index, opening in enumerate(record):
        if index >= len(longest) or opening != longest[index]:
            raise ProtocolError(f"{name} recorded opening {opening.number} otherwise than another party", _COMPARE)


def _seal(ledger: RevealLedger, count: int) -> str:
    return ledger.blocks[count - 1].seal() if count else Chain().seal


# ---- messages ----------------------------------------------------------------------------------------------------------


def _send_to_all(links: Links, others: Sequence[str], tag: str, value: dict[str, Any], tolerant: bool = False) -> None:
    """Send to every party that can be reached; only then raise the first loss, unless losses are tolerated."""
    lost: list[PeerLostError] = []
    for name in others:
        try:
            links.send_object(name, tag, value)
        except PeerLostError as error:
            lost.append(error)
    if lost and not tolerant:
        raise lost[0]


def _parsed(parse: Callable[[Any], T], sender: str, value: Any) -> T:
    try:
        return parse(value)
    except ValueError:
        raise ProtocolError(f"{sender} sent something else than a part of the reveal ledger", _SAME) from None


def _list_of(parse: Callable[[Any], T]) -> Callable[[Any], list[T]]:
    def parse_list(value: Any) -> list[T]:
        if not isinstance(value, list):
            raise ValueError("no list")
        return [parse(item) for item in value]

    return parse_list


def _openings(message: Mapping[str, Any], sender: str) -> list[Opening]:
    return _parsed(_list_of(opening_from), sender, message.get("pending"))
