"""Streams between two parties: chunks over one TLS connection, who is let in, and why a stream ended.

On the connection a stream is a sequence of parcels: one byte that says what it is, its length (4 bytes, little-endian), its bytes.
Who listens says first that the certificate was taken (OPEN), or refuses with its reason; then both send chunks until each has
said END. A connection that ends without it is broken.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator

from mpc_fl.crypto.certificates import Identity, host_name, verify_certificate
from mpc_fl.errors import (
    SAME_VERSION,
    HandshakeError,
    IdentityError,
    LinkError,
    MpcFlError,
    ProtocolError,
    RefusedError,
    printable,
)
from mpc_fl.links.conversation import Conversation, EndedStream, Rest, place
from mpc_fl.links.places import Places, Refusals
from mpc_fl.links.tls_sockets import TlsSocket, certificate_of, connected_to, context_of, listening, why

log = logging.getLogger(__name__)

LONGEST_CHUNK = (2 << 20) + (65 << 10)  # bytes: what is relayed is one chunk of 2 MB with its header, sealed
LONGEST_GREETING = 66 << 10
_FIRST_PIECE = 346  # bytes that hold any frame's header
_TLS_RECORD = 16 << 10
_LONGEST_DETAILS, _LONGEST_REFUSAL = 300, 4 << 10  # characters that are shown, bytes that are read
_HEAD = struct.Struct("<BI")
_HANDSHAKE, _ANSWER = 30.0, 60.0  # seconds for TLS where a party is dialled; for that and the first word where it dials
_CONNECT = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0  # seconds between attempts to dial
_FOR_NOBODY = 2.0  # seconds that a party which ends stays for a peer that has taken nothing from it yet
_GRACE = 0.2  # seconds that streams have to end by themselves when the server stops
_LAST_CHUNKS, _LAST_WORDS = (
    10.0,
    2.0,
)  # seconds for chunks that are queued when a stream is over; for the other end to end it, too


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


def _refusal_in(line: TlsSocket, what: int, length: int, deadline: float | None = None) -> MpcFlError:
    """What the other end says with a parcel that is a refusal. Raises `ProtocolError` for another one, `OSError`."""
    if what not in _REFUSALS or length > _LONGEST_REFUSAL:
        raise ProtocolError("a stream holds something that is no chunk, or too long a one", SAME_VERSION)
    return _REFUSALS[what](printable(line.take(length, deadline).decode("utf-8", "replace"), _LONGEST_DETAILS))


def _ended_by(refusal: MpcFlError) -> Iterator[bytes]:
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
                raise EndedStream(_refusal_in(line, what if dialled else Parcel.CHUNK, length))
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
        with contextlib.closing(conversation.chunks_to_send()) as leaving:
            for chunk in leaving:
                if isinstance(chunk, Rest):
                    line.send(chunk, goes_on)
                else:
                    send_parcel(line, Parcel.CHUNK, chunk, goes_on)
        refusal = None if dialled else conversation.refusal
        if refusal is None:
            send_parcel(line, Parcel.END, b"", goes_on)
        else:
            send_parcel(line, Parcel.REFUSED_FRAME, refusal.what.encode("utf-8", "replace")[:_LONGEST_REFUSAL], goes_on)
    except OSError:
        line.cut()  # what has come can still be read
    conversation.wait(None)
    reader.join(_LAST_WORDS)
    if reader.is_alive():
        line.cut()
    else:
        line.drain(_LAST_WORDS)
    reader.join()
    line.close()


# ---- the party that is dialled -----------------------------------------------------------------------------------------

# `admit(names in the client's certificate, first chunk)` returns this party's end, or raises to refuse the stream.
Admit = Callable[[set[str], bytes], Conversation]


class StreamServer:
    """Serves one address. Raises `LinkError` when the port is in use or not allowed.

    `refused(name, why)` hears of streams whose certificate does not hold. One thread accepts and waits for nobody; each connection
    has one of its own, which lets it in or refuses it, and then writes. Its lock guards which connections there are.
    """

    def __init__(
        self,
        identity: Identity,
        listen: str,
        admit: Admit,
        streams: int,
        greeting_timeout: float,
        refused: Callable[[str, str], object] = lambda name, why: None,
    ) -> None:
        self._identity = identity
        self._admit, self._refused = admit, refused
        self._places, self._refusals = Places(streams), Refusals(log)
        self._greeting_timeout = greeting_timeout
        self._context = context_of(identity, listens=True)
        self._lock = threading.Lock()
        self._lines: dict[TlsSocket, threading.Thread] = {}
        self._stopped = False
        try:
            self._listening = listening(listen)
        except LinkError as error:
            raise LinkError(f"{identity.name} {error.what}", error.fix) from None
        self._awake, self._wake = os.pipe()
        self._acceptor = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._acceptor.start()
        log.info("%s listens on %s", identity.name, listen)

    def _accept(self) -> None:
        by_number = {each.fileno(): each for each in self._listening}
        poll = select.poll()
        for number in (*by_number, self._awake):
            poll.register(number, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            if self._awake in ready:
                return
            for number in ready:
                try:
                    connection, address = by_number[number].accept()
                    self._begin(connection, f"{address[0]}:{address[1]}", str(address[0]))
                except BlockingIOError:
                    continue  # it has gone again
                except (OSError, RuntimeError) as error:  # no file or thread is left
                    kind = f"a connection could not be accepted: {type(error).__name__}"
                    self._refusals.count(kind, kind)
                    time.sleep(_FIRST_PAUSE)

    def _begin(self, connection: socket.socket, address: str, host: str) -> None:
        try:
            line = TlsSocket(connection, self._context)
        except OSError:
            return  # it has gone again
        thread = threading.Thread(target=self._serve, args=(line, address, host), name="link", daemon=True)
        with self._lock:
            self._lines[line] = thread
        try:
            thread.start()
        except RuntimeError:
            self._end(line)
            raise

    def _end(self, line: TlsSocket) -> None:
        line.close()
        with self._lock:
            self._lines.pop(line, None)

    def _serve(self, line: TlsSocket, address: str, host: str) -> None:
        """One connection: let it in or refuse it, then write."""
        held = contextlib.ExitStack()
        try:
            with self._places.unknown(host.encode(), line.cut):
                names, conversation = self._let_in(line, address, held)
            if conversation is not None:
                with held:
                    converse(line, conversation, names, dialled=False)
                if conversation.refusal is not None:
                    log.warning("refused a frame from %s: %s", names, conversation.refusal)
        finally:
            self._end(line)

    def _let_in(self, line: TlsSocket, address: str, held: contextlib.ExitStack) -> tuple[str, Conversation | None]:
        """The names in the certificate at its other end, and this party's end, None where it was refused."""
        try:
            line.shake_hands(_HANDSHAKE)
            names, certificate = certificate_of(line)
        except (OSError, ValueError) as error:
            reason = why(error) if isinstance(error, OSError) else "its certificate cannot be read"
            said = "refused a TLS hand-shake"
            self._refusals.count(f"{said}: {reason}", f"{said} from {address}: {reason}")
            line.drain(_LAST_WORDS)
            return "", None
        names = printable(names, _LONGEST_DETAILS)
        what, reason = Parcel.REFUSED_PARTY, ""
        tells = True
        try:
            try:
                verify_certificate(certificate, names, self._identity)  # TLS knows no revocation
            except IdentityError as error:
                self._refused(names, error.what)
                raise HandshakeError(error.what, error.fix) from None
            with self._places.silent(certificate, line.cut):
                send_parcel(line, Parcel.OPEN)
                greeting = self._first_chunk(line)
            held.enter_context(self._places.held(certificate))
            return names, self._admit({names}, greeting)
        except RefusedError as error:
            what, reason = Parcel.REFUSED_FULL, str(error)
        except MpcFlError as error:
            reason = error.what
        except OSError:
            reason, tells = "it sent no greeting", False  # it may be slow, and come again
        except Exception as error:  # noqa: BLE001 - a thread's last words would show what was received
            log.error("unexpected %s while admitting a link at %s", type(error).__name__, place(error))
            reason = f"unexpected {type(error).__name__} (a defect)"
        held.close()
        kind = f"refused a link ({names}): {reason}"
        self._refusals.count(kind, f"refused a link from {address} ({names}): {reason}")
        with contextlib.suppress(OSError):
            if tells:
                send_parcel(line, what, reason.encode("utf-8", "replace")[:_LONGEST_REFUSAL], lambda: False)
                line.drain(_LAST_WORDS)
        return names, None

    def _first_chunk(self, line: TlsSocket) -> bytes:
        """Empty when the stream ends at once. Raises `HandshakeError` for what is none, or too long for a greeting; `OSError`."""
        deadline = time.monotonic() + self._greeting_timeout
        what, length = next_parcel(line, deadline)
        if what == Parcel.END and not length:
            return b""
        if what != Parcel.CHUNK or length > LONGEST_GREETING:
            raise HandshakeError("it does not begin with a greeting of this version", SAME_VERSION)
        return line.take(length, deadline)

    def stop(self) -> None:
        """Cut all streams and free the port; once is enough."""
        with self._lock:
            stopped, self._stopped = self._stopped, True
        if stopped:
            return
        os.write(self._wake, b".")
        self._acceptor.join()
        for each in self._listening:
            each.close()
        os.close(self._awake)
        os.close(self._wake)
        with self._lock:
            lines = dict(self._lines)
        deadline = time.monotonic() + _GRACE
        for thread in lines.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for line, thread in lines.items():
            if thread.is_alive():
                line.cut()
        deadline = time.monotonic() + _LAST_WORDS
        for thread in lines.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._refusals.close()


# ---- the party that dials ----------------------------------------------------------------------------------------------


class Dialling:
    """Dials `address` until the peer of that name takes the certificate of `identity`, then holds the conversation with it.

    TLS verifies that the certificate there names the peer and is of this federation. It goes on until it is closed.
    """

    def __init__(self, identity: Identity, peer: str, address: str, conversation: Conversation) -> None:
        self._context = context_of(identity, listens=False)
        self._peer, self._address, self._conversation = peer, address, conversation
        self._refusals = Refusals(log)
        self._closed = threading.Event()
        self._line: TlsSocket | None = None
        threading.Thread(target=self._run, name=f"to-{peer}", daemon=True).start()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._conversation.over:
            if self._attempt():
                break
            if self._closed.wait(pause):
                self._conversation.receive(iter(()))
                break
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._refusals.close()

    def _attempt(self) -> bool:
        """Dial once. Whether the other end took the certificate or refused it; what followed is over then."""
        line, deadline = None, time.monotonic() + _ANSWER
        try:
            line = TlsSocket(connected_to(self._address, _CONNECT), self._context, host_name(self._peer))
            self._line = line
            if self._closed.is_set():
                raise ConnectionAbortedError
            line.shake_hands(_ANSWER)
            what, length = next_parcel(line, deadline)
            refusal = None if (what, length) == (Parcel.OPEN, 0) else _refusal_in(line, what, length, deadline)
        except (OSError, ProtocolError) as error:
            if line is not None:
                line.close()
            if isinstance(error, ProtocolError | ssl.SSLError):
                reason = error.what if isinstance(error, ProtocolError) else why(error)
                said = f"no link with {self._peer} at {self._address}: {reason}"
                self._refusals.count(said, said)
            return False
        if refusal is None:
            converse(line, self._conversation, self._peer, dialled=True)
        else:
            line.close()
            self._conversation.receive(_ended_by(refusal))
        return True

    def close(self) -> None:
        """Dial no more, and end the conversation at once."""
        self._closed.set()
        if self._line is not None:
            self._line.cut()


def wait_for_all(conversations: list[Conversation], seconds: float) -> None:
    """Let queued chunks leave and peers end their side, for at most `seconds` in all; less where nobody ever listened."""
    began = time.monotonic()
    for conversation in sorted(conversations, key=lambda conversation: not conversation.reached):
        stay = seconds if conversation.reached else min(seconds, _FOR_NOBODY)
        conversation.wait(max(0.0, began + stay - time.monotonic()))
