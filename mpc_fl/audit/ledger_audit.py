"""Checking a reveal ledger: what was edited, removed, added, exchanged or signed by somebody else, and where.

`extend` checks one block against all before it. A party applies it to every block before it keeps it, an audit to every
line of a file; the audit then compares the copies of several parties. What each party recorded besides is compared with
the ledger by `record_audit`. Certificates may have expired since: each must
have been valid when its holder signed, by the time in the signature. This module is pure.

A run that was complete may have been given more rounds: after a block "end" comes a block "resume", and nothing else may. Its
authority may then be another than before (a run on one machine keeps no keys); the certificates of `earlier` ones, oldest
first, are then needed beside the last one's, and no block goes back to one of them.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

from cryptography import x509

from mpc_fl.audit.reveal_ledger import (
    Block,
    Chain,
    Members,
    block_from,
    encode_block,
    is_signed,
    moment_of,
)
from mpc_fl.crypto.certificates import CLOCK_SKEW, UNSOUND, is_of_party
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.parsing import parse_json
from mpc_fl.roles import is_hospital


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: the copy, its block, the opening, the party, as far as each is known."""

    what: str
    block: int | None = None
    opening: int | None = None
    party: str | None = None
    copy: str | None = None

    @property
    def line(self) -> str:
        """The finding in one line."""
        places = [self.copy, None if self.block is None else f"block {self.block}"]
        places += [None if self.opening is None else f"opening {self.opening}", self.party]
        where = ", ".join(place for place in places if place)
        return f"{where}: {self.what}" if where else self.what


# ---- one block ---------------------------------------------------------------------------------------------------------


def extend(
    chain: Chain, block: Block, authority: x509.Certificate, earlier: Sequence[x509.Certificate] = ()
) -> tuple[Chain, list[Finding]]:
    """Check that `block` continues `chain`; return the chain with it, and all that is wrong.

    A change is named where it was made: what only follows from an earlier finding is not reported again.
    """
    certificates, introduced = chain.certificates, list[Finding]()
    if block.members is not None:
        certificates, introduced = _certificates(chain, block, block.members, (*earlier, authority))
    signed = list(_signatures(chain, block, certificates))
    short = list(shortfalls(chain, block))
    # What was not signed by all gives no reason to believe its number.
    believed = not signed or block.number == chain.blocks
    repeated = believed and block.number < chain.blocks
    number, digest, opened = (chain.openings, chain.opening_digest, []) if repeated else check_openings(chain, block)
    findings = [*_order(chain, block), *short, *opened, *introduced, *signed]
    seal = block.seal()
    times = [moment_of(signature) for signature in block.signatures]
    return Chain(
        max(chain.blocks, block.number + 1) if believed else chain.blocks + 1,
        seal,
        number,
        seal if block.number == chain.blocks == 0 else digest,
        certificates,
        max([*times, *([] if chain.signed_until is None else [chain.signed_until])], default=None),
        block.kind == "end" or (chain.ended and block.kind != "resume"),
        not findings,
        chain.version or block.version,
        chain.quorum or (block.members.quorum if block.members else 0),
        chain.authority if block.members is None else block.members.authority,
    ), findings


def _order(chain: Chain, block: Block) -> Iterator[Finding]:
    here, due = block.number, chain.blocks
    if here < due:
        yield Finding("comes again, or out of order", here)
    elif here > due:
        yield Finding("is missing" if here == due + 1 else f"is missing, and all up to block {here - 1}", due)
    elif block.previous != chain.seal and chain.sound:
        yield Finding(f"does not follow block {here - 1}: one of the two was exchanged", here)
    if chain.ended and block.kind != "resume":
        yield Finding("comes after the end of the run", here)
    if chain.version not in (None, block.version):
        yield Finding(f"is of version {block.version} of the ledger, and those before it of {chain.version}", here)
    introduces = block.kind in ("start", "resume")
    if (block.kind == "start") != (here == 0) or introduces != (block.members is not None):
        yield Finding(f"cannot be a block '{block.kind}'", here)
    if introduces and block.openings:
        yield Finding(f"holds openings, which a block '{block.kind}' cannot", here)


def shortfalls(chain: Chain, block: Block) -> Iterator[Finding]:
    """What keeps a block from counting whoever signed it: too few hospitals, or an opener that is no party of it.

    The aggregator, or whoever else opens, could else sign a history alone. A block of version 1 counts without this.
    """
    if block.version == 1:
        return
    here, said = block.number, 0 if block.members is None else block.members.quorum
    if block.members is not None and chain.quorum not in (0, said):
        yield Finding(f"changes the quorum from {chain.quorum} to {said}", here)
    least = max(2, chain.quorum or said)
    hospitals = [party for party in block.parties if is_hospital(party)]
    if len(hospitals) < least:
        names = f"{', '.join(hospitals)} alone" if hospitals else "no hospital"
        yield Finding(f"is signed by {names}: a block counts with {least} hospitals or more", here)
    for opening in block.openings:
        # Hospitals that opened a sum to themselves: who of them is lost then cannot sign, and the quorum of the others does.
        is_left = block.kind == "abandoned" and set(opening.to) == set(opening.among)
        for party in () if is_left else opening.to:
            if party not in block.parties:
                yield Finding("learned what was opened and is no party of the block", here, opening.number, party)


def check_openings(chain: Chain, block: Block) -> tuple[int, str, list[Finding]]:
    """What is wrong with the openings of a block that follows `chain`; first, number and digest of the last of them."""
    number, digest, known = chain.openings, chain.opening_digest, set(block.parties)
    linked, findings = chain.sound and block.number == chain.blocks, list[Finding]()
    for opening in block.openings:
        here = opening.number
        if opening.computed_digest(block.version) != opening.digest:
            findings.append(Finding("was edited: its digest does not fit", block.number, here))
            number, digest, linked = number + 1, opening.digest, False
            continue
        if here <= number:
            findings.append(Finding("comes again, or out of order", block.number, here))
        elif here > number + 1:
            lost = f"opening {here - 1} is" if here == number + 2 else f"openings {number + 1} to {here - 1} are"
            findings.append(Finding(f"{lost} missing before it", block.number, here))
        elif opening.previous != digest and linked:
            what = "does not follow the opening before it: one of the two was exchanged"
            findings.append(Finding(what, block.number, here))
        if block.kind != "abandoned":
            what = "took part in it and is no party of the block"
            findings += [Finding(what, block.number, here, party) for party in opening.among if party not in known]
        number, digest, linked = max(number, here), opening.digest, True
    return number, digest, findings


def _certificates(
    chain: Chain, block: Block, members: Members, authorities: Sequence[x509.Certificate]
) -> tuple[dict[str, x509.Certificate], list[Finding]]:
    """The certificates that a block introduces, without those that prove nothing."""
    here, trusted = block.number, [fingerprint(each) for each in authorities]
    if members.authority not in trusted:
        return {}, [Finding(f"names another authority, SHA-256 {members.authority}", here)]
    place = trusted.index(members.authority)
    if chain.authority in trusted and place < trusted.index(chain.authority):
        return {}, [Finding(f"goes back to an earlier authority, SHA-256 {members.authority}", here)]
    authority = authorities[place]
    known: dict[str, x509.Certificate] = {}
    findings: list[Finding] = []
    if set(members.certificates) != set(block.parties):
        findings.append(Finding("does not hold the certificates of exactly its parties", here))
    for name, certificate_pem in members.certificates.items():
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem.encode("ascii"))
            certificate.verify_directly_issued_by(authority)
            if is_of_party(certificate, name):
                known[name] = certificate
            else:
                findings.append(Finding("the certificate is another party's", here, party=name))
        except UNSOUND:
            findings.append(Finding("the certificate is not one of this authority's", here, party=name))
    return known, findings


def _signatures(chain: Chain, block: Block, certificates: Mapping[str, x509.Certificate]) -> Iterator[Finding]:
    here, signers = block.number, [signature.party for signature in block.signatures]
    if not block.parties:
        yield Finding("has no parties", here)
    for party in block.parties:
        if party not in signers:
            yield Finding("did not sign it", here, party=party)
        elif party not in certificates and certificates:
            yield Finding("has no certificate, so the signature proves nothing", here, party=party)
    for party in dict.fromkeys(signers):
        if party not in block.parties:
            yield Finding("signed it and is no party of it", here, party=party)
    if len(set(signers)) != len(signers):
        yield Finding("a signature comes twice", here)
    elif set(signers) == set(block.parties) and tuple(signers) != block.parties:
        yield Finding("the signatures are not in the order of its parties", here)
    content, false = block.content_digest(), []
    for signature in block.signatures:
        party, certificate, moment = signature.party, certificates.get(signature.party), moment_of(signature)
        if certificate is None or party not in block.parties:
            continue
        if not is_signed(content, signature, certificate, block.version):
            false.append(party)
        elif not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
            yield Finding(f"its certificate was not valid when it signed, {signature.time}", here, party=party)
        elif chain.signed_until is not None and moment < chain.signed_until - CLOCK_SKEW:
            yield Finding(f"signed it before the block before it, {signature.time}", here, party=party)
    if len(false) > 1 and set(false) == set(block.parties):
        yield Finding(f"is not what its parties signed ({', '.join(false)})", here)
    else:
        for party in false:
            yield Finding("the signature is false: over something else, or somebody else's", here, party=party)


# ---- one copy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A copy of the ledger: its lines, the blocks that could be read from them, and what is wrong."""

    lines: tuple[bytes, ...]
    blocks: tuple[Block | None, ...]
    chain: Chain
    findings: tuple[Finding, ...]


def parse_line(line: bytes) -> Block:
    """The block of a line without its newline. Raises `ValueError` unless it is exactly what `encode_block` writes."""
    block = block_from(parse_json(line))
    if encode_block(block) != line + b"\n":
        raise ValueError("not in canonical form")
    return block


def read_ledger(content: bytes, authority: x509.Certificate, earlier: Sequence[x509.Certificate] = ()) -> Reading:
    """Check one copy from its first to its last block. That the run's end is there is not required here."""
    *lines, rest = content.split(b"\n")
    chain, blocks, findings = Chain(), list[Block | None](), list[Finding]()
    for number, line in enumerate(lines):
        try:
            block = parse_line(line)
        except ValueError:
            findings.append(Finding(f"line {number + 1} is damaged or was edited: it is no block", chain.blocks))
            blocks.append(None)
            chain = replace(chain, blocks=chain.blocks + 1, sound=False)
            continue
        chain, found = extend(chain, block, authority, earlier)
        blocks.append(block)
        findings += found
    if rest:
        findings.append(Finding("the last line is cut off", chain.blocks))
    if not lines:
        findings.append(Finding("holds no block"))
    return Reading(tuple(lines), tuple(blocks), chain, tuple(findings))


# ---- all copies of a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """A copy of the ledger: where it lies, whose it is (`None` if that is not known), its bytes.

    `unconfirmed` is what lies beside it of a block that its owner has signed and did not see signed by all.
    """

    where: str
    owner: str | None
    content: bytes
    unconfirmed: bytes = b""


_OLD = "the ledger is of version 1: no quorum of hospitals had to sign a block, and no opening says what its parties agreed on"


@dataclass(frozen=True)
class Verdict:
    """What an audit of all copies found; `reference` is the copy that the others were compared with."""

    reference: Reading
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def verify_copies(
    copies: Sequence[Copy],
    authority: x509.Certificate,
    now: datetime.datetime,
    earlier: Sequence[x509.Certificate] = (),
) -> Verdict:
    """Check every copy and compare them; at least one is needed.

    A copy may lack only blocks that its owner did not sign: those of a party that was lost and did not come back. Before them
    it may lack one that its owner signed and could not keep, if it had written down its own signature.
    """
    read: dict[bytes, Reading] = {}
    for copy in copies:
        if copy.content not in read:
            read[copy.content] = read_ledger(copy.content, authority, earlier)
    readings = [(copy, read[copy.content]) for copy in copies]
    best, reference = max(readings, key=lambda item: (not item[1].findings, len(item[1].lines)))
    findings = [replace(finding, copy=copy.where) for copy, reading in readings for finding in reading.findings]
    notes = [_OLD] if reference.chain.version == 1 else []
    for copy, reading in readings:
        difference = _difference(reference, reading, copy)
        if difference is not None and difference[1]:
            what = f"{difference[0].what} in {best.where}{_signed_twice(reference, reading, difference[0])}"
            findings.append(replace(difference[0], copy=copy.where, what=what))
        elif difference is not None:
            lost = f"{copy.owner} took no part in the blocks after it"
            if _could_not_keep(copy, reference.blocks[len(reading.lines)]):
                lost = (
                    f"{copy.owner} signed block {len(reading.lines)} and was lost before it had the signatures of all"
                )
            notes.append(f"{copy.where} ends earlier: {lost}")
    notes += _continuations(reference)
    if not reference.chain.ended:
        findings.append(
            Finding("the end of the run is missing: blocks were cut off, or the run did not end", copy=best.where)
        )
    for name, certificate in reference.chain.certificates.items():
        if certificate.not_valid_after_utc < now:
            notes.append(
                f"the certificate of {name} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; what counts is that it "
                "was valid when its holder signed"
            )
    return Verdict(reference, tuple(findings), tuple(notes))


def _continuations(reference: Reading) -> list[str]:
    """Where a run that was complete was given more rounds, and by whose authority it was signed until then."""
    notes, authority = list[str](), ""
    for before, block in pairwise(reference.blocks):
        if before is None or block is None:
            continue
        authority = authority if before.members is None else before.members.authority
        if before.kind == "end" and block.kind == "resume" and block.members is not None:
            of = "" if block.members.authority == authority else f", of an earlier authority, SHA-256 {authority}"
            notes.append(f"the run was complete with block {before.number}{of}, and was given more rounds after it")
    return notes


def _could_not_keep(copy: Copy, block: Block | None) -> bool:
    """Whether the owner of a copy wrote down its signature under this block, which others then had from all."""
    if block is None:
        return False
    try:
        own = parse_line(copy.unconfirmed.removesuffix(b"\n"))
    except ValueError:
        return False
    mine = [signature for signature in block.signatures if signature.party == copy.owner]
    return own.signatures == tuple(mine) != () and own.content_digest() == block.content_digest()


def _difference(reference: Reading, other: Reading, copy: Copy) -> tuple[Finding, bool] | None:
    """The first block where `other`, the reading of `copy`, differs, and whether that is wrong; `None` when they are the same."""
    owner = copy.owner
    for number, (theirs, mine) in enumerate(zip_longest(reference.lines, other.lines)):
        if mine is None:
            rest = reference.blocks[number + _could_not_keep(copy, reference.blocks[number]) :]
            owed = owner is None or any(block is None or owner in block.parties for block in rest)
            return Finding(f"is missing, with all after it: there are {len(reference.lines)} blocks", number), owed
        if theirs is None:
            return Finding("is not", number), True
        if theirs != mine:
            opening = _first_other_opening(reference.blocks[number], other.blocks[number])
            return Finding("is not the same as", number, opening), True
    return None


def _signed_twice(reference: Reading, other: Reading, difference: Finding) -> str:
    """Who signed two histories, where two sound copies differ: a fork, and whoever leads the signing made it."""
    at = difference.block
    if at is None or reference.findings or other.findings or at >= min(len(reference.blocks), len(other.blocks)):
        return ""
    one, two = reference.blocks[at], other.blocks[at]
    both = [] if one is None or two is None else [party for party in one.parties if party in two.parties]
    return f": two histories, signed both by {', '.join(both)}" if both else ""


def _first_other_opening(reference: Block | None, other: Block | None) -> int | None:
    if reference is None or other is None:
        return None
    for theirs, mine in zip_longest(reference.openings, other.openings):
        if theirs != mine:
            return int((mine or theirs).number)
    return None
