"""Messages among peers in which something else stands than should: refused in one line that names who sent it, or without effect.

The sender signs what it sends where that is signed, so that signatures are no help. Whole peer sums, proposals, and blocks.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.aggregation import peer_sum, slice_totals
from mpc_fl.aggregation.signed_words import say_signed
from mpc_fl.audit.ledger_file import RevealLedger, now
from mpc_fl.audit.opening_record import Opening, OpeningRecord
from mpc_fl.audit.reveal_ledger import Block, Members, block_from, chain_opening, sign_block, to_json
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import MpcFlError, ProtocolError, SecrecyError
from mpc_fl.federation.peer_admission import Admission, Membership
from mpc_fl.federation.peer_proposal import Complete, Proposal, Proposals, Reason, Standing
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.links.settings import Timeouts, Tolerance
from mpc_fl.sharing.opening import SecretDomain
from tests.support.peer_sums import PeerSums, expected, hospitals_of, only_at, rules_of
from tests.support.signatories import signatories

DEVIATES = "hospital-1"
TEXTS = st.text(max_size=20) | st.sampled_from(["", "hospital-0", "0" * 64, "f" * 64, "\ud800", "\x1b[2J", "void"])
NUMBERS = st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 3)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)

# ---- sums --------------------------------------------------------------------------------------------------------------

WORDS = {
    "slices": ("hashes", "keys", "coin"),
    "arrived": ("hospitals",),
    "fixed": ("hospitals",),
    "confirm": ("confirmation", "repeated", "fixed"),
    "total": ("hashes",),
    "coin": ("number", "repeated"),
    "combinations": ("of",),
    "repeated": ("repeated",),
}
PLACES = [(word, key) for word, keys in WORDS.items() for key in (*keys, "word", "signature")]


def _require_harmless(sums: PeerSums) -> None:
    outcome = sums.run()
    for name in sums.hospitals:
        if name == DEVIATES:
            continue
        error = outcome.errors.get(name)
        if error is not None:
            assert isinstance(error, MpcFlError) and not isinstance(error, SecrecyError), (name, error)
            assert str(error).isprintable() and getattr(error, "by", "") in ("", DEVIATES), (name, error)
        total = outcome.totals.get(name)
        if total is not None:
            assert torch.equal(total, expected(outcome.admitted[name], sums.elements))


@settings(max_examples=40, deadline=None)
@given(place=st.sampled_from(PLACES), junk=JUNK)
def test_a_word_of_a_sum(place: tuple[str, str], junk: Any) -> None:
    word, key = place

    def signed(original: Any, domain: Any, links: Any, names: Any, subject: Any, values: Any) -> Any:
        is_it = subject.word == word and key in values
        return original(domain, links, names, subject, {**values, key: junk} if is_it else values)

    def sent(original: Any, links: Any, receiver: str, tag: str, value: Any) -> None:
        is_it = value.get("word") == word and (
            key not in value or key in ("word", "signature") or "signature" not in value
        )
        original(links, receiver, tag, {**value, key: junk} if is_it else value)

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        sums = PeerSums(Path(directory), patch)
        sums.proposer = DEVIATES if word == "fixed" else sums.proposer
        for where in (peer_sum, slice_totals):
            only_at(patch, DEVIATES, where, "say_signed", signed)
        only_at(patch, DEVIATES, Links, "send_object", sent)
        _require_harmless(sums)


TENSORS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda words: words[:-1],
    lambda words: words.reshape(1, -1),
    lambda words: words.long() if words.dtype == torch.int32 else words.int(),
    lambda words: words.double(),
    lambda words: words[:0],
    lambda words: torch.zeros((), dtype=words.dtype),
    lambda words: torch.full_like(words, 127),
]


@pytest.mark.parametrize("change", range(len(TENSORS)))
@pytest.mark.parametrize("tag", ["slice", "total", "keys"])
def test_a_tensor_of_a_sum(tag: str, change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(original: Any, links: Any, receiver: str, to: str, words: torch.Tensor) -> None:
        original(links, receiver, to, TENSORS[change](words) if to.startswith(tag) else words)

    sums = PeerSums(tmp_path, monkeypatch)
    only_at(monkeypatch, DEVIATES, Links, "send_tensor", sent)
    _require_harmless(sums)


# ---- proposals ---------------------------------------------------------------------------------------------------------

NAMES = hospitals_of(4)
STANDING, MEMBERSHIP = Standing(2, "5" * 64, 1), Membership(NAMES, frozenset(NAMES))


@cache
def hospitals() -> dict[str, Proposals]:
    """Hospitals that are linked, all in this thread, before round 2."""
    directory = Path(tempfile.mkdtemp())
    signatory = signatories(list(NAMES), directory)
    network = InMemoryNetwork(list(NAMES), Agreement("test", "digest", "train"), Timeouts(60.0, 60.0))
    made = {name: network.links(name, Tolerance(frozenset(NAMES))) for name in NAMES}
    for links in made.values():
        links._open()
    found = dict[str, Proposals]()
    for name, links in made.items():
        links._mailboxes.await_all_connected()
        domain = SecretDomain(links, NAMES, OpeningRecord(directory / name, name), signatory=signatory[name])
        rules, about_run = rules_of(NAMES[0], NAMES, 3), ("test", "digest")
        admission = Admission(domain, rules, about_run, "all", lambda certificate: True)
        found[name] = Proposals(domain, rules, about_run, admission)
    return found


def word_of(name: str, word: str, values: dict[str, Any]) -> dict[str, Any]:
    """What a hospital says under view 0 of round 2, signed."""
    at = hospitals()[name]
    signed = say_signed(at.domain, at.domain.links, [], at.subject(word, (2, 0)), values)
    return {**values, "word": word, "signature": signed.signature}


def presences() -> dict[str, Any]:
    record: Any = SimpleNamespace(chain=SimpleNamespace(blocks=3, seal="6" * 64), pending=[])
    said = {name: at.own_presence(STANDING, 0, Reason(), record, None) for name, at in hospitals().items()}
    return {name: (each, word_of(name, "present", asdict(each))) for name, each in said.items()}


def proposed() -> dict[str, Any]:
    return hospitals()[NAMES[0]].proposed(STANDING, MEMBERSHIP, NAMES, presences())


def heard_at(name: str, word: dict[str, Any]) -> Proposal:
    return hospitals()[name].sound(STANDING, NAMES[0], word, presences()[name][0], MEMBERSHIP)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths(part, (*path, key))


def with_junk(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = junk
    return changed


def test_a_sound_proposal_is_taken() -> None:
    for name in NAMES[1:]:
        proposal = heard_at(name, word_of(NAMES[0], "proposal", proposed()))
        assert proposal.plan.hospitals == NAMES and not proposal.plan.normalised


@settings(max_examples=150, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_a_proposal_with_something_else_in_it(data: st.DataObject, junk: Any) -> None:
    sound = proposed()
    path = data.draw(st.sampled_from(list(paths(sound))))
    try:
        proposal = heard_at(NAMES[2], word_of(NAMES[0], "proposal", with_junk(sound, path, junk)))
    except ProtocolError as error:
        assert NAMES[0] in str(error) and str(error).isprintable()
    else:  # the same value, or one of 1, 1.0 and True for another
        assert proposal.plan.hospitals == NAMES and set(proposal.present) == set(NAMES)


def test_a_presence_of_an_earlier_start() -> None:
    """Of a run that goes on, under the same round and view: it would pass for a hospital that is there."""
    last, values = NAMES[3], proposed()
    before = replace(presences()[last][0], held=dict.fromkeys(NAMES, "9" * 64))
    values["present"][last] = {k: v for k, v in word_of(last, "present", asdict(before)).items() if k != "word"}
    with pytest.raises(ProtocolError, match=f"{NAMES[0]} says of {last} what it said at an earlier start"):
        heard_at(NAMES[1], word_of(NAMES[0], "proposal", values))


# ---- blocks ------------------------------------------------------------------------------------------------------------


@cache
def begun() -> tuple[list[Identity], Any, Any]:
    """Identities, a block that begins a ledger, and one with an opening that follows it; both signed by all."""
    directory = Path(tempfile.mkdtemp())
    signatories(list(NAMES), directory)
    identities = [load_identity(directory / name, name) for name in NAMES]
    ledger = RevealLedger(directory / "ledger", identities[0])
    certificates = {each.name: each.certificate.decode() for each in identities}
    members = Members("test", "digest", fingerprint(ledger.authority), certificates, 3)
    blocks = list[Any]()
    for kind, of in (("start", members), ("openings", None)):
        if of is None:
            ledger.append(Opening("sum", "round 1", (3,), NAMES, NAMES, {"epsilon": 1.5}, "7" * 64))
        draft = ledger.draft(kind, kind, NAMES, {}, of)
        blocks.append(replace(draft, signatures=tuple(sign_block(draft, each, now()) for each in identities)))
        ledger.add(blocks[-1])
    return identities, blocks[0], blocks[1]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), junk=JUNK, first=st.booleans())
def test_a_block_with_something_else_in_it(data: st.DataObject, junk: Any, first: bool) -> None:
    identities, start, openings = begun()
    sound = to_json(start if first else openings)
    path = data.draw(st.sampled_from(list(paths(sound))))
    value = with_junk(sound, path, junk)
    with tempfile.TemporaryDirectory() as directory:
        ledger = RevealLedger(Path(directory), identities[0])
        if not first:
            ledger.add(start)
        try:
            block = block_from(value)
        except ValueError:
            return
        if value == sound:
            return
        with pytest.raises(ProtocolError, match="was refused"):
            ledger.add(block, "hospital-3")


@settings(max_examples=100, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_an_opening_with_something_else_in_it(data: st.DataObject, junk: Any) -> None:
    """As a hospital says that it has recorded it: what comes of it can be written down, and read again."""
    from mpc_fl.audit.reveal_ledger import Chain, opening_from

    sound = to_json(
        chain_opening(Chain(), [], Opening("sum", "round 1", (3,), NAMES, NAMES, {"epsilon": 1.5}, "7" * 64))
    )
    value = with_junk(sound, data.draw(st.sampled_from(list(paths(sound)))), junk)
    try:
        opening = opening_from(value)
    except ValueError:
        return
    assert opening_from(to_json(opening)) == opening and len(opening.computed_digest()) == 64


# ---- of which view a block is ------------------------------------------------------------------------------------------


def _finished(view: int, about: str, *signers: str, seal: str = "") -> Complete:
    """A block of round 2, which these have signed that they finish under a view."""
    block = Block(1, "openings", about, NAMES, (), {"global model": "5" * 64}, None, "6" * 64)
    signed = dict[str, str]()
    for name in signers:
        at = hospitals()[name]
        subject, values = at.subject("finish", (2, view)), {"seal": seal or block.seal()}
        signed[name] = say_signed(at.domain, at.domain.links, [], subject, values).signature
    return Complete(view, block, signed)


@pytest.mark.parametrize(
    ("view", "about", "signers", "is_of_it"),
    [
        (0, "round 2", (), True),
        (3, "round 2 (3)", (), True),
        (1, "round 2", (), False),
        (0, "round 2 (1)", (), False),
        (4, "round 2 (3)", NAMES[:2], False),
        (4, "round 2 (3)", NAMES[:3], True),
    ],
)
def test_a_block_is_of_the_view_that_a_quorum_signed(
    view: int, about: str, signers: tuple[str, ...], is_of_it: bool
) -> None:
    """One that could be said to be of a later view than it is would be preferred to the one that a quorum has kept."""
    at, complete = hospitals()[NAMES[0]], _finished(view, about, *signers)
    assert at.is_of_its_view(2, complete) is is_of_it
    assert not at.is_of_its_view(2, _finished(view + 7, about, *signers, seal="0" * 64))
    assert not at.is_of_its_view(2, replace(complete, view=view + 5))
