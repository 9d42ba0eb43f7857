"""Dialling a party as a program of one's own would: a connection with an identity, and what comes of a stream of raw chunks."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator

from mpc_fl.crypto.certificates import Identity, host_name
from mpc_fl.links.streams import Parcel, next_parcel, send_parcel
from mpc_fl.links.tls_sockets import TlsSocket, context_of, why


@contextlib.contextmanager
def dialled(name: str, port: int, identity: Identity, seconds: float = 10.0) -> Iterator[TlsSocket]:
    """A connection with the party `name` on this machine, once it listens, with the certificate of `identity`. Raises `OSError`."""
    connection = _connected(port, time.monotonic() + seconds)
    line = TlsSocket(connection, context_of(identity, listens=False), host_name(name))
    try:
        line.shake_hands(seconds)
        yield line
    finally:
        line.cut()
        line.close()


def _connected(port: int, deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 10.0)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def end_of(line: TlsSocket, seconds: float) -> str:
    """Wait for the end of a stream; "END", or the kind of refusal and its reason. Raises `OSError`."""
    deadline = time.monotonic() + seconds
    while True:
        what, length = next_parcel(line, deadline)
        said = line.take(length, deadline)
        if what not in (Parcel.OPEN, Parcel.CHUNK):
            return f"{Parcel(what).name}: {said.decode()}" if said else Parcel(what).name


def stream_end(name: str, port: int, identity: Identity, chunks: Iterable[bytes], seconds: float) -> str:
    """Dial as `dialled`, send, wait for the end of the stream: as `end_of` says, or "BROKEN" with the reason."""
    try:
        with dialled(name, port, identity, seconds) as line:
            with contextlib.suppress(OSError):  # it may be refused meanwhile
                for chunk in chunks:
                    send_parcel(line, Parcel.CHUNK, chunk)
                send_parcel(line, Parcel.END)
            return end_of(line, seconds)
    except OSError as error:
        return f"BROKEN: {why(error)}"
