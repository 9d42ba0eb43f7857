"""Parties on separate machines, as far as one kernel can give them: a network namespace each, joined by a bridge.

Two hospitals can only dial out: they have no address, listen on no port, and reach each other through the aggregator. Then
a cable is pulled. Needs iproute2 and the right to make namespaces; skipped with the reason elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mpc_fl.crypto.authority import make_local_identities

pytestmark = pytest.mark.processes
NAMES = ["hospital-0", "hospital-1", "hospital-2", "aggregator"]
BEHIND_FIREWALL = ["hospital-1", "hospital-2"]
PORT = 47100


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, str]]:
    """A namespace per party, 10.77.0.x, all on one bridge in a namespace of its own. Party name -> namespace."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    mark = f"mpcfl{os.getpid()}"
    switch = f"{mark}s"
    namespaces = {name: f"{mark}p{index}" for index, name in enumerate(NAMES)}
    made: list[str] = []
    try:
        try:
            _ip("netns", "add", switch)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        made.append(switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for index, namespace in enumerate(namespaces.values()):
            _ip("netns", "add", namespace)
            made.append(namespace)
            _ip(
                "link",
                "add",
                "cable",
                "netns",
                namespace,
                "type",
                "veth",
                "peer",
                "name",
                f"port{index}",
                "netns",
                switch,
            )
            _ip("-n", switch, "link", "set", f"port{index}", "master", "bridge", "up")
            _ip("-n", namespace, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "cable")
            _ip("-n", namespace, "link", "set", "cable", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        yield namespaces
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True, timeout=30)


def _start(
    machines: dict[str, str], directory: Path, rounds: int, receive_timeout: float
) -> dict[str, subprocess.Popen[str]]:
    addresses = {n: f"10.77.0.{i + 1}:{PORT}" for i, n in enumerate(NAMES) if n not in BEHIND_FIREWALL}
    config = {
        "name": "machines",
        "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
        "model": {"architecture": "mlp", "hidden": [4]},
        "training": {"rounds": rounds, "local_steps": 2, "batch_size": 16, "per_sample_gradients": "vmap"},
        "privacy": {"mechanism": "none"},
        "runtime": {"receive_timeout": receive_timeout},
        "federation": {
            "session": f"machines-{directory.name}",
            "addresses": addresses,
            "dial_out_only": BEHIND_FIREWALL,
        },
    }
    path = directory / "federation.yaml"
    path.write_text(yaml.safe_dump(config))
    make_local_identities(NAMES, {name: directory / name / "identity" for name in NAMES})
    parties = {}
    for name in NAMES:
        role, _, rank = name.partition("-")
        command = ["ip", "netns", "exec", machines[name], sys.executable, "-m", "mpc_fl", "party", role]
        command += [*(["--rank", rank] if rank else []), "--config", str(path), "--out", str(directory / name)]
        command += ["--identity", str(directory / name / "identity")]
        log = (directory / name / "log").open("w")
        parties[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        log.close()
    return parties


def _end(parties: dict[str, subprocess.Popen[str]]) -> None:
    for party in parties.values():
        if party.poll() is None:
            party.kill()
        party.wait(timeout=30)


def _log(directory: Path, name: str) -> str:
    return (directory / name / "log").read_text()


@pytest.mark.slow
def test_federation_over_separate_networks_with_hospitals_that_only_dial_out(
    machines: dict[str, str], tmp_path: Path
) -> None:
    parties = _start(machines, tmp_path, rounds=2, receive_timeout=120)
    listening: dict[str, set[int]] = {name: set() for name in NAMES}
    try:
        deadline = time.monotonic() + 200
        while any(party.poll() is None for party in parties.values()):
            assert time.monotonic() < deadline, {name: _log(tmp_path, name)[-500:] for name in NAMES}
            for name, party in parties.items():
                if party.poll() is None:
                    listening[name] |= _listening_ports(party.pid)
            time.sleep(0.3)
    finally:
        _end(parties)
    for name, party in parties.items():
        assert party.returncode == 0, f"{name}: {_log(tmp_path, name)[-800:]}"
        reachable = name not in BEHIND_FIREWALL
        assert listening[name] <= ({PORT} if reachable else set()), f"{name} listens on {listening[name]}"
        assert (f"{name} listens on 10.77.0." in _log(tmp_path, name)) == reachable
    models = {(tmp_path / name / "model.safetensors").read_bytes() for name in NAMES}
    assert len(models) == 1
    traffic = json.loads((tmp_path / "aggregator" / "traffic.json").read_text())["phases"].values()
    counts = [(peer, count) for phase in traffic for peer, count in phase["peers"].items()]
    assert {peer for peer, count in counts if count["bytes_relayed"]} <= set(BEHIND_FIREWALL)
    openings = [json.loads(line) for line in (tmp_path / "aggregator" / "openings.jsonl").read_text().splitlines()]
    assert len(openings) == 5 and all(opening["to"] == ["aggregator"] for opening in openings)


@pytest.mark.slow
def test_a_pulled_cable_ends_every_party_and_is_named(machines: dict[str, str], tmp_path: Path) -> None:
    """One hospital's cable is pulled after the first round; the others end by the deadline and say who was lost."""
    parties = _start(machines, tmp_path, rounds=100_000, receive_timeout=30)
    try:
        _wait_for_rounds(parties, tmp_path)
        _ip("-n", machines["hospital-1"], "link", "set", "cable", "down")
        pulled = time.monotonic()
        for name, party in parties.items():
            party.wait(timeout=pulled + 90 - time.monotonic())
            assert party.returncode != 0, name
    finally:
        _end(parties)
    for name in ("hospital-0", "hospital-2", "aggregator"):
        last = [line for line in _log(tmp_path, name).splitlines() if line.startswith("mpc-fl:")][-1]
        assert "hospital-1" in last, f"{name}: {last}"
        assert not (tmp_path / name / "model.safetensors").exists() and not list((tmp_path / name).glob(".*partial"))
    assert "Traceback" not in "".join(_log(tmp_path, name) for name in NAMES)


def _wait_for_rounds(parties: dict[str, subprocess.Popen[str]], directory: Path) -> None:
    deadline = time.monotonic() + 150
    metrics = directory / "aggregator" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert all(party.poll() is None for party in parties.values()), {n: _log(directory, n)[-500:] for n in NAMES}
        assert time.monotonic() < deadline, "no round within the deadline"
        time.sleep(0.2)


def _listening_ports(process: int) -> set[int]:
    """Ports with a listener in the network namespace of `process` (state 0A in proc(5)), none before it is in its own.

    `ip netns exec` is this very process first, still on the network of the machine; once it has left that it stays away.
    """
    ports: set[int] = set()
    try:
        if Path(f"/proc/{process}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            return ports
    except OSError:  # it has ended
        return ports
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        rows = [line.split() for line in lines]
        ports |= {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[3] == "0A"}
    return ports
