"""Greetings that a relay kept, or that a hospital gives it for somebody who needs none: they cost nobody a link.

Real links over mutual TLS, those of `test_several_relays`. What a relay kept is made here as its hospital made it then: with its
certificate and signature, and a key of a start, or for a run, that is over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import MpcFlError
from mpc_fl.links.frames import _HEADER, MAGIC, MAX_GREETING, VERSION, Kind
from mpc_fl.links.handshake import Agreement, make_greeting
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from tests.attacks.test_several_relays import FIRST, OTHER, Meeting, both, exchange, not_lost
from tests.support.harness import Options

pytestmark = pytest.mark.processes
SAME_RUN, EARLIER_RUN = Options().agreement, Agreement("an earlier run", "digest", "train")
Attack = Callable[[NetworkLinks], None]


def _after_what_the_relay_does(meeting: Meeting, attack: Attack) -> dict[str, Any]:
    """The two exchange something, the relay that they use attacks, and they exchange something again and have lost nobody."""

    def party(links: Links, peer: str) -> bool:
        right = exchange(links, peer, 0, 2)
        links.send_object(FIRST, "attack", {})
        links.receive_object(FIRST, "attacked")
        right = right and exchange(links, peer, 2, 2)
        links.require_all()
        return right and not_lost(links, *links.peers)

    def attacks(links: NetworkLinks) -> None:
        for name in ("a", "b"):
            links.receive_object(name, "attack")
        attack(links)
        for name in ("a", "b"):
            links.send_object(name, "attacked", {})
        meeting.over.wait(120)

    parties = both(party) | {FIRST: attacks}
    return meeting.run(**parties)


def _recorded(meeting: Meeting, sender: str, receiver: str, agreement: Agreement, answers: str) -> dict[str, Any]:
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return make_greeting(load_identity(meeting.directory / sender, sender), agreement, receiver, key, answers)


@pytest.mark.parametrize("answers", ["", "knock ", "0" * 64])
@pytest.mark.parametrize("agreement", [SAME_RUN, EARLIER_RUN], ids=["an earlier start", "an earlier run"])
def test_a_relay_that_repeats_what_it_has_kept_resets_no_link(
    agreement: Agreement, answers: str, tmp_path: Path
) -> None:
    """Signed by the hospital itself, of a start or for a run that is over: its receiver cannot know that from it alone."""
    meeting = Meeting(tmp_path)

    def attack(relay: NetworkLinks) -> None:
        for name, other in (("a", "b"), ("b", "a")):
            for _ in range(2):
                kept = _recorded(meeting, other, name, agreement, answers)
                relay._outgoing.put(relay._outgoing.peers[name], Kind.RELAY_GREETING, "", kept)

    outcomes = _after_what_the_relay_does(meeting, attack)
    assert (outcomes["a"], outcomes["b"]) == (True, True), outcomes


def test_a_hospital_cannot_have_one_relay_blamed_by_another(tmp_path: Path) -> None:
    """It has one pass on a greeting, and a chunk, for the other, which would take them for what no relay may send."""
    meeting = Meeting(tmp_path)

    def attacks(links: Links, peer: str) -> bool:
        right = exchange(links, peer, 0, 1)
        if links.name == "a":
            for kind, tag, payload in (
                (Kind.RELAY, OTHER, b"no chunk"),
                (Kind.RELAY_GREETING, "", {"name": "a", "to": OTHER, "signature": "00"}),
            ):
                links._outgoing.put(links._outgoing.peers[FIRST], kind, tag, payload)  # type: ignore[attr-defined]
        right = exchange(links, peer, 1, 1) and right
        links.send_object(OTHER, "enough", {})
        return right

    def relay(links: NetworkLinks) -> bool:
        other = OTHER if links.name == FIRST else FIRST
        for number in range(2):
            links.send_object(other, "word", {"number": number})
            assert links.receive_object(other, "word") == {"number": number}
            if not number and links.name == OTHER:
                for name in ("a", "b"):
                    links.receive_object(name, "enough")
        meeting.over.wait(120)
        return not_lost(links, other)

    outcomes = meeting.run(**both(attacks), r=relay, s=relay)
    assert (outcomes["r"], outcomes["s"], outcomes["b"]) == (True, True, True), outcomes


def test_a_greeting_that_grows_when_it_is_written_anew_costs_its_receiver_no_relay(tmp_path: Path) -> None:
    """Letters that are no ASCII take three times as many bytes at the relay, with which its receiver would end the link."""
    meeting = Meeting(tmp_path)
    body = json.dumps(
        {"name": "a", "to": "b", "signature": "\u00e9" * (MAX_GREETING // 3)}, ensure_ascii=False
    ).encode()

    def attacks(links: NetworkLinks) -> bool:
        right = exchange(links, "b", 0, 1)
        relay = links._outgoing.peers[FIRST]
        with relay.writer.lock:
            assert relay.conversation is not None
            head = _HEADER.pack(MAGIC, VERSION, Kind.RELAY_GREETING, 255, 0, relay.writer.next_sequence, 0, len(body))
            assert len(body) <= MAX_GREETING and relay.conversation.put(head + body, 10.0)
        with pytest.raises(MpcFlError):
            links.receive_object(FIRST, "never")
        return exchange(links, "b", 1, 1) and right

    def party(links: NetworkLinks) -> bool:
        right = exchange(links, "a", 0, 1)
        right = exchange(links, "a", 1, 1) and right  # the relay has refused it by then
        links.send_object(FIRST, "word", {})
        return right and links.receive_object(FIRST, "word") == {} and not_lost(links, FIRST)

    def relay(links: NetworkLinks) -> bool:
        said = links.receive_object("b", "word")
        links.send_object("b", "word", said)
        meeting.over.wait(120)
        return "asked to relay what may not be relayed" in str(links._mailboxes.failure("a"))

    parties = {"a": attacks, "b": party, FIRST: relay}
    outcomes = meeting.run(**parties)  # type: ignore[arg-type]
    assert (outcomes["a"], outcomes["b"], outcomes[FIRST]) == (True, True, True), outcomes
