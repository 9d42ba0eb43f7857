"""What is unread: reckoned, and dropped with its tag or scope (both kinds of links)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import LinkError, ProtocolError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.inbox import EndedTags, Inbox, memory_of
from mpc_fl.links.links import Links
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.settings import Timeouts, Tolerance
from mpc_fl.links.traffic import TrafficCounter
from tests.links.test_conformance import KINDS, NetworkWorld, World

pytestmark = pytest.mark.processes
NAMES = ["a", "b", "c"]
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _identities(tmp_path_factory: pytest.TempPathFactory) -> None:
    NetworkWorld.directory = tmp_path_factory.mktemp("identities")
    make_local_identities(NAMES, {name: NetworkWorld.directory / name for name in NAMES})


@pytest.fixture(params=list(KINDS))
def world(request: pytest.FixtureRequest) -> type[World]:
    return KINDS[request.param]


def _frame(tag: str, size: int = 8) -> Frame:
    return Frame(Kind.TENSOR, tag, 0, torch.zeros(size, dtype=torch.uint8), size)


def _unread(links: Links, peer: str) -> int:
    return links._mailboxes._boxes[peer].inbox.unread


def test_what_is_taken_or_forgotten_takes_no_memory() -> None:
    inbox = Inbox()
    for tag in ("sum 1", "check/a", "check/b/c", "sum 1", "checked"):
        inbox.put(_frame(tag, 100))
    assert inbox.unread == 5 * memory_of(_frame("", 100))
    assert inbox.take("sum 1").tag == "sum 1" and "sum 1" in inbox
    inbox.forget("sum 1")
    inbox.forget("check/")
    assert "sum 1" not in inbox and "check/b/c" not in inbox and "checked" in inbox
    assert inbox.unread == memory_of(_frame("", 100))
    inbox.clear()
    assert inbox.unread == 0 and "checked" not in inbox


def _memory_taken(value: Any) -> int:
    """Bytes of a JSON value, with the collector's 16 for each container."""
    taken, left = 0, [value]
    while left:
        one = left.pop()
        taken += sys.getsizeof(one) + 16 * isinstance(one, list | dict)
        left += one if isinstance(one, list) else [*one.keys(), *one.values()] if isinstance(one, dict) else []
    return taken


@pytest.mark.parametrize(
    "item", ["[]", "{}", "[[]]", "[0]", '{"":0}', "[" * 400 + "]" * 400, '{"":' * 200 + "0" + "}" * 200, '"aé"', "0.5"]
)
def test_a_json_object_is_reckoned_with_what_python_makes_of_it(item: str) -> None:
    body = '{"a":[' + ",".join([item] * (100_000 // len(item))) + "]}"
    frame = Frame(Kind.OBJECT, "", 0, json.loads(body), len(body))
    assert memory_of(frame) >= _memory_taken(frame.payload)


def test_ended_tags_are_the_last_few_thousand() -> None:
    ended = EndedTags()
    assert "anything" not in ended
    ended.add("scope/")
    ended.add("tag")
    assert "scope/x" in ended and "scope/x/y" in ended and "tag" in ended
    assert "scope" not in ended and "tag/x" not in ended and "other/scope/x" not in ended
    for number in range(5000):
        ended.add(f"sum {number}")
    assert "sum 4999" in ended and "tag" not in ended and len(ended._ended) == 4096


def test_late_frames_of_an_ended_scope_are_dropped(world: type[World]) -> None:
    def send(links: Links) -> None:
        links.scoped("check").send_tensor("b", "early", torch.zeros(MIB, dtype=torch.uint8))
        links.send_tensor("b", "summand 1", torch.zeros(MIB, dtype=torch.uint8))
        links.send_object("b", "sent", {})
        links.receive_object("b", "ended")
        links.scoped("check").send_tensor("b", "late", torch.zeros(MIB, dtype=torch.uint8))
        links.send_tensor("b", "summand 1", torch.zeros(MIB, dtype=torch.uint8))
        links.send_object("b", "sent", {})

    def receive(links: Links) -> list[int]:
        links.receive_object("a", "sent")
        before = _unread(links, "a")
        links.scoped("check").end_scope()
        links.forget("summand 1")
        after = _unread(links, "a")
        links.send_object("a", "ended", {})
        links.receive_object("a", "sent")
        return [before // MIB, after, _unread(links, "a")]

    assert world(["a", "b"]).meet(a=send, b=receive) == {"a": None, "b": [2, 0, 0]}


def test_a_party_that_has_ended_keeps_nothing(world: type[World]) -> None:
    def send(links: Links) -> None:
        links.send_tensor("b", "never taken", torch.zeros(MIB, dtype=torch.uint8))
        links.send_object("b", "sent", {})

    kept: list[Links] = []

    def receive(links: Links) -> None:
        links.receive_object("a", "sent")
        assert _unread(links, "a") > MIB
        kept.append(links)

    assert world(["a", "b"]).meet(a=send, b=receive) == {"a": None, "b": None}
    assert _unread(kept[0], "a") == 0


def test_the_first_of_those_that_went_in_silence_is_named_and_whoever_was_told_before_all() -> None:
    boxes = Mailboxes(dict.fromkeys(NAMES, ()), Timeouts(1.0, 1.0), Tolerance(), TrafficCounter("work"))
    for name in NAMES:
        boxes.connect(name)
    boxes.lose("c", boxes.lost("c", "the link ended without a farewell"))
    boxes.lose("a", boxes.lost("a", "the link ended without a farewell"))
    with pytest.raises(LinkError, match="lost c "):
        boxes.require_all()
    boxes.file("b", Frame(Kind.ABORT, "", 1, {"reason": "lost c in phase 'work'", "cause": "c"}, 10))
    with pytest.raises(LinkError, match="b stopped: lost c "):
        boxes.require_all()


def test_a_reader_that_fails_ends_the_link_with_a_reason(tmp_path: Path) -> None:
    """An observer stands for any code that fails on a reader's thread; its message could quote what was received."""

    def fails(sender: str, frame: Frame) -> None:
        if frame.kind == Kind.OBJECT:
            raise ValueError("value 123456")

    def receive(links: Links) -> str:
        links.send_object("a", "connected", {})
        with pytest.raises(ProtocolError, match="the link with a: unexpected ValueError") as caught:
            links.receive_object("a", "word")
        return str(caught.value)

    class Observed(NetworkWorld):
        def links(self, name: str, elsewhere: bool = False, **more: Any) -> Links:
            return super().links(name, elsewhere, **({"observer": fails} if name == "b" else {}), **more)

    def send(links: Links) -> None:
        links.receive_object("b", "connected")  # else what fails would end the wait for all links
        links.send_object("b", "word", {})

    outcome = Observed(["a", "b"]).meet(a=send, b=receive)
    assert "123456" not in outcome["b"]
