"""Whoever reaches the port of a party, with or without a certificate: refused with a reason, in bounded time and memory, and a
genuine party gets in meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import Identity, host_name
from mpc_fl.errors import HandshakeError, IdentityError, LinkError, MpcFlError, ProtocolError
from mpc_fl.links import places, stream_server, streams, tls_sockets
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.dialling import Dialling
from mpc_fl.links.stream_server import StreamServer
from mpc_fl.links.streams import Parcel, next_parcel, send_parcel
from mpc_fl.links.tls_sockets import TlsSocket, context_of
from tests.support.dialling import dialled, end_of, stream_end
from tests.support.harness import free_ports
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAME, OTHER = "hospital-0", "hospital-1"
LONG = 60.0  # seconds, for what comes at once
GREETING, GENUINE = b"hello", b"it is me"


@dataclass
class Served:
    """A server that admits whoever says `GREETING`, what its streams took, how they ended; apart from it whoever says `GENUINE`."""

    port: int
    authority: Authority
    own: Identity
    genuine: Identity
    taken: list[bytes] = field(default_factory=list)
    ended: list[MpcFlError | None] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    let_in: list[Conversation] = field(default_factory=list)

    def admit(self, names: set[str], chunk: bytes) -> Conversation:
        if chunk not in (GREETING, GENUINE):
            raise HandshakeError("the first frame is not a greeting")

        def take(chunk: bytes | memoryview) -> bool:
            if chunk == b"refuse":
                raise ProtocolError("a frame was refused: it says so")
            self.taken.append(bytes(chunk))
            return True

        listed, ended = (
            (self.conversations, self.ended) if chunk == GREETING else (self.let_in, list[MpcFlError | None]())
        )
        listed.append(Conversation(take, ended.append))
        return listed[-1]

    def dial(self) -> tuple[Conversation, list[bytes], list[MpcFlError | None]]:
        """The genuine party's end of a stream, what it took, and how it ended."""
        taken, ended = list[bytes](), list[MpcFlError | None]()
        conversation = Conversation(lambda chunk: taken.append(bytes(chunk)) is None, ended.append)
        conversation.put(GENUINE, LONG)
        Dialling(self.genuine, NAME, f"127.0.0.1:{self.port}", conversation)
        return conversation, taken, ended

    def require_that_the_genuine_gets_in(self) -> None:
        before, (conversation, taken, ended) = len(self.let_in), self.dial()
        eventually(lambda: len(self.let_in) > before, LONG, "it is admitted")
        own = self.let_in[-1]
        assert conversation.put(b"ask", LONG) and own.put(b"answer", LONG)
        eventually(lambda: self.taken[-1:] == [b"ask"] and taken == [b"answer"], LONG, "both have heard each other")
        conversation.finish()
        own.finish()
        assert conversation.wait(LONG) and own.wait(LONG)
        eventually(lambda: ended == [None], LONG, "it ended well")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(stream_server, "_HANDSHAKE", 2.0)
    authority = Authority(datetime.timedelta(hours=1))
    state = Served(free_ports(1)[0], authority, authority.issue(NAME), authority.issue(OTHER))
    server = StreamServer(state.own, f"127.0.0.1:{state.port}", state.admit, 4, 2.0)
    yield state
    try:
        state.require_that_the_genuine_gets_in()
    finally:
        server.stop()
    assert not server._lines
    with socket.create_server(("127.0.0.1", state.port)):
        pass  # the port is free again


def _ends(connection: socket.socket) -> bool:
    """Whether the other end closes the connection in time."""
    connection.settimeout(LONG)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "it speaks no TLS"),
        (b"GET / HTTP/1.1\r\n\r\n", "it speaks no TLS"),
        (bytes(100), "it speaks no TLS"),
        (b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000, "."),
    ],
)
def test_garbage_before_tls(said: bytes, reason: str, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(said)
        assert _ends(connection)
    eventually(lambda: "refused a TLS hand-shake from 127.0.0.1:" in caplog.text, LONG, "it is logged")
    assert reason in caplog.records[-1].getMessage()


def test_a_hand_shake_that_stalls_ends_and_holds_nobody_up(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as silent:
        with socket.create_connection(("127.0.0.1", served.port)) as half:
            half.sendall(b"\x16\x03\x01\x02\x00")  # a record is announced, and never comes
            served.require_that_the_genuine_gets_in()
            assert _ends(silent) and _ends(half)
    eventually(lambda: "it took too long" in caplog.text, LONG, "it is logged")


def _client(served: Served, **versions: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=served.genuine.authority.decode())
    for name, version in versions.items():
        setattr(context, name, version)
    return context


@pytest.mark.parametrize(
    ("versions", "reason"),
    [({}, "it showed no certificate"), ({"maximum_version": ssl.TLSVersion.TLSv1_2}, "it speaks no TLS 1.3")],
    ids=["no-certificate", "tls-1.2"],
)
def test_tls_that_proves_nothing_or_is_old(
    versions: dict[str, ssl.TLSVersion], reason: str, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", served.port), LONG) as connection:
        with pytest.raises(OSError):  # noqa: PT011 - of TLS 1.3 it is told when it reads
            line = _client(served, **versions).wrap_socket(connection, server_hostname=host_name(NAME))
            line.settimeout(LONG)
            if not line.recv(1):
                raise ConnectionResetError
    eventually(lambda: reason in caplog.text, LONG, "it is logged")


def test_no_session_can_be_resumed(served: Served) -> None:
    """A ticket would let its holder in without proving a certificate that may have been revoked meanwhile."""
    with dialled(NAME, served.port, served.genuine) as line:
        send_parcel(line, Parcel.CHUNK, GREETING)
        assert next_parcel(line, time.monotonic() + LONG) == (Parcel.OPEN, 0)
        session = line._connection.session
        assert line._connection.version() == "TLSv1.3" and (session is None or not session.has_ticket)


def test_a_slow_greeting_ends(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Byte by byte, each in time, but not all of them."""
    with dialled(NAME, served.port, served.genuine) as line:
        stop = threading.Event()

        def drip() -> None:
            try:
                for byte in struct.pack("<BI", Parcel.CHUNK, 60_000) + bytes(60_000):
                    line.send(bytes([byte]))
                    if stop.wait(0.05):
                        return
            except OSError:
                pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(OSError, match="ended|reset"):
            end_of(line, LONG)
        stop.set()
        thread.join(LONG)
    assert "it sent no greeting" in caplog.text


@pytest.mark.parametrize(
    ("parcel", "reason"),
    [
        (
            struct.pack("<BI", Parcel.CHUNK, (1 << 32) - 1),
            "REFUSED_PARTY: it does not begin with a greeting of this version",
        ),
        (struct.pack("<BI", Parcel.CHUNK, 1 << 17), "REFUSED_PARTY: it does not begin with a greeting of this version"),
        (struct.pack("<BI", 99, 0), "REFUSED_PARTY: it does not begin with a greeting of this version"),
        (
            struct.pack("<BI", Parcel.REFUSED_PARTY, 4) + b"stop",
            "REFUSED_PARTY: it does not begin with a greeting of this version",
        ),
        (struct.pack("<BI", Parcel.END, 0), "REFUSED_PARTY: the first frame is not a greeting"),
        (struct.pack("<BI", Parcel.CHUNK, 0), "REFUSED_PARTY: the first frame is not a greeting"),
    ],
)
def test_first_words_that_are_none(parcel: bytes, reason: str, served: Served) -> None:
    with dialled(NAME, served.port, served.genuine) as line:
        line.send(parcel)
        assert end_of(line, LONG) == reason


@pytest.mark.parametrize(
    ("parcel", "reason"),
    [
        (struct.pack("<BI", Parcel.CHUNK, (1 << 32) - 1), "no chunk, or too long"),
        (struct.pack("<BI", Parcel.CHUNK, streams.LONGEST_CHUNK + 1), "no chunk, or too long"),
        (struct.pack("<BI", Parcel.END, 5), "no chunk, or too long"),
        (struct.pack("<BI", Parcel.OPEN, 0), "no chunk, or too long"),
        (struct.pack("<BI", Parcel.REFUSED_PARTY, 4) + b"stop", "no chunk, or too long"),
        (struct.pack("<BI", Parcel.CHUNK, 6) + b"refuse", "it says so"),
    ],
)
def test_what_is_no_chunk_ends_the_stream_with_the_reason(parcel: bytes, reason: str, served: Served) -> None:
    """Nothing of the announced length is set aside before it comes; and who dials can refuse nobody."""
    with dialled(NAME, served.port, served.genuine) as line:
        send_parcel(line, Parcel.CHUNK, GREETING)
        line.send(parcel + bytes(1 << 20))
        said = end_of(line, LONG)
    assert said.startswith("REFUSED_FRAME: ") and reason in said
    eventually(lambda: len(served.ended) == 1, LONG, "its end is told")
    assert isinstance(served.ended[0], ProtocolError)


@pytest.mark.parametrize("how", ["half-closed", "reset in a chunk", "half-closed in a chunk"])
def test_a_connection_that_breaks_is_no_end(how: str, served: Served) -> None:
    """It ended without END: nobody is told that all was said."""
    with dialled(NAME, served.port, served.genuine) as line:
        send_parcel(line, Parcel.CHUNK, GREETING)
        assert next_parcel(line, time.monotonic() + LONG) == (Parcel.OPEN, 0)
        eventually(lambda: len(served.conversations) == 1, LONG, "it is admitted")
        if "chunk" in how:
            line.send(struct.pack("<BI", Parcel.CHUNK, 1 << 20) + bytes(1 << 18))
            eventually(lambda: len(served.taken) >= 1, LONG, "the chunk has begun")
        if "reset" in how:
            line._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.close()
        else:
            line.drain(0.0)
        eventually(lambda: served.ended == [None], LONG, "it is found")
        assert served.conversations[0].over and served.conversations[0].refusal is None


def test_a_peer_that_reads_nothing_is_let_go_when_its_stream_is_over(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_LAST_CHUNKS", 0.5)
    with dialled(NAME, served.port, served.genuine) as line:
        send_parcel(line, Parcel.CHUNK, GREETING)
        eventually(lambda: len(served.conversations) == 1, LONG, "it is admitted")
        conversation = served.conversations[0]
        chunk, put = bytes(2 << 20), 0
        while conversation.put(chunk, 0.3):
            put += 1
            assert put < 100, "what is queued is bounded"
        conversation.cut()
        assert conversation.wait_until_left(LONG)


@contextlib.contextmanager
def _records_that_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Inside, whoever listens reads for as long as the connection is there, as OpenSSL does while new keys come fast enough.

    The event: somebody reads so.
    """
    original, goes_on, reads = ssl.SSLSocket.recv_into, threading.Event(), threading.Event()

    def recv_into(self: ssl.SSLSocket, memory: memoryview) -> int:
        if self.server_side and goes_on.is_set():
            ended = select.poll()
            ended.register(self.fileno(), select.POLLRDHUP)
            reads.set()
            ended.poll(10 * 1000 * LONG)
        return original(self, memory)

    monkeypatch.setattr(ssl.SSLSocket, "recv_into", recv_into)
    goes_on.set()
    yield reads
    goes_on.clear()


def test_records_that_hold_nothing_before_a_greeting_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_server, "LAST_WORDS", 0.1)
    with _records_that_hold_nothing(monkeypatch) as reads, dialled(NAME, served.port, served.genuine) as line:
        assert reads.wait(LONG)
        assert _ends(line._connection)


def test_records_that_hold_nothing_hold_up_nobody_who_sends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are sent by one thread to all peers: it must not wait for one of them, nor any party without a deadline."""
    monkeypatch.setattr(tls_sockets, "_LOOK", 0.1)
    with dialled(NAME, served.port, served.genuine) as line:
        send_parcel(line, Parcel.CHUNK, GREETING)
        eventually(lambda: len(served.conversations) == 1, LONG, "it is admitted")
        with _records_that_hold_nothing(monkeypatch) as reads:
            line.send(bytes([Parcel.CHUNK]))
            assert reads.wait(LONG)
            sender = threading.Thread(target=served.conversations[0].put, args=(b"a sign", 0.0), daemon=True)
            sender.start()
            sender.join(LONG)
            assert not sender.is_alive()
            eventually(lambda: served.ended == [None], LONG, "the connection is given up")


def test_more_connections_than_may_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that say nothing make room, the oldest first; the party accepts all the while."""
    monkeypatch.setattr(stream_server, "_HANDSHAKE", 2 * LONG)
    crowd = [socket.create_connection(("127.0.0.1", served.port), LONG) for _ in range(places._UNKNOWN + 40)]
    try:
        for connection in crowd[:20]:
            assert _ends(connection), "the oldest make room"
        served.require_that_the_genuine_gets_in()
    finally:
        for connection in crowd:
            connection.close()


def test_a_certificate_of_another_authority(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    stranger = Authority(datetime.timedelta(hours=1)).issue(OTHER)
    mixed = Identity(OTHER, stranger.certificate, served.own.authority, stranger.key)
    said = stream_end(NAME, served.port, mixed, [GREETING], LONG)
    assert said == "BROKEN: the other end says: unknown ca"
    eventually(lambda: "refused a TLS hand-shake" in caplog.text, LONG, "it is logged")


def _answered_by(port: int, identity: Identity, parcel: bytes) -> threading.Thread:
    """Somebody at the address who is dialled, and answers with this."""

    def serve(listening: socket.socket) -> None:
        with listening:
            connection, _ = listening.accept()
            line = TlsSocket(connection, context_of(identity, listens=True))
            try:
                line.shake_hands(LONG)
                line.send(parcel)
                line.drain(LONG)
            except OSError:
                pass
            line.close()

    thread = threading.Thread(target=serve, args=(socket.create_server(("127.0.0.1", port)),), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("who", "parcel", "reason"),
    [
        (NAME, struct.pack("<BI", Parcel.REFUSED_PARTY, 1 << 30), "no chunk, or too long"),
        (NAME, b"\x00\x00\x12\x04\x00", "no chunk, or too long"),  # what another version of this program would say
        ("hospital-2", struct.pack("<BI", Parcel.OPEN, 0), "Hostname mismatch"),
    ],
)
def test_whoever_dials_goes_on_until_the_true_party_is_there(
    who: str, parcel: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    authority, (port,) = Authority(datetime.timedelta(hours=1)), free_ports(1)
    own, genuine = authority.issue(NAME), authority.issue(OTHER)
    impostor = _answered_by(port, authority.issue(who), parcel)
    served = Served(port, authority, own, genuine)
    conversation, _, ended = served.dial()
    impostor.join(LONG)
    eventually(lambda: reason in caplog.text, LONG, "it is logged")
    server = StreamServer(own, f"127.0.0.1:{port}", served.admit, 4, LONG)
    eventually(lambda: len(served.let_in) == 1, LONG, "it is admitted")
    assert ended == []
    server.stop()
    assert conversation.wait(LONG)


def test_a_listener_that_cannot_listen_says_so_in_one_line() -> None:
    own = Authority(datetime.timedelta(hours=1)).issue(NAME)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        for address in (f"127.0.0.1:{busy.getsockname()[1]}", "127.0.0.1:99999", "203.0.113.1:5000", "nowhere"):
            with pytest.raises(LinkError, match=f"{NAME} cannot listen on {address}: the port is in use or not"):
                StreamServer(own, address, lambda names, chunk: pytest.fail("nobody comes"), 4, LONG)


@pytest.mark.parametrize("address", ["localhost", "[::1]"])
def test_names_and_addresses_of_version_6(address: str, caplog: pytest.LogCaptureFixture) -> None:
    if address == "[::1]":
        with socket.socket(socket.AF_INET6) as attempt:
            try:
                attempt.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no address of version 6")
    caplog.set_level(logging.INFO)
    authority, (port,) = Authority(datetime.timedelta(hours=1)), free_ports(1)
    served = Served(port, authority, authority.issue(NAME), authority.issue(OTHER))
    server = StreamServer(served.own, f"{address}:{port}", served.admit, 4, LONG)
    conversation = Conversation(lambda chunk: True, lambda failure: None)
    conversation.put(GREETING, LONG)
    dialling = Dialling(served.genuine, NAME, f"{address}:{port}", conversation)
    eventually(lambda: len(served.conversations) == 1, LONG, "it is admitted")
    dialling.close()
    server.stop()
    assert conversation.wait(LONG)


def test_a_key_is_written_nowhere_and_a_useless_one_is_told_of() -> None:
    own = Authority(datetime.timedelta(hours=1)).issue(NAME)
    useless = Identity(NAME, own.certificate, own.authority, b"-----BEGIN PRIVATE KEY-----\nAAAA\n")
    for identity in (useless, Identity(NAME, own.certificate, own.authority, b"x" * (1 << 20))):
        with pytest.raises(IdentityError, match="is of no use for TLS") as caught:
            context_of(identity, listens=True)
        assert "AAAA" not in str(caught.value)


def test_a_closed_connection_is_used_by_nobody(served: Served) -> None:
    """OpenSSL knows a socket by its number, which the next file that is opened may have."""
    with dialled(NAME, served.port, served.genuine) as line:
        line.close()
        for use in (lambda: line.send(b"x"), lambda: line.send_at_once(b"x"), lambda: line.take(1, time.monotonic())):
            with pytest.raises(ConnectionAbortedError, match="was closed"):
                use()
        line.cut()
