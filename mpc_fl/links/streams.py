"""Streams between two parties: chunks over one TLS connection, who is let in, and why a stream ended.

On the connection a stream is a sequence of parcels: one byte that says what it is, its length (4 bytes, little-endian), its bytes.
Who listens says first that the certificate was taken (OPEN), or refuses with its reason; then both send chunks until each has
said END. A connection that ends without it is broken.
"""

from __future__ import annotations

import enum
import struct
import threading
import time
from collections.abc import Callable, Iterator

from mpc_fl.errors import SAME_VERSION, HandshakeError, MpcFlError, ProtocolError, RefusedError, printable
from mpc_fl.links.conversation import Conversation, EndedStream, Rest
from mpc_fl.links.tls_sockets import TlsSocket

LONGEST_CHUNK = (2 << 20) + (65 << 10)  # bytes: what is relayed is one chunk of 2 MB with its header, sealed
_FIRST_PIECE = 346  # bytes that hold any frame's header
_TLS_RECORD = 16 << 10
LONGEST_DETAILS, LONGEST_REFUSAL = 300, 4 << 10  # of a reason: characters that are shown, bytes that are read
_HEAD = struct.Struct("<BI")
_FOR_NOBODY = 2.0  # seconds that a party which ends stays for a peer that has taken nothing from it yet
_LAST_CHUNKS = 10.0  # seconds for chunks that are queued when a stream is over
LAST_WORDS = 2.0  # seconds for the other end to end it, too


class Parcel(enum.IntEnum):
    """What comes next on a connection. A refusal holds its reason in UTF-8: what a party is or says first, a frame, no place."""

    OPEN = 1
    CHUNK = 2
    END = 3
    REFUSED_PARTY = 4
    REFUSED_FRAME = 5
    REFUSED_FULL = 6


_REFUSALS: dict[int, type[MpcFlError]] = {
    Parcel.REFUSED_PARTY: HandshakeError,
    Parcel.REFUSED_FRAME: ProtocolError,
    Parcel.REFUSED_FULL: RefusedError,
}


def refusal_in(line: TlsSocket, what: int, length: int, deadline: float | None = None) -> MpcFlError:
    """What the other end says with a parcel that is a refusal. Raises `ProtocolError` for another one, `OSError`."""
    if what not in _REFUSALS or length > LONGEST_REFUSAL:
        raise ProtocolError("a stream holds something that is no chunk, or too long a one", SAME_VERSION)
    return _REFUSALS[what](printable(line.take(length, deadline).decode("utf-8", "replace"), LONGEST_DETAILS))


def ended_by(refusal: MpcFlError) -> Iterator[bytes]:
    """A stream that the other end refused before anything came."""
    raise EndedStream(refusal)
    yield b""


def send_parcel(
    line: TlsSocket, what: Parcel, content: bytes = b"", goes_on: Callable[[], bool] = lambda: True
) -> None:
    """Send one parcel. Raises `OSError`."""
    first, rest = _begun(what, content)
    line.send(first, goes_on)
    line.send(rest, goes_on)


def _begun(what: Parcel, content: bytes) -> tuple[bytes, memoryview]:
    """A parcel as one record of TLS, and what follows."""
    first = _TLS_RECORD - _HEAD.size
    return _HEAD.pack(what, len(content)) + content[:first], memoryview(content)[first:]


def _send_at_once(line: TlsSocket, chunk: bytes) -> Rest:
    """Send a chunk as far as that waits for nobody; return the rest. What breaks is found by whoever sends the rest, or reads."""
    first, rest = _begun(Parcel.CHUNK, chunk)
    try:
        if unsent := line.send_at_once(first):
            return Rest(b"".join((unsent, rest)))
        return Rest(line.send_at_once(rest))
    except OSError:
        line.cut()
        return Rest()


def next_parcel(line: TlsSocket, deadline: float | None = None) -> tuple[int, int]:
    """What comes next, and how many bytes follow, neither of them checked. Raises `OSError`."""
    what, length = _HEAD.unpack(line.take(_HEAD.size, deadline))
    return what, length


def arriving(line: TlsSocket, conversation: Conversation, dialled: bool) -> Iterator[bytes | memoryview]:
    """The chunks that come, in pieces: where `conversation` has room for the rest of a frame, straight into it.

    Ends with the other end's END; raises `EndedStream` when it refuses or the connection breaks, `ProtocolError` for what is no
    stream. Only whom this party `dialled` may refuse: nobody who came by itself can end more than its own link.
    """
    try:
        while True:
            what, length = next_parcel(line)
            if what == Parcel.CHUNK and length <= LONGEST_CHUNK:
                yield from _pieces(line, conversation, length)
            elif what == Parcel.END and not length:
                return
            else:
                raise EndedStream(refusal_in(line, what if dialled else Parcel.CHUNK, length))
    except OSError:
        raise EndedStream(None) from None


def _pieces(line: TlsSocket, conversation: Conversation, length: int) -> Iterator[bytes | memoryview]:
    if not length:
        yield b""
    while length:
        if not conversation.wanted:
            line.pass_over(length)
            return
        piece: bytes | memoryview | None = conversation.room_for(length)
        if isinstance(piece, memoryview):
            line.fill(piece)
        else:
            piece = line.take(min(length, _FIRST_PIECE))
        length -= len(piece)
        yield piece


def converse(line: TlsSocket, conversation: Conversation, name: str, dialled: bool) -> None:
    """Read on a thread of its own and write on this one, until both sides have ended or the connection has; then close it."""
    chunks = arriving(line, conversation, dialled)
    reader = threading.Thread(target=conversation.receive, args=(chunks,), name=f"from-{name}", daemon=True)
    try:
        reader.start()
    except RuntimeError:  # the machine has no thread left
        line.close()
        conversation.receive(iter(()))
        return
    until = float("inf")

    def goes_on() -> bool:
        nonlocal until
        if conversation.over:
            until = min(until, time.monotonic() + _LAST_CHUNKS)
        return time.monotonic() < until

    try:
        conversation.leave_at_once(lambda chunk: _send_at_once(line, chunk))
        for chunk in conversation.chunks_to_send():
            if isinstance(chunk, Rest):
                line.send(chunk, goes_on)
            else:
                send_parcel(line, Parcel.CHUNK, chunk, goes_on)
        refusal = None if dialled else conversation.refusal
        if refusal is None:
            send_parcel(line, Parcel.END, b"", goes_on)
        else:
            send_parcel(line, Parcel.REFUSED_FRAME, refusal.what.encode("utf-8", "replace")[:LONGEST_REFUSAL], goes_on)
    except OSError:
        line.cut()  # what has come can still be read
    conversation.wait(None)
    reader.join(LAST_WORDS)
    if reader.is_alive():
        line.cut()
    else:
        line.drain(LAST_WORDS)
    reader.join()
    line.close()


def wait_for_all(conversations: list[Conversation], seconds: float) -> None:
    """Let queued chunks leave and peers end their side, for at most `seconds` in all; less where nobody ever listened."""
    began = time.monotonic()
    for conversation in sorted(conversations, key=lambda conversation: not conversation.reached):
        stay = seconds if conversation.reached else min(seconds, _FOR_NOBODY)
        conversation.wait(max(0.0, began + stay - time.monotonic()))
