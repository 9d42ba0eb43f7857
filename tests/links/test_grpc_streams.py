"""One end of a stream: what leaves when, and that a stream on which nothing happens wakes nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from mpc_fl.links.grpc_streams import Conversation
from tests.support.harness import local_links

WAIT = 60.0  # seconds, for what comes at once


def conversation() -> Conversation:
    return Conversation(lambda chunk: True, lambda failure: None)


def sent_by(stream: Conversation) -> tuple[threading.Thread, list[bytes]]:
    """What gRPC's thread would send, on a thread."""
    sent = list[bytes]()
    thread = threading.Thread(target=lambda: sent.extend(stream.chunks_to_send()), daemon=True)
    thread.start()
    return thread, sent


@pytest.mark.parametrize("end", [Conversation.finish, Conversation.cut])
def test_whoever_waits_for_a_chunk_ends_with_the_stream(end: Callable[[Conversation], None]) -> None:
    stream = conversation()
    thread, sent = sent_by(stream)
    assert stream.put(b"first", WAIT)
    end(stream)
    thread.join(WAIT)
    assert not thread.is_alive() and sent == [b"first"] and stream.wait_until_left(WAIT)


@pytest.mark.parametrize("end", [Conversation.finish, Conversation.cut])
def test_a_full_stream_that_ends_sends_what_was_queued(end: Callable[[Conversation], None]) -> None:
    stream, chunks = conversation(), [bytes([number]) for number in range(10)]
    queued = [chunk for chunk in chunks if stream.put(chunk, 0.0)]
    assert 1 < len(queued) < len(chunks), "it is full"
    end(stream)
    thread, sent = sent_by(stream)
    thread.join(WAIT)
    assert not thread.is_alive() and sent == queued


@pytest.mark.processes
def test_a_stream_on_which_nothing_happens_wakes_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """gRPC looked ten times a second at every stream, and the sender twice: 64 hospitals did nothing else."""
    waits, gets = list[float](), list[object]()
    waited, got = grpc._common._wait_once, Conversation.__init__

    def wait_once(wait: Any, timeout: float, spin: Any) -> None:
        waits.append(timeout)
        waited(wait, timeout, spin)

    def begin(self: Conversation, *arguments: Any) -> None:
        got(self, *arguments)
        get = self._outgoing.get

        def noted(block: bool = True, timeout: float | None = None) -> bytes | None:
            gets.append(timeout)
            return get(block, timeout)

        self._outgoing.get = noted  # type: ignore[method-assign]

    monkeypatch.setattr(grpc._common, "_wait_once", wait_once)
    monkeypatch.setattr(Conversation, "__init__", begin)
    with local_links(["a", "b"], tmp_path) as (a, b):
        a.send_object("b", "word", {"said": 1})
        assert b.receive_object("a", "word") == {"said": 1}
        b.send_object("a", "word", {"said": 2})
        assert a.receive_object("b", "word") == {"said": 2}
    assert waits and min(waits) > 10.0
    assert gets and set(gets) == {None}
