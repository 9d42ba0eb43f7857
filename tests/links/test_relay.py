"""Links through a relay when parties come and come back; what an adversary tries with them is in `tests/attacks/`."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import PeerLostError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.losses import Known
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.pulse import Pulse
from mpc_fl.links.silence import Silence
from tests.support.harness import free_ports, local_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["a", "b", "relay"]


@pytest.mark.parametrize("last", ["a", "b"])
def test_whoever_connects_last_has_not_come_back(last: str, tmp_path: Path) -> None:
    """The relay takes part itself, and may go on before it has told the others about the last that connected.

    Told that it came back they would greet it once more, and the link that they have with it would be none.
    """
    make_local_identities(NAMES, {name: tmp_path / name for name in NAMES})
    ports = dict(zip(["relay"], free_ports(1), strict=True))
    told: list[str] = []
    outcome: dict[str, Any] = {}

    def watch(sender: str, frame: Frame) -> None:
        if frame.kind == Kind.RELAY_GREETING and isinstance(frame.payload, dict) and "returned" in frame.payload:
            told.append(str(frame.payload["returned"]))

    relay = local_links("relay", NAMES, ports, tmp_path, relay="relay", tolerated="ab")
    boxes = relay._mailboxes
    connect, first_is_there = boxes.connect, threading.Event()

    def connect_and_let_it_go_on(peer: str) -> None:
        connect(peer)
        first_is_there.set()
        if boxes.connected("a") and boxes.connected("b"):
            eventually(lambda: boxes.started, 30.0, "the relay goes on")

    boxes.connect = connect_and_let_it_go_on  # type: ignore[method-assign]

    def party(name: str) -> None:
        peer = "b" if name == "a" else "a"
        if name == last:
            assert first_is_there.wait(30)
        options = {"relay": "relay", "tolerated": [peer], "observer": watch}
        with local_links(name, NAMES, ports, tmp_path, **options) as links:
            for number in range(3):
                links.send_tensor(peer, "number", torch.tensor([number]))
            outcome[name] = [int(links.receive_tensor(peer, "number", torch.int64, (1,))) for _ in range(3)]
            links.send_object("relay", "enough", {})

    threads = [threading.Thread(target=party, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    with relay:
        for name in "ab":
            relay.receive_object(name, "enough")
    for thread in threads:
        thread.join()
    assert outcome == {"a": [0, 1, 2], "b": [0, 1, 2]} and not told


def test_the_relay_says_who_is_silent_to_those_that_cannot_hear_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay has nothing to wait for itself, as in its farewell; a says nothing, as if it were stopped."""
    monkeypatch.setattr(Pulse, "start", lambda self: None)
    make_local_identities(NAMES, {name: tmp_path / name for name in NAMES})
    ports = dict(zip(["relay"], free_ports(1), strict=True))
    met, said = threading.Barrier(3), list[str]()
    over = threading.Event()

    def party(name: str) -> None:
        with contextlib.suppress(PeerLostError), local_links(name, NAMES, ports, tmp_path, relay="relay") as links:
            met.wait(60)
            if name == "b":
                with pytest.raises(PeerLostError) as caught:
                    links.receive_object("a", "word")
                said.append(str(caught.value))
                over.set()
            over.wait(60)

    threads = [threading.Thread(target=party, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    with contextlib.suppress(PeerLostError), local_links("relay", NAMES, ports, tmp_path, relay="relay") as relay:
        met.wait(60)
        now = [0.0]
        relay._mailboxes.silence = Silence(20.0, lambda: now[0])
        for second in range(30):
            now[0] = float(second)
            relay._outgoing.peers["b"].conversation._heard = True
            relay._connections._pulse.beat()
        over.wait(60)
    for thread in threads:
        thread.join()
    assert said and said[0].startswith("a has given no sign of life for 20 s")


def test_parties_with_addresses_hear_from_no_relay_who_is_gone(tmp_path: Path) -> None:
    """All are relays for others that only dial out; who is told what only such need to hear would end the link with the relay."""
    names = ["first", "second", "third"]
    make_local_identities(names, {name: tmp_path / name for name in names})
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    met, heard = threading.Barrier(3), list[Any]()

    def links_of(name: str) -> NetworkLinks:
        return local_links(
            name, names, ports, tmp_path, relay=names, tolerated=[each for each in names if each != name]
        )

    def second() -> None:
        with contextlib.suppress(PeerLostError), links_of("second"):
            met.wait(60)
            raise PeerLostError("nobody", "second stops", "look there")

    def third() -> None:
        with links_of("third") as links:
            met.wait(60)
            heard.append(links.receive_object("first", "after"))

    threads = [threading.Thread(target=party) for party in (second, third)]
    for thread in threads:
        thread.start()
    with links_of("first") as links:
        met.wait(60)
        with pytest.raises(PeerLostError, match="second stop"):
            links.receive_object("second", "never")
        threads[0].join()
        links.send_object("third", "after", {"all": "well"})
        threads[1].join()
    assert heard == [{"all": "well"}]


@pytest.mark.parametrize("state", ["has not come yet", "came and went", "did not come in time"])
def test_a_relay_says_of_nobody_who_has_not_come_yet_that_it_is_gone(state: str, tmp_path: Path) -> None:
    """Else a second relay, that a party is not linked with yet, would make a false word of the first one about it true."""
    relays = ["relay", "other"]
    make_local_identities(["relay"], {"relay": tmp_path / "relay"})
    ports = dict(zip(relays, free_ports(2), strict=True))
    names, others = ["a", "b", *relays], ["a", "b", "other"]
    links = local_links("relay", names, ports, tmp_path, relay=relays, tolerated=others)
    boxes, peers, told = links._mailboxes, links._outgoing.peers, list[Any]()
    boxes.connect("a")
    if state != "has not come yet":
        boxes.connect("b") if state == "came and went" else None
        peers["b"].start = "its start" if state == "came and went" else ""
        boxes.lose("b", boxes.lost("b", "it is away"), Known.VANISHED)
    links._outgoing.put_at_once = lambda peer, kind, payload: told.append((peer.name, payload))  # type: ignore[method-assign]
    chunk = Frame(Kind.RELAY, "b", 0, torch.zeros(40, dtype=torch.uint8), 40)
    links._connections._relay.pass_on(peers["a"], chunk)
    said = {"gone": "b", "start": peers["b"].start}
    assert told == ([] if state == "has not come yet" else [("a", said)])
