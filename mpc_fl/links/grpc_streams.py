"""gRPC streams with mutual TLS: chunks of bytes to and from one peer, and why a stream ended. The one import of gRPC.

One bidirectional call per pair of parties that can reach each other, whoever dials. A `Conversation` is this party's end
of it: chunks go out through a bounded queue and come in through a callback. What the chunks mean is the matter of `connections`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NoReturn

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core would write to the user's terminal

import grpc  # noqa: E402

from mpc_fl.crypto.certificates import Identity, host_name, verify_certificate  # noqa: E402
from mpc_fl.errors import (  # noqa: E402
    HandshakeError,
    IdentityError,
    LinkError,
    MpcFlError,
    ProtocolError,
    RefusedError,
    printable,
)
from mpc_fl.links.places import Places, Refusals  # noqa: E402

log = logging.getLogger(__name__)

# gRPC wakes every thread that reads a stream ten times a second, lest a signal wait for the main thread (grpc/grpc#19464). Here
# threads of their own read, no signal comes to them, and 64 hospitals on two cores would do little else than wake up.
grpc._common.MAXIMUM_WAIT_TIMEOUT = 60.0

_METHOD = "/mpc_fl.Link/Send"
_OUTGOING_CHUNKS = 4  # of 2 MB, for each peer
_BACKLOG = 1000  # streams that may queue for a thread: each is refused or admitted in milliseconds
_LONGEST_DETAILS = 300
_FOR_NOBODY = 2.0  # seconds that a party which ends stays for a peer that has taken nothing from it yet
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.http2.max_frame_size", 4 << 20),  # a chunk in one frame: a seventh faster than in 16 KB
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),  # a party that computes for minutes still pings; that is no attack
]


class Conversation:
    """One end of a stream. `take(chunk)` is called for each chunk that arrives, `ended(failure)` once at the end.

    `take` returns False after the last chunk that matters; what it raises ends the stream. `ended` gets None when the stream
    simply stopped: whether that was to be expected is the caller's matter.
    """

    def __init__(self, take: Callable[[bytes], bool], ended: Callable[[MpcFlError | None], None]) -> None:
        self._take = take
        self._ended = ended
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(_OUTGOING_CHUNKS)
        self._over = threading.Event()
        self._finishing = threading.Event()
        self._all_left = threading.Event()
        self._heard = self.taking = False  # `taking`: whether a chunk of the peer is being taken
        self.last_put = float("-inf")  # when a chunk was queued last, of `time.monotonic`
        self.reached = False  # whether a chunk has left: there was somebody to send it to
        self.refusal: MpcFlError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing can come in any more."""
        return self._over.is_set()

    def put(self, chunk: bytes, seconds: float) -> bool:
        """Queue a chunk; False when the queue stayed full for `seconds`."""
        try:
            self._outgoing.put(chunk, timeout=seconds)
        except queue.Full:
            return False
        self.last_put = time.monotonic()
        return True

    def has_room_to_spare(self) -> bool:
        """Whether a chunk more leaves room for another."""
        return self._outgoing.qsize() < _OUTGOING_CHUNKS // 2

    def heard(self) -> bool:
        """Whether the peer has said something since the last call, or could not: while a chunk of it is being taken.

        That takes long where this party lets a peer wait (`mailboxes`).
        """
        heard, self._heard = self._heard or self.taking, False
        return heard

    def finish(self) -> None:
        """Say that no chunk follows; those queued still leave."""
        self._finishing.set()
        self._wake_sender()

    def _wake_sender(self) -> None:
        with contextlib.suppress(queue.Full):  # then it does not wait
            self._outgoing.put_nowait(None)

    def chunks_to_send(self) -> Iterator[bytes]:
        """What gRPC sends: until `finish`, or until the stream is over."""
        try:
            while not (self._outgoing.empty() and (self._over.is_set() or self._finishing.is_set())):
                chunk = self._outgoing.get()
                if chunk is None:
                    return
                yield chunk
                self.reached = True
        finally:
            self._all_left.set()

    def receive(self, chunks: Iterator[bytes]) -> None:
        """Read to the end of the stream, on a thread of its own. Whatever happens there, `ended` is told."""
        failure: MpcFlError | None = None
        try:
            wanted = True
            for chunk in chunks:  # read on after the last one: the call ends when both sides have finished
                self.taking = True
                if wanted and (self._over.is_set() or not self._take(chunk)):
                    wanted = False
                    self.finish()  # the peer has said its last word, and stays until this side has ended, too
                self._heard, self.taking = True, False
        except MpcFlError as error:
            failure = self.refusal = error
        except grpc.RpcError as error:
            failure = _explain(error)
        except Exception as error:  # noqa: BLE001 - a thread that dies in silence leaves a link nobody reads
            log.error("unexpected %s while reading a frame at %s", type(error).__name__, _place(error))
            failure = self.refusal = ProtocolError(
                f"unexpected {type(error).__name__} while reading a frame (a defect)"
            )
        self.cut()
        self._ended(failure)

    def cut(self) -> None:
        """Take nothing more, whatever the peer still sends."""
        self._over.set()
        self._wake_sender()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing can come in any more; False when it took longer than `seconds`."""
        return self._over.wait(seconds)

    def wait_until_left(self, seconds: float) -> bool:
        """Wait until, after `finish`, all chunks have left; False when it took longer than `seconds`."""
        return self._all_left.wait(seconds)


def _place(error: BaseException) -> str:
    """File and line: an error's message could quote what was received."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"


def _explain(error: grpc.RpcError) -> MpcFlError | None:
    """What the peer said when it refused us; None for every way in which a connection just breaks."""
    code = error.code() if isinstance(error, grpc.Call) else None
    details = printable(str(error.details() or ""), _LONGEST_DETAILS) if isinstance(error, grpc.Call) else ""
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return HandshakeError(details)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return ProtocolError(details)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return RefusedError(details)
    return None


def _certificate_of(context: grpc.ServicerContext) -> tuple[str, bytes]:
    """The name in the certificate at the other end of a stream, and the certificate as PEM."""
    proven = context.auth_context()
    names = [
        printable(value.decode("utf-8", "replace"), _LONGEST_DETAILS) for value in proven.get("x509_common_name", [])
    ]
    return ", ".join(names), b"".join(proven.get("x509_pem_cert", []))


# `admit(names in the client's certificate, first chunk)` returns this party's end, or raises to refuse the stream.
Admit = Callable[[set[str], bytes], Conversation]


class StreamServer:
    """Serves one address. Raises `LinkError` when the port is in use or not allowed.

    `refused(name, why)` hears of streams whose certificate does not hold.
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
        self._stopping = threading.Event()
        credentials = grpc.ssl_server_credentials(
            [(identity.key, identity.certificate)], root_certificates=identity.authority, require_client_auth=True
        )
        threads = self._places.threads
        pool = futures.ThreadPoolExecutor(max_workers=threads, thread_name_prefix="link")
        self._server = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=threads + _BACKLOG)
        service, method = _METHOD.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            port = self._server.add_secure_port(listen, credentials)
        except (RuntimeError, ValueError):
            port = 0
        if port == 0:
            raise LinkError(
                f"{identity.name} cannot listen on {listen}: the port is in use or not allowed",
                "choose another address in federation.addresses, or free the port",
            )
        self._server.start()
        log.info("%s listens on %s", identity.name, listen)

    def _serve(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One incoming stream: admit or refuse it, then read on one thread and write on this one."""
        names, certificate = _certificate_of(context)
        held = contextlib.ExitStack()
        status, why = grpc.StatusCode.PERMISSION_DENIED, ""
        try:
            try:
                verify_certificate(certificate, names, self._identity)  # TLS knows no revocation
            except IdentityError as error:
                self._refused(names, error.what)
                raise HandshakeError(error.what, error.fix) from None
            with self._places.silent(certificate, context.cancel, self._greeting_timeout):
                greeting = next(chunks, b"")
            held.enter_context(self._places.held(certificate))
            conversation = self._admit({names}, greeting)
        except RefusedError as error:
            status, why = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        except MpcFlError as error:
            why = error.what
        except grpc.RpcError:
            status, why = grpc.StatusCode.DEADLINE_EXCEEDED, "it sent no greeting"
        except Exception as error:  # noqa: BLE001 - gRPC would print it, with what was received
            log.error("unexpected %s while admitting a link at %s", type(error).__name__, _place(error))
            why = f"unexpected {type(error).__name__} (a defect)"
        if why:
            held.close()
            self._refuse(context, names, status, why)
        with held:
            threading.Thread(target=conversation.receive, args=(chunks,), daemon=True, name="link-in").start()
            yield from conversation.chunks_to_send()
            # Ending the call now would drop what the peer still sends.
            while not conversation.wait(0.5) and not self._stopping.is_set():
                pass
        if conversation.refusal is not None:
            log.warning("refused a frame from %s: %s", names, conversation.refusal)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, conversation.refusal.what)

    def _refuse(self, context: grpc.ServicerContext, names: str, status: grpc.StatusCode, why: str) -> NoReturn:
        kind = f"refused a link ({names}): {why}"
        self._refusals.count(kind, f"refused a link from {context.peer()} ({names}): {why}")
        context.abort(status, why)
        raise AssertionError("abort raises")

    def stop(self) -> None:
        """Cut all streams and free the port."""
        self._stopping.set()
        self._server.stop(grace=0.2).wait(2.0)
        self._refusals.close()


def dial(identity: Identity, peer: str, address: str, conversation: Conversation) -> grpc.Channel:
    """Open a stream to `peer` and read it on a thread; it keeps trying until the channel is closed.

    TLS verifies that the certificate at `address` names the peer and is of this federation.
    """
    credentials = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.ssl_target_name_override", host_name(peer))]
    options += [("grpc.enable_http_proxy", 0)]
    options += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
    channel = grpc.secure_channel(address, credentials, options=options)
    call = channel.stream_stream(_METHOD)(conversation.chunks_to_send(), wait_for_ready=True)
    threading.Thread(target=conversation.receive, args=(call,), name=f"from-{peer}", daemon=True).start()
    return channel


def wait_for_all(conversations: list[Conversation], seconds: float) -> None:
    """Let queued chunks leave and peers end their side, for at most `seconds` in all; less where nobody ever listened."""
    began = time.monotonic()
    for conversation in sorted(conversations, key=lambda conversation: not conversation.reached):
        stay = seconds if conversation.reached else min(seconds, _FOR_NOBODY)
        conversation.wait(max(0.0, began + stay - time.monotonic()))
