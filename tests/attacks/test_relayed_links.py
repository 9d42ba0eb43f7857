"""A certified hospital against the relayed link of two others: it may lose its own links by that, never cost them theirs.

Real links over mutual TLS. 'hospital-0' and 'hospital-1' can only dial out and reach each other through the aggregator;
'hospital-2' has an address, and a direct link with each. All hospitals may be lost and come back.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import LinkError, PeerLostError, ProtocolError
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.frames import CHUNK_BYTES, Frame, FrameReader, Kind, Observer
from mpc_fl.links.settings import Unread
from tests.support.harness import free_ports, local_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
FIRST, SECOND, THIRD, RELAY = NAMES = ["hospital-0", "hospital-1", "hospital-2", "aggregator"]
Party = Callable[[Any], Any]


def _run(directory: Path, observer: Observer | None = None, **parties: Party) -> dict[str, Any]:
    """The parties by name with underscores; what each returned or raised. `observer` is the aggregator's."""
    make_local_identities(NAMES, {name: directory / name for name in NAMES})
    ports = dict(zip([THIRD, RELAY], free_ports(2), strict=True))
    outcomes: dict[str, Any] = {}

    def run(name: str, party: Party) -> None:
        try:
            tolerated = [hospital for hospital in NAMES[:3] if hospital != name]
            options = {"relay": RELAY, "tolerated": tolerated, "observer": observer if name == RELAY else None}
            with local_links(name, NAMES, ports, directory, **options) as links:
                outcomes[name] = party(links)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcomes[name] = error

    threads = [threading.Thread(target=run, args=(name.replace("_", "-"), party)) for name, party in parties.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def _exchange(links: Any, peer: str, number: int) -> int:
    links.send_tensor(peer, "number", torch.tensor([number]))
    return int(links.receive_tensor(peer, "number", torch.int64, (1,)))


def _put(links: Any, receiver: str, kind: Kind, tag: str, payload: Any) -> None:
    """A frame of any kind, not through the relay by itself: what a program that deviates can send."""
    links._outgoing.put(links._outgoing.peers[receiver], kind, tag, payload)


@pytest.mark.parametrize(
    "forged", [{"name": SECOND, "to": FIRST}, {"name": SECOND, "to": FIRST, "signature": "00"}, {"returned": SECOND}]
)
def test_a_hospital_cannot_reset_the_link_of_two_others(forged: dict[str, str], tmp_path: Path) -> None:
    """It sends one of the pair, over its own link, what only the relay may pass on. It loses that link, the pair nothing."""

    def first(links: Any) -> Any:
        before = _exchange(links, SECOND, 1)
        links.send_object(THIRD, "attack", {})
        with pytest.raises(ProtocolError, match=f"the link with {THIRD}: "):
            links.receive_object(THIRD, "never")
        after = _exchange(links, SECOND, 2)
        links.send_object(RELAY, "enough", {})
        return before, after

    def second(links: Any) -> Any:
        return _exchange(links, FIRST, 1), _exchange(links, FIRST, 2)

    def third(links: Any) -> None:
        links.receive_object(FIRST, "attack")
        _put(links, FIRST, Kind.RELAY_GREETING, "", forged)

    outcome = _run(
        tmp_path, hospital_0=first, hospital_1=second, hospital_2=third,
        aggregator=lambda links: links.receive_object(FIRST, "enough"),
    )  # fmt: skip
    assert outcome[FIRST] == (1, 2) and outcome[SECOND] == (1, 2) and outcome[RELAY] == {}, outcome


def _false_greeting(links: Any) -> None:
    _put(links, RELAY, Kind.RELAY_GREETING, "", {"name": SECOND, "to": FIRST, "signature": "00"})


def _the_same_greeting_again(links: Any) -> None:
    _put(links, RELAY, Kind.RELAY_GREETING, "", links._outgoing.peers[FIRST].greeting)


def _garbage(links: Any) -> None:
    _put(links, RELAY, Kind.RELAY, FIRST, b"not sealed")


def _sealed_garbage(links: Any) -> None:
    links._outgoing.peers[FIRST].stream.put(b"no frame", 1.0)


@pytest.mark.parametrize("attack", [_false_greeting, _the_same_greeting_again, _garbage, _sealed_garbage])
def test_what_a_hospital_sends_through_the_relay_costs_nobody_the_relay(
    attack: Callable[[Any], None], tmp_path: Path
) -> None:
    """The receiver refuses it, or loses whom it came from, and goes on with the relay and the third.

    What does not open may be the relay's work; what opens, and is no frame, is not.
    """
    lost = attack is _sealed_garbage

    def first(links: Any) -> Any:
        assert _exchange(links, SECOND, 1) == 1
        links.send_object(SECOND, "attack", {})
        if lost:
            with pytest.raises(ProtocolError, match=f"the link with {SECOND}: "):
                links.receive_object(SECOND, "never")
            assert links.alive(RELAY) and not links.alive(SECOND)
        else:  # refused: what comes after it on the same way arrives
            assert links.receive_object(SECOND, "after") == {}
        return [_exchange(links, peer, 3) for peer in (THIRD, RELAY)]

    def second(links: Any) -> None:
        assert _exchange(links, FIRST, 1) == 1
        links.receive_object(FIRST, "attack")
        attack(links)
        if not lost:
            links.send_object(FIRST, "after", {})
        links.receive_object(RELAY, "enough")

    def relay(links: Any) -> int:
        number = _exchange(links, FIRST, 3)
        links.send_object(SECOND, "enough", {})
        return number

    outcome = _run(
        tmp_path, hospital_0=first, hospital_1=second,
        hospital_2=lambda links: _exchange(links, FIRST, 3), aggregator=relay,
    )  # fmt: skip
    assert outcome == {FIRST: [3, 3], SECOND: None, THIRD: 3, RELAY: 3}


def test_false_greetings_without_end_write_no_log_without_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And what is sent for a hospital that is gone: at the relay."""
    caplog.set_level(logging.INFO, "mpc_fl.links")

    def first(links: Any) -> None:
        assert _exchange(links, SECOND, 1) == 1
        assert links.receive_object(SECOND, "after") == {}

    def second(links: Any) -> None:
        assert _exchange(links, FIRST, 1) == 1
        for _ in range(200):
            _false_greeting(links)
        links.send_object(FIRST, "after", {})
        with contextlib.suppress(PeerLostError):
            links.receive_object(FIRST, "never")
        for _ in range(200):
            _garbage(links)
        links.send_object(RELAY, "enough", {})

    outcome = _run(
        tmp_path, hospital_0=first, hospital_1=second,
        hospital_2=lambda links: None, aggregator=lambda links: links.receive_object(SECOND, "enough"),
    )  # fmt: skip
    assert outcome == {FIRST: None, SECOND: None, THIRD: None, RELAY: {}}
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("mpc_fl.links.relay")]
    assert any(f"refused a greeting of {SECOND} that came through {RELAY}" in line for line in lines)
    assert any("in all 200 times" in line for line in lines) and len(lines) < 20, lines


@pytest.mark.parametrize("value", [[[[]]], {"a": 1}, 7, None, True])
def test_what_is_no_greeting_is_not_passed_on(value: Any, tmp_path: Path) -> None:
    """Whoever sends it loses its link with the relay; it reaches nobody else."""

    def bystander(links: Any) -> Any:
        links.send_object(RELAY, "here", {})
        return links.receive_object(RELAY, "enough")

    def second(links: Any) -> str:
        links.receive_object(RELAY, "all are here")
        _put(links, RELAY, Kind.RELAY_GREETING, "", {"name": SECOND, "to": FIRST, "signature": value})
        with pytest.raises(ProtocolError) as caught:
            links.receive_object(RELAY, "never")
        return str(caught.value)

    def relay(links: Any) -> str:
        for name in (FIRST, THIRD):
            links.receive_object(name, "here")
        links.send_object(SECOND, "all are here", {})
        with pytest.raises(ProtocolError) as caught:
            links.receive_object(SECOND, "never")
        for name in (FIRST, THIRD):
            links.send_object(name, "enough", {})
        return str(caught.value)

    outcome = _run(tmp_path, hospital_0=bystander, hospital_1=second, hospital_2=bystander, aggregator=relay)
    assert outcome[FIRST] == {} and outcome[THIRD] == {}, outcome
    assert f"{SECOND} asked to relay what may not be relayed" in outcome[RELAY], outcome
    assert f"{SECOND} asked to relay what may not be relayed" in outcome[SECOND], outcome


def test_a_flood_through_the_relay_keeps_the_relays_words_from_nobody(tmp_path: Path) -> None:
    """Its receiver computes, so that others may have to wait; what comes through the relay is read on, and then refused."""
    mib, unread = 1 << 20, Unread(pause=4 << 20, most=32 << 20, patience=1.0)
    make_local_identities([FIRST, SECOND, RELAY], {name: tmp_path / name for name in (FIRST, SECOND, RELAY)})
    ports = dict(zip([RELAY], free_ports(1), strict=True))
    outcome, over = dict[str, Any](), threading.Event()

    def links_of(name: str) -> Any:
        tolerated = [other for other in (FIRST, SECOND) if other != name]
        return local_links(
            name, [FIRST, SECOND, RELAY], ports, tmp_path, relay=RELAY, tolerated=tolerated, unread=unread
        )

    def computes(links: Any) -> None:
        boxes = links._mailboxes
        eventually(lambda: boxes._boxes[SECOND].inbox.unread > unread.pause, 60.0, "more is unread than makes one wait")
        links.send_object(RELAY, "flooded", {})
        eventually(lambda: links.waiting(RELAY, "word"), 60.0, "the relay's word arrives while this party computes")
        eventually(lambda: boxes.failure(SECOND) is not None, 60.0, "the link with the other end is ended")
        outcome[FIRST] = str(boxes.failure(SECOND))
        links.send_object(RELAY, "enough", {})

    def floods(links: Any) -> None:
        with contextlib.suppress(LinkError, ProtocolError):
            while not over.is_set():
                links.send_tensor(FIRST, "flood", torch.zeros(mib, dtype=torch.uint8))

    def relays(links: Any) -> None:
        links.receive_object(FIRST, "flooded")
        links.send_object(FIRST, "word", {})
        outcome[RELAY] = links.receive_object(FIRST, "enough")
        over.set()

    def party(name: str, act: Callable[[Any], None]) -> None:
        try:
            with contextlib.suppress(LinkError), links_of(name) as links:
                act(links)
        finally:
            over.set()  # however one of them ends

    parties = {FIRST: computes, SECOND: floods, RELAY: relays}
    threads = [threading.Thread(target=party, args=each) for each in parties.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        outcome.get(RELAY) == {} and f"{SECOND} sent" in outcome[FIRST] and "nobody has asked for" in outcome[FIRST]
    ), outcome


def test_what_is_relayed_leaves_room_for_the_relays_own_words(tmp_path: Path) -> None:
    """To a receiver that stands still: the relay's word is queued at once, whatever another has it pass on meanwhile."""
    make_local_identities([FIRST, RELAY], {name: tmp_path / name for name in (FIRST, RELAY)})
    links = local_links(RELAY, [FIRST, RELAY], dict(zip([FIRST, RELAY], free_ports(2), strict=True)), tmp_path)
    peer, ended = links._outgoing.peers[FIRST], threading.Event()
    peer.conversation = Conversation(lambda chunk: True, lambda failure: None)
    # Or a chunk would leave before the relay's greeting.
    with pytest.raises(LinkError, match=f"{FIRST} is not connected"):
        links._outgoing.pass_on(peer, SECOND, torch.zeros(1, dtype=torch.uint8))
    links._mailboxes.connect(FIRST)

    def flood() -> None:
        with contextlib.suppress(LinkError):
            while True:
                links._outgoing.pass_on(peer, SECOND, torch.zeros(CHUNK_BYTES, dtype=torch.uint8))
        ended.set()

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    eventually(lambda: not peer.conversation.has_room_to_spare(), 30.0, "no more is passed on")
    links._outgoing.put(peer, Kind.OBJECT, "word", {}, 0.0)
    assert not ended.is_set()
    links._mailboxes.lose(FIRST, links._mailboxes.lost(FIRST, "it stands still"))
    thread.join(30)
    assert ended.is_set()


def test_a_receiver_that_takes_nothing_never_finds_half_of_what_was_relayed(tmp_path: Path) -> None:
    """Else the relay's own next frame would end its link with a hospital that only computed."""
    make_local_identities([FIRST, RELAY], {name: tmp_path / name for name in (FIRST, RELAY)})
    links = local_links(RELAY, [FIRST, RELAY], dict(zip([FIRST, RELAY], free_ports(2), strict=True)), tmp_path)
    peer = links._outgoing.peers[FIRST]
    peer.conversation = Conversation(lambda chunk: True, lambda failure: None)
    sealed = torch.zeros(CHUNK_BYTES + 1000, dtype=torch.uint8)

    def put(kind: Kind, payload: Any) -> None:
        links._outgoing.put(peer, kind, "", payload, 0.3)

    for _ in range(3):
        put(Kind.OBJECT, {})
    put(Kind.RELAY, sealed)  # there is room for one chunk
    with pytest.raises(PeerLostError, match=f"{FIRST} takes no data"):
        put(Kind.RELAY, sealed)
    peer.conversation.finish()
    sent = peer.conversation.chunks_to_send()
    reader, kinds = FrameReader(), list[Kind]()
    for chunk in itertools.islice(sent, 4):
        frame = reader.feed(chunk)
        assert frame is not None
        kinds.append(frame.kind)
    put(Kind.OBJECT, {})
    (frame,) = [reader.feed(chunk) for chunk in sent]
    assert frame is not None and [*kinds, frame.kind] == [*[Kind.OBJECT] * 3, Kind.RELAY, Kind.OBJECT]


def test_a_relay_cannot_have_a_key_stream_used_twice(tmp_path: Path) -> None:
    """It repeats the greeting that made the link of two hospitals: a link made anew by that would seal from number 0 again."""
    recorded: list[Any] = []

    def record(sender: str, frame: Frame) -> None:
        if frame.kind == Kind.RELAY_GREETING and sender == SECOND:
            recorded.append(frame.payload)

    def first(links: Any) -> tuple[int, int]:
        before = _exchange(links, SECOND, 1)
        links.send_object(RELAY, "attack", {})
        links.receive_object(RELAY, "done")
        return before, _exchange(links, SECOND, 2)

    def relay(links: Any) -> None:
        links.receive_object(FIRST, "attack")
        _put(links, FIRST, Kind.RELAY_GREETING, "", recorded[0])
        links.send_object(FIRST, "done", {})
        links.receive_object(SECOND, "enough")

    def second(links: Any) -> tuple[int, int]:
        numbers = _exchange(links, FIRST, 1), _exchange(links, FIRST, 2)
        links.send_object(RELAY, "enough", {})
        return numbers

    outcome = _run(
        tmp_path, record, hospital_0=first, hospital_1=second, hospital_2=lambda links: None, aggregator=relay
    )  # fmt: skip
    assert outcome == {FIRST: (1, 2), SECOND: (1, 2), THIRD: None, RELAY: None}
