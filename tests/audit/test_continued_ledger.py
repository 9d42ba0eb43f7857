"""The ledger of a run that was complete and was given more rounds: it goes on, under the same authority or a later one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mpc_fl.audit.ledger_audit import Copy, Verdict, extend, read_ledger, verify_copies
from mpc_fl.audit.ledger_file import EARLIER_FILE, RevealLedger, earlier_authorities
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block, Members, sign_block
from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import Identity, pem
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import IdentityError, MpcFlError
from tests.audit.test_reveal_ledger import BEGAN, DAY, PARTIES, authority, identity, make_ledger, members, text

LATER = Authority(30 * DAY)


def by(whose: Authority, block: Block) -> Block:
    """A block signed by its parties, as `whose` certified them."""
    signers = [identity(name) if whose is authority() else issued(whose, name) for name in block.parties]
    return Block(**{**vars(block), "signatures": tuple(sign_block(block, one, BEGAN) for one in signers)})


def issued(whose: Authority, name: str, known: dict[tuple[int, str], Identity] = {}) -> Identity:  # noqa: B006 - a cache
    return known.setdefault((id(whose), name), whose.issue(name, 10 * DAY))


for _name in PARTIES:
    issued(LATER, _name)  # at once, as those of the other module


def members_by(whose: Authority) -> Members:
    if whose is authority():
        return members()
    certificates = {name: issued(whose, name).certificate.decode() for name in PARTIES}
    return Members("session", "d" * 64, fingerprint(whose.certificate), certificates, 2)


def continued(*authorities: Authority) -> list[Block]:
    """A complete ledger, which is continued once under each of `authorities`."""
    blocks = make_ledger(rounds=1)
    chain = read_ledger(text(blocks), authority().certificate).chain
    everybody = authority().certificate, *(each.certificate for each in authorities if each is not authority())
    for whose in authorities:
        for kind in ("resume", "openings", "end"):
            introduced = members_by(whose) if kind == "resume" else None
            block = by(whose, Block(chain.blocks, kind, kind, PARTIES, (), {}, introduced, chain.seal))
            chain, _ = extend(chain, block, everybody[-1], everybody[:-1])
            blocks.append(block)
    return blocks


def verdict(blocks: Sequence[Block], now: Authority, *earlier: Authority) -> Verdict:
    certificates = [each.certificate for each in earlier]
    return verify_copies([Copy("copy", None, text(blocks))], now.certificate, BEGAN, certificates)


def test_a_run_goes_on_after_its_end_under_the_same_authority_and_under_a_later_one() -> None:
    found = verdict(continued(authority()), authority())
    assert found.findings == () and found.reference.chain.ended
    assert found.notes == ("the run was complete with block 2, and was given more rounds after it",)
    found = verdict(continued(LATER), LATER, authority())
    assert found.findings == () and found.reference.chain.ended
    assert f"block 2, of an earlier authority, SHA-256 {fingerprint(authority().certificate)}" in found.notes[0]


def test_one_that_goes_on_and_does_not_end_again_is_not_complete() -> None:
    (finding,) = verdict(continued(authority())[:-1], authority()).findings
    assert "the end of the run is missing" in finding.line


def test_no_authority_is_believed_that_is_not_given_and_none_comes_back() -> None:
    (finding, *_) = verdict(continued(LATER), LATER).findings
    assert "block 0: names another authority" in finding.line
    (finding, *_) = verdict(continued(LATER), authority()).findings
    assert "block 3: names another authority" in finding.line
    back = verdict(continued(LATER, authority()), LATER, authority()).findings
    assert "block 6: goes back to an earlier authority" in back[0].line


def test_only_a_resumption_comes_after_the_end() -> None:
    blocks = make_ledger(rounds=1)
    chain = read_ledger(text(blocks), authority().certificate).chain
    for kind in ("openings", "abandoned", "end"):
        block = by(authority(), Block(chain.blocks, kind, "", PARTIES, (), {}, None, chain.seal))
        assert "comes after the end of the run" in verdict([*blocks, block], authority()).findings[0].line


def test_a_party_reads_its_own_ledger_under_both(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_bytes(text(continued(LATER)))
    with pytest.raises(MpcFlError, match="names another authority"):
        RevealLedger(tmp_path, issued(LATER, "hospital-0"))
    (tmp_path / EARLIER_FILE).write_bytes(pem(authority().certificate))
    assert RevealLedger(tmp_path, issued(LATER, "hospital-0")).chain.ended
    (tmp_path / EARLIER_FILE).write_bytes(pem(authority().certificate) + pem(LATER.certificate))
    assert len(earlier_authorities(tmp_path)) == 2
    (tmp_path / EARLIER_FILE).write_bytes(pem(authority().certificate)[:-40] + b"\n")
    with pytest.raises(IdentityError, match="earlier_authorities.crt"):
        earlier_authorities(tmp_path)
