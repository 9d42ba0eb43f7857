"""Through which relays words and greetings for a peer go, where there are more than are used at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.links import ways
from mpc_fl.links.losses import Known
from mpc_fl.links.sealed_stream import SealedStream
from mpc_fl.links.sealing import Sealer, Unsealer
from mpc_fl.links.silence import SIGN
from tests.support.harness import free_ports, local_links

RELAYS = ["r1", "r2", "r3", "r4", "r5"]
NAMES = ["a", "b", *RELAYS]


def test_greetings_go_through_all_relays_in_turn_and_words_first_through_the_one_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three that pass nothing on keep no two parties apart as long as one more does."""
    make_local_identities(["a"], {"a": tmp_path / "a"})
    ports = dict(zip(RELAYS, free_ports(len(RELAYS)), strict=True))
    links = local_links("a", NAMES, ports, tmp_path, relay=RELAYS, tolerated=NAMES[1:])
    for name in RELAYS:
        links._mailboxes.connect(name)
    peer, found = links._outgoing.peers["b"], links._connections._relayed._ways
    used = set[str]()
    for turn in range(len(RELAYS)):
        monkeypatch.setattr(ways.time, "monotonic", lambda turn=turn: turn * SIGN)
        now = [relay.name for relay in found.through(peer)]
        assert len(now) == 3
        used.update(now)
    assert used == set(RELAYS)
    monkeypatch.undo()
    links._mailboxes.connect("b")
    peer.stream = SealedStream(Sealer(bytes(32), "a", "b"), Unsealer(bytes(32), "b", "a"))
    for name in RELAYS:
        found._ways["b"] = ways._Way(name)
        assert [relay.name for relay in found.through(peer)][0] == name
    peer.stream.end()


@pytest.mark.parametrize("late", [True, False], ids=["another relay comes yet", "all are linked"])
def test_a_peer_is_not_lost_by_a_relay_that_says_so_before_another_one_is_linked(late: bool, tmp_path: Path) -> None:
    make_local_identities(["a"], {"a": tmp_path / "a"})
    relays = RELAYS[:2]
    ports = dict(zip(relays, free_ports(2), strict=True))
    links = local_links("a", ["a", "b", *relays], ports, tmp_path, relay=relays, tolerated=["b", *relays])
    peer, found, boxes = links._outgoing.peers["b"], links._connections._relayed._ways, links._mailboxes
    for name in ("b", "r1", *([] if late else ["r2"])):
        boxes.connect(name)
    peer.stream = SealedStream(Sealer(bytes(32), "a", "b"), Unsealer(bytes(32), "b", "a"))
    found._ways["b"] = ways._Way("r1")
    for relay in relays if not late else relays[:1]:
        assert boxes.alive("b")
        found.lose_through(peer, relay, boxes.lost("b", "it is denied"), Known.VANISHED)
    assert boxes.alive("b") == late
    peer.stream.end()
