"""The party that is dialled: accepts connections at its address, and lets streams in or refuses them with a reason."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from mpc_fl.crypto.certificates import Identity, verify_certificate
from mpc_fl.errors import SAME_VERSION, HandshakeError, IdentityError, LinkError, MpcFlError, RefusedError, printable
from mpc_fl.links.conversation import Conversation, place
from mpc_fl.links.places import Places, Refusals
from mpc_fl.links.streams import (
    LAST_WORDS,
    LONGEST_DETAILS,
    LONGEST_REFUSAL,
    Parcel,
    converse,
    next_parcel,
    send_parcel,
)
from mpc_fl.links.tls_sockets import ENDED, TlsSocket, certificate_of, context_of, listening, why

log = logging.getLogger(__name__)

_LONGEST_GREETING = 66 << 10  # bytes of a stream's first chunk
_HANDSHAKE = 30.0  # seconds for TLS
_PAUSE = 0.1  # seconds after which a machine without files or threads left is tried again
_LOOK = 1.0  # seconds between looks for connections that should have been let in or refused
_GRACE = 0.2  # seconds that streams have to end by themselves when the server stops

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
        self._let_in_until: dict[TlsSocket, float] = {}  # of `time.monotonic`
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
            ready = [number for number, _ in poll.poll(round(1000 * _LOOK))]
            if self._awake in ready:
                return
            self._cut_late()
            for number in ready:
                try:
                    connection, address = by_number[number].accept()
                    self._begin(connection, f"{address[0]}:{address[1]}", str(address[0]))
                except BlockingIOError:
                    continue  # it has gone again
                except (OSError, RuntimeError, MemoryError) as error:  # no file, thread or memory is left
                    kind = f"a connection could not be accepted: {type(error).__name__}"
                    self._refusals.count(kind, kind)
                    time.sleep(_PAUSE)

    def _begin(self, connection: socket.socket, address: str, host: str) -> None:
        try:
            line = TlsSocket(connection, self._context)
        except OSError:
            return  # it has gone again
        thread = threading.Thread(target=self._serve, args=(line, address, host), name="link", daemon=True)
        with self._lock:
            self._lines[line] = thread
            self._let_in_until[line] = time.monotonic() + _HANDSHAKE + self._greeting_timeout + 2 * LAST_WORDS
        try:
            thread.start()
        except RuntimeError:
            self._end(line)
            raise

    def _cut_late(self) -> None:
        """End connections whose time to be let in is over: records that hold nothing keep a thread inside OpenSSL beyond it."""
        now = time.monotonic()
        with self._lock:
            late = [line for line, until in self._let_in_until.items() if now > until]
        for line in late:
            line.cut()

    def _end(self, line: TlsSocket) -> None:
        line.close()
        with self._lock:
            self._lines.pop(line, None)
            self._let_in_until.pop(line, None)

    def _serve(self, line: TlsSocket, address: str, host: str) -> None:
        """One connection: let it in or refuse it, then write."""
        held = contextlib.ExitStack()
        try:
            with self._places.unknown(host.encode(), line.cut):
                names, conversation = self._let_in(line, address, held)
            with self._lock:
                self._let_in_until.pop(line, None)
            if conversation is not None:
                with held:
                    converse(line, conversation, names, dialled=False)
                if conversation.refusal is not None:
                    said = f"refused a frame from {names}"
                    self._refusals.count(said, f"{said}: {conversation.refusal}")
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
            level = logging.INFO if reason == ENDED else logging.WARNING  # whoever only looks whether somebody listens
            self._refusals.count(f"{said}: {reason}", f"{said} from {address}: {reason}", level)
            line.drain(LAST_WORDS)
            return "", None
        names = printable(names, LONGEST_DETAILS)
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
                send_parcel(line, what, reason.encode("utf-8", "replace")[:LONGEST_REFUSAL], lambda: False)
                line.drain(LAST_WORDS)
        return names, None

    def _first_chunk(self, line: TlsSocket) -> bytes:
        """Empty when the stream ends at once. Raises `HandshakeError` for what is none, or too long for a greeting; `OSError`."""
        deadline = time.monotonic() + self._greeting_timeout
        what, length = next_parcel(line, deadline)
        if what == Parcel.END and not length:
            return b""
        if what != Parcel.CHUNK or length > _LONGEST_GREETING:
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
        deadline = time.monotonic() + LAST_WORDS
        for thread in lines.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._refusals.close()
