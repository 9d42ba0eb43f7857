"""A hospital that says in rounds among peers what none may say, or says it when it hurts: the others go on, and it is named.

Each of these ended the run, made an honest hospital leave it, or had one blamed, before something was mended. Parties are
threads in virtual time, as in `test_peer_rounds`; hospital-3 deviates unless a test says otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.aggregation import peer_plan, peer_sum, slice_totals
from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.ledger_file import now
from mpc_fl.audit.opening_record import Opening
from mpc_fl.audit.peer_signing import PeerSigners
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Chain, Members, chain_opening, sign_block, to_json
from mpc_fl.crypto.certificates import load_root
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import SumLostError
from mpc_fl.federation import peer_attendance, peer_round
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.federation.peer_attendance import PeerAttendance
from mpc_fl.federation.peer_proposal import Presence, Proposals
from mpc_fl.federation.peer_settling import Settling
from mpc_fl.files import read_json_lines
from mpc_fl.links import frames
from mpc_fl.links.frames import Kind
from mpc_fl.links.links import Links
from tests.support.peer_rounds import among_peers, names, require_sound
from tests.support.peer_sums import only_at

DEVIATES = "hospital-3"


def honest(count: int = 5, *deviating: str) -> list[str]:
    return [name for name in names(count) if name not in (deviating or (DEVIATES,))]


def before_presence(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[PeerAttendance], None]) -> None:
    """Whoever deviates does something before it says that it is there for a round, once."""
    done = list[int]()

    def say(original: Any, self: PeerAttendance, standing: Any, *rest: Any) -> None:
        if standing.number == number and not done:
            done.append(number)
            do(self)
        original(self, standing, *rest)

    only_at(monkeypatch, DEVIATES, PeerAttendance, "_say_present", say)


# ---- what no message may be --------------------------------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NOTHING = {"NaN": float("nan"), "infinity": float("inf"), "401 digits": 10**400, "300 lists": nested(300)}


@pytest.mark.parametrize("what", NOTHING.values(), ids=NOTHING.keys())
def test_a_value_that_is_no_value_of_messages(what: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an opening of a block: it had no digest, or no end of its nesting, which ended whoever computed it."""

    def anything(original: Any, value: Any, **named: Any) -> str:
        return str(original(value, **{**named, "allow_nan": True}))

    def send(attendance: PeerAttendance) -> None:
        block = to_json(attendance.ledger.blocks[-1])
        opening = Opening("sum", "round 1", (), tuple(names(5)), tuple(names(5)), {"epsilon": 1.0}, "0" * 64)
        false = {**to_json(chain_opening(Chain(), [], opening)), "privacy": {"epsilon": what}}
        block |= {"number": block["number"] + 1, "kind": "openings", "openings": [false]}
        for name in honest():
            attendance._links.send_object(name, "word", {"word": "block", "block": block})

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, DEVIATES, frames.json, "dumps", anything)
    before_presence(monkeypatch, 1, send)
    run.run()
    require_sound(run, honest())
    assert any("a frame was refused" in line and DEVIATES in line for line in run.log)


def test_a_frame_that_is_none_costs_its_sender_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sum, before hospital-0 sends it a slice: that one can neither send to it any more nor hear from it, and goes on."""
    done = list[str]()

    def send_after_garbage(original: Any, links: Any, receiver: str, tag: str, words: Any) -> None:
        if (receiver, tag) == (DEVIATES, "slice") and links._scope.startswith("peers update 1 ") and not done:
            done.append(tag)
            run.network._present[DEVIATES].send_chunk("hospital-0", b"garbage")
        original(links, receiver, tag, words)

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, "hospital-0", Links, "send_tensor", send_after_garbage)
    run.run()
    assert done
    require_sound(run, honest())


def test_a_presence_that_fills_every_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals hold what all have said, and no message may be longer than a megabyte."""

    def padded(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Any) -> Any:
        more = {"padding": "x" * 1_040_000} if subject.word == "present" and values["number"] == 1 else {}
        return original(domain, links, to, subject, {**values, **more})

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, DEVIATES, peer_attendance, "say_signed", padded)
    run.run()
    require_sound(run, honest())
    assert any(f"{DEVIATES} did not say how it is present" in line for line in run.log)


WRONG: dict[str, Any] = {
    "number": [-1, True, 1.0, "1", None, 1 << 31],
    "view": [-1, False, 1 << 62],
    "blocks": [None, [], -1],
    "pending": [1, 1 << 40],
    "complete_view": [-1, "0"],
    "state": ["x", 5, "F" * 64, "0" * 65, "\ud800" * 64],
    "made": ["x" * 64, None],
    "seal": [{}, "0" * 63],
    "last": ["0" * 64, "x"],
    "complete": [[], "0" * 66],
    "held": [None, [], {"hospital-0": 1}, {"hospital-0": "0"}],
    "why": [None, "x" * 301],
    "lost": [5, "x" * 301],
    "leaves": [None, 0],
    "recalls": ["yes", 1],
    "votes": [None, [], {"hospital-0": 1}, {"hospital-0": "x" * 513}, {str(name): "" for name in range(65)}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_presence_that_is_none(key: str, value: Any) -> None:
    from mpc_fl.errors import ProtocolError

    held, zero = {"hospital-0": "0" * 64}, "0" * 64
    sound = Presence(1, 0, zero, "", 2, zero, 0, "", "", 0, held, "", "", False, True, {})
    word = {**vars(sound), "word": "present", "signature": "00"}
    assert Presence.from_word("hospital-0", word) == sound
    with pytest.raises(ProtocolError, match="hospital-0 did not say how it is present"):
        Presence.from_word("hospital-0", {**word, key: value})
    with pytest.raises(ProtocolError, match="hospital-0 did not say how it is present"):
        Presence.from_word("hospital-0", {**word, "more": value})


def test_a_certificate_that_is_none_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-0 can check nothing that it says then, and takes nobody for a liar who can."""

    def none(original: Any, links: Any, receiver: str, tag: str, value: Any) -> None:
        original(
            links, receiver, tag, {"certificate": "none"} if (tag, receiver) == ("certificate", "hospital-0") else value
        )

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, DEVIATES, Links, "send_object", none)
    run.run()
    require_sound(run, honest())
    assert not [line for line in run.log if "what it did not sign" in line]


def test_one_that_speaks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each word of it that is taken another one has come: nobody stays with it for ever."""
    original, said = peer_attendance.next_word, list[str]()

    def again(links: Any, name: str, *rest: Any) -> Any:
        word = original(links, name, *rest)
        if name == DEVIATES and word.get("number") == 1 and name in run.network._present:
            said.append(links.name)
            assert len(said) < 3000, f"{links.name} hears {name} alone"
            run.network._present[name].send_frame(links.name, Kind.OBJECT, f"{links._scope}word", word)
            run.clock.wait(threading.Event(), 0.01)  # others do something meanwhile
        return word

    run = among_peers(tmp_path, monkeypatch)
    monkeypatch.setattr(peer_attendance, "next_word", again)
    run.run()
    assert said
    require_sound(run, names(5))


# ---- another ledger, other openings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parties", "session", "quorum"), [(("hospital-3", "hospital-4"), "", 2), (tuple(names(5)), "earlier", 4)]
)
def test_a_ledger_of_another_run(
    parties: tuple[str, ...], session: str, quorum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That two began by themselves, whose two signatures are then those of all its parties; or that all began in an earlier run.
    Whoever kept its first block had no part in this run any more."""
    run = among_peers(tmp_path, monkeypatch, 5, federation={"quorum": 4})

    def send(attendance: PeerAttendance) -> None:
        identities = [load_identity(run.party(name) / "identity", name) for name in parties]
        certificates = {each.name: each.certificate.decode() for each in identities}
        authority = fingerprint(load_root(identities[0].authority, "test"))
        members = Members(session, run.config.digest(), authority, certificates, quorum)
        draft = attendance.ledger.draft("start", "the run begins", parties, {}, members)
        block = replace(draft, signatures=tuple(sign_block(draft, each, now()) for each in identities))
        for name in names(3):
            attendance._links.send_object(name, "word", {"word": "block", "block": to_json(block)})

    before_presence(monkeypatch, 0, send)
    run.run()
    require_sound(run, names(5))
    assert any("hospital-3 sent a block that begins the ledger of another run" in line for line in run.log)


def claims(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Presence, Any], Presence], view: int = 1, who: str = DEVIATES
) -> None:
    """It says something else of its record under this view of round 1."""

    def present(original: Any, self: Proposals, standing: Any, tried: int, reason: Any, ledger: Any, own: Any) -> Any:
        said = original(self, standing, tried, reason, ledger, own)
        return change(said, ledger) if said.view_of == (1, view) else said

    only_at(monkeypatch, who, Proposals, "own_presence", present)


def gives_up_signing(monkeypatch: pytest.MonkeyPatch, who: str = DEVIATES) -> None:
    """It has round 1 made and not signed under view 0."""

    def sign(original: Any, self: PeerSigners, kind: str, about: str, *rest: Any) -> Any:
        if about == "round 1":
            raise SumLostError("nothing that was lost", "")
        return original(self, kind, about, *rest)

    only_at(monkeypatch, who, PeerSigners, "sign", sign)


def test_another_record_than_that_of_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    gives_up_signing(monkeypatch)
    claims(monkeypatch, lambda said, _: replace(said, last="0" * 64))
    run.run()
    require_sound(run, honest())
    assert any(f"{DEVIATES} recorded other openings than most" in line for line in run.log)


def test_an_exact_sum_that_was_opened_is_not_made_anew_without_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hospital-2 knows the sum of all five, and proposes next: with that of all but hospital-4 it would know what that one gave."""

    def without(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Any) -> Any:
        if subject.word == "proposal" and (values["number"], values["view"]) == (1, 1):
            hospitals = [name for name in values["hospitals"] if name != "hospital-4"]
            kept = {key: {name: values[key][name] for name in hospitals} for key in ("starts", "present")}
            values = {**values, "hospitals": hospitals, **kept}
        return original(domain, links, to, subject, values)

    run = among_peers(tmp_path, monkeypatch)
    gives_up_signing(monkeypatch, "hospital-2")
    claims(monkeypatch, lambda said, _: replace(said, made=""), who="hospital-2")
    only_at(monkeypatch, "hospital-2", peer_attendance, "say_signed", without)
    run.run()
    require_sound(run, honest(5, "hospital-2"))
    assert not [sender for sender, tag in run.sent if tag.startswith("transcript update 1 1")]
    assert any("hospital-2 would make a sum of round 1 anew without hospital-4" in line for line in run.log)


def made_up(ledger: Any, among: tuple[str, ...], transcript: str) -> list[Any]:
    opening = Opening("sum of updates", "round 1: mean update", (10,), among, among, None, transcript)
    return [*ledger.pending, chain_opening(ledger.chain, ledger.pending, opening)]


@pytest.mark.parametrize("among", [5, 4, 2], ids=["of all", "of a quorum", "of too few"])
def test_an_opening_that_was_not(among: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it has recorded one more than all others. Whoever is said to be in it knows better."""
    record = list[Any]()

    def longer(said: Presence, ledger: Any) -> Presence:
        record[:] = made_up(ledger, tuple(names(5)[-among:]), "7" * 64)
        return replace(said, pending=len(record), last=record[-1].digest)

    def settle(original: Any, self: Settling, ledger: Any) -> None:
        pending = ledger.pending
        ledger.pending = record or pending
        try:
            original(self, ledger)
        finally:
            ledger.pending = pending

    run = among_peers(tmp_path, monkeypatch)
    claims(monkeypatch, longer, view=0)
    only_at(monkeypatch, DEVIATES, Settling, "settle", settle)
    run.run()
    assert record
    require_sound(run, honest())
    for name in honest():
        blocks = [parse_line(line) for line in (run.party(name) / LEDGER_FILE).read_bytes().splitlines()]
        assert record[-1].digest not in [opening.digest for block in blocks for opening in block.openings]
    assert any(f"{DEVIATES} recorded " in line for line in run.log)


# ---- said to one alone -------------------------------------------------------------------------------------------------


def coin_to(monkeypatch: pytest.MonkeyPatch, *told: str) -> None:
    """It shows these another part of the coin than it committed to, in the first update."""

    def say(original: Any, links: Any, to: Any, word: str, **values: Any) -> None:
        if word != "coin" or "update 1 0" not in links._scope:
            original(links, to, word, **values)
            return
        original(links, [name for name in to if name not in told], word, **values)
        original(links, [name for name in to if name in told], word, **{**values, "number": "00" * 32})

    only_at(monkeypatch, DEVIATES, slice_totals, "say", say)


def test_whoever_alone_sees_a_deviation_does_not_leave_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    coin_to(monkeypatch, "hospital-0")
    run.run()
    require_sound(run, names(5))
    assert any(f"{DEVIATES} showed another part of the coin" in line for line in run.log)


def test_whoever_all_see_deviate_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = among_peers(tmp_path, monkeypatch)
    coin_to(monkeypatch, *honest())
    run.run()
    require_sound(run, honest())
    blocks = [parse_line(line) for line in (run.party("hospital-0") / LEDGER_FILE).read_bytes().splitlines()]
    of_round = [block for block in blocks if block.about.startswith("round 1")]
    assert [DEVIATES in block.parties for block in of_round] == [False]
    assert any(f"{DEVIATES} is left out of round 1" in line for line in run.log)


def test_a_word_about_a_block_to_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(original: Any, self: PeerSigners, to: list[str], tag: str, value: dict[str, Any]) -> None:
        if tag == "signed" and self.drafted is not None and self.drafted.about == "round 1":
            original(self, ["hospital-0"], tag, {**value, "signature": "none"})
            to = [name for name in to if name != "hospital-0"]
        original(self, to, tag, value)

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, DEVIATES, PeerSigners, "_say", say)
    run.run()
    require_sound(run, names(5))


def test_counts_that_cannot_be_cost_a_figure_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def false(original: Any, *arguments: Any) -> Any:
        encoded, release = original(*arguments)
        return Private("counts", encoded.inside_protocol() - 1000), release

    run = among_peers(tmp_path, monkeypatch, 3)
    only_at(monkeypatch, "hospital-2", peer_round, "counts_to_sum", false)
    run.run()
    require_sound(run, names(3))
    lines = read_json_lines(run.party("hospital-0") / ROUNDS_FILE)
    assert [line["evaluation"] for line in lines] == [None] * 3
    assert any("the opened evaluation contradicts itself" in line for line in run.log)


# ---- when it hurts -----------------------------------------------------------------------------------------------------


def test_whoever_proposes_is_not_late_because_another_one_dawdles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hospital-2 lets the proposer, hospital-1, begin an answer's time after the others, has it wait for its slice as long as
    that may take, and then never says what arrived. All others waited for the set meanwhile, and took the proposer for late."""
    late, scope = "hospital-2", "peers update 1 0 0/"
    held = list[tuple[str, Callable[[], None]]]()

    def dawdle(seconds: float) -> None:
        run.clock.wait(threading.Event(), seconds)

    def transcript(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Any) -> Any:
        if "update 1 0" not in links._scope:
            return original(domain, links, to, subject, values)
        original(domain, links, [name for name in to if name != "hospital-1"], subject, values)
        dawdle(18.5)
        return original(domain, links, ["hospital-1"], subject, values)

    def send_object(original: Any, links: Any, receiver: str, tag: str, value: Any) -> None:
        is_word = receiver == "hospital-1" and links._scope == scope and tag == "word"
        if is_word and value["word"] == "slices":
            held.append(("word", lambda: original(links, receiver, tag, value)))
        elif not is_word or value["word"] != "arrived":
            original(links, receiver, tag, value)

    def send_tensor(original: Any, links: Any, receiver: str, tag: str, words: Any) -> None:
        if receiver == "hospital-1" and links._scope == scope and tag == "slice":
            held.append(("slice", lambda: original(links, receiver, tag, words)))
        else:
            original(links, receiver, tag, words)

    def take_slices(original: Any, part: Any) -> None:
        for _, send in held:
            dawdle(18.5)
            send()
        held.clear()
        original(part)

    run = among_peers(tmp_path, monkeypatch)
    only_at(monkeypatch, late, peer_plan, "say_signed", transcript)
    only_at(monkeypatch, late, Links, "send_object", send_object)
    only_at(monkeypatch, late, Links, "send_tensor", send_tensor)
    only_at(monkeypatch, late, peer_sum._Part, "_take_slices", take_slices)
    run.run()
    require_sound(run, honest(5, late))
    assert not [line for line in run.log if "hospital-1 is late" in line or "hospital-1 is left out" in line]
