"""Streams of one certificate that say nothing, more than there are places: the genuine connect meanwhile, logs stay short."""

from __future__ import annotations

import contextlib
import datetime
import logging
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509

from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import load_identity, write_identity
from mpc_fl.links.tls_sockets import TlsSocket, why
from tests.support.dialling import dialled, end_of
from tests.support.harness import free_ports, local_links
from tests.support.served import Service, configuration, make_service_directory
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["hospital-0", "hospital-1", "aggregator"]
TARGET = NAMES[0]
STREAMS = 160


class SilentStreams:
    """Dials `target` with `identity` until told to stop, so that `STREAMS` streams are there which say nothing."""

    def __init__(self, identity: Identity, port: int, target: str = TARGET) -> None:
        self._identity, self._port, self._target = identity, port, target
        self._stop = threading.Event()
        self._lines: set[TlsSocket] = set()
        self.ended: list[str] = []  # how streams ended
        self._threads = [threading.Thread(target=self._dial, daemon=True) for _ in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def _dial(self) -> None:
        while not self._stop.is_set():
            try:
                with dialled(self._target, self._port, self._identity, 60.0) as line:
                    self._lines.add(line)
                    if self._stop.is_set():
                        return
                    self.ended.append(end_of(line, 300.0))
            except OSError as error:
                self.ended.append(f"BROKEN: {why(error)}")
            self._stop.wait(0.5)

    def stop(self) -> None:
        self._stop.set()
        for line in list(self._lines):
            line.cut()
        for thread in self._threads:
            thread.join(10)


def _exchange(links: Any, peer: str) -> int:
    links.send_tensor(peer, "hello", torch.arange(4))
    return int(links.receive_tensor(peer, "hello", torch.int64, (4,)).sum())


@pytest.mark.parametrize("whose", ["revoked", "hospital-2"])
def test_silent_streams_of_one_certificate_keep_nobody_out(
    whose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a revoked certificate, and with a valid one of a hospital that takes no part."""
    caplog.set_level(logging.INFO, "mpc_fl")
    authority = Authority(datetime.timedelta(hours=1))
    identities = {name: authority.issue(name) for name in [*NAMES, "hospital-2"]}
    identities["revoked"] = authority.issue("hospital-1")
    now = datetime.datetime.now(datetime.UTC)
    serial = x509.load_pem_x509_certificate(identities["revoked"].certificate).serial_number
    for name in NAMES:
        write_identity(identities[name], tmp_path / name)
        listed = authority.revocation_list({serial: now}, 1, now + datetime.timedelta(hours=1))
        (tmp_path / name / "federation.crl").write_bytes(listed)
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    outcome: dict[str, Any] = {}

    def party(name: str, peers: list[str], connect_timeout: float) -> None:
        try:
            with local_links(name, NAMES, ports, tmp_path, connect_timeout=connect_timeout) as links:
                outcome[name] = [_exchange(links, peer) for peer in peers]
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcome[name] = error

    target = threading.Thread(target=party, args=(TARGET, NAMES[1:], 120.0))
    target.start()
    with contextlib.closing(_Stopping(SilentStreams(identities[whose], ports[TARGET]))) as attack:
        # Most of the streams have come, and been turned away in one way or another.
        eventually(lambda: len(attack.streams.ended) >= STREAMS - 20, 60.0, "the attack is under way")
        genuine = [threading.Thread(target=party, args=(name, [TARGET], 20.0)) for name in NAMES[1:]]
        for thread in genuine:
            thread.start()
        for thread in [*genuine, target]:
            thread.join(150)
    assert outcome == {TARGET: [6, 6], "hospital-1": [6], "aggregator": [6]}
    if whose == "revoked":
        assert all(said.startswith("REFUSED_PARTY") and "revoked" in said for said in attack.streams.ended[:100])
    about = [record for record in caplog.records if record.name.endswith("stream_server") and "link" in record.message]
    assert 1 <= len(about) < 30, [record.message for record in about]
    assert any("in all" in record.message for record in about), "they are counted"


@pytest.mark.parametrize("target", ["model-owner", "dealer"])
def test_a_service_that_is_flooded_serves_a_hospital_meanwhile(target: str, tmp_path: Path) -> None:
    """Model owner and dealer as processes of their own; streams that say nothing, with the certificate of another hospital."""
    make_service_directory(tmp_path, configuration())
    service = Service(tmp_path, configuration(), {"images_per_minute": 1000})
    port = int(service.config.federation.addresses[target].rpartition(":")[2])
    attacker = load_identity(tmp_path / "hospital-2", "hospital-2")
    try:
        with contextlib.closing(_Stopping(SilentStreams(attacker, port, target))) as attack:
            eventually(lambda: len(attack.streams.ended) >= STREAMS - 20, 60.0, "the attack is under way")
            for number in range(2):
                line, results = service.ask("hospital-1", 2, f"meanwhile-{number}")
                assert (line, len(results)) == ("", 2)
        assert service.end(signal.SIGTERM) == [0, 0]
    finally:
        for process in service.asking:
            process.kill()
        service.end(signal.SIGKILL)
    about = [line for line in (tmp_path / target / "log").read_text().splitlines() if "link" in line]
    assert 1 <= len(about) < 40, about


class _Stopping:
    def __init__(self, streams: SilentStreams) -> None:
        self.streams = streams

    def close(self) -> None:
        self.streams.stop()
