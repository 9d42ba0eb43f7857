"""A hospital that in the middle of a run refuses those that dial it, or greets as one of another run: it is lost, and nobody else.

Real links over mutual TLS, with a server of the hospital's own that says what no program of ours says there.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import HandshakeError, PeerLostError
from mpc_fl.links.frames import FrameReader, Kind, encode_frame
from mpc_fl.links.handshake import Agreement, greeting_digest, make_greeting
from mpc_fl.links.streams import Parcel, next_parcel, send_parcel
from mpc_fl.links.tls_sockets import TlsSocket, context_of, listening
from tests.support.harness import Options, free_ports, local_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["a", "b"]


class _Deviating:
    """The server of hospital 'a': it answers a greeting as it must, and ends the stream when and as it is told."""

    def __init__(self, directory: Path, port: int) -> None:
        self._identity = load_identity(directory / "a", "a")
        self.endings = queue.SimpleQueue[Parcel | None]()
        self.greeted = 0
        (self._listening,) = listening(f"127.0.0.1:{port}")
        self._listening.settimeout(60)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._greet_and_wait() is not None:
            pass

    def _greet_and_wait(self) -> Parcel | None:
        """One stream: how it was told to end it, None to serve no more."""
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return None
        line = TlsSocket(connection, context_of(self._identity, listens=True))
        line.shake_hands(30)
        send_parcel(line, Parcel.OPEN)
        _, length = next_parcel(line)
        greeting = FrameReader(greetings_only=True).feed(line.take(length))
        assert greeting is not None and isinstance(greeting.payload, dict)
        key = X25519PrivateKey.generate().public_key().public_bytes_raw()
        answer = make_greeting(self._identity, Options().agreement, "b", key, greeting_digest(greeting.payload))
        self.greeted += 1
        for chunk in encode_frame(Kind.WELCOME, "", 0, answer):
            send_parcel(line, Parcel.CHUNK, chunk)
        ending = self.endings.get()
        if ending is not None:
            send_parcel(line, ending, b"not you")
        line.drain(5)
        line.close()
        return ending

    def stop(self) -> None:
        """Serve no more."""
        self.endings.put(None)
        self._listening.close()


@pytest.mark.parametrize("ending", [Parcel.REFUSED_PARTY, Parcel.REFUSED_FULL])
def test_who_ends_a_link_as_if_it_refused_a_greeting_is_lost_like_any_other(ending: Parcel, tmp_path: Path) -> None:
    """No reason for those that dialled it to end, as where links are made. And each dialling takes the place of the last."""
    make_local_identities(NAMES, {name: tmp_path / name for name in NAMES})
    (port,) = free_ports(1)
    deviating = _Deviating(tmp_path, port)
    try:
        with local_links("b", NAMES, {"a": port}, tmp_path, tolerated=["a"]) as links:
            for again in range(3):
                eventually(lambda: links.alive("a"), 30.0, "the link is there")
                assert deviating.greeted == again + 1
                deviating.endings.put(ending)
                with pytest.raises(PeerLostError, match="not you") as caught:
                    links.receive_object("a", "never")
                assert caught.value.peer == "a"
            assert len(links._connections._diallings) == 1
    finally:
        deviating.stop()


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
