"""The smallest program on the library: three processes compute a mean nobody could compute alone.

Run it: .venv/bin/python examples/secure_mean.py
"""

from __future__ import annotations

import multiprocessing
import secrets
import socket
import sys
import tempfile
from pathlib import Path

import torch

from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.ring import FixedPoint, Headroom
from mpc_fl.crypto.secrecy import Private
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.secure_sum import encode_weighted, weighted_mean

NAMES = ["north", "south", "west"]
HEADROOM = Headroom(FixedPoint(fraction_bits=24, bound=1000.0), parties=3, weight_bound=10_000)


def hospital(name: str, addresses: dict[str, str], session: str, directory: Path, value: float, patients: int) -> None:
    """One party: shares its value, weighted by its number of patients; only 'north' learns the mean."""
    agreement = Agreement(session, "secure mean example", "example")
    reach, timeouts = Reach.of(name, NAMES, addresses), Timeouts(connect=30.0, receive=30.0)
    with NetworkLinks(load_identity(directory / name, name), agreement, reach, timeouts) as links:
        domain = SecretDomain(links, NAMES, OpeningRecord(directory / name / "openings.jsonl", name))
        update = Private("mean haemoglobin", torch.tensor([value], dtype=torch.float64))
        own = encode_weighted(update, Private("number of patients", patients), HEADROOM)
        mean = weighted_mean(domain, own, "north", "example")
        print(f"{name}: {'learns nothing' if mean is None else f'the mean over all patients is {float(mean):.3f}'}")


def main() -> None:
    directory = Path(tempfile.mkdtemp())
    make_local_identities(NAMES, {name: directory / name for name in NAMES})
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in NAMES]
    addresses = {name: f"127.0.0.1:{s.getsockname()[1]}" for name, s in zip(NAMES, sockets, strict=True)}
    for listener in sockets:
        listener.close()
    session = secrets.token_hex(8)
    context = multiprocessing.get_context("spawn")
    private = {"north": (13.9, 120), "south": (14.4, 45), "west": (12.8, 300)}
    processes = [
        context.Process(target=hospital, args=(name, addresses, session, directory, *private[name])) for name in NAMES
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode != 0 for process in processes):
        sys.exit("a party failed")


if __name__ == "__main__":
    main()
