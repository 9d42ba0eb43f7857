"""A hospital that in the middle of a run refuses those that dial it, or greets as one of another run: it is lost, and nobody else.

Real links over mutual TLS, with a server of the hospital's own that says what no program of ours says there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import HandshakeError, PeerLostError
from mpc_fl.links.frames import FrameReader, Kind, encode_frame
from mpc_fl.links.handshake import Agreement, greeting_digest, make_greeting
from tests.support.harness import Options, free_ports, local_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["a", "b"]


class _Deviating:
    """The server of hospital 'a': it answers a greeting as it must, and ends the stream when and as it is told."""

    def __init__(self, directory: Path, port: int) -> None:
        self._identity = load_identity(directory / "a", "a")
        self.endings = queue.SimpleQueue[grpc.StatusCode]()
        self.greeted = 0
        credentials = grpc.ssl_server_credentials(
            [(self._identity.key, self._identity.certificate)], self._identity.authority, require_client_auth=True
        )
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mpc_fl.Link", {"Send": handler}),))
        self.server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self.server.start()

    def _serve(self, chunks: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        greeting = FrameReader(greetings_only=True).feed(next(chunks))
        assert greeting is not None and isinstance(greeting.payload, dict)
        key = X25519PrivateKey.generate().public_key().public_bytes_raw()
        answer = make_greeting(self._identity, Options().agreement, "b", key, greeting_digest(greeting.payload))
        self.greeted += 1
        yield from encode_frame(Kind.WELCOME, "", 0, answer)
        context.abort(self.endings.get(), "not you")


@pytest.mark.parametrize("status", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_who_ends_a_link_as_if_it_refused_a_greeting_is_lost_like_any_other(
    status: grpc.StatusCode, tmp_path: Path
) -> None:
    """No reason for those that dialled it to end, as where links are made. And each channel takes the place of the last."""
    make_local_identities(NAMES, {name: tmp_path / name for name in NAMES})
    (port,) = free_ports(1)
    deviating = _Deviating(tmp_path, port)
    try:
        with local_links("b", NAMES, {"a": port}, tmp_path, tolerated=["a"]) as links:
            for again in range(3):
                eventually(lambda: links.alive("a"), 30.0, "the link is there")
                assert deviating.greeted == again + 1
                deviating.endings.put(status)
                with pytest.raises(PeerLostError, match="not you") as caught:
                    links.receive_object("a", "never")
                assert caught.value.peer == "a"
            assert len(links._connections._channels) == 1
    finally:
        for _ in range(8):
            deviating.endings.put(status)
        deviating.server.stop(0)


def test_who_dials_again_for_another_run_is_lost_like_any_other(tmp_path: Path) -> None:
    """A hospital of which a second process runs something else, by mistake or not."""
    make_local_identities(NAMES, {name: tmp_path / name for name in NAMES})
    ports = dict(zip(["a"], free_ports(1), strict=True))
    said, over = dict[str, Exception](), threading.Event()

    def dials() -> None:
        with local_links("b", NAMES, ports, tmp_path, tolerated=["a"]):
            try:
                with local_links("b", NAMES, ports, tmp_path, agreement=Agreement("another", "digest", "train")):
                    pass
            except HandshakeError as error:
                said["b"] = error
            over.wait(60)

    thread = threading.Thread(target=dials, daemon=True)
    thread.start()
    try:
        with local_links("a", NAMES, ports, tmp_path, tolerated=["b"]) as links:
            with pytest.raises(PeerLostError, match="do not have the same session") as caught:
                links.receive_object("b", "never")
            assert caught.value.peer == "b"
            with pytest.raises(PeerLostError):
                links.send_object("b", "word", {})
            eventually(lambda: "b" in said, 30.0, "the other process was told")
    finally:
        over.set()
        thread.join(60)
    assert "do not have the same session" in str(said["b"])
