"""TLS 1.3 over TCP with certificates on both sides: one connection, read by one thread and written by another.

No session is resumed, so each connection proves both certificates anew. What the bytes mean is the matter of `streams`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

from cryptography import x509

from mpc_fl.crypto.certificates import ASK_ADMINISTRATOR, Identity, pem
from mpc_fl.errors import IdentityError, LinkError

_LONGEST_SECRET = 16 << 10  # bytes of a key or certificate in PEM; a pipe holds 64 KB
_BACKLOG = 1024  # connections that the system keeps until they are accepted
_LOOK = 1.0  # seconds between looks whether a sender that waits for room may go on waiting
_LOOKS = 10  # at a call of OpenSSL that does not end; of a machine that stands still meanwhile one passes
_AT_ONCE = 0.1  # seconds for a call that is under way, before what was to leave at once is queued
_SCRATCH = 64 << 10
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}  # a machine that is gone is found in 20 s
ENDED = "it ended the connection"
_REASONS = {
    "HTTP_REQUEST": "it speaks no TLS",
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
}


# ---- what a party proves and accepts -----------------------------------------------------------------------------------


def context_of(identity: Identity, listens: bool) -> ssl.SSLContext:
    """How a party that `listens`, or dials, proves its identity and checks that the other end is of its federation.

    Raises `IdentityError` for a key or certificate that TLS cannot use.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET
    if listens:
        context.num_tickets = 0
    try:
        with _readable(identity.certificate) as certificate, _readable(identity.key) as key:
            context.load_cert_chain(certificate, key, password="")
        context.load_verify_locations(cadata=identity.authority.decode("ascii"))
    except (OSError, ValueError):
        raise IdentityError(
            f"the key or a certificate of {identity.name} is of no use for TLS", ASK_ADMINISTRATOR
        ) from None
    return context


@contextlib.contextmanager
def _readable(text: bytes) -> Iterator[str]:
    """A path at which `text` can be read once. It is a pipe's: a key is written to no disk."""
    if len(text) > _LONGEST_SECRET:
        raise ValueError("too long for a key or certificate")
    reading, writing = os.pipe()
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(text)
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)


def why(error: OSError) -> str:
    """Why no TLS connection came about, or why it ended, in words of this program or of OpenSSL; nothing that a peer wrote."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLEOFError):
        return ENDED
    if isinstance(error, ssl.SSLError) and error.reason:
        alert = error.reason.partition("_ALERT_")[2]
        said = f"the other end says: {alert.replace('_', ' ').lower()}"
        return _REASONS.get(error.reason) or (said if alert else error.reason.replace("_", " ").lower())
    if isinstance(error, TimeoutError):
        return "it took too long"
    return (error.strerror or ENDED).lower()


# ---- addresses ---------------------------------------------------------------------------------------------------------


def _host_and_port(address: str) -> tuple[str, int]:
    """Raises `ValueError` for what is no host:port."""
    host, _, port = address.rpartition(":")
    if not 0 <= int(port) < 1 << 16:  # the system would take it modulo 2^16
        raise ValueError(f"there is no port {port}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listening(address: str) -> list[socket.socket]:
    """Sockets that listen on all addresses of a host:port that this machine has. Raises `LinkError` when there is none."""
    sockets: list[socket.socket] = []
    try:
        host, port = _host_and_port(address)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, place in dict.fromkeys(found):
            try:
                both = _serves_both(family, host)
                opened = socket.create_server(place[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)
                opened.setblocking(False)
                sockets.append(opened)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except (OSError, ValueError):
        for opened in sockets:
            opened.close()
        sockets = []
    if not sockets:
        raise LinkError(
            f"cannot listen on {address}: the port is in use or not allowed",
            "choose another address in federation.addresses, or free the port",
        )
    return sockets


def _serves_both(family: int, host: str) -> bool:
    """Whether an address of version 6 stands for all of version 4, too."""
    return family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()


def connected_to(address: str, seconds: float) -> socket.socket:
    """A TCP connection to host:port. Raises `OSError`."""
    try:
        return socket.create_connection(_host_and_port(address), seconds)
    except ValueError:
        raise OSError(errno.EINVAL, "it is no address") from None


# ---- a connection ------------------------------------------------------------------------------------------------------


class TlsSocket:
    """One TLS connection. One thread reads it and another writes it; any may `cut` it, and whoever made it closes it last.

    OpenSSL takes one call at a time for a connection: each is made under its lock, and none waits inside. But reading goes on as
    long as records come that hold nothing (new keys, tickets), of which TLS allows any number: whoever waits for such a call
    gives the connection up after some seconds.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, host: str | None = None) -> None:
        """`host` must be in the certificate of whom this party dialled; None where it was dialled. Raises `OSError`."""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            self._connection = context.wrap_socket(
                connection, server_side=host is None, do_handshake_on_connect=False, server_hostname=host
            )
        except OSError:
            connection.close()
            raise
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def _held(self, at_once: bool = False) -> Iterator[ssl.SSLSocket]:
        """For one call. Once closed there is none: OpenSSL would use whatever file has the number of the socket now.

        Raises `TimeoutError` where another call does not end.
        """
        seconds, times = (_AT_ONCE, 1) if at_once else (_LOOK, _LOOKS)
        if not any(self._lock.acquire(timeout=seconds) for _ in range(times)):
            raise TimeoutError
        try:
            if self._closed:
                raise ConnectionAbortedError("the connection was closed")
            yield self._connection
        finally:
            self._lock.release()

    def shake_hands(self, seconds: float) -> None:
        """Prove and check certificates, within `seconds`. Raises `OSError` (`why` explains it)."""
        self._connection.settimeout(seconds)
        self._connection.do_handshake()
        self._connection.setblocking(False)

    def certificate(self) -> x509.Certificate:
        """What the other end has proven to own the key of. Raises `ValueError` when it cannot be read."""
        return x509.load_der_x509_certificate(self._connection.getpeercert(binary_form=True) or b"")

    def fill(self, memory: memoryview, deadline: float | None = None) -> None:
        """Read until `memory` is full. Raises `OSError`, also when the connection ends before or `deadline` passes."""
        filled = 0
        while filled < len(memory):
            count = self._receive(memory[filled:], deadline)
            if not count:
                raise ConnectionResetError("the connection ended")
            filled += count

    def take(self, length: int, deadline: float | None = None) -> bytes:
        """The next bytes. Raises as `fill`."""
        memory = bytearray(length)
        self.fill(memoryview(memory), deadline)
        return bytes(memory)

    def pass_over(self, length: int) -> None:
        """Read and forget so many bytes. Raises as `fill`."""
        scratch = memoryview(bytearray(min(length, _SCRATCH)))
        while length:
            piece = scratch[:length]
            self.fill(piece)
            length -= len(piece)

    def drain(self, seconds: float) -> None:
        """Say that nothing follows, then read and forget until the other end says so, too, for at most so long.

        Closed with something unread, a connection is torn down, and what was said last may be lost. Nobody reads it any more.
        """
        scratch, deadline, plain = bytearray(_SCRATCH), time.monotonic() + seconds, socket.socket
        with contextlib.suppress(OSError):  # it has ended
            plain.shutdown(self._connection, socket.SHUT_WR)  # of TCP: the methods of `ssl` want TLS to be whole
            self._connection.setblocking(False)
            while self._wait(select.POLLIN, deadline - time.monotonic()):
                if not plain.recv_into(self._connection, scratch):
                    return

    def _receive(self, memory: memoryview, deadline: float | None) -> int:
        while True:
            with self._held() as connection:
                try:
                    return connection.recv_into(memory)
                except ssl.SSLWantReadError:
                    event = select.POLLIN
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
            if not self._wait(event, None if deadline is None else deadline - time.monotonic()):
                raise TimeoutError

    def send(self, data: bytes | memoryview, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Send all of `data`; whoever waits for room asks each second whether it `goes_on`. Raises `OSError`."""
        rest = memoryview(data)
        while rest:
            with self._held() as connection:
                try:
                    rest = rest[connection.send(rest) :]
                    continue
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
                except ssl.SSLWantReadError:
                    event = select.POLLIN
            while not self._wait(event, _LOOK):
                if not goes_on():
                    raise TimeoutError

    def send_at_once(self, data: bytes | memoryview) -> memoryview:
        """Send what leaves without waiting; return the rest, which must be sent before anything else. Raises `OSError`."""
        rest = memoryview(data)
        with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError, TimeoutError):
            while rest:
                with self._held(at_once=True) as connection:
                    rest = rest[connection.send(rest) :]
        return rest

    def _wait(self, event: int, seconds: float | None) -> bool:
        poll, number = select.poll(), self._connection.fileno()
        if number < 0:
            raise ConnectionAbortedError("the connection was closed")
        poll.register(number, event)
        return bool(poll.poll(None if seconds is None else max(0, round(1000 * seconds))))

    def cut(self) -> None:
        """End the connection: whoever reads or writes it finds out at once."""
        with contextlib.suppress(OSError):  # it has ended
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back: whoever uses it from now on is told that it is closed."""
        with self._lock:
            self._closed = True
            self._connection.close()


def certificate_of(line: TlsSocket) -> tuple[str, bytes]:
    """The name in the certificate at the other end of a connection, and the certificate as PEM. Raises `ValueError`."""
    certificate = line.certificate()
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    return ", ".join(names), pem(certificate)
