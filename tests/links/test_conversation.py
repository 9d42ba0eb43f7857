"""One end of a stream: what leaves when and in which order, and where what comes is put."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from mpc_fl.links.conversation import Conversation, Rest
from mpc_fl.links.frames import Frame, FrameReader, Kind, encode_frame

WAIT = 60.0  # seconds, for what comes at once


def conversation() -> Conversation:
    return Conversation(lambda chunk: True, lambda failure: None)


def sent_by(stream: Conversation) -> tuple[threading.Thread, list[bytes]]:
    """What the stream's thread would send, on a thread."""
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


@pytest.mark.parametrize("end", [Conversation.finish, Conversation.cut])
def test_what_left_in_part_goes_on_before_all_that_comes_after_it(end: Callable[[Conversation], None]) -> None:
    """Whoever puts a chunk lets it leave; of one that does not fit the rest is sent by the stream's own thread, in its place."""
    stream, left = conversation(), list[bytes]()

    def leave_half(chunk: bytes) -> Rest:
        left.append(chunk[:1])
        return Rest(chunk[1:])

    stream.leave_at_once(leave_half)
    assert stream.put(b"abc", 0.0) and stream.put(b"de", 0.0) and stream.reached
    assert left == [b"a"], "the second one waits for the rest of the first"
    end(stream)
    assert not stream.put(b"late", 0.0) or left == [b"a"]
    thread, sent = sent_by(stream)
    thread.join(WAIT)
    assert not thread.is_alive() and [*left, *sent][:3] == [b"a", b"bc", b"de"] and isinstance(sent[0], Rest)


def test_what_leaves_at_once_wakes_nobody() -> None:
    stream, left = conversation(), list[bytes]()

    def leave(chunk: bytes) -> Rest:
        left.append(chunk)
        return Rest()

    stream.leave_at_once(leave)
    assert all(stream.put(bytes([number]), 0.0) for number in range(10))
    assert left == [bytes([number]) for number in range(10)]
    stream.finish()
    thread, sent = sent_by(stream)
    thread.join(WAIT)
    assert not thread.is_alive() and sent == []


def test_a_frame_arrives_where_its_tensor_lies() -> None:
    """What follows a header is written straight into the frame's own memory, and taken without a copy."""
    tensor = torch.arange(1 << 16)
    reader, taken, frames = FrameReader(), list[bytes | memoryview](), list[Frame]()

    def take(chunk: bytes | memoryview) -> bool:
        taken.append(chunk)
        if (frame := reader.feed(chunk)) is not None:
            frames.append(frame)
        return True

    stream = Conversation(take, lambda failure: None, reader.room)
    (chunk,) = encode_frame(Kind.TENSOR, "x", 0, tensor)

    def pieces() -> Iterator[bytes | memoryview]:
        assert stream.room_for(len(chunk)) is None, "before its header nobody knows"
        yield chunk[:346]
        room = stream.room_for(len(chunk) - 346)
        assert room is not None and stream.room_for(len(chunk)) is None
        room = stream.room_for(len(chunk) - 346)
        assert room is not None
        room[:] = chunk[346:]
        yield room

    stream.receive(pieces())
    (frame,) = frames
    assert isinstance(frame.payload, torch.Tensor) and torch.equal(frame.payload, tensor)
    room = taken[1]
    assert isinstance(room, memoryview)
    tensor_end = frame.payload.data_ptr() + frame.payload.nbytes
    assert np.frombuffer(room, np.uint8).ctypes.data + len(room) == tensor_end
