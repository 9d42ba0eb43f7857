"""Typed binary frames: what parties send each other. No pickle, no code, fixed limits.

One frame is a header and a payload. All integers are little-endian.

    magic 4 | version 1 | kind 1 | dtype 1 | dimensions 1 | sequence 8 | tag length 2 | payload length 8 |
    tag (UTF-8) | shape (8 bytes per dimension) | payload

`kind` is TENSOR (payload is the raw little-endian array), RELAY (a sealed chunk as uint8, its tag names the other end)
or one of the control kinds, whose payload is a JSON object (of ALIVE an empty one: it only says that its sender is there).
"""

from __future__ import annotations

import enum
import json
import math
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpc_fl.crypto.memory_layout import bytes_of
from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.links.traffic import TrafficCounter
from mpc_fl.parsing import parse_json

MAGIC = b"MPCF"
VERSION = 1
MAX_TAG = 256
MAX_DIMENSIONS = 8
MAX_PAYLOAD = 1 << 32
MAX_CONTROL = 1 << 20
MAX_GREETING = 1 << 16
CHUNK_BYTES = 2 << 20
MAX_RELAYED = CHUNK_BYTES + (64 << 10)  # one chunk with its header, sealed
_HEADER = struct.Struct("<4sBBBBQHQ")
LONGEST_HEADER = _HEADER.size + MAX_TAG + 8 * MAX_DIMENSIONS

_DTYPES: list[tuple[torch.dtype, int]] = [
    (torch.int64, 8),
    (torch.int32, 4),
    (torch.int16, 2),
    (torch.int8, 1),
    (torch.uint8, 1),
    (torch.bool, 1),
    (torch.float32, 4),
    (torch.float64, 8),
]
_NO_BYTES = np.empty(0, np.uint8)
_CODE_OF = {dtype: code for code, (dtype, _) in enumerate(_DTYPES)}


class Kind(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    WELCOME = 2
    TENSOR = 3
    OBJECT = 4
    ABORT = 5
    BYE = 6
    RELAY_GREETING = 7
    RELAY = 8
    ALIVE = 9


@dataclass(frozen=True)
class Frame:
    """One received message. `payload` is a tensor for TENSOR frames, a JSON object otherwise."""

    kind: Kind
    tag: str
    sequence: int
    payload: torch.Tensor | dict[str, Any]
    size: int


# What may be sent: bytes arrive as a uint8 tensor.
Payload = torch.Tensor | bytes | dict[str, Any]
# `observer(sender, frame)` sees each frame that a party receives, for tests of what it learns.
Observer = Callable[[str, Frame], None]


def encode_frame(kind: Kind, tag: str, sequence: int, payload: Payload) -> Iterator[bytes]:
    """Yield a frame in chunks of at most `CHUNK_BYTES` (plus the header). Tensors are sent in row order, also views.

    Bytes are sent like a uint8 tensor. What is relayed is one chunk: what a hospital has the relay pass on leaves whole or
    not at all, so a receiver that takes nothing meanwhile never finds half of it before the relay's own next frame.
    """
    encoded_tag = tag.encode()
    if len(encoded_tag) > MAX_TAG:
        raise ProtocolError("a frame tag is too long", "this is a defect of the program")
    if isinstance(payload, torch.Tensor):
        if payload.dtype not in _CODE_OF or payload.dim() > MAX_DIMENSIONS:
            raise ProtocolError(f"tensors of {payload.dtype} cannot be sent", "this is a defect of the program")
        code, shape, body = _CODE_OF[payload.dtype], tuple(payload.shape), bytes_of(payload).numpy().data
    elif isinstance(payload, bytes):
        code, shape, body = _CODE_OF[torch.uint8], (len(payload),), memoryview(payload)
    else:
        code, shape = 255, ()
        body = memoryview(json.dumps(payload, allow_nan=False).encode())
        if len(body) > MAX_CONTROL:
            raise ProtocolError("a control message is too long", "this is a defect of the program")
    head = _HEADER.pack(MAGIC, VERSION, kind, code, len(shape), sequence, len(encoded_tag), len(body))
    head += encoded_tag + b"".join(int(size).to_bytes(8, "little") for size in shape)
    first = MAX_RELAYED if kind == Kind.RELAY else CHUNK_BYTES
    yield b"".join((head, body[:first]))
    for start in range(first, len(body), CHUNK_BYTES):
        yield bytes(body[start : start + CHUNK_BYTES])


class FrameWriter:
    """Numbers the frames to one peer, cuts them into chunks and counts them: one frame at a time, whoever sends.

    Its lock is the writer's lock of the lock order in `mailboxes`.
    """

    def __init__(self, peer: str, counter: TrafficCounter) -> None:
        self.lock = threading.RLock()
        self.next_sequence = 0
        self._peer = peer
        self._counter = counter

    def put(self, kind: Kind, tag: str, payload: Payload, write: Callable[[bytes], None]) -> None:
        """Hand the next frame to `write`, chunk by chunk. Raises what `write` raises, `ProtocolError` like encoding."""
        with self.lock:
            traffic = self._counter.of(self._peer)
            for chunk in encode_frame(kind, tag, self.next_sequence, payload):
                write(chunk)
                traffic.bytes_sent += len(chunk)
            self.next_sequence += 1
            traffic.messages_sent += 1

    def put_at_once(self, kind: Kind, tag: str, payload: Payload, write: Callable[[bytes], bool]) -> bool:
        """Hand a frame of one chunk to `write`, without waiting for another one under way; whether it took it. Not counted."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            (chunk,) = encode_frame(kind, tag, self.next_sequence, payload)
            taken = write(chunk)
            self.next_sequence += int(taken)
            return taken
        finally:
            self.lock.release()


class FrameReader:
    """Turns the chunks of one stream back into frames and checks every field.

    With `greetings_only` the peer is a stranger: until `trust` only a greeting of at most `MAX_GREETING` bytes is read. What a
    header announces takes memory as it arrives, not before: pages of a fresh array exist once they are written.
    Raises `ProtocolError` for garbage, oversized, truncated, replayed or reordered frames; the stream is then dead.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD, greetings_only: bool = False) -> None:
        self._max_payload = max_payload
        self._greetings_only = greetings_only
        self._next_sequence = 0
        self._head: tuple[Kind, int, tuple[int, ...], str, int] | None = None
        self._body = _NO_BYTES
        self._filled = 0
        self._room: memoryview | None = None

    def trust(self) -> None:
        """The peer's greeting was checked: it may send frames of all kinds."""
        self._greetings_only = False

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and not ended; true at the end of a stream means it was truncated."""
        return self._head is not None

    def _refuse(self, why: str) -> ProtocolError:
        return ProtocolError(f"a frame was refused: {why}", SAME_VERSION)

    def _start(self, chunk: bytes) -> memoryview:
        if len(chunk) < _HEADER.size:
            raise self._refuse("its header is truncated")
        magic, version, kind, code, dimensions, sequence, tag_length, length = _HEADER.unpack_from(chunk)
        if magic != MAGIC:
            raise self._refuse("it does not begin with the frame magic")
        if version != VERSION:
            raise self._refuse(f"frame version {version} instead of {VERSION}")
        if kind not in Kind.__members__.values():
            raise self._refuse("unknown kind")
        if sequence != self._next_sequence:
            raise self._refuse("out of sequence (replayed, lost or reordered)")
        if dimensions > MAX_DIMENSIONS or tag_length > MAX_TAG:
            raise self._refuse("too many dimensions or too long a tag")
        start = _HEADER.size + tag_length + 8 * dimensions
        if len(chunk) < start:
            raise self._refuse("its header is truncated")
        try:
            tag = chunk[_HEADER.size : _HEADER.size + tag_length].decode()
        except UnicodeDecodeError:
            raise self._refuse("its tag is not UTF-8") from None
        sizes = chunk[_HEADER.size + tag_length : start]
        shape = tuple(int.from_bytes(sizes[8 * i : 8 * i + 8], "little") for i in range(dimensions))
        if self._greetings_only and (kind not in (Kind.HELLO, Kind.WELCOME) or length > MAX_GREETING):
            raise self._refuse("it is not a greeting")
        if kind in (Kind.TENSOR, Kind.RELAY):
            if code >= len(_DTYPES) or math.prod(shape) * _DTYPES[code][1] != length:
                raise self._refuse("dtype, shape and length do not agree")
            # Dimensions beside one of zero count, too: strides are made of them.
            largest = math.prod(max(size, 1) for size in shape) * _DTYPES[code][1]
            if largest > (self._max_payload if kind == Kind.TENSOR else MAX_RELAYED):
                raise self._refuse("it is larger than the limit")
        elif code != 255 or dimensions or length > (MAX_GREETING if kind == Kind.RELAY_GREETING else MAX_CONTROL):
            raise self._refuse("a control message is malformed")
        self._head = (Kind(kind), code, shape, tag, length)
        try:
            self._body = np.empty(length, np.uint8)
        except MemoryError:
            raise self._refuse("there is no memory for it") from None
        self._filled = 0
        return memoryview(chunk)[start:]

    def room(self, length: int) -> memoryview | None:
        """Where the next `length` bytes belong, if they are of a frame that has begun: whoever writes them there need not copy."""
        if self._head is None or not 0 < length <= len(self._body) - self._filled:
            return None
        self._room = self._body.data[self._filled : self._filled + length]
        return self._room

    def feed(self, chunk: bytes | memoryview) -> Frame | None:
        """Take the next chunk, or what was written where `room` said; return the frame it completes, if any.

        A chunk never spans two frames, and the first one of a frame holds its header.
        """
        room, self._room = self._room, None
        piece = memoryview(chunk) if self._head is not None else self._start(bytes(chunk))
        assert self._head is not None
        kind, code, shape, tag, length = self._head
        if self._filled + len(piece) > length or (not piece and self._filled < length):
            raise self._refuse("its payload does not have the announced length")
        if chunk is not room:
            self._body.data[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)
        if self._filled < length:
            return None
        body, sequence = self._body, self._next_sequence
        self._head, self._body = None, _NO_BYTES
        self._next_sequence += 1
        if kind in (Kind.TENSOR, Kind.RELAY):
            return Frame(kind, tag, sequence, _tensor(body, code, shape), length)
        try:
            payload = parse_json(body.tobytes())
        except ValueError as error:
            raise self._refuse(f"a control message is not one: {error}") from None
        if not isinstance(payload, dict):
            raise self._refuse("a control message is not a JSON object")
        return Frame(kind, tag, sequence, payload, length)


def _tensor(body: npt.NDArray[np.uint8], code: int, shape: tuple[int, ...]) -> torch.Tensor:
    dtype, _ = _DTYPES[code]
    if not body.size:
        return torch.zeros(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.from_numpy(body != 0).reshape(shape)
    return torch.frombuffer(body, dtype=dtype).reshape(shape)
