"""Attackers against a federation that is waiting for its parties: each is refused, the reason logged, nobody harmed.

'hospital-0' serves real TLS; attackers dial it with whatever they have. In the end the genuine parties connect to the
very same links and exchange messages.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import Identity, host_name
from mpc_fl.crypto.identity_files import write_identity
from mpc_fl.links.frames import Kind, encode_frame
from mpc_fl.links.handshake import Agreement, make_greeting
from tests.support.dialling import stream_end
from tests.support.harness import free_ports, local_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["hospital-0", "hospital-1", "aggregator"]
AGREEMENT = Agreement("test", "digest", "train")
TARGET = NAMES[0]


@dataclass
class Waiting:
    """A party that waits for the others: its port, the identities of all, what it logged."""

    ports: dict[str, int]
    directory: Path
    authority: Authority
    identities: dict[str, Identity]
    log: list[str]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """Module-wide: all attacks hit the same waiting party, which must still serve the genuine ones at the end."""
    directory = tmp_path_factory.mktemp("attacks")
    authority = Authority(datetime.timedelta(hours=1))
    identities = {name: authority.issue(name) for name in NAMES}
    revoked = authority.issue("hospital-1")
    serial = _serial(revoked)
    now = datetime.datetime.now(datetime.UTC)
    for name, identity in identities.items():
        write_identity(identity, directory / name)
        listed = authority.revocation_list({serial: now}, 1, now + datetime.timedelta(hours=1))
        (directory / name / "federation.crl").write_bytes(listed)
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    state = Waiting(ports, directory, authority, {**identities, "revoked": revoked}, [])
    handler = logging.Handler()
    handler.emit = lambda record: state.log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mpc_fl").addHandler(handler)
    outcome: list[Any] = []

    def wait_for_the_genuine() -> None:
        try:
            with local_links(TARGET, NAMES, ports, directory, connect_timeout=240.0) as links:
                outcome.append([_exchange(links, peer) for peer in NAMES[1:]])
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=wait_for_the_genuine)
    thread.start()
    yield state
    others = [threading.Thread(target=_genuine, args=(name, ports, directory, outcome)) for name in NAMES[1:]]
    for other in others:
        other.start()
    for other in [*others, thread]:
        other.join(timeout=60)
    logging.getLogger("mpc_fl").removeHandler(handler)
    assert sorted(outcome, key=str) == [[6, 6], [6], [6]], outcome  # the federation is unharmed


def _serial(identity: Identity) -> int:
    from cryptography import x509

    return x509.load_pem_x509_certificate(identity.certificate).serial_number


def _exchange(links: Any, peer: str) -> int:
    links.send_tensor(peer, "hello", torch.arange(4))
    return int(links.receive_tensor(peer, "hello", torch.int64, (4,)).sum())


def _genuine(name: str, ports: dict[str, int], directory: Path, outcome: list[Any]) -> None:
    try:
        with local_links(name, NAMES, ports, directory) as links:
            outcome.append([_exchange(links, TARGET)])
    except Exception as error:
        outcome.append(error)


def _attack(waiting: Waiting, identity: Identity, *chunks: bytes, seconds: float = 10.0) -> str:
    """Dial with `identity`, send, wait for the end of the stream, return its status and details."""
    return stream_end(TARGET, waiting.ports[TARGET], identity, chunks, seconds)


def _greeting(identity: Identity, agreement: Agreement = AGREEMENT) -> bytes:
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return next(encode_frame(Kind.HELLO, "", 0, make_greeting(identity, agreement, TARGET, key)))


def test_a_certificate_of_another_authority(waiting: Waiting) -> None:
    foreign = Authority(datetime.timedelta(hours=1)).issue("hospital-1")
    said = _attack(waiting, Identity("hospital-1", foreign.certificate, waiting.authority.issue("aggregator").authority,
                                     foreign.key), _greeting(foreign), seconds=3.0)  # fmt: skip
    assert said == "BROKEN: the other end says: unknown ca", said


def test_an_expired_certificate(waiting: Waiting) -> None:
    expired = waiting.authority.issue("hospital-1", datetime.timedelta(minutes=-1))
    said = _attack(waiting, expired, _greeting(expired), seconds=3.0)
    assert said == "BROKEN: the other end says: certificate expired", said


def test_a_revoked_certificate(waiting: Waiting) -> None:
    said = _attack(waiting, waiting.identities["revoked"], _greeting(waiting.identities["revoked"]))
    assert said.startswith("REFUSED_PARTY") and "revoked" in said, said
    assert any("refused a link" in line and "revoked" in line for line in waiting.log)


def test_a_hospital_as_aggregator(waiting: Waiting) -> None:
    """With the aggregator's name in the greeting, and with its certificate but without its key."""
    hospital, aggregator = waiting.identities["hospital-1"], waiting.identities["aggregator"]
    said = _attack(
        waiting, hospital, _greeting(Identity("aggregator", hospital.certificate, hospital.authority, hospital.key))
    )
    assert "the certificate of hospital-1 was used as 'aggregator'" in said
    stolen = Identity("hospital-1", aggregator.certificate, hospital.authority, hospital.key)
    said = _attack(waiting, hospital, _greeting(stolen))
    assert said.startswith("REFUSED_PARTY") and "hospital-1" in said, said
    assert sum("refused a link" in line and "aggregator" in line for line in waiting.log) >= 1


def test_a_greeting_recorded_from_another_receiver(waiting: Waiting) -> None:
    """What hospital-1 once said to the aggregator, sent to us by the aggregator."""
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    recorded = make_greeting(waiting.identities["hospital-1"], AGREEMENT, "aggregator", key)
    for name in ("aggregator", "hospital-1"):
        said = _attack(waiting, waiting.identities[name], next(encode_frame(Kind.HELLO, "", 0, recorded)))
        assert said.startswith("REFUSED_PARTY"), said
    assert any("made for another link" in line for line in waiting.log)


def test_a_plaintext_client(waiting: Waiting) -> None:
    with socket.create_connection(("127.0.0.1", waiting.ports[TARGET]), timeout=5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100))
        connection.settimeout(5)
        try:
            answer = connection.recv(1000)
        except OSError:
            answer = b""
    assert b"HTTP" not in answer and b"mpc" not in answer


def test_the_links_speak_tls_1_3(waiting: Waiting) -> None:
    identity = waiting.directory / "hospital-1"
    context = ssl.create_default_context(cafile=str(identity / "federation.crt"))
    context.load_cert_chain(identity / "hospital-1.crt", identity / "hospital-1.key")
    with socket.create_connection(("127.0.0.1", waiting.ports[TARGET]), timeout=10) as connection:
        with context.wrap_socket(connection, server_hostname=host_name(TARGET)) as secured:
            assert secured.version() == "TLSv1.3"


def test_a_party_logs_why_tls_was_refused(tmp_path: Path) -> None:
    """The real program: an expired certificate is logged as such, and nowhere else."""
    authority = Authority(datetime.timedelta(hours=1))
    write_identity(authority.issue(TARGET), tmp_path / "identity")
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    config = {
        "data": {"image_size": 8, "phantoms": {"train_patients": 30, "test_patients": 30}},
        "model": {"architecture": "mlp", "hidden": [4]},
        "privacy": {"mechanism": "none"},
        "runtime": {"connect_timeout": 120},
        "federation": {
            "hospitals": 2,
            "session": "tls",
            "addresses": {name: f"127.0.0.1:{port}" for name, port in ports.items()},
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "mpc_fl",
        "party",
        "hospital",
        "--rank",
        "0",
        "--config",
        "config.yaml",
    ]
    command += ["--identity", "identity", "--out", "out", "--set", f"site.log={tmp_path / 'log'}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    party = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: _listens(ports[TARGET]), 60.0, "the party listens")
        state = Waiting(ports, tmp_path, authority, {}, [])
        expired = authority.issue("hospital-1", datetime.timedelta(minutes=-1))
        assert not _attack(state, expired, _greeting(expired), seconds=2.0).startswith("OK")
        eventually(lambda: "certificate has expired" in (tmp_path / "log").read_text(), 60.0, "the refusal is logged")
    finally:
        party.kill()
        said = party.communicate(timeout=30)[1]
    assert re.search(
        r"WARNING .*refused a TLS hand-shake from .*: certificate has expired", (tmp_path / "log").read_text()
    )
    assert "hand-shake" not in said


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


GREETING_LENGTH = 200


@given(
    st.one_of(
        st.lists(st.binary(max_size=300), min_size=1, max_size=3),
        st.tuples(st.integers(0, GREETING_LENGTH), st.integers(1, 255)),
        st.integers(0, GREETING_LENGTH),
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_flipped_bytes_and_truncated_greetings(
    waiting: Waiting, damage: list[bytes] | tuple[int, int] | int
) -> None:
    """Random chunks, a genuine greeting with one byte flipped, a truncated one: nobody gets in, nothing breaks."""
    identity = waiting.identities["hospital-1"]
    if isinstance(damage, list):
        chunks = damage
    else:
        greeting = bytearray(_greeting(identity))
        if isinstance(damage, tuple):
            greeting[damage[0]] ^= damage[1]
        else:
            greeting = greeting[:damage]
        chunks = [bytes(greeting)]
    said = _attack(waiting, identity, *chunks)
    assert said.startswith("REFUSED_PARTY"), said
    reason = said.removeprefix("REFUSED_PARTY: ")
    assert any("refused a link" in line and reason in line for line in waiting.log), "each kind of refusal is logged"
