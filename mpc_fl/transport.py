"""Links between parties: gRPC streams with mutual TLS, typed frames, a deadline on every wait.

Each party serves one port and dials every peer; the stream a party dials carries what it sends. A stream begins with a
HELLO (name, session, configuration digest, an ephemeral X25519 key) that the peer checks against the dialler's
certificate and answers with WELCOME or refuses with the reason. A party that ends well says BYE; one that fails says
ABORT with its reason; a stream that ends without either is a lost party. This module moves bytes and does no arithmetic.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core would write to the user's terminal

import grpc  # noqa: E402
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpc_fl import __version__
from mpc_fl.errors import HandshakeError, LinkError, MpcFlError, PeerLostError, ProtocolError
from mpc_fl.frames import Frame, FrameReader, Kind, encode_frame
from mpc_fl.identity import Identity, host_name
from mpc_fl.stream_cipher import Seed

log = logging.getLogger(__name__)

_METHOD = "/mpc_fl.Link/Send"
_OUTGOING_CHUNKS = 16
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),  # a party that computes for minutes still pings; that is no attack
]

Observer = Callable[[str, Frame], None]


@dataclass(frozen=True)
class Agreement:
    """What all parties of a run must agree on before anything else is sent."""

    session: str
    digest: str
    task: str


@dataclass
class Traffic:
    """Bytes and messages of one peer in one phase."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    waits: int = 0
    seconds_waited: float = 0.0


@dataclass
class _Peer:
    name: str
    address: str
    outgoing: queue.Queue[bytes | None] = field(default_factory=lambda: queue.Queue(_OUTGOING_CHUNKS))
    next_sequence: int = 0
    send_lock: threading.Lock = field(default_factory=threading.Lock)
    inbox: dict[str, collections.deque[Frame]] = field(
        default_factory=lambda: collections.defaultdict(collections.deque)
    )
    public_key: bytes | None = None
    welcomed: bool = False
    stream_open: bool = False
    closed: bool = False
    failure: MpcFlError | None = None


class Links:
    """This party's links to its peers. Use as a context manager; leaving it with an error tells the peers why."""

    def __init__(
        self,
        identity: Identity,
        listen: str,
        peers: dict[str, str],
        agreement: Agreement,
        connect_timeout: float,
        receive_timeout: float,
        observer: Observer | None = None,
    ) -> None:
        self.name = identity.name
        self._identity = identity
        self._listen = listen
        self._agreement = agreement
        self._connect_timeout = connect_timeout
        self._receive_timeout = receive_timeout
        self._observer = observer
        self._peers = {name: _Peer(name, address) for name, address in peers.items()}
        self._key = X25519PrivateKey.generate()
        self._changed = threading.Condition()
        self._closing = False
        self._phase = "connect"
        self.traffic: dict[str, dict[str, Traffic]] = {}
        self.phase_seconds: dict[str, float] = {}
        self._phase_began = time.monotonic()
        self._server: grpc.Server | None = None
        self._channels: list[grpc.Channel] = []

    # ---- connecting ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Links:
        try:
            self._serve()
            for peer in self._peers.values():
                self._dial(peer)
            self._await_all_peers()
        except BaseException as error:
            self._stop(error)
            raise
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._stop(error)

    def _hello(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": __version__,
            "session": self._agreement.session,
            "digest": self._agreement.digest,
            "task": self._agreement.task,
            "public_key": self._key.public_key().public_bytes_raw().hex(),
        }

    def _serve(self) -> None:
        credentials = grpc.ssl_server_credentials(
            [(self._identity.key, self._identity.certificate)],
            root_certificates=self._identity.authority,
            require_client_auth=True,
        )
        pool = futures.ThreadPoolExecutor(max_workers=2 * len(self._peers) + 4, thread_name_prefix="link")
        self._server = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=2 * len(self._peers) + 4)
        handler = grpc.stream_stream_rpc_method_handler(self._take_stream)
        service, method = _METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            port = self._server.add_secure_port(self._listen, credentials)
        except (RuntimeError, ValueError):
            port = 0
        if port == 0:
            raise LinkError(
                f"{self.name} cannot listen on {self._listen}: the port is in use or not allowed",
                "choose another address in federation.addresses, or free the port",
            )
        self._server.start()

    def _dial(self, peer: _Peer) -> None:
        credentials = grpc.ssl_channel_credentials(
            self._identity.authority, self._identity.key, self._identity.certificate
        )
        options = [*_OPTIONS, ("grpc.ssl_target_name_override", host_name(peer.name)), ("grpc.enable_http_proxy", 0)]
        options += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        channel = grpc.secure_channel(peer.address, credentials, options=options)
        self._channels.append(channel)
        call = channel.stream_stream(_METHOD)(self._outgoing(peer), wait_for_ready=True)
        threading.Thread(target=self._watch_call, args=(peer, call), name=f"to-{peer.name}", daemon=True).start()
        self._put(peer, Kind.HELLO, "", self._hello())

    def _outgoing(self, peer: _Peer) -> Iterator[bytes]:
        while (chunk := peer.outgoing.get()) is not None:
            yield chunk

    def _watch_call(self, peer: _Peer, call: Any) -> None:
        """Take WELCOME from the peer, then learn when and why the stream we send on ends."""
        reader = FrameReader()
        try:
            for chunk in call:
                frame = reader.feed(chunk)
                if frame is not None and frame.kind == Kind.WELCOME:
                    with self._changed:
                        peer.welcomed = True
                        self._changed.notify_all()
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details() or "")
            if code == grpc.StatusCode.PERMISSION_DENIED:
                self._lose(peer, HandshakeError(f"{peer.name} refused {self.name}: {details}", "compare the two sides"))
            else:
                self._lose(peer, self._lost(peer, "the link broke"))
        except ProtocolError as error:
            self._lose(peer, error)

    def _take_stream(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Serve one incoming stream: check HELLO, welcome, then fill the inbox until BYE, ABORT or loss."""
        reader = FrameReader()
        try:
            peer = self._admit(next(chunks, b""), reader, context)
        except (HandshakeError, ProtocolError) as error:
            log.warning("refused a link from %s: %s", context.peer(), error)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, error.what)
        yield from encode_frame(Kind.WELCOME, "", 0, {"name": self.name})
        try:
            for chunk in chunks:
                frame = reader.feed(chunk)
                if frame is not None and not self._deliver(peer, frame):
                    return
        except ProtocolError as error:
            log.warning("refused a frame from %s: %s", peer.name, error)
            self._lose(peer, ProtocolError(f"{peer.name} sent a bad frame: {error.what}", error.fix))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.what)
        except grpc.RpcError:
            pass  # reported below, as for a stream that ends without BYE
        self._lose(peer, self._lost(peer, "the link ended without a farewell"))

    def _admit(self, chunk: bytes, reader: FrameReader, context: grpc.ServicerContext) -> _Peer:
        names = {value.decode() for value in context.auth_context().get("x509_common_name", [])}
        frame = reader.feed(chunk)
        if frame is None or frame.kind != Kind.HELLO or not isinstance(frame.payload, dict):
            raise HandshakeError("the first frame is not a greeting")
        hello = frame.payload
        name = hello.get("name")
        if name not in names:
            raise HandshakeError(f"the certificate of {', '.join(sorted(names)) or 'nobody'} was used as {name!r}")
        peer = self._peers.get(str(name))
        if peer is None:
            raise HandshakeError(f"{name} takes no part in this run")
        for key, mine in self._hello().items():
            if key in ("name", "public_key"):
                continue
            if hello.get(key) != mine:
                words = {"digest": "configuration"}.get(key, key)
                self._lose(peer, HandshakeError(f"{peer.name} runs another {words}", "give all parties the same file"))
                raise HandshakeError(f"{peer.name} and {self.name} do not have the same {words}")
        try:
            public_key = bytes.fromhex(str(hello.get("public_key")))
            X25519PublicKey.from_public_bytes(public_key)
        except ValueError:
            raise HandshakeError("the greeting holds no valid public key") from None
        with self._changed:
            if peer.stream_open or peer.public_key is not None:
                raise HandshakeError(f"{peer.name} is connected already")
            peer.stream_open, peer.public_key = True, public_key
            self._changed.notify_all()
        return peer

    def _await_all_peers(self) -> None:
        deadline = time.monotonic() + self._connect_timeout
        with self._changed:
            while True:
                self._raise_first_failure()
                missing = [p.name for p in self._peers.values() if not (p.welcomed and p.public_key)]
                if not missing:
                    return
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise PeerLostError(
                        missing[0],
                        f"{', '.join(missing)} did not connect within {self._connect_timeout:g} s",
                        "check that it runs and that its address is right",
                    )
                self._changed.wait(remaining)

    # ---- losing ----------------------------------------------------------------------------------------------------

    def _lost(self, peer: _Peer, how: str) -> PeerLostError:
        return PeerLostError(
            peer.name, f"lost {peer.name} in phase '{self._phase}' ({how})", f"see the log of {peer.name}"
        )

    def _lose(self, peer: _Peer, failure: MpcFlError) -> None:
        with self._changed:
            if not self._closing and not peer.closed and peer.failure is None:
                peer.failure = failure
            peer.stream_open = False
            self._changed.notify_all()

    def _raise_first_failure(self) -> None:
        """A refused hand-shake explains more than the losses it causes, so it is reported first."""
        failures = [peer.failure for peer in self._peers.values() if peer.failure is not None]
        failures.sort(key=lambda failure: isinstance(failure, PeerLostError))
        if failures:
            raise failures[0]

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._closing = True
        if error is None:
            kind, payload = Kind.BYE, {}
        else:
            # Only messages written for users cross the link: anything else could quote a secret.
            reason = error.what if isinstance(error, MpcFlError) else type(error).__name__
            peer_name = error.peer if isinstance(error, PeerLostError) else None
            kind, payload = Kind.ABORT, {"reason": reason, "cause": peer_name}
        for peer in self._peers.values():
            if peer.failure is None:
                with contextlib.suppress(LinkError, ProtocolError):
                    self._put(peer, kind, "", payload, timeout=2.0)
            with contextlib.suppress(queue.Full):
                peer.outgoing.put(None, timeout=0.5)
        self._linger(2.0 if error is not None else 10.0)
        for channel in self._channels:
            channel.close()
        if self._server is not None:
            self._server.stop(grace=0.2).wait(2.0)
        self.set_phase("closed")

    def _linger(self, seconds: float) -> None:
        """Let queued frames leave and peers say goodbye before the streams are cut."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while any(peer.stream_open and peer.failure is None for peer in self._peers.values()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                self._changed.wait(remaining)

    # ---- frames ----------------------------------------------------------------------------------------------------

    def _count(self, peer: str) -> Traffic:
        return self.traffic.setdefault(self._phase, {}).setdefault(peer, Traffic())

    def _put(
        self, peer: _Peer, kind: Kind, tag: str, payload: torch.Tensor | dict[str, Any], timeout: float | None = None
    ) -> None:
        deadline = time.monotonic() + (self._receive_timeout if timeout is None else timeout)
        with peer.send_lock:
            traffic = self._count(peer.name)
            for chunk in encode_frame(kind, tag, peer.next_sequence, payload):
                while True:
                    if peer.failure is not None:
                        raise peer.failure
                    try:
                        peer.outgoing.put(chunk, timeout=0.2)
                        break
                    except queue.Full:
                        if time.monotonic() > deadline:
                            raise PeerLostError(
                                peer.name,
                                f"{peer.name} takes no data in phase '{self._phase}'",
                                f"see the log of {peer.name}",
                            ) from None
                traffic.bytes_sent += len(chunk)
            peer.next_sequence += 1
            traffic.messages_sent += 1

    def _deliver(self, peer: _Peer, frame: Frame) -> bool:
        """File a frame; return False when it ends the stream."""
        if self._observer is not None:
            self._observer(peer.name, frame)
        if frame.kind in (Kind.TENSOR, Kind.OBJECT):
            with self._changed:
                peer.inbox[frame.tag].append(frame)
                self._changed.notify_all()
            return True
        if frame.kind == Kind.ABORT and isinstance(frame.payload, dict):
            reason = str(frame.payload.get("reason"))[:300]
            cause = frame.payload.get("cause") or peer.name
            self._lose(
                peer, PeerLostError(str(cause)[:64], f"{peer.name} stopped: {reason}", f"see the log of {cause}"[:100])
            )
        elif frame.kind == Kind.BYE:
            with self._changed:
                peer.closed, peer.stream_open = True, False
                self._changed.notify_all()
        else:
            raise ProtocolError("a greeting came twice", "check that both parties run the same version")
        return False

    def _take(self, sender: str, tag: str) -> Frame:
        peer = self._peers[sender]
        began = time.monotonic()
        deadline = began + self._receive_timeout
        with self._changed:
            waited = not peer.inbox[tag]
            while not peer.inbox[tag]:
                self._raise_first_failure()
                if peer.closed:
                    raise self._lost(peer, "it had finished already")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise PeerLostError(
                        sender,
                        f"{sender} is late: nothing for '{tag}' within {self._receive_timeout:g} s in phase '{self._phase}'",
                        f"see the log of {sender}, or raise runtime.receive_timeout",
                    )
                self._changed.wait(remaining)
            frame = peer.inbox[tag].popleft()
            if not peer.inbox[tag]:
                del peer.inbox[tag]
        traffic = self._count(sender)
        traffic.bytes_received += frame.size
        traffic.messages_received += 1
        if waited:
            traffic.waits += 1
            traffic.seconds_waited += time.monotonic() - began
        return frame

    # ---- what protocols use ----------------------------------------------------------------------------------------

    @property
    def peers(self) -> list[str]:
        """Names of the peers, in the order given."""
        return list(self._peers)

    def set_phase(self, phase: str) -> None:
        """Name what is going on, for counters and for messages about lost parties."""
        now = time.monotonic()
        self.phase_seconds[self._phase] = self.phase_seconds.get(self._phase, 0.0) + now - self._phase_began
        self._phase, self._phase_began = phase, now

    def send_tensor(self, receiver: str, tag: str, tensor: torch.Tensor) -> None:
        """Send a tensor. Raises `PeerLostError` when the receiver is gone or takes nothing until the deadline."""
        self._put(self._peers[receiver], Kind.TENSOR, tag, tensor)

    def send_object(self, receiver: str, tag: str, value: dict[str, Any]) -> None:
        """Send a small JSON object (public control data, never a secret)."""
        self._put(self._peers[receiver], Kind.OBJECT, tag, value)

    def receive_tensor(self, sender: str, tag: str, dtype: torch.dtype, shape: Sequence[int] | None) -> torch.Tensor:
        """The next tensor of `tag` from `sender`, of exactly this dtype and shape (`None`: any shape).

        Raises `PeerLostError` when the sender is gone or late, `ProtocolError` when dtype or shape differ.
        """
        frame = self._take(sender, tag)
        tensor = frame.payload
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            raise ProtocolError(f"{sender} sent no {dtype} tensor for '{tag}'", "run the same version everywhere")
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ProtocolError(
                f"{sender} sent shape {tuple(tensor.shape)} for '{tag}' instead of {tuple(shape)}",
                "check that all parties use the same configuration",
            )
        return tensor

    def receive_object(self, sender: str, tag: str) -> dict[str, Any]:
        """The next JSON object of `tag` from `sender`. Raises like `receive_tensor`."""
        payload = self._take(sender, tag).payload
        if not isinstance(payload, dict):
            raise ProtocolError(f"{sender} sent a tensor for '{tag}'", "run the same version everywhere")
        return payload

    def pairwise_seed(self, peer: str, purpose: str) -> Seed:
        """A seed that only this party and `peer` know, fresh for this run and bound to both names, session and purpose.

        X25519 between keys made for this connection and received over the mutually authenticated link, then HKDF
        (RFC 5869). Fresh keys per start mean that no mask repeats after a retry or a restart.
        """
        public_key = self._peers[peer].public_key
        if public_key is None:
            raise LinkError(f"{peer} is not connected", "connect before deriving secrets")
        secret = self._key.exchange(X25519PublicKey.from_public_bytes(public_key))
        mine = self._key.public_key().public_bytes_raw()
        context = [*sorted([self.name, peer]), self._agreement.session, self._agreement.digest, purpose]
        info = b"".join(len(part.encode()).to_bytes(2, "little") + part.encode() for part in context)
        transcript = hashlib.sha256(b"".join(sorted([mine, public_key]))).digest()
        return Seed(HKDF(SHA256(), 32, salt=transcript, info=b"mpc-fl pairwise seed" + info).derive(secret))
