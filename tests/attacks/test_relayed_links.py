"""A certified hospital against the relayed link of two others: it may lose its own links by that, never cost them theirs.

Real links over mutual TLS. 'hospital-0' and 'hospital-1' can only dial out and reach each other through the aggregator;
'hospital-2' has an address, and a direct link with each. All hospitals may be lost and come back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import ProtocolError
from mpc_fl.links.frames import Frame, Kind, Observer
from tests.support.harness import free_ports, local_links

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
    _put(links, RELAY, Kind.RELAY, FIRST, links._outgoing.peers[FIRST].sealer.seal(b"no frame"))


@pytest.mark.parametrize("attack", [_false_greeting, _the_same_greeting_again, _garbage, _sealed_garbage])
def test_what_a_hospital_sends_through_the_relay_costs_nobody_the_relay(
    attack: Callable[[Any], None], tmp_path: Path
) -> None:
    """The receiver refuses it, or loses whom it came from, and goes on with the relay and the third."""
    lost = attack in (_garbage, _sealed_garbage)

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
