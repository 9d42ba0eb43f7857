"""What a peer says reaches errors, and so terminals and logs, in one bounded line that moves no cursor and hides nothing."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import LinkError, PeerLostError, ProtocolError, printable
from mpc_fl.links.frames import Kind
from mpc_fl.links.in_memory import InMemoryLinks
from mpc_fl.links.streams import Parcel, send_parcel
from mpc_fl.links.tls_sockets import TlsSocket, context_of
from tests.support.harness import free_ports, local_links, run_parties_in_memory

pytestmark = pytest.mark.processes
# Clears the screen, writes over the line before, rings, reorders, ends the line, hides in a C1 control.
HOSTILE = "\x1b[2J\x1b[1A\rall is well\x07 \u202etxt.exe\nmpc-fl: finished\x9b31m\u2028\ud800"


def _require_harmless(text: str) -> None:
    assert text.isprintable() and len(text) < 600, repr(text)
    text.encode()


def test_the_reason_of_a_party_that_stops() -> None:
    def party(links: InMemoryLinks) -> Any:
        if links.name == "b":
            links.receive_object("a", "ready")
            links.send_frame("a", Kind.ABORT, "", {"reason": HOSTILE + "x" * 100_000, "cause": HOSTILE + "y" * 100_000})
            return None
        links.send_object("b", "ready", {})
        with pytest.raises(PeerLostError, match="b stopped: ") as caught:
            links.receive_object("b", "never")
        return caught.value

    error = run_parties_in_memory(party, ["a", "b"])["a"]
    for said in (str(error), error.what, error.fix, error.cause):
        _require_harmless(said)
    assert "all is well" in error.what and len(error.cause) <= 64 and error.peer == "b"


def test_the_reason_of_a_party_that_refuses(tmp_path: Path) -> None:
    """A certified party whose server answers every greeting with this."""
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip("ab", free_ports(2), strict=True))
    identity = load_identity(tmp_path / "a", "a")

    said = (HOSTILE.replace("\ud800", "") + "x" * 3_000).encode()

    def refuse(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        line = TlsSocket(connection, context_of(identity, listens=True))
        line.shake_hands(30.0)
        send_parcel(line, Parcel.REFUSED_PARTY, said)
        line.drain(30.0)
        line.close()

    with socket.create_server(("127.0.0.1", ports["a"])) as listening:
        thread = threading.Thread(target=refuse, args=(listening,))
        thread.start()
        with pytest.raises(LinkError, match="a refused b: ") as caught:
            with local_links("b", ["a", "b"], ports, tmp_path, connect_timeout=30.0):
                pass
        thread.join(60.0)
    _require_harmless(str(caught.value))
    assert "all is well" in caught.value.what


def test_every_error_is_one_harmless_line() -> None:
    error = ProtocolError(f"b sent {HOSTILE}", f"do not {HOSTILE}")
    _require_harmless(str(error))
    assert printable("a\tb\n c", 100) == "a b c" and printable("ä€π", 2) == "ä€"
