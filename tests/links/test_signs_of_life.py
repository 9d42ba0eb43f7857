"""Signs of life: who is silent and who only cannot be heard, what a standstill of one's own moves, and who is named in the end.

Time is what the test says: nothing here sleeps, and no thread beats but by its word.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import HandshakeError, PeerLostError, ProtocolError
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.frames import Frame, FrameReader, FrameWriter, Kind
from mpc_fl.links.links import Links
from mpc_fl.links.losses import Known, Loss, as_heard, first_named, giving_up, without_sign
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.pulse import Pulse
from mpc_fl.links.routes import Route
from mpc_fl.links.settings import Timeouts, Tolerance, Unread
from mpc_fl.links.silence import AtFirst, Silence
from mpc_fl.links.traffic import TrafficCounter
from tests.links.test_conformance import NetworkWorld
from tests.support.waiting import eventually

LIMIT = 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Said:
    """What a peer says on its stream, chunk by chunk, and when each has been taken."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._chunks: queue.Queue[bytes | None] = queue.Queue()
        self._taken = 0
        threading.Thread(target=conversation.receive, args=(self._stream(),), daemon=True).start()

    def _stream(self) -> Iterator[bytes]:
        while (chunk := self._chunks.get()) is not None:
            yield chunk
            self._taken += 1

    def say(self, taken: bool = True) -> None:
        before = self._taken
        self._chunks.put(b"chunk")
        if taken:
            eventually(lambda: self._taken > before, 60.0, "the chunk is taken")
        else:
            eventually(lambda: self.conversation.taking, 60.0, "the chunk arrives")


class Party:
    """A party with peers a and b, whose clock is the test's."""

    def __init__(self, *tolerated: str) -> None:
        self.clock, counter = Clock(), TrafficCounter("work")
        self.mailboxes = Mailboxes({"a": (), "b": ()}, Timeouts(60.0, 60.0), Tolerance(frozenset(tolerated)), counter)
        self.mailboxes.silence = Silence(LIMIT, self.clock)
        self.read_on = threading.Event()
        self.read_on.set()
        self.peers = {name: Peer(name, Route("await"), FrameWriter(name, counter)) for name in ("a", "b")}
        self.heard: dict[str, Said] = {}
        for name, peer in self.peers.items():
            peer.conversation = Conversation(lambda chunk: self.read_on.wait(60.0), lambda failure: None)
            self.heard[name] = Said(peer.conversation)
            self.mailboxes.connect(name)
        self.mailboxes.await_all_connected()
        self.outgoing = Outgoing(self.peers, (), self.mailboxes, counter, 60.0)
        self.silent: list[str] = []
        self.pulse = Pulse(self.outgoing, self.mailboxes, 0.0, self.lose)
        self.pulse.beat()

    def lose(self, peer: Peer, why: PeerLostError) -> None:
        self.silent.append(peer.name)
        self.mailboxes.lose(peer.name, why, Known.SILENT)

    def pass_seconds(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now += 1.0
            self.pulse.beat()

    def conversation(self, name: str) -> Conversation:
        conversation = self.peers[name].conversation
        assert conversation is not None
        return conversation

    def queued(self, name: str) -> list[bytes]:
        conversation = self.conversation(name)
        return [conversation._outgoing.get_nowait() or b"" for _ in range(conversation._outgoing.qsize())]


# ---- who is silent -----------------------------------------------------------------------------------------------------


def test_who_says_nothing_for_the_limit_is_named_and_who_says_anything_is_not() -> None:
    party = Party()
    for _ in range(3):
        party.pass_seconds(15)
        party.heard["a"].say()
        if party.silent:
            break
    assert party.silent == ["b"]
    with pytest.raises(
        PeerLostError, match=r"^b has given no sign of life for 20 s in phase 'work' \(its process is stopped"
    ):
        party.mailboxes.require_all()
    party.pass_seconds(10)
    assert party.silent == ["b"] and party.mailboxes.alive("a")


def test_a_peer_that_this_party_lets_wait_is_not_silent() -> None:
    party = Party()
    party.read_on.clear()
    party.heard["a"].say(taken=False)  # it could say more, and nobody would read it
    party.pass_seconds(100)
    assert party.silent == ["b"]
    party.read_on.set()
    eventually(lambda: not party.conversation("a").taking, 60.0, "it is read on")
    party.pass_seconds(20)
    assert party.silent == ["b"]
    party.pass_seconds(1)
    assert party.silent == ["b", "a"]


def test_who_has_ended_or_is_not_connected_is_not_silent() -> None:
    party = Party()
    party.mailboxes.file("a", Frame(Kind.BYE, "", 0, {}, 2))
    party.mailboxes.begin_again("b")
    party.pass_seconds(100)
    assert party.silent == []


# ---- a standstill of one's own -----------------------------------------------------------------------------------------


def test_who_stood_still_itself_blames_nobody_for_that_time() -> None:
    party = Party()
    party.pass_seconds(15)
    party.clock.now += 10_000.0
    party.pulse.beat()
    party.pass_seconds(2)
    assert party.silent == [] and party.mailboxes.silence.stood_still() == pytest.approx(10_000.0)
    party.heard["a"].say()
    party.pass_seconds(3)
    assert party.silent == ["b"]
    party.pass_seconds(20)
    assert party.mailboxes.silence.stood_still() == 0.0, "long ago"


@given(gaps=st.lists(st.floats(0.0, 1000.0), max_size=40))
def test_silence_is_never_longer_than_this_process_was_awake(gaps: list[float]) -> None:
    clock = Clock()
    silence = Silence(LIMIT, clock)
    silence.look({"a": True})
    awake = 0.0
    for gap in gaps:
        clock.now += gap
        awake += min(gap, 2.0)
        silent = silence.look({"a": False})
        assert silence.awake == pytest.approx(awake)
        assert silent == (["a"] if silence.awake >= LIMIT else [])


def test_silence_may_last_longer_while_links_are_made() -> None:
    """64 hospitals on two cores: whoever has greeted 40 of them may not have come to the others for half a minute."""
    clock = Clock()
    silence = Silence(LIMIT, clock, AtFirst(more=10.0, until=60.0))
    silence.look({"a": True, "b": True})
    silent = dict[int, list[str]]()
    for second in range(1, 91):
        clock.now += 1.0
        # a speaks every 25 seconds and then every 15, b until the 60th second
        silent[second] = silence.look({"a": second in (25, 50, 65, 80), "b": second <= 60})
    assert [second for second, names in silent.items() if "a" in names] == []
    assert [second for second, names in silent.items() if "b" in names] == [*range(60 + int(LIMIT), 91)]


def test_deadlines_are_moved_by_a_standstill_into_which_they_fell_and_by_nothing_else() -> None:
    clock = Clock()
    silence = Silence(LIMIT, clock)
    assert silence.moved(1005.0) == 1005.0, "nobody looks yet"
    silence.look({})
    clock.now = 1060.0
    assert silence.moved(1005.0) == 1065.0, "also before the next look"
    assert silence.moved(999.0) == 999.0, "over before"
    assert silence.moved(1061.0) == 1121.0, "short after waking"
    assert silence.moved(1500.0) == 1500.0
    clock.now = 1065.5
    assert silence.moved(1005.0) == 1065.0, "once"
    silence.end()
    clock.now = 2000.0
    assert silence.moved(1500.0) == 1500.0, "nobody looks any more"


def test_no_peer_is_late_for_a_time_in_which_this_party_stood_still() -> None:
    """Its message may be in a buffer of the system already: here it comes once the party waits again."""
    party = Party()
    party.mailboxes.silence = silence = Silence(LIMIT)
    silence.look({})
    silence._seen = time.monotonic() - 300.0  # stopped since then
    timer = threading.Timer(0.05, lambda: party.mailboxes.file("a", Frame(Kind.OBJECT, "word", 0, {}, 2)))
    timer.start()
    assert party.mailboxes.take("a", "word", deadline=time.monotonic() - 200.0).tag == "word"


# ---- who is named ------------------------------------------------------------------------------------------------------


def test_at_a_deadline_a_silent_peer_is_named_before_the_one_that_waits_for_it() -> None:
    party = Party()
    party.pass_seconds(9)
    party.heard["a"].say()
    with pytest.raises(PeerLostError, match="^a is late"):
        party.mailboxes.take("a", "word", deadline=0.0)
    party.pass_seconds(3)
    with pytest.raises(PeerLostError, match="^b has given no sign of life for 12 s") as caught:
        party.mailboxes.take("a", "word", deadline=0.0)
    assert caught.value.peer == "b"


def test_a_silent_peer_that_is_tolerated_is_no_excuse() -> None:
    party = Party("b")
    party.pass_seconds(9)
    party.heard["a"].say()
    party.pass_seconds(3)
    with pytest.raises(PeerLostError, match="^a is late"):
        party.mailboxes.take("a", "word", deadline=0.0)


def test_of_several_losses_a_refusal_is_named_then_silence_then_what_was_told_then_the_first() -> None:
    losses = [
        Loss(PeerLostError("a", "lost a"), Known.VANISHED, 1),
        Loss(PeerLostError("b", "lost b"), Known.VANISHED, 2),
        Loss(PeerLostError("d", "c stopped: d is late"), Known.TOLD, 3),
        Loss(without_sign("e", 20.0, "work"), Known.SILENT, 4),
        Loss(HandshakeError("f runs another version"), Known.VANISHED, 5),
    ]
    named = []
    while first := first_named(losses):
        named.append(str(first.failure)[:6])
        losses.remove(first)
    assert named == ["f runs", "e has ", "c stop", "lost a", "lost b"]


def test_a_party_that_was_given_up_is_told_that_it_was_silent_itself() -> None:
    kind, message = giving_up(without_sign("b", 20.0, "work"))
    heard = as_heard("a", message)
    assert kind == Kind.ABORT and (heard.peer, heard.cause) == ("a", "b")
    assert heard.what.startswith("a gave this party up: b has given no sign of life for 20 s")


# ---- signs -------------------------------------------------------------------------------------------------------------


def test_a_sign_has_its_place_among_the_frames_and_is_not_counted() -> None:
    party = Party()
    party.queued("a")
    party.outgoing.put(party.peers["a"], Kind.OBJECT, "one", {})
    party.pulse.beat()
    party.outgoing.put(party.peers["a"], Kind.OBJECT, "two", {})
    reader = FrameReader()
    reader._next_sequence = 1  # after the sign of the start
    frames = [reader.feed(chunk) for chunk in party.queued("a")]
    assert [frame.kind for frame in frames if frame] == [Kind.OBJECT, Kind.ALIVE, Kind.OBJECT]
    assert party.outgoing._counter.of("a").messages_sent == 2


def test_no_sign_where_something_was_sent_and_none_waits() -> None:
    party = Party()
    party.queued("a")
    party.outgoing.put(party.peers["a"], Kind.OBJECT, "one", {})
    party.outgoing.give_sign(party.peers["a"], 1e9)
    assert len(party.queued("a")) == 1
    for _ in range(100):  # its queue is full soon, and nobody empties it
        party.pulse.beat()
    assert len(party.queued("a")) == 4
    with_lock, done = threading.Event(), threading.Event()

    def hand_over_a_large_frame() -> None:
        with party.peers["a"].writer.lock:
            with_lock.set()
            done.wait(60.0)

    thread = threading.Thread(target=hand_over_a_large_frame)
    thread.start()
    with_lock.wait(60.0)
    party.pulse.beat()
    assert party.queued("a") == []
    done.set()
    thread.join()


# ---- over the network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("identities")
    make_local_identities(["a", "b", "c"], {name: directory / name for name in ("a", "b", "c")})
    NetworkWorld.directory = directory
    return directory


def pulse_of(links: Links, seconds: float = 1e9) -> Pulse:
    """The pulse of a party whose own thread does not run."""
    assert isinstance(links, NetworkLinks)
    pulse = links._connections._pulse
    pulse._seconds = seconds
    return pulse


@pytest.mark.processes
def test_signs_keep_a_link_alive_and_no_protocol_sees_them(identities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pulse, "start", lambda self: None)
    seen: list[Kind] = []

    def give(links: Links) -> None:
        for _ in range(3):
            pulse_of(links, 0.0).beat()
        links.send_object("b", "word", {})
        links.receive_object("b", "done")

    def hear(links: Links) -> list[str]:
        clock = Clock()
        links._mailboxes.silence = Silence(LIMIT, clock)
        links.receive_object("a", "word")
        for _ in range(15):
            clock.now += 1.0
            pulse_of(links).beat()
        links.send_object("a", "done", {})
        return links.peers

    world = NetworkWorld(["a", "b"], observer=lambda sender, frame: seen.append(frame.kind))
    assert world.meet(a=give, b=hear) == {"a": None, "b": ["a"]}
    assert Kind.ALIVE not in seen and Kind.OBJECT in seen


@pytest.mark.processes
def test_everybody_names_the_silent_one_and_it_learns_why(identities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """c says nothing and does nothing, as if it were stopped; then it goes on."""
    monkeypatch.setattr(Pulse, "start", lambda self: None)
    others_over = threading.Semaphore(0)

    def notice(links: Links) -> None:
        clock = Clock()
        links._mailboxes.silence = Silence(LIMIT, clock)
        links.send_object("b", "here", {})
        links.receive_object("b", "here")
        for _ in range(30):
            clock.now += 1.0
            links._outgoing.peers["b"].conversation._heard = True  # type: ignore[attr-defined]
            pulse_of(links).beat()
        links.receive_object("c", "never")

    def wait(links: Links) -> None:
        links.send_object("a", "here", {})
        links.receive_object("a", "here")
        links.receive_object("a", "never")

    def frozen(links: Links) -> None:
        for _ in range(2):
            others_over.acquire()
        links.receive_object("a", "never")

    def then(party: Any) -> Any:
        def run(links: Links) -> None:
            try:
                party(links)
            finally:
                others_over.release()

        return run

    said = NetworkWorld(["a", "b", "c"]).meet(a=then(notice), b=then(wait), c=frozen)
    assert str(said["a"]).startswith("c has given no sign of life for 20 s")
    assert str(said["b"]).startswith("a stopped: c has given no sign of life for 20 s")
    assert "c has given no sign of life" in str(said["c"]), said["c"]


@pytest.mark.processes
@pytest.mark.parametrize("reason", [None, "the data of a are of no use"])
def test_a_peer_that_ends_with_a_word_just_after_a_standstill_gave_nobody_up(
    reason: str | None, identities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All had stood still and gone on; then a ends, well or for a reason of its own, while b has something left to do."""
    monkeypatch.setattr(Pulse, "start", lambda self: None)
    over, receive = list[Conversation](), Conversation.receive

    def receive_to_the_end(conversation: Conversation, chunks: Any) -> None:
        receive(conversation, chunks)
        over.append(conversation)

    monkeypatch.setattr(Conversation, "receive", receive_to_the_end)

    def end(links: Links) -> None:
        links.receive_object("b", "awake")
        if reason is not None:
            raise ProtocolError(reason)

    def wake_up(links: Links) -> None:
        clock, conversation = Clock(), links._outgoing.peers["a"].conversation  # type: ignore[attr-defined]
        links._mailboxes.silence = silence = Silence(LIMIT, clock)
        silence.look({})
        clock.now += 50.0
        assert silence.stood_still() == 50.0
        links.send_object("a", "awake", {})
        eventually(lambda: conversation in over, 60.0, "the link with a has ended")
        if reason is not None:
            links.receive_object("a", "never")
        links.send_object("c", "awake", {})
        links.receive_object("c", "here")

    def answer(links: Links) -> None:
        links.receive_object("b", "awake")
        links.send_object("b", "here", {})

    if reason is None:
        assert NetworkWorld(["a", "b", "c"]).meet(a=end, b=wake_up, c=answer) == {"a": None, "b": None, "c": None}
    else:
        said = NetworkWorld(["a", "b"]).meet(a=end, b=wake_up)
        assert str(said["b"]).startswith(f"a stopped: {reason}"), said


@pytest.mark.processes
def test_a_sender_that_waits_for_a_party_that_computes_is_not_silent(
    identities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pulse, "start", lambda self: None)

    def send(links: Links) -> None:
        for _ in range(40):
            links.send_tensor("b", "much", torch.zeros(1 << 20, dtype=torch.uint8))

    def compute(links: Links) -> int:
        clock, conversation = Clock(), links._outgoing.peers["a"].conversation  # type: ignore[attr-defined]
        links._mailboxes.silence = Silence(LIMIT, clock)
        eventually(lambda: links._mailboxes.readers.pausing > 0, 60.0, "the sender has to wait")
        for _ in range(100):
            clock.now += 1.0
            pulse_of(links).beat()
        assert conversation.heard()
        return sum(links.receive_tensor("a", "much", torch.uint8, (1 << 20,)).numel() for _ in range(40)) >> 20

    small = Unread(pause=4 << 20, most=64 << 20, patience=60.0)
    assert NetworkWorld(["a", "b"], unread=small).meet(a=send, b=compute) == {"a": None, "b": 40}
