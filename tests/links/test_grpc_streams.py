"""One end of a stream: what leaves when, and that a stream on which nothing happens wakes nobody."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mpc_fl.links.grpc_streams import Conversation
from tests.support.harness import run_parties
from tests.support.waiting import eventually

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


def waits(links: Any) -> dict[str, Any]:
    """For how long the threads of a party wait on its streams, of those that begin to wait from now on."""
    reading, sending = list[float](), list[float | None]()
    wait_once, get = grpc._common._wait_once, queue.Queue.get

    def noted_wait(wait: Any, timeout: float, spin: Any) -> None:
        reading.append(timeout)
        wait_once(wait, timeout, spin)

    def noted_get(self: queue.Queue[Any], block: bool = True, timeout: float | None = None) -> Any:
        sending.append(timeout)
        return get(self, block, timeout)

    grpc._common._wait_once, queue.Queue.get = noted_wait, noted_get  # type: ignore[method-assign]
    for peer in links.peers:
        links.send_object(peer, "word", {"said": links.name})
        assert links.receive_object(peer, "word") == {"said": peer}
    if links.name == "b":  # it dials; who listens hears from gRPC without such a wait
        eventually(lambda: bool(reading), WAIT, "the stream is read on")
    eventually(lambda: bool(sending), WAIT, "the sender waits for the next chunk")
    return {"reading": sorted(set(reading)), "sending": list(set(sending))}


@pytest.mark.processes
def test_a_stream_on_which_nothing_happens_wakes_nobody(tmp_path: Path) -> None:
    """gRPC looked ten times a second at every stream, and the sender twice: 64 hospitals did nothing else."""
    found = run_parties(waits, ["a", "b"], tmp_path)
    assert found["a"]["sending"] == found["b"]["sending"] == [None]
    assert min(found["b"]["reading"]) > 10.0
