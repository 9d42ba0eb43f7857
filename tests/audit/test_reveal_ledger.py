"""The reveal ledger: whatever is changed in it is found and named, and all parties agree on it or the run stops."""

from __future__ import annotations

import copy as copies_of
import dataclasses
import datetime
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mpc_fl.apps.cli import ledger as ledger_commands
from mpc_fl.audit.ledger_audit import Copy, Finding, extend, read_ledger, verify_copies
from mpc_fl.audit.ledger_file import RevealLedger, tensor_digest
from mpc_fl.audit.opening_record import Opening
from mpc_fl.audit.reveal_ledger import (
    LEDGER_FILE,
    UNCONFIRMED_FILE,
    Block,
    Chain,
    ChainedOpening,
    Members,
    Signature,
    block_from,
    chain_opening,
    encode_block,
    sign_block,
    to_json,
)
from mpc_fl.config.config import Config
from mpc_fl.crypto import signatory
from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import ROOT_FILE, Identity, load_root, pem
from mpc_fl.crypto.identity_files import load_identity, write_identity
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import MpcFlError, ProtocolError
from mpc_fl.federation.audit_trail import open_ledger
from tests.support.harness import run_parties
from tests.support.views import LAYOUTS

PARTIES = ("hospital-0", "hospital-1", "aggregator")
BEGAN = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)
MODEL, TRANSCRIPT = "5" * 64, "7" * 64


@functools.cache
def authority() -> Authority:
    return Authority(30 * DAY)


@functools.cache
def identity(name: str) -> Identity:
    return authority().issue(name, 10 * DAY)


for _name in (*PARTIES, "hospital-2"):
    identity(_name)  # at once: made when a test asks for it, a certificate might be valid only after what it signs


def members(parties: Sequence[str] = PARTIES, quorum: int = 2, **other: Identity) -> Members:
    """Keyword names have underscores: `hospital_1=...` puts another certificate in the place of hospital-1's."""
    certificates = {name: other.get(name.replace("-", "_"), identity(name)).certificate.decode() for name in parties}
    return Members("session", "c" * 64, fingerprint(authority().certificate), certificates, quorum)


def signed(block: Block, moment: datetime.datetime = BEGAN, signers: Sequence[Identity] | None = None) -> Block:
    own = [identity(name) for name in block.parties] if signers is None else signers
    return dataclasses.replace(block, signatures=tuple(sign_block(block, one, moment) for one in own))


def describe(
    chain: Chain, pending: Sequence[ChainedOpening], why: str, parties: Sequence[str] = PARTIES
) -> ChainedOpening:
    privacy = {"mechanism": "local", "epsilon at most": 8.0}
    opening = Opening("sum of updates", why, (5, 2), ("aggregator",), tuple(parties), privacy, TRANSCRIPT)
    return chain_opening(chain, pending, opening)


def make_ledger(
    rounds: int = 3, openings: int = 3, moment: datetime.datetime = BEGAN, parties: Sequence[str] = PARTIES
) -> list[Block]:
    """A genuine ledger: the start, one block per round, the end."""
    chain, blocks = Chain(), list[Block]()
    for number in range(rounds + 2):
        kind = {0: "start", rounds + 1: "end"}.get(number, "openings")
        opened: list[ChainedOpening] = []
        for index in range(openings if kind == "openings" else 0):
            opened.append(describe(chain, opened, f"round {number}: part {index}", parties))
        values = {"global model": MODEL} if kind == "openings" else {}
        introduced = members(parties) if kind == "start" else None
        block = Block(number, kind, f"block {number}", tuple(parties), tuple(opened), values, introduced, chain.seal)
        blocks.append(signed(block, moment))
        chain, findings = extend(chain, blocks[-1], authority().certificate)
        assert not findings
    return blocks


def text(blocks: Sequence[Block]) -> bytes:
    return b"".join(map(encode_block, blocks))


@functools.cache
def genuine() -> bytes:
    return text(make_ledger())


def lines() -> list[Any]:
    return [json.loads(line) for line in genuine().splitlines()]


def written(blocks: Sequence[Any]) -> bytes:
    """Edited blocks in the ledger's own form, as somebody who knows it would write them."""
    form = {"sort_keys": True, "separators": (",", ":")}
    return b"".join(json.dumps(block, **form).encode() + b"\n" for block in blocks)


def findings_of(content: bytes) -> list[Finding]:
    return list(audit(content).findings)


def audit(*contents: bytes, owners: Sequence[str | None] = (None, None, None), now: datetime.datetime = BEGAN) -> Any:
    copies = [Copy(f"copy {index}", owners[index], content) for index, content in enumerate(contents)]
    return verify_copies(copies, authority().certificate, now)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all leaves and empty containers in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, item in items for place in places(item, (*path, key))]
    return found or [path]


def at(value: Any, path: Sequence[Any]) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path, value)


OTHER_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8),
    st.sampled_from(["0" * 64, "aggregator", "hospital-1", "hospital-2", "end", "abandoned"]),
    st.lists(st.sampled_from(PARTIES), max_size=3), st.just({}),
)  # fmt: skip


# ---- a genuine ledger --------------------------------------------------------------------------------------------------


def test_a_genuine_ledger_verifies_and_says_what_was_opened() -> None:
    assert findings_of(genuine()) == []
    reading = audit(genuine()).reference
    assert [block.kind for block in reading.blocks] == ["start", "openings", "openings", "openings", "end"]
    assert [opening.number for block in reading.blocks for opening in block.openings] == list(range(1, 10))


def test_certificates_may_expire_after_the_run_and_not_before() -> None:
    verdict = audit(genuine(), now=BEGAN + 11 * DAY)
    assert verdict.findings == () and len(verdict.notes) == 3 and "hospital-0 expired" in verdict.notes[1]
    late = make_ledger(1, 1)
    late = late[:-1] + [signed(dataclasses.replace(late[-1], signatures=()), BEGAN + 11 * DAY)]
    found = findings_of(text(late))
    assert [finding.party for finding in found] == list(PARTIES)
    assert all("was not valid when it signed" in finding.what and finding.block == 2 for finding in found)


def test_nobody_can_sign_as_of_yesterday() -> None:
    old = make_ledger(1, 1)
    old[-1] = signed(dataclasses.replace(old[-1], signatures=()), BEGAN - DAY / 24)
    assert {finding.what[:33] for finding in findings_of(text(old))} == {"its certificate was not valid whe"}
    late = make_ledger(1, 1, BEGAN + DAY)
    late[-1] = signed(dataclasses.replace(late[-1], signatures=()), BEGAN)
    assert {finding.what[:36] for finding in findings_of(text(late))} == {"signed it before the block before it"}


# ---- changes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_any_edit_of_one_field_is_found_in_its_block(data: st.DataObject) -> None:
    blocks = lines()
    number = data.draw(st.integers(0, len(blocks) - 1))
    path = data.draw(st.sampled_from(places(blocks[number])))
    before, after = at(blocks[number], path), data.draw(OTHER_VALUES)
    assume(json.dumps(before) != json.dumps(after))
    at(blocks[number], path[:-1])[path[-1]] = after
    found = findings_of(written(blocks))
    assert found, path
    assert number in {finding.block for finding in found} or path == ("number",)
    readable = not any("it is no block" in finding.what for finding in found)
    if readable and path[0] == "openings" and path[-1] != "number":
        assert blocks[number]["openings"][path[1]]["number"] in {finding.opening for finding in found}
    if path[0] == "signatures" and found[0].party is not None:
        assert PARTIES[path[1]] in {finding.party for finding in found}


@settings(max_examples=150)
@given(st.integers(0, len(genuine()) - 1), st.integers(1, 255))
def test_any_edit_of_one_byte_is_found(position: int, change: int) -> None:
    content = bytearray(genuine())
    content[position] ^= change
    assert findings_of(bytes(content))


@settings(max_examples=150)
@given(st.data())
def test_any_removal_repetition_or_exchange_is_found(data: st.DataObject) -> None:
    """Of blocks, openings, signatures, parties, certificates, values: everything that the ledger holds several of."""
    blocks = lines()
    number = data.draw(st.integers(0, len(blocks) - 1))
    where: list[list[Any]] = [
        blocks,
        blocks[number]["openings"],
        blocks[number]["signatures"],
        blocks[number]["parties"],
    ]
    where += [opening[key] for opening in blocks[number]["openings"] for key in ("to", "among", "shape")]
    items = data.draw(st.sampled_from([entry for entry in where if entry]))
    index = data.draw(st.integers(0, len(items) - 1))
    how = data.draw(st.sampled_from(["remove", "repeat", "exchange", "insert"]))
    if how == "remove":
        del items[index]
    elif how == "repeat":
        items.insert(data.draw(st.integers(0, len(items))), copies_of.deepcopy(items[index]))
    elif how == "exchange":
        other = data.draw(st.integers(0, len(items) - 1))
        assume(items[index] != items[other])
        items[index], items[other] = items[other], items[index]
    else:
        source = data.draw(st.sampled_from([block for block in lines() if block["openings"]]))
        items.insert(index, {"o": source["openings"][0], "s": source["signatures"][0], "b": source}.get(
            {id(where[0]): "b", id(where[1]): "o", id(where[2]): "s"}.get(id(items), ""), "hospital-1"))  # fmt: skip
    found = findings_of(written(blocks))
    assert found
    if items is not blocks:
        assert number in {finding.block for finding in found}


def test_each_change_is_named_where_it_was_made_and_nowhere_else() -> None:
    def said(change: Callable[[list[Any]], Any]) -> list[str]:
        blocks = lines()
        change(blocks)
        return [finding.line.removeprefix("copy 0, ") for finding in findings_of(written(blocks))]

    unsigned = f"block 2: is not what its parties signed ({', '.join(PARTIES)})"
    assert said(lambda b: b[2]["openings"][1].update(why="nothing")) == [
        "block 2, opening 5: was edited: its digest does not fit", unsigned]  # fmt: skip
    assert said(lambda b: b[2]["openings"].pop(1)) == [
        "block 2, opening 6: opening 5 is missing before it", unsigned]  # fmt: skip
    assert said(lambda b: b[2]["values"].update({"global model": "6" * 64})) == [unsigned]
    assert said(lambda b: b.pop(2)) == [
        "block 2: is missing", "block 3, opening 7: openings 4 to 6 are missing before it"]  # fmt: skip
    assert said(lambda b: b.insert(3, b[2])) == ["block 2: comes again, or out of order"]
    assert said(lambda b: b.pop()) == [
        "copy 0: the end of the run is missing: blocks were cut off, or the run did not end"
    ]
    assert said(lambda b: b[3]["signatures"].pop(1)) == ["block 3, hospital-1: did not sign it"]
    assert said(lambda b: b[2]["signatures"][1].update(signature=b[3]["signatures"][1]["signature"])) == [
        "block 2, hospital-1: the signature is false: over something else, or somebody else's"]  # fmt: skip
    assert said(lambda b: b.reverse())[0] == "block 0: is missing, and all up to block 3"


def test_what_was_genuinely_signed_elsewhere_does_not_fit() -> None:
    """Each of these is signed by all, so that only the chain, or the order of signatures, can tell."""
    blocks = make_ledger()
    again = signed(dataclasses.replace(blocks[2], signatures=()), BEGAN + datetime.timedelta(seconds=1))
    found = findings_of(text([*blocks[:2], again, *blocks[3:]]))
    assert [finding.line for finding in found] == [
        "copy 0, block 3: does not follow block 2: one of the two was exchanged"]  # fmt: skip

    state = read_ledger(text(blocks[:-1]), authority().certificate).chain
    one, other = describe(state, [], "one"), describe(state, [], "other")
    following = describe(state, [other], "two")
    last = signed(Block(4, "end", "", PARTIES, (one, following), {}, None, state.seal))
    found = findings_of(text([*blocks[:-1], last]))
    assert [finding.line for finding in found] == [
        "copy 0, block 4, opening 11: does not follow the opening before it: one of the two was exchanged"]  # fmt: skip

    ended = read_ledger(text(blocks), authority().certificate).chain
    late = signed(Block(5, "openings", "", PARTIES, (), {}, None, ended.seal))
    assert [finding.line for finding in findings_of(text([*blocks, late]))] == [
        "copy 0, block 5: comes after the end of the run"]  # fmt: skip

    first, second, third = blocks[-1].signatures
    exchanged = dataclasses.replace(blocks[-1], signatures=(second, first, third))
    assert [finding.line for finding in findings_of(text([*blocks[:-1], exchanged]))] == [
        "copy 0, block 4: the signatures are not in the order of its parties"]  # fmt: skip


def test_who_recomputes_all_digests_is_found_by_the_signatures() -> None:
    """The forger holds the aggregator's key only: every block from the change on lacks the hospitals' signatures."""
    chain, forged = Chain(), list[Block]()
    for block in make_ledger():
        opened: list[ChainedOpening] = []
        for opening in block.openings:
            why = "nothing to see" if opening.number == 4 else opening.why
            opened.append(describe(chain, opened, why))
        again = dataclasses.replace(block, openings=tuple(opened), previous=chain.seal)
        own = sign_block(again, identity("aggregator"), BEGAN)
        forged.append(dataclasses.replace(again, signatures=(*block.signatures[:2], own)))
        chain, _ = extend(chain, forged[-1], authority().certificate)
    found = findings_of(text(forged))
    # The forger's new signature changes even block 0, so that every later block is another one.
    assert {(finding.block, finding.party) for finding in found} == {
        (number, party) for number in range(1, 5) for party in PARTIES[:2]
    }


def test_signatures_of_others_are_found() -> None:
    blocks = make_ledger(1, 1)
    bare = dataclasses.replace(blocks[-1], signatures=())
    outsider = Authority(30 * DAY).issue("hospital-1")
    for stranger in (outsider, identity("aggregator")):
        false = sign_block(bare, dataclasses.replace(stranger, name="hospital-1"), BEGAN)
        own = signed(bare).signatures
        found = findings_of(text([*blocks[:-1], dataclasses.replace(bare, signatures=(own[0], false, own[2]))]))
        assert [(finding.block, finding.party) for finding in found] == [(2, "hospital-1")]
    extra = dataclasses.replace(
        bare, signatures=(*signed(bare).signatures, sign_block(bare, identity("hospital-2"), BEGAN))
    )
    found = findings_of(text([*blocks[:-1], extra]))
    assert [(finding.party, finding.what) for finding in found] == [("hospital-2", "signed it and is no party of it")]


@pytest.mark.parametrize(
    ("instead", "what"),
    [
        (lambda: Authority(30 * DAY).issue("hospital-1"), "not one of this authority's"),
        (lambda: identity("aggregator"), "another party's"),
        (lambda: dataclasses.replace(identity("aggregator"), certificate=b"-----BEGIN"), "not one of this authority's"),
    ],
)
def test_a_ledger_begun_with_a_foreign_certificate_is_found(instead: Callable[[], Identity], what: str) -> None:
    stranger = dataclasses.replace(instead(), name="hospital-1")
    start = Block(0, "start", "", PARTIES, (), {}, members(hospital_1=stranger), Chain().seal)
    start = signed(start, signers=[identity("hospital-0"), stranger, identity("aggregator")])
    found = read_ledger(text([start]), authority().certificate).findings
    assert found and what in found[0].what and found[0].party == "hospital-1"


def test_a_ledger_of_another_federation_is_found() -> None:
    verdict = verify_copies([Copy("copy", None, genuine())], Authority(DAY).certificate, BEGAN)
    assert "names another authority" in verdict.findings[0].what


def test_the_other_form_of_a_signature_is_found_even_in_the_last_block() -> None:
    """(r, -s) verifies wherever (r, s) does; no later block would tell."""
    blocks = make_ledger(1, 1)
    first, *rest = blocks[-1].signatures
    r, s = decode_dss_signature(bytes.fromhex(first.signature))
    twin = dataclasses.replace(first, signature=encode_dss_signature(r, signatory._ORDER - s).hex())
    blocks[-1] = dataclasses.replace(blocks[-1], signatures=(twin, *rest))
    assert [finding.party for finding in findings_of(text(blocks))] == ["hospital-0"]


def test_copies_are_compared() -> None:
    cut = b"".join(genuine().splitlines(keepends=True)[:3])
    assert audit(genuine(), genuine()).findings == ()
    (found,) = audit(cut, genuine()).findings
    assert found.line == "copy 0, block 3: is missing, with all after it: there are 5 blocks in copy 1"
    other = make_ledger()  # genuine too: the same parties signed twice
    assert [item.block for item in audit(genuine(), text(other)).findings] == [0]
    assert audit(genuine()[:-30], genuine()).findings[0].what == "the last line is cut off"
    assert [item.block for item in audit(genuine(), genuine() + cut.splitlines(keepends=True)[1]).findings][0] == 1
    assert audit(b"", b"").findings


def test_a_lost_party_may_lack_what_it_did_not_sign() -> None:
    all_of_them = ("hospital-0", "hospital-1", "hospital-2", "aggregator")
    blocks = make_ledger(1, 1, parties=all_of_them)[:2]
    chain = read_ledger(text(blocks), authority().certificate).chain
    begun = describe(chain, [], "round 2, attempt 1", all_of_them)
    rest = ("hospital-0", "hospital-2", "aggregator")
    for kind, opened in (("abandoned", (begun,)), ("end", ())):
        blocks.append(signed(Block(chain.blocks, kind, kind, rest, opened, {}, None, chain.seal)))
        chain, found = extend(chain, blocks[-1], authority().certificate)
        assert not found
    verdict = audit(text(blocks), text(blocks[:2]), owners=["aggregator", "hospital-1"])
    assert verdict.findings == () and "hospital-1 took no part" in verdict.notes[0]
    assert audit(text(blocks), text(blocks[:2]), owners=["aggregator", "hospital-0"]).findings
    # The same without the word "abandoned" is an opening that one of its parties did not sign.
    as_usual = dataclasses.replace(blocks[2], kind="openings", signatures=())
    found = findings_of(text([*blocks[:2], signed(as_usual)]))
    assert ("hospital-1", "took part in it and is no party of the block") in {(item.party, item.what) for item in found}


@given(
    st.recursive(OTHER_VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner))
)
def test_anything_at_all_is_read_without_a_traceback(value: Any) -> None:
    assert findings_of(json.dumps(value).encode() + b"\n")
    with pytest.raises(ValueError):
        block_from(value)


def test_garbage_is_named_by_its_line() -> None:
    good = genuine().splitlines(keepends=True)
    for garbage in (
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        b"\n",
        b"null\n",
        good[2].replace(b'":', b'": '),
        b'{"a":1e999}\n',
    ):
        found = findings_of(b"".join([*good[:2], garbage, *good[3:]]))
        assert (found[0].block, found[0].what) == (2, "line 3 is damaged or was edited: it is no block")


# ---- the quorum, and versions ------------------------------------------------------------------------------------------


def in_version_1(blocks: Sequence[Block]) -> list[Block]:
    """The same history as a program of version 1 wrote and signed it."""
    chain, old = Chain(), list[Block]()
    for block in blocks:
        opened: list[ChainedOpening] = []
        last = chain.opening_digest
        for opening in block.openings:
            bare = dataclasses.replace(opening, transcript=None, previous=last)
            opened.append(dataclasses.replace(bare, digest=bare.computed_digest(1)))
            last = opened[-1].digest
        introduced = None if block.members is None else dataclasses.replace(block.members, quorum=0)
        old.append(signed(dataclasses.replace(
            block, openings=tuple(opened), members=introduced, previous=chain.seal, signatures=(), version=1)))  # fmt: skip
        chain, found = extend(chain, old[-1], authority().certificate)
        assert not found
    return old


def test_a_ledger_of_version_1_verifies_as_what_it_was_and_is_not_continued(tmp_path: Path) -> None:
    old = in_version_1(make_ledger())
    assert b"version" not in text(old) and b"quorum" not in text(old) and b"transcript" not in text(old)
    verdict = audit(text(old))
    assert verdict.findings == () and "is of version 1: no quorum of hospitals had to sign" in verdict.notes[0]
    assert [block_from(json.loads(line)) for line in text(old).splitlines()] == old
    for content in (text(old[:-1]), text(old)):
        (tmp_path / LEDGER_FILE).write_bytes(content)
        with pytest.raises(MpcFlError, match="is a reveal ledger of version 1, which cannot be continued") as refused:
            RevealLedger(tmp_path, identity("aggregator"))
        assert "\n" not in str(refused.value)


def test_a_ledger_is_of_one_version_throughout() -> None:
    new = make_ledger(1, 1)
    old = in_version_1(new)
    for first, then in ((new, old), (old, new)):
        found = findings_of(text([*first[:2], *then[2:]]))
        assert any(f"is of version {then[0].version} of the ledger" in finding.what for finding in found)
    # Nor can one be taken for the other by leaving the fields away.
    bare = lines()
    for block in bare:
        del block["version"]
        for opening in block["openings"]:
            del opening["transcript"]
    del bare[0]["members"]["quorum"]
    assert {finding.block for finding in findings_of(written(bare)) if "is not what its parties signed" in finding.what}
    bare = lines()
    bare[1]["version"] = 3
    assert findings_of(written(bare))[0].what == "line 2 is damaged or was edited: it is no block"


def test_a_block_counts_with_a_quorum_of_hospitals_and_whoever_learned_something() -> None:
    def said(parties: Sequence[str], quorum: int = 2, to: Sequence[str] = ("aggregator",)) -> list[str]:
        everybody = ("hospital-0", "hospital-1", "hospital-2", "aggregator")
        start = signed(Block(0, "start", "", everybody, (), {}, members(everybody, quorum), Chain().seal))
        chain, found = extend(Chain(), start, authority().certificate)
        assert not found
        opened = chain_opening(chain, [], Opening("sum", "why", (), tuple(to), tuple(parties)))
        block = signed(Block(1, "openings", "", tuple(parties), (opened,), {}, None, chain.seal))
        return [finding.line for finding in extend(chain, block, authority().certificate)[1]]

    assert said(("hospital-0", "hospital-2", "aggregator")) == []
    assert said(("hospital-0", "aggregator")) == [
        "block 1: is signed by hospital-0 alone: a block counts with 2 hospitals or more"]  # fmt: skip
    assert said(("aggregator",), quorum=0) == [
        "block 1: is signed by no hospital: a block counts with 2 hospitals or more"]  # fmt: skip
    assert said(("hospital-0", "hospital-2", "aggregator"), quorum=3) == [
        "block 1: is signed by hospital-0, hospital-2 alone: a block counts with 3 hospitals or more"]  # fmt: skip
    assert said(("hospital-0", "hospital-1"), to=("hospital-0", "aggregator")) == [
        "block 1, opening 1, aggregator: learned what was opened and is no party of the block"]  # fmt: skip


def test_a_resumed_run_keeps_its_quorum() -> None:
    blocks = make_ledger(1, 1)[:2]
    chain = read_ledger(text(blocks), authority().certificate).chain
    for quorum, what in (
        (2, []),
        (3, ["block 2: changes the quorum from 2 to 3"]),
        (0, ["block 2: changes the quorum from 2 to 0"]),
    ):
        block = signed(Block(2, "resume", "", PARTIES, (), {}, members(quorum=quorum), chain.seal))
        assert [finding.line for finding in extend(chain, block, authority().certificate)[1]] == what


# ---- a party's copy ----------------------------------------------------------------------------------------------------


def begun(directory: Path) -> RevealLedger:
    ledger = RevealLedger(directory, identity("aggregator"))
    ledger.add(signed(Block(0, "start", "", PARTIES, (), {}, members(), Chain().seal)))
    return ledger


def record(ledger: RevealLedger, why: str) -> ChainedOpening:
    return ledger.append(Opening("sum", why, (3,), ("aggregator",), PARTIES))


def test_the_copy_cut_off_at_any_byte_is_read_up_to_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A crash may come within any write: whole blocks stay as they are, the torn one goes, and the log says so."""
    caplog.set_level(logging.WARNING)
    path, content = tmp_path / LEDGER_FILE, genuine()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        caplog.clear()
        ledger = RevealLedger(tmp_path, identity("aggregator"))
        whole = content[:size].rfind(b"\n") + 1
        assert path.read_bytes() == content[:whole] and len(ledger.blocks) == content[:size].count(b"\n")
        assert ("cut off by a crash" in caplog.text) == (size != whole)


def test_what_was_recorded_and_not_signed_survives_a_crash(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    first = record(ledger, "round 1")
    block = signed(ledger.draft("openings", "round 1", PARTIES))
    ledger.add(block)
    second, third = record(ledger, "round 2"), record(ledger, "round 2")
    before = (tmp_path / LEDGER_FILE).read_bytes()
    with (tmp_path / "openings.jsonl").open("ab") as file:
        file.write(b'{"among":["aggr')
    again = RevealLedger(tmp_path, identity("aggregator"))
    assert again.pending == [second, third] and again.blocks[1].openings == (first,)
    assert (tmp_path / LEDGER_FILE).read_bytes() == before
    assert [json.loads(line)["number"] for line in (tmp_path / "openings.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_block_that_leaves_out_what_was_begun_here_is_refused(tmp_path: Path) -> None:
    """Format 1 dropped the pending opening and logged a warning: whoever signs blocks could erase it."""
    ledger = begun(tmp_path)
    first = record(ledger, "round 1: begun here")
    other = describe(ledger.chain, [], "another attempt")
    before = (tmp_path / LEDGER_FILE).read_bytes()
    words = r"block 1 .* from aggregator leaves out opening 1, which this party began \(round 1: begun here\)"
    for kind, opened in (("openings", (other,)), ("abandoned", (other,)), ("end", ())):
        block = signed(Block(1, kind, "", PARTIES, opened, {}, None, ledger.chain.seal))
        with pytest.raises(ProtocolError, match=words):
            ledger.add(block, "aggregator")
    assert ledger.pending == [first] and (tmp_path / LEDGER_FILE).read_bytes() == before
    ledger.add(signed(Block(1, "resume", "", PARTIES, (), {}, members(), ledger.chain.seal)), "aggregator")
    assert ledger.pending == [first], "a block without openings leaves it for the next one"
    assert RevealLedger(tmp_path, identity("aggregator")).pending == [first]
    ledger.add(signed(Block(2, "abandoned", "", PARTIES, (first,), {}, None, ledger.chain.seal)), "aggregator")
    assert ledger.pending == []


def test_what_others_began_is_written_down_before_it_is_signed(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    mine = record(ledger, "round 1")
    theirs = describe(ledger.chain, [mine], "round 1, second")
    with pytest.raises(ProtocolError, match="do not continue"):
        ledger.adopt([theirs])
    ledger.adopt([mine, theirs])
    assert ledger.pending == [mine, theirs] == RevealLedger(tmp_path, identity("aggregator")).pending


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [lines[0], lines[1].replace("round 2", "round 9")], "opening 2 in .* was edited"),
        (lambda lines: [lines[0], "{}\n"], "is damaged or of another version"),
        (lambda lines: [lines[0], *lines[2:]], "does not fit the reveal ledger: .*opening 2 is missing before it"),
        (lambda lines: [*lines, lines[2]], "does not fit the reveal ledger: .*comes again"),
    ],
)
def test_a_record_that_was_changed_is_not_used(
    change: Callable[[list[str]], list[str]], words: str, tmp_path: Path
) -> None:
    ledger = begun(tmp_path)
    record(ledger, "round 1")
    ledger.add(signed(ledger.draft("openings", "round 1", PARTIES)))
    record(ledger, "round 2")
    record(ledger, "round 3")
    path = tmp_path / "openings.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(MpcFlError, match=words):
        RevealLedger(tmp_path, identity("aggregator"))


def test_the_last_value_that_was_signed_for_a_step_is_found(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    for about, model in (("round 1", "1"), ("round 2", "2"), ("round 2 (1)", "3"), ("round 20", "4")):
        ledger.add(signed(ledger.draft("openings", about, PARTIES, {"global model": model * 64})))
    found = [ledger.signed_value(f"round {number}", "global model") for number in (1, 2, 20, 3)]
    assert found == ["1" * 64, "3" * 64, "4" * 64, None]


def test_a_copy_that_was_changed_is_not_used(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_bytes(genuine().replace(b"round 2", b"round 9", 1))
    with pytest.raises(MpcFlError, match=r"was changed: block 2, opening 4: was edited"):
        RevealLedger(tmp_path, identity("aggregator"))


def test_a_block_that_is_not_right_is_not_kept(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    record(ledger, "round 1")
    content = (tmp_path / LEDGER_FILE).read_bytes()
    draft = ledger.draft("openings", "round 1", PARTIES)
    ahead = signed(draft, BEGAN + DAY)
    unsigned = dataclasses.replace(signed(draft), signatures=signed(draft).signatures[:2])
    for block, what in ((ahead, "clock of hospital-0 is ahead"), (unsigned, "aggregator: did not sign it")):
        with pytest.raises(ProtocolError, match=what):
            ledger.add(block)
    assert (tmp_path / LEDGER_FILE).read_bytes() == content and len(ledger.pending) == 1
    ledger.add(signed(draft))
    assert ledger.pending == []


def test_an_opening_is_refused_before_the_start_and_when_it_would_write_to_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="before the reveal ledger began"):
        record(RevealLedger(tmp_path / "new", identity("aggregator")), "too early")
    with pytest.raises(ProtocolError, match="cannot be described"):
        record(begun(tmp_path), "\x1b[2J")
    assert not (tmp_path / "openings.jsonl").exists()


def test_the_digest_of_a_tensor_tells_values_shapes_and_types_apart() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.ones(4), torch.zeros(0)]
    assert len({tensor_digest(tensor) for tensor in zeros}) == 5
    strided = torch.arange(6.0).reshape(2, 3).T
    assert tensor_digest(strided) == tensor_digest(strided.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_digest_of_a_view_is_that_of_its_elements(name: str) -> None:
    view = LAYOUTS[name](torch.arange(24.0).reshape(4, 6))
    assert tensor_digest(view) == tensor_digest(torch.tensor(view.tolist()).reshape(view.shape))


# ---- the protocol ------------------------------------------------------------------------------------------------------


FOUR = ("hospital-0", "hospital-1", "hospital-2", "aggregator")


def _whole_story(links: Any, directory: str) -> bytes:
    """Two rounds, a restart in which hospital-1 lacks a block and all have unsigned openings, a lost hospital, the end."""
    from mpc_fl.audit.co_signing import CoSigners

    parties, leader, out = list(FOUR), "aggregator", Path(directory) / links.name
    own = load_identity(out, links.name)
    ledger = RevealLedger(out, own)

    def opened(why: str) -> None:
        ledger.append(Opening("sum of updates", why, (4, 3), (leader,), tuple(parties), {"mechanism": "local"}))

    signers = CoSigners(ledger, links, parties, leader)
    signers.begin("session", "c" * 64, 2)
    for number in (1, 2):
        opened(f"round {number}")
        opened(f"round {number} (divisor)")
        signers.sign("openings", f"round {number}", {"global model": MODEL})

    # All are killed: hospital-1 before it kept the last block, hospital-0 further in round 3 than the others.
    opened("round 3")
    if links.name == "hospital-0":
        opened("round 3 (divisor)")
    if links.name == "hospital-1":
        content = ledger.path.read_bytes().splitlines(keepends=True)
        ledger.path.write_bytes(b"".join(content[:-1]) + content[-1][:100])
    ledger = RevealLedger(out, own)
    CoSigners(ledger, links, parties, leader).begin("another session", "c" * 64, 2, resumed=True)
    assert ledger.pending == [] and ledger.blocks[-1].kind == "abandoned"

    # hospital-1 is lost in the repeated round, the others go on without it.
    opened("round 3, attempt 2")
    if links.name != "hospital-1":
        rest = ["hospital-0", "hospital-2", "aggregator"]
        signers = CoSigners(ledger, links, rest, leader)
        signers.settle("round 3, attempt 2")
        assert signers.settle("nothing since") is None
        parties = rest
        opened("round 3, attempt 3")
        last = signers.sign("end", "the run is complete")

        # A restart when all is done adds nothing.
        ledger = RevealLedger(out, own)
        signers = CoSigners(ledger, links, rest, leader)
        assert signers.begin("third session", "c" * 64, 2, resumed=True) == last
        with pytest.raises(MpcFlError, match="is the ledger of an earlier run"):
            signers.begin("session", "c" * 64, 2)
    return ledger.path.read_bytes()


def test_all_parties_keep_the_same_ledger_over_restarts_and_losses(tmp_path: Path) -> None:
    results = run_parties(_whole_story, list(FOUR), tmp_path, str(tmp_path))
    assert results["hospital-0"] == results["hospital-2"] == results["aggregator"]
    trusted = load_identity(tmp_path / "aggregator", "aggregator")
    root = load_root((tmp_path / "aggregator" / ROOT_FILE).read_bytes(), "the root")
    copies = [Copy(name, name, results[name]) for name in FOUR]
    verdict = verify_copies(copies, root, BEGAN)
    assert trusted.name == "aggregator" and verdict.findings == ()
    assert verdict.notes == ("hospital-1 ends earlier: hospital-1 took no part in the blocks after it",)
    kinds = [(block.kind, len(block.openings), len(block.parties)) for block in verdict.reference.blocks if block]
    assert kinds == [
        ("start", 0, 4), ("openings", 2, 4), ("openings", 2, 4), ("resume", 0, 4), ("abandoned", 2, 4),
        ("abandoned", 1, 3), ("end", 1, 3),
    ]  # fmt: skip
    lost = verdict.reference.blocks[5]
    assert lost is not None and lost.openings[0].among == FOUR and lost.openings[0].why == "round 3, attempt 2"


def _lost_before_it_kept_a_block(links: Any, directory: str) -> None:
    """hospital-1 signs round 2 and is killed before it keeps the block of all; the others go on without it."""
    from mpc_fl.audit.co_signing import CoSigners

    parties, leader, out = list(FOUR), "aggregator", Path(directory) / links.name
    ledger = RevealLedger(out, load_identity(out, links.name))
    signers = CoSigners(ledger, links, parties, leader)
    signers.begin("session", "c" * 64, 2)
    ledger.append(Opening("sum of updates", "round 1", (4, 3), (leader,), tuple(parties)))
    signers.sign("openings", "round 1")
    assert not (out / UNCONFIRMED_FILE).exists()
    ledger.append(Opening("sum of updates", "round 2", (4, 3), (leader,), tuple(parties)))
    if links.name == "hospital-1":
        ledger.add = lambda *_: None  # type: ignore[method-assign]
        signers.sign("openings", "round 2")
        return
    signers.sign("openings", "round 2")
    rest = [name for name in parties if name != "hospital-1"]
    CoSigners(ledger, links, rest, leader).sign("end", "the run is complete")


def _written_without_hospital_1(directory: Path) -> None:
    """The files that a run leaves in its directory, from those of its parties."""
    for name in FOUR:
        (directory / "parties").mkdir(exist_ok=True)
        (directory / name).rename(directory / "parties" / name)
    (directory / "parties" / "aggregator" / "federation.crt").rename(directory / "federation.crt")


def test_a_party_that_was_lost_before_it_kept_what_it_signed_is_named_and_blamed_for_nothing(tmp_path: Path) -> None:
    run_parties(_lost_before_it_kept_a_block, list(FOUR), tmp_path, str(tmp_path))
    _written_without_hospital_1(tmp_path)
    result = CliRunner().invoke(ledger_commands.app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output
    said = "hospital-1 signed block 2 and was lost before it had the signatures of all"
    assert said in " ".join(result.output.split()) and "verifies" in result.output

    # Its signature proves nothing about what else is cut off, and neither does another block or nothing.
    own, ledger = (tmp_path / "parties" / "hospital-1" / name for name in (UNCONFIRMED_FILE, LEDGER_FILE))
    content = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(content[0])
    result = CliRunner().invoke(ledger_commands.app, ["verify", str(tmp_path)])
    assert result.exit_code == 1 and "block 1: is missing, with all after it" in " ".join(result.output.split())
    ledger.write_bytes(b"".join(content))
    for other in (b"", b"[" * 10_000, content[1], own.read_bytes()[:-20]):
        own.write_bytes(other)
        result = CliRunner().invoke(ledger_commands.app, ["verify", str(tmp_path)])
        assert result.exit_code == 1 and "block 2: is missing, with all after it" in " ".join(result.output.split())


def _one_differs(links: Any, directory: str) -> None:
    from mpc_fl.audit.co_signing import CoSigners

    ledger = RevealLedger(Path(directory) / links.name, load_identity(Path(directory) / links.name, links.name))
    signers = CoSigners(ledger, links, PARTIES, "aggregator")
    signers.begin("session", "c" * 64, 2)
    opener = links.name if links.name == "hospital-1" else "aggregator"
    ledger.append(Opening("sum", "round 1", (3,), ("aggregator",), PARTIES))
    ledger.append(Opening("sum", "round 1", (1,), (opener,), PARTIES))
    signers.sign("openings", "round 1", {"global model": tensor_digest(torch.zeros(3))})


def test_a_party_whose_record_differs_is_named_at_once(tmp_path: Path) -> None:
    words = "ProtocolError: hospital-1 recorded opening 2 otherwise than hospital-0, aggregator"
    with pytest.raises(AssertionError, match=words):
        run_parties(_one_differs, list(PARTIES), tmp_path, str(tmp_path))
    for name in PARTIES:
        content = (tmp_path / name / LEDGER_FILE).read_bytes()
        assert content.count(b"\n") == 1, "the block was not kept by anybody"


def _one_starts_anew(links: Any, directory: str) -> None:
    from mpc_fl.audit.co_signing import CoSigners

    ledger = RevealLedger(Path(directory) / links.name, load_identity(Path(directory) / links.name, links.name))
    signers = CoSigners(ledger, links, PARTIES, "aggregator")
    signers.begin("session", "c" * 64, 2, resumed=links.name != "hospital-0")


def test_who_starts_anew_while_others_resume_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ProtocolError: hospital-0 wants a new run and aggregator an earlier one"):
        run_parties(_one_starts_anew, list(PARTIES), tmp_path, str(tmp_path))


def test_who_differs_is_told_by_the_majority() -> None:
    from mpc_fl.audit.co_signing import claim_of, disagreement

    start = Block(0, "start", "", PARTIES, (), {}, members(), Chain().seal)
    chain, _ = extend(Chain(), signed(start), authority().certificate)
    one, two = ([describe(chain, [], why)] for why in ("one", "two"))
    claims = [
        claim_of(Block(1, "openings", "", PARTIES, tuple(opened), {}, None, chain.seal)) for opened in (one, two, [])
    ]
    assert disagreement({"hospital-0": claims[0], "aggregator": claims[0]}) is None
    assert disagreement({"hospital-0": claims[0], "hospital-1": claims[0], "aggregator": claims[1]}) == (
        "aggregator recorded opening 1 otherwise than hospital-0, hospital-1"
    )
    assert disagreement({"hospital-0": claims[0], "hospital-1": claims[2], "aggregator": claims[0]}) == (
        "hospital-1 recorded opening 1 otherwise than hospital-0, aggregator"
    )
    assert disagreement({"hospital-0": claims[0], "aggregator": claims[1]}) == (
        "hospital-0, aggregator do not agree on opening 1"
    )
    held = Block(1, "openings", "", PARTIES, (), {"model": MODEL}, None, chain.seal)
    other = claim_of(dataclasses.replace(held, values={"model": "6" * 64}))
    assert disagreement({"hospital-0": claim_of(held), "hospital-1": other, "aggregator": claim_of(held)}) == (
        "hospital-1 recorded the value of model otherwise than hospital-0, aggregator"
    )
    assert disagreement({"hospital-0": "nonsense", "aggregator": claims[1]}) == (
        "hospital-0 sent no claim about the reveal ledger"
    )


# ---- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for directory in (run, run / "parties" / "hospital-0", run / "parties" / "hospital-1"):
        directory.mkdir(parents=True)
        (directory / LEDGER_FILE).write_bytes(genuine())
    (run / "federation.crt").write_bytes(pem(authority().certificate))
    return run


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(ledger_commands.app, [str(argument) for argument in arguments])


def test_verify_says_that_all_is_well(run_dir: Path) -> None:
    result = command("verify", run_dir)
    assert result.exit_code == 0, result.output
    assert "The reveal ledger verifies: 9 openings in 5 blocks" in result.output and "3 copies" in result.output
    assert f"certificate, from {run_dir / ROOT_FILE}: {fingerprint(authority().certificate)}\n" in result.output
    assert "It lies with what it verifies" in result.output
    given = command("verify", run_dir, "--authority", run_dir / ROOT_FILE).output
    assert f"certificate: {fingerprint(authority().certificate)}\n" in given and "It lies with" not in given
    found = json.loads(command("verify", run_dir, "--json", "--authority", run_dir / "federation.crt").output)
    assert (
        found["ok"] is True and found["findings"] == [] and found["authority_given"] is True and found["openings"] == 9
    )


def test_verify_prints_one_line_per_finding_and_fails(run_dir: Path) -> None:
    edited = run_dir / "parties" / "hospital-1" / LEDGER_FILE
    edited.write_bytes(genuine().replace(b"round 3: part 1", b"round 3: part 7"))
    result = command("verify", run_dir)
    assert result.exit_code == 1
    output = result.output.splitlines()
    where = f"parties/hospital-1/{LEDGER_FILE}, block 3"
    assert output[0] == f"{where}, opening 8: was edited: its digest does not fit"
    assert output[1].startswith(f"{where}: is not what its parties signed")
    assert output[2] == f"{where}, opening 8: is not the same as in {LEDGER_FILE}"
    assert output[-1] == "The reveal ledger does NOT verify: 3 findings."
    result = command("verify", run_dir, "--json")
    found = json.loads(result.output)
    assert result.exit_code == 1 and found["ok"] is False and len(found["findings"]) == 3
    assert found["findings"][0]["opening"] == 8 and found["findings"][0]["block"] == 3
    edited.write_bytes(genuine())
    other = run_dir / "other.jsonl"
    other.write_bytes(genuine().replace(b"round", b"ROUND"))
    assert command("verify", run_dir).exit_code == 0 and command("verify", run_dir, "--copy", other).exit_code == 1


def test_verify_compares_the_files_whose_digests_were_signed(run_dir: Path) -> None:
    import hashlib

    blocks = make_ledger(1, 1)
    values = {"model.safetensors": hashlib.sha256(b"weights").hexdigest(), "../secret": "0" * 64}
    blocks[-1] = signed(dataclasses.replace(blocks[-1], values=values, signatures=()))
    for path in run_dir.rglob(LEDGER_FILE):
        path.write_bytes(text(blocks))
    (run_dir / "model.safetensors").write_bytes(b"weights")
    (run_dir.parent / "secret").write_bytes(b"")
    assert command("verify", run_dir).exit_code == 0
    (run_dir / "parties" / "hospital-0" / "model.safetensors").write_bytes(b"other weights")
    result = command("verify", run_dir)
    assert result.exit_code == 1 and "parties/hospital-0/model.safetensors is not the one" in result.output


def test_the_directory_of_a_party_is_verified_by_the_certificate_that_the_run_left(
    run_dir: Path, tmp_path: Path
) -> None:
    """In the party's own directory first, which `mpc-fl party` writes; else in that of the run that it is a part of."""
    party = run_dir / "parties" / "hospital-0"
    result = command("verify", party)
    assert result.exit_code == 0 and f"from {run_dir / ROOT_FILE}" in result.output
    (party / ROOT_FILE).write_bytes(pem(authority().certificate))
    assert f"from {party / ROOT_FILE}" in command("verify", party).output
    (party / ROOT_FILE).write_bytes(pem(Authority(30 * DAY).certificate))
    result = command("verify", party)
    assert result.exit_code == 1 and "names another authority" in result.output
    (party / ROOT_FILE).write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    assert "is not a certificate in PEM" in str(command("verify", party).exception)


def test_a_party_keeps_the_certificate_of_its_run_beside_its_ledger(tmp_path: Path) -> None:
    own, out = identity("hospital-0"), tmp_path / "out"
    write_identity(own, tmp_path / "identity")
    open_ledger(Config().with_values(site={"out": str(out), "identity": str(tmp_path / "identity")}), own.name)
    assert (out / ROOT_FILE).read_bytes() == own.authority


def test_what_is_missing_is_said_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / LEDGER_FILE).write_bytes(genuine())
    for arguments, words in (
        (("verify", run_dir / "nowhere", "--authority", run_dir / "federation.crt"), "holds no reveal_ledger.jsonl"),
        (("verify", run_dir / "nowhere"), "holds no reveal_ledger.jsonl"),
        (("verify", alone), "give it with --authority: each party has federation.crt in the directory that was its"),
        (("verify", run_dir, "--authority", run_dir / LEDGER_FILE), "not a certificate in PEM"),
        (("verify", run_dir, "--copy", run_dir), "cannot read"),
        (("show", run_dir / "parties"), "holds no reveal_ledger.jsonl"),
    ):
        error = command(*arguments).exception
        assert isinstance(error, MpcFlError) and words in str(error) and "\n" not in str(error)


def test_show_reads_well(run_dir: Path) -> None:
    result = command("show", run_dir)
    assert result.exit_code == 0, result.output
    for words in ("Block 2, openings: block 2, signed", "round 2: part 1", "5 x 2", "epsilon at most 8.0, mechanism local",
                  "Signed by hospital-0, hospital-1, aggregator", "All hold the same global model",
                  "mpc-fl ledger verify"):  # fmt: skip
        assert words in result.output.replace("\n", " "), words
    assert max(map(len, result.output.splitlines())) <= 132
    found = json.loads(command("show", run_dir, "--json").output)
    assert [block["kind"] for block in found["blocks"]] == ["start", "openings", "openings", "openings", "end"]


def test_show_takes_no_text_for_markup_and_names_a_damaged_line(run_dir: Path) -> None:
    chain = read_ledger(b"".join(genuine().splitlines(keepends=True)[:-1]), authority().certificate).chain
    text_of_tags = Opening("[bold]sum[/bold]", "[link=x]why[/link]", (), ("aggregator",), PARTIES[:2])
    opened = chain_opening(chain, [], text_of_tags)
    block = Block(4, "openings", "[red]", PARTIES, (opened,), {}, None, chain.seal, (Signature(PARTIES[0], "2", ""),))
    block = dataclasses.replace(block, signatures=signed(block).signatures[:2])
    path = run_dir / LEDGER_FILE
    path.write_bytes(b"".join(genuine().splitlines(keepends=True)[:-1]) + encode_block(block))
    output = command("show", run_dir).output
    for words in (
        "[bold]sum[/bold]",
        "[link=x]why[/link]",
        "openings: [red]",
        "single",
        "NOT by aggregator",
        "not in this copy",
    ):
        assert words in output, words
    path.write_bytes(genuine() + json.dumps(to_json(block)).encode() + b"\n")
    error = command("show", run_dir).exception
    assert isinstance(error, MpcFlError) and "line 6 of reveal_ledger.jsonl is damaged" in str(error)
