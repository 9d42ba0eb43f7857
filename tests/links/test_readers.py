"""What a party that computes, or waits, lets its peers leave unread (both kinds of links)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import LinkError, ProtocolError
from mpc_fl.links.links import Links
from mpc_fl.links.settings import Unread
from tests.links.test_conformance import KINDS, NetworkWorld, World
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["a", "b", "c"]
MIB = 1 << 20
SMALL = Unread(pause=4 * MIB, most=64 * MIB, patience=1.0)


@pytest.fixture(scope="module", autouse=True)
def _identities(tmp_path_factory: pytest.TempPathFactory) -> None:
    NetworkWorld.directory = tmp_path_factory.mktemp("identities")
    make_local_identities(NAMES, {name: NetworkWorld.directory / name for name in NAMES})


@pytest.fixture(params=list(KINDS))
def world(request: pytest.FixtureRequest) -> type[World]:
    return KINDS[request.param]


def _unread(links: Links, peer: str) -> int:
    return links._mailboxes._boxes[peer].inbox.unread


def test_what_nobody_asked_for_gives_no_room_for_more(world: type[World]) -> None:
    """A deviating peer answers with a frame far too large: refused, and nobody may leave more unread from then on."""

    def send(links: Links) -> None:
        for tag in ("any shape", "another shape", "as asked for"):
            links.send_tensor("b", tag, torch.zeros(8 * MIB, dtype=torch.uint8))
        links.receive_object("b", "done")

    def receive(links: Links) -> list[int]:
        assert links.receive_tensor("a", "any shape", torch.uint8, None).numel() == 8 * MIB
        with pytest.raises(ProtocolError, match="instead of"):
            links.receive_tensor("a", "another shape", torch.uint8, (3,))
        largest = [links._mailboxes.readers.largest_taken]
        links.receive_tensor("a", "as asked for", torch.uint8, (8 * MIB,))
        links.send_object("a", "done", {})
        return [*largest, links._mailboxes.readers.largest_taken // MIB]

    assert world(["a", "b"]).meet(a=send, b=receive) == {"a": None, "b": [0, 8]}


def test_a_party_that_computes_lets_its_senders_wait(world: type[World]) -> None:
    """Nothing is lost by that: it takes all in the end."""

    def send(links: Links) -> None:
        for number in range(40):
            links.send_tensor("b", "number", torch.full((MIB,), number, dtype=torch.uint8))

    def receive(links: Links) -> Any:
        eventually(lambda: _unread(links, "a") > SMALL.pause, 60.0, "more is unread than makes a reader pause")
        most = _unread(links, "a")
        got = [int(links.receive_tensor("a", "number", torch.uint8, (MIB,))[0]) for _ in range(40)]
        return most <= SMALL.pause + 2 * MIB, got == list(range(40))

    world_of_two = world(["a", "b"], unread=SMALL)
    assert world_of_two.meet(a=send, b=receive) == {"a": None, "b": (True, True)}


def test_two_that_send_each_other_more_than_they_keep_unread_both_end(world: type[World]) -> None:
    """Whoever waits for room goes on reading."""

    def party(links: Links) -> int:
        for _ in range(40):
            links.send_tensor(links.peers[0], "much", torch.zeros(MIB, dtype=torch.uint8))
        return sum(links.receive_tensor(links.peers[0], "much", torch.uint8, (MIB,)).numel() for _ in range(40)) // MIB

    assert world(["a", "b"], unread=SMALL).meet(a=party, b=party) == {"a": 40, "b": 40}


def test_who_waits_for_another_reads_on(world: type[World]) -> None:
    """a waits for b, b for c, and c sends a much that a takes last: no party pauses for ever."""

    def first(links: Links) -> int:
        links.receive_object("b", "go")
        return sum(links.receive_tensor("c", "much", torch.uint8, (MIB,)).numel() for _ in range(40)) // MIB

    def second(links: Links) -> None:
        links.receive_object("c", "sent")
        links.send_object("a", "go", {})

    def third(links: Links) -> None:
        for _ in range(40):
            links.send_tensor("a", "much", torch.zeros(MIB, dtype=torch.uint8))
        links.send_object("b", "sent", {})

    assert world(NAMES, unread=SMALL).meet(a=first, b=second, c=third) == {"a": 40, "b": None, "c": None}


@pytest.mark.parametrize("kind", ["tensors", "objects"])
def test_who_sends_what_nobody_asks_for_is_refused(world: type[World], kind: str) -> None:
    def flood(links: Links) -> str:
        links.receive_object("b", "ready")
        try:
            for _ in range(100_000):
                if kind == "tensors":
                    links.send_tensor("b", "flood", torch.zeros(MIB, dtype=torch.uint8))
                else:
                    links.send_object("b", "flood", {"nested": [[]] * 10_000})
        except (LinkError, ProtocolError) as error:
            return type(error).__name__
        return "all was taken"

    def receive(links: Links) -> Any:
        links.send_object("a", "ready", {})
        with pytest.raises(ProtocolError, match="the link with a: a sent 6[4-9] MiB that nobody has asked for"):
            links.receive_object("a", "never")
        return _unread(links, "a") <= SMALL.most + 2 * MIB

    outcome = world(["a", "b"], unread=SMALL).meet(a=flood, b=receive)
    assert outcome["b"] is True and outcome["a"] in ("PeerLostError", "BrokenLinkError"), outcome


def test_one_frame_may_be_larger_than_what_is_kept_unread(world: type[World]) -> None:
    size = 80 * MIB

    def send(links: Links) -> None:
        links.send_tensor("b", "model", torch.zeros(size, dtype=torch.uint8))
        links.send_object("b", "after", {})

    def receive(links: Links) -> int:
        got = links.receive_tensor("a", "model", torch.uint8, (size,)).numel()
        links.receive_object("a", "after")
        return got

    assert world(["a", "b"], unread=SMALL).meet(a=send, b=receive) == {"a": None, "b": size}


def test_a_dealer_ahead_of_need_never_waits_for_room() -> None:
    for ahead in (1 << 20, 256 << 20, 8 << 30):
        unread = Unread.with_dealer_ahead(ahead)
        assert unread.pause >= 2 * ahead and unread.most >= 2 * unread.pause
