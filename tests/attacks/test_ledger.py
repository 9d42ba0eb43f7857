"""A leader of the reveal ledger that deviates, against parties that run the program unchanged.

It holds the aggregator's key, and in some tests those of hospitals that pool with it. What it tried at first: a block of its own
that erased what a hospital had begun, with which every ledger verified.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509

from mpc_fl.audit import co_signing
from mpc_fl.audit.co_signing import CoSigners
from mpc_fl.audit.ledger_audit import Copy, extend, verify_copies
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.opening_record import Opening
from mpc_fl.audit.reveal_ledger import (
    LEDGER_FILE,
    Block,
    ChainedOpening,
    Members,
    chain_opening,
    encode_block,
    sign_block,
    to_json,
)
from mpc_fl.config.config import party_names
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import MpcFlError, PeerLostError, ProtocolError
from mpc_fl.links.frames import Kind
from tests.integration.test_dropouts import Site
from tests.support.deviating import run_and_report
from tests.support.harness import SPAWN, run_parties_in_memory

HOSPITALS = ("hospital-0", "hospital-1", "hospital-2")
PARTIES = (*HOSPITALS, "aggregator")
QUORUM = 2
CONFIGURATION = "c" * 64


def in_this_version(function: Any, **named: Any) -> dict[str, Any]:
    """Those named arguments that the code under test knows: these tests were seen to fail on the code before them."""
    return {name: value for name, value in named.items() if name in inspect.signature(function).parameters}


def begin(signers: CoSigners, resumed: bool = False) -> Block:
    return signers.begin("session", CONFIGURATION, resumed=resumed, **in_this_version(CoSigners.begin, quorum=QUORUM))


def round_opening(why: str) -> Opening:
    return Opening("sum of updates", why, (4, 3), ("aggregator",), PARTIES)


class UncheckedLedger(RevealLedger):
    """The ledger of a leader that keeps what it likes."""

    def add(self, block: Block, *_: Any) -> None:
        chain, _findings = extend(self.chain, block, self.authority)
        self.chain = dataclasses.replace(chain, blocks=block.number + 1, seal=block.seal(), sound=True)
        with self.path.open("ab") as file:
            file.write(encode_block(block))
        self.blocks.append(block)
        self.pending = []


def signed(block: Block, directory: Path) -> Block:
    """Signed by all its parties, whose keys the leader has, its own or those of hospitals that pool with it."""
    now = datetime.datetime.now(datetime.UTC)
    signatures = [sign_block(block, load_identity(directory / name, name), now) for name in block.parties]
    return dataclasses.replace(block, signatures=tuple(signatures))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_local_identities(PARTIES, {name: tmp_path / name for name in PARTIES})
    return tmp_path


def run_round_then(
    directory: Path, deviate: Callable[[Any, CoSigners], Any], wanted: Callable[[Any, CoSigners], Any]
) -> dict[str, Any]:
    """All begin, sign round 1 and record an opening of round 2; then the aggregator does `deviate`, the others `wanted`.

    Returns what each hospital said last: the line of its error, or what `wanted` returned.
    """

    def party(links: Any) -> Any:
        own = load_identity(directory / links.name, links.name)
        kind = UncheckedLedger if links.name == "aggregator" else RevealLedger
        ledger = kind(directory / links.name, own)
        signers = CoSigners(ledger, links, PARTIES, "aggregator")
        begin(signers)
        ledger.append(round_opening("round 1: mean update"))
        signers.sign("openings", "round 1")
        ledger.append(round_opening("round 2: mean update"))
        try:
            return (deviate if links.name == "aggregator" else wanted)(links, signers)
        except MpcFlError as error:
            # A peer that ends with an error would end the waits of the others, whose own words are wanted.
            return error

    return run_parties_in_memory(party, list(PARTIES), receive_timeout=60.0)


def findings_of(directory: Path, *names: str) -> list[str]:
    """What `mpc-fl ledger verify` finds in the copies and records of these parties."""
    from mpc_fl.audit.record_audit import RecordCopy, verify_records

    root = x509.load_pem_x509_certificate(load_identity(directory / "aggregator", "aggregator").authority)
    copies = [Copy(name, name, (directory / name / LEDGER_FILE).read_bytes()) for name in names]
    verdict = verify_copies(copies, root, datetime.datetime.now(datetime.UTC))
    records = [RecordCopy(name, name, (directory / name / "openings.jsonl").read_bytes()) for name in names]
    unsigned, _ = verify_records(records, verdict.reference)
    return [finding.line for finding in [*verdict.findings, *unsigned]]


def resume(_links: Any, signers: CoSigners) -> Any:
    return begin(signers, resumed=True)


# ---- blocks that others are said to have signed ------------------------------------------------------------------------


def forged_history(directory: Path, parties: Sequence[str], kind: str = "abandoned") -> Callable[[Any, CoSigners], Any]:
    """The leader says that `parties` signed the next block: another opening in the place of the one all had begun."""

    def deviate(links: Any, signers: CoSigners) -> Any:
        ledger = signers.ledger
        ledger.pending = []
        other = chain_opening(
            ledger.chain, [], dataclasses.replace(round_opening("a lost attempt"), among=tuple(parties))
        )
        opened: tuple[ChainedOpening, ...] = () if kind == "end" else (other,)
        ledger.add(signed(Block(2, kind, "round 2", tuple(parties), opened, {}, None, ledger.chain.seal), directory))
        return resume(links, signers)

    return deviate


@pytest.mark.parametrize(
    ("parties", "words"),
    [
        (("aggregator",), "block 2: is signed by no hospital: a block counts with 2 hospitals or more"),
        (
            ("hospital-2", "aggregator"),
            "block 2: is signed by hospital-2 alone: a block counts with 2 hospitals or more",
        ),
        (
            ("hospital-1", "hospital-2", "aggregator"),
            "leaves out opening 2, which this party began (round 2: mean update)",
        ),
        (
            ("hospital-1", "hospital-2"),
            "block 2, opening 2, aggregator: learned what was opened and is no party of the block",
        ),
    ],
)
def test_no_block_erases_what_a_hospital_began(parties: tuple[str, ...], words: str, directory: Path) -> None:
    """Of the aggregator alone, with a hospital that pools with it, with a quorum of such, and of a quorum without the opener.

    Before, hospital-0 took each of them, dropped its opening with a warning, and went on.
    """
    said = run_round_then(directory, forged_history(directory, parties), resume)
    assert isinstance(said["hospital-0"], ProtocolError), said
    assert words in str(said["hospital-0"]) and "from aggregator" in str(said["hospital-0"])
    own = RevealLedger(directory / "hospital-0", load_identity(directory / "hospital-0", "hospital-0"))
    assert len(own.blocks) == 2 and [opening.why for opening in own.pending] == ["round 2: mean update"]
    begun = "opening 2: was begun by hospital-0, hospital-1, hospital-2 and is signed nowhere (round 2: mean update)"
    assert begun in findings_of(directory, *HOSPITALS)


def test_no_run_ends_without_what_a_hospital_began(directory: Path) -> None:
    parties = ("hospital-1", "hospital-2", "aggregator")
    said = run_round_then(directory, forged_history(directory, parties, "end"), resume)
    assert "leaves out opening 2, which this party began" in str(said["hospital-0"])


def test_a_newcomer_takes_no_history_that_the_aggregator_made_alone(directory: Path) -> None:
    """hospital-0 has no ledger yet. The history is signed by the aggregator, or by a quorum of another size than configured."""

    def history(parties: Sequence[str], quorum: int) -> Block:
        identities = {name: load_identity(directory / name, name) for name in parties}
        certificates = {name: one.certificate.decode() for name, one in identities.items()}
        root = x509.load_pem_x509_certificate(identities["aggregator"].authority)
        told = in_this_version(Members, quorum=quorum)
        members = Members("session", CONFIGURATION, fingerprint(root), certificates, **told)
        return signed(Block(0, "start", "the run begins", tuple(parties), (), {}, members, "0" * 64), directory)

    def party(links: Any, start: Block, resumed: bool) -> Any:
        here = directory / f"{links.name}-of-{len(start.parties)}-{resumed}"
        own = load_identity(directory / links.name, links.name)
        ledger = (UncheckedLedger if links.name == "aggregator" else RevealLedger)(here, own)
        if links.name == "aggregator":
            ledger.add(start)
            links.receive_object("hospital-0", "ledger certificate")
            certificates = {name: load_identity(directory / name, name).certificate.decode() for name in both}
            links.send_object("hospital-0", "ledger certificates", certificates)
            return CoSigners(ledger, links, both, "aggregator").catch_up("begin")
        try:
            begin(CoSigners(ledger, links, both, "aggregator"), resumed)
        except MpcFlError as error:
            return error, len(ledger.blocks)
        return "went on", len(ledger.blocks)

    both = ["hospital-0", "aggregator"]
    for parties, quorum, resumed, words in (
        (["aggregator"], QUORUM, True, "is signed by no hospital"),
        (["hospital-1", "hospital-2", "hospital-0", "aggregator"], 3, True, "counts by a quorum of 3, not 2"),
        (
            ["hospital-1", "hospital-2", "aggregator"],
            QUORUM,
            False,
            "sent no number of blocks that this ledger can lack",
        ),
    ):
        error, kept = run_parties_in_memory(party, both, history(parties, quorum), resumed)["hospital-0"]
        assert isinstance(error, ProtocolError) and words in str(error) and kept == 0, (parties, error)


@pytest.mark.parametrize("count", [-1, True, 10**15, "2", None, 2.0])
def test_a_false_number_of_blocks_is_refused_at_once(count: Any, directory: Path) -> None:
    def deviate(links: Any, signers: CoSigners) -> None:
        for name in HOSPITALS:
            links.send_object(name, "ledger catch up now", {"blocks": count})

    said = run_round_then(directory, deviate, lambda _, signers: signers.catch_up("now"))
    for name in HOSPITALS:
        assert "sent no number of blocks that this ledger can lack" in str(said[name])


# ---- signing -----------------------------------------------------------------------------------------------------------


def sent_signatures(links: Any, name: str, tag: str, block: Block) -> None:
    links.send_object(name, tag, {"signatures": [to_json(signature) for signature in block.signatures]})


def test_signatures_over_a_block_without_an_opening_are_refused(directory: Path) -> None:
    """The leader, and hospitals 1 and 2 that pool with it, sign round 2 without its opening; hospital-0 runs the program."""

    def deviate(links: Any, signers: CoSigners) -> None:
        ledger = signers.ledger
        tag = f"ledger {ledger.chain.blocks} openings round 2"
        for name in HOSPITALS:
            links.receive_object(name, tag)
        block = Block(ledger.chain.blocks, "openings", "round 2", PARTIES, (), {}, None, ledger.chain.seal)
        for name in HOSPITALS:
            sent_signatures(links, name, tag, signed(block, directory))

    said = run_round_then(directory, deviate, lambda _, signers: signers.sign("openings", "round 2"))
    assert "is not what its parties signed" in str(said["hospital-0"])
    assert len((directory / "hospital-0" / LEDGER_FILE).read_bytes().splitlines()) == 2


def test_no_hospital_signs_where_fewer_than_the_quorum_are_said_to_be_left(directory: Path) -> None:
    """Before, a hospital signed a history with the aggregator alone: that the others were lost it cannot see."""
    received: list[Any] = []

    def deviate(links: Any, signers: CoSigners) -> None:
        try:
            received.append(links.receive_object("hospital-0", "ledger 2 openings round 2"))
        except PeerLostError:
            return

    def wanted(links: Any, signers: CoSigners) -> Any:
        if links.name != "hospital-0":
            return None
        alone = CoSigners(signers.ledger, links, ["hospital-0", "aggregator"], "aggregator")
        return alone.sign("openings", "round 2")

    said = run_round_then(directory, deviate, wanted)
    assert "would not count: block 2: is signed by hospital-0 alone" in str(said["hospital-0"]) and not received


def test_in_settling_the_leader_cannot_leave_out_what_a_hospital_began(directory: Path) -> None:
    def deviate(links: Any, signers: CoSigners) -> None:
        signers.catch_up("restart")
        for name in HOSPITALS:
            links.receive_object(name, "ledger settle restart")
            links.send_object(name, "ledger settle restart", {"pending": []})

    said = run_round_then(directory, deviate, lambda _, signers: signers.settle("restart"))
    for name in HOSPITALS:
        assert "aggregator leaves out opening 2, which was begun (round 2: mean update)" in str(said[name])


def test_two_histories_are_found_and_who_signed_both_is_named(directory: Path) -> None:
    """All sign round 2; hospital-2 gets the block, the others hear that it was lost and sign without it."""

    def deviate(links: Any, signers: CoSigners) -> None:
        ledger, tag = signers.ledger, "ledger 2 openings round 2"
        received = {name: links.receive_object(name, tag) for name in HOSPITALS}
        draft = ledger.draft("openings", "round 2", PARTIES)
        own = to_json(sign_block(draft, ledger.identity, datetime.datetime.now(datetime.UTC)))
        told = {**{name: item["signature"] for name, item in received.items()}, "aggregator": own}
        links.send_object("hospital-2", tag, {"signatures": [told[name] for name in PARTIES]})
        for name in rest[:2]:
            links.send_object(name, tag, {"lost": "hospital-2"})
        CoSigners(ledger, links, rest, "aggregator").sign("abandoned", "round 2 (1)")

    def wanted(links: Any, signers: CoSigners) -> Any:
        try:
            return signers.sign("openings", "round 2")
        except PeerLostError as error:
            assert error.peer == "hospital-2"
            return CoSigners(signers.ledger, links, rest, "aggregator").sign("abandoned", "round 2 (1)")

    rest = ["hospital-0", "hospital-1", "aggregator"]
    said = run_round_then(directory, deviate, wanted)
    assert all(isinstance(said[name], Block) for name in HOSPITALS), said
    found = findings_of(directory, *PARTIES)
    both = "is not the same as in hospital-0: two histories, signed both by hospital-0, hospital-1, aggregator"
    assert f"hospital-2, block 2: {both}" in found
    assert not any("signed nowhere" in line for line in found)


@pytest.mark.parametrize(
    "answer", [{"lost": "hospital-7"}, {"lost": ["x"]}, {"lost": "\x1b[2J"}, {"signatures": [None] * 99}]
)
def test_what_the_leader_answers_is_bounded_and_checked(answer: dict[str, Any], directory: Path) -> None:
    def deviate(links: Any, signers: CoSigners) -> None:
        for name in HOSPITALS:
            links.receive_object(name, "ledger 2 openings round 2")
            links.send_object(name, "ledger 2 openings round 2", answer)

    said = run_round_then(directory, deviate, lambda _, signers: signers.sign("openings", "round 2"))
    for name in HOSPITALS:
        assert isinstance(said[name], ProtocolError) and str(said[name]).isprintable(), said[name]


FALSE_CERTIFICATES: dict[str, Callable[[str], Any]] = {
    "a number": lambda _: 5,
    "no text that can be encoded": lambda _: "\ud800",
    "too long": lambda own: own + "x" * 5000,
    "text beside it": lambda own: "\x01" * 1000 + "\n" + own,
}


@pytest.mark.parametrize("kind", FALSE_CERTIFICATES)
def test_a_hospital_that_sends_no_plain_certificate_is_named_by_the_leader(kind: str, directory: Path) -> None:
    """And it is passed on to nobody, so that no hospital takes it for the leader's."""

    def party(links: Any) -> Any:
        own = load_identity(directory / links.name, links.name)
        if links.name == "hospital-1":
            sent = {"certificate": FALSE_CERTIFICATES[kind](own.certificate.decode("ascii")), "resumed": False}
            links.send_object("aggregator", "ledger certificate", sent)
            return links.receive_object("aggregator", "end")
        try:
            return begin(CoSigners(RevealLedger(directory / links.name, own), links, PARTIES, "aggregator"))
        except MpcFlError as error:
            if links.name == "aggregator":
                for name in ("hospital-0", "hospital-2"):
                    assert not links.waiting(name, "ledger 0 start the run begins")
                    links.send_object(name, "ledger certificates", {})
                links.send_object("hospital-1", "end", {})
            return str(error)

    said = run_parties_in_memory(party, list(PARTIES), receive_timeout=60.0)
    wanted = (
        "the certificate of hospital-1 is PEM with something beside it"
        if "beside" in kind
        else "hospital-1 sent no certificate"
    )
    assert said["aggregator"].startswith(wanted), said
    for name in ("hospital-0", "hospital-2"):
        assert said[name].startswith("aggregator sent other certificates than those of the parties"), said


def test_a_hospital_that_claims_what_cannot_be_printed_writes_to_no_terminal() -> None:
    claim = {"block": "1", "openings": {}, "values": {}}
    other = {"block": "2", "openings": {}, "values": {"\x1b[2J": "0"}}
    said = co_signing.disagreement({"hospital-0": claim, "hospital-1": claim, "hospital-2": other})
    assert said is not None and said.isprintable() and said.startswith("hospital-2 recorded")


def test_pending_openings_from_a_peer_are_bounded(directory: Path) -> None:
    def deviate(links: Any, signers: CoSigners) -> None:
        signers.catch_up("restart")
        for name in HOSPITALS:
            links.receive_object(name, "ledger settle restart")
            links.send_frame(name, Kind.OBJECT, "ledger settle restart", {"pending": [1] * 5000})

    said = run_round_then(directory, deviate, lambda _, signers: signers.settle("restart"))
    for name in HOSPITALS:
        assert "something else than a part of the reveal ledger" in str(said[name])


# ---- a whole run -------------------------------------------------------------------------------------------------------


def _party(name: str, values: dict[str, Any], results: Any, deviation: str) -> None:
    """One party as its site runs it; the aggregator deviates by the function of this module of that name."""
    from mpc_fl.apps.runs.party_process import set_up_log
    from mpc_fl.config.config import parse_config

    config = parse_config(values, name)
    set_up_log(config.site.log)
    if name == "aggregator":
        globals()[deviation]()
    run_and_report(name, config, results)


def forget_round_2() -> None:
    """Open the updates of round 2, call the sum void, sign a block without it alone, and have the round made again."""
    from mpc_fl.aggregation import quorum_sum
    from mpc_fl.errors import SumLostError
    from mpc_fl.federation import aggregator_program, aggregator_round

    collect, say, begin_ledger = aggregator_round.collect, quorum_sum.say, aggregator_program.begin_ledger
    stage = ["honest"]

    def say_void(links: Any, names: Any, word: str, **values: Any) -> None:
        say(links, names, "void" if word == "opened" and stage[0] == "opening" else word, **values)

    def open_and_lose(domain: Any, rules: Any, agreed: Any, *arguments: Any) -> Any:
        if agreed.label[:2] != ("update", 2) or stage[0] != "honest":
            return collect(domain, rules, agreed, *arguments)
        stage[0] = "opening"
        collect(domain, rules, agreed, *arguments)
        stage[0] = "opened"
        raise SumLostError("the updates of round 2 are known", "")

    def begin_with_a_block_of_its_own(ledger: Any, links: Any, config: Any, plan: Any) -> None:
        if stage[0] == "opened":
            stage[0] = "forged"
            other = Opening("nothing", "round 2: a lost attempt", (), ("aggregator",), ("aggregator",))
            ledger.pending = []
            opened = chain_opening(ledger.chain, [], other)
            number, seal = ledger.chain.blocks, ledger.chain.seal
            block = Block(number, "abandoned", "a lost attempt", ("aggregator",), (opened,), {}, None, seal)
            own = sign_block(block, ledger.identity, datetime.datetime.now(datetime.UTC))
            UncheckedLedger.add(ledger, dataclasses.replace(block, signatures=(own,)))
        begin_ledger(ledger, links, config, plan)

    quorum_sum.say = say_void  # type: ignore[attr-defined]
    aggregator_round.collect = open_and_lose  # type: ignore[attr-defined]
    aggregator_program.begin_ledger = begin_with_a_block_of_its_own  # type: ignore[attr-defined]


@pytest.mark.processes
def test_an_aggregator_that_forgets_a_round_ends_the_run_and_is_found(tmp_path: Path) -> None:
    """Before, all finished without error and every ledger verified."""
    with Site(tmp_path) as site:
        for name in party_names(site.config):
            values = site.placed[name].model_dump(mode="json")
            site.processes[name] = SPAWN.Process(
                target=_party, args=(name, values, site.results, "forget_round_2"), name=name
            )
            site.processes[name].start()
        words = site.await_words(4)
    lines = [word for name, word in words.items() if name in HOSPITALS and "from aggregator was refused" in word]
    assert lines and all("is signed by no hospital: a block counts with 2" in line for line in lines), words
    assert "finished" not in words.values(), words
    for name in HOSPITALS:
        (tmp_path / name).mkdir()
    (tmp_path / "aggregator").symlink_to(site.party("aggregator") / "identity")
    for name in HOSPITALS:
        for file in (LEDGER_FILE, "openings.jsonl"):
            (tmp_path / name / file).write_bytes((site.party(name) / file).read_bytes())
    found = findings_of(tmp_path, *HOSPITALS)
    assert any(
        "was begun by hospital-0, hospital-1, hospital-2 and is signed nowhere (round 2" in line for line in found
    )


def go_on_with_another_model() -> None:
    """Take the last checkpoint unchecked, and change one parameter of it."""
    from mpc_fl.federation import aggregator_state

    load, load_state = aggregator_state.load_checkpoint, torch.nn.Module.load_state_dict

    def unchecked(directory: Path, digest: str, *_: Any, **__: Any) -> Any:
        return load(directory, digest)

    def changed(module: Any, state: dict[str, torch.Tensor], *arguments: Any, **named: Any) -> Any:
        first = next(iter(state))
        return load_state(module, {**state, first: state[first] + 0.5}, *arguments, **named)

    aggregator_state.load_checkpoint = unchecked  # type: ignore[attr-defined]
    torch.nn.Module.load_state_dict = changed  # type: ignore[method-assign]


@pytest.mark.processes
def test_hospitals_that_resume_take_no_model_but_the_one_that_they_signed(tmp_path: Path) -> None:
    """Before, a changed model of the aggregator's was trained on, and every ledger verified."""
    with Site(tmp_path, federation={"quorum": None}) as site:
        site.start_all(aggregator="round 3 aggregation")
        site.await_death("aggregator")
        site.await_words(3)
        for name in party_names(site.config):
            values = site.placed[name].with_values(site={"resume": True}).model_dump(mode="json")
            arguments = (name, values, site.results, "go_on_with_another_model")
            site.processes[name] = SPAWN.Process(target=_party, args=arguments, name=name)
            site.processes[name].start()
        words = site.await_words(4)
    assert "finished" not in words.values(), words
    refusal = "aggregator sent another global model than all parties signed after round 2"
    assert any(words[name].startswith(refusal) for name in HOSPITALS), words
