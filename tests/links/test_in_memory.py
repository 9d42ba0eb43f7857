"""Links in memory: what a test can do as the adversary, and parties as threads (the rest: `test_conformance`)."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from mpc_fl.errors import LinkError, PeerLostError, ProtocolError
from mpc_fl.links.frames import Frame, Kind, encode_frame
from mpc_fl.links.in_memory import DroppedError, InMemoryLinks, InMemoryNetwork
from mpc_fl.links.links import Links
from tests.support.harness import run_parties_in_memory


def chatter(links: Links) -> list[int]:
    """Every party sends three numbers to every peer, and its own after what it received."""
    links.set_phase("chatter")
    for number in range(3):
        for peer in links.peers:
            links.send_tensor(peer, "number", torch.tensor([number]))
    return [int(links.receive_tensor(peer, "number", torch.int64, (1,))) for peer in links.peers for _ in range(3)]


def test_it_needs_neither_tls_nor_a_certificate() -> None:
    program = "import sys, mpc_fl.links.in_memory; sys.exit('mpc_fl.links.tls_sockets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_parties_run_as_threads_and_return_by_name() -> None:
    assert run_parties_in_memory(chatter, ["a", "b", "c"]) == dict.fromkeys("abc", [0, 1, 2] * 2)


def fails_at_b(links: Links, what: str) -> None:
    if links.name == "b":
        raise ProtocolError(what)
    links.receive_object("b", "never")


def test_the_first_error_is_raised_with_its_cause() -> None:
    with pytest.raises(AssertionError, match="b failed: ProtocolError: the update is too large") as caught:
        run_parties_in_memory(fails_at_b, ["a", "b", "c"], "the update is too large")
    assert isinstance(caught.value.__cause__, ProtocolError)


def test_parties_that_do_not_end_are_named_and_ended() -> None:
    with pytest.raises(AssertionError, match=re.escape("no result within 0.2 s, got ['a']")):
        run_parties_in_memory(
            lambda links: links.name == "a" or links.receive_object("c" if links.name == "b" else "b", "never"),
            ["a", "b", "c"],
            timeout=0.2,
        )
    assert not {"a", "b", "c"} & {thread.name for thread in threading.enumerate()}


def test_a_watcher_sees_every_frame_with_both_ends() -> None:
    seen: list[tuple[str, str, str, str]] = []

    def prepare(network: InMemoryNetwork) -> None:
        network.watch(lambda sender, receiver, frame: seen.append((sender, receiver, frame.kind.name, frame.tag)))

    run_parties_in_memory(chatter, ["a", "b"], prepare=prepare)
    for sender, receiver in (("a", "b"), ("b", "a")):
        kinds = [(kind, tag) for source, target, kind, tag in seen if (source, target) == (sender, receiver)]
        # Who ends last has nobody left to say farewell to.
        assert kinds[:4] == [("HELLO", ""), *[("TENSOR", "number")] * 3] and kinds[4:] in ([], [("BYE", "")])


def drop_at(victim: str, sequence: int) -> Any:
    """Drop a party as its frame of this number to 'a' is on its way."""

    def prepare(network: InMemoryNetwork) -> None:
        def watch(sender: str, receiver: str, frame: Frame) -> None:
            if (sender, receiver, frame.sequence) == (victim, "a", sequence):
                network.drop(victim)

        network.watch(watch)

    return prepare


def survive(links: Links) -> Any:
    links.set_phase("work")
    if links.name == "b":
        links.receive_object("a", "ready")
        try:
            chatter(links)
        except Exception:
            return "a protocol saw that it was dropped"
    links.send_object("b", "ready", {})
    got = []
    try:
        while True:
            got.append(int(links.receive_tensor("b", "number", torch.int64, (1,))))
    except PeerLostError as error:
        return got, error.what


def test_a_party_is_dropped_at_the_chosen_frame_and_no_protocol_of_its_own_catches_that() -> None:
    results = run_parties_in_memory(survive, ["a", "b"], prepare=drop_at("b", 2))
    assert results == {"a": ([0], "lost b in phase 'work' (the link ended without a farewell)")}


def test_a_dropped_party_can_neither_send_nor_wait() -> None:
    def party(links: Links, caught: dict[str, list[str]]) -> None:
        if links.name == "a":
            links.send_object("b", "ready", {})
            with pytest.raises(PeerLostError, match="without a farewell"):
                links.receive_object("b", "never")
            return
        links.receive_object("a", "ready")
        networks[0].drop("b")
        for use in (
            lambda: links.send_object("a", "late", {}),
            lambda: links.receive_object("a", "never"),
            links.require_all,
        ):
            with pytest.raises(DroppedError):
                use()
            caught.setdefault("b", []).append("dropped")
        raise DroppedError

    networks: list[InMemoryNetwork] = []
    caught: dict[str, list[str]] = {}
    assert run_parties_in_memory(party, ["a", "b"], caught, prepare=networks.append) == {"a": None}
    assert caught["b"] == ["dropped"] * 3


def oversized() -> bytes:
    """The header of a frame that announces more than a frame may hold."""
    head = next(encode_frame(Kind.TENSOR, "x", 1, torch.zeros(1, dtype=torch.int64)))
    return head[:18] + (1 << 33).to_bytes(8, "little") + head[26:27] + (1 << 30).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("deviate", "reason"),
    [
        (lambda links: links.send_chunk("a", b"garbage"), "a frame was refused: its header is truncated"),
        (lambda links: links.send_chunk("a", b"x" * 100), "it does not begin with the frame magic"),
        (lambda links: links.send_chunk("a", oversized()), "do not agree|larger than the limit"),
        (lambda links: links.send_frame("a", Kind.OBJECT, "x", {}, sequence=0), "out of sequence"),
        (lambda links: links.send_frame("a", Kind.OBJECT, "x", {}, sequence=7), "out of sequence"),
        (lambda links: links.send_frame("a", Kind.HELLO, "", {}), "a greeting came twice"),
        (lambda links: links.send_frame("a", Kind.WELCOME, "", {}), "a greeting came twice"),
        (lambda links: links.send_frame("a", Kind.RELAY, "c", b"sealed"), "b asked to relay what may not be relayed"),
        (lambda links: links.send_frame("a", Kind.RELAY_GREETING, "", {"to": "c"}), "may not be relayed"),
    ],
)
def test_a_deviating_party_is_refused_with_the_reason(deviate: Any, reason: str) -> None:
    def party(links: InMemoryLinks) -> Any:
        peer = "b" if links.name == "a" else "a"
        if links.name == "a":
            links.send_object("b", "ready", {})
        else:
            links.receive_object("a", "ready")
            deviate(links)
        with pytest.raises(ProtocolError, match=reason) as caught:
            links.receive_object(peer, "never")
        with pytest.raises(ProtocolError, match=reason):
            links.send_object(peer, "after", {})
        assert str(caught.value).startswith(f"the link with {peer}: ")
        return True

    assert run_parties_in_memory(party, ["a", "b"]) == {"a": True, "b": True}


def test_a_deviating_party_may_send_any_frame_that_is_one() -> None:
    def party(links: InMemoryLinks) -> Any:
        if links.name == "b":
            links.receive_object("a", "ready")
            links.send_frame("a", Kind.TENSOR, "scope of another/tag", torch.ones(2, dtype=torch.int16))
            links.send_frame("a", Kind.ABORT, "", {"reason": "made up", "cause": "a"})
            return None
        links.send_object("b", "ready", {})
        got = links.scoped("scope of another").receive_tensor("b", "tag", torch.int16, (2,))
        with pytest.raises(PeerLostError, match="b stopped: made up"):
            links.receive_object("b", "never")
        return got.tolist()

    assert run_parties_in_memory(party, ["a", "b"]) == {"a": [1, 1], "b": None}


def test_a_stranger_has_no_links() -> None:
    def prepare(network: InMemoryNetwork) -> None:
        with pytest.raises(LinkError, match="c takes no part in this run"):
            network.links("c")

    assert run_parties_in_memory(lambda links: links.peers, ["a", "b"], prepare=prepare) == {"a": ["b"], "b": ["a"]}
