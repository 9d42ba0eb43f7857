"""Throughput and latency of the links between two real processes, beside plain gloo in the same run.

Three ways: a direct link (mutual TLS), one through a relay (sealed, and TLS on both halves), and torch.distributed's gloo,
which neither encrypts nor authenticates. Each measures an echo of one element and a one-way stream of large tensors.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts

_WAIT = 120.0
WAYS = ("direct link", "relayed link", "gloo")


@dataclass(frozen=True)
class LinkFigures:
    """Of one way: the median echo of one element, and the best throughput of large tensors."""

    echo_milliseconds: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class LinksFigures:
    """Of all ways, by name, with tensors of `megabytes`; ratios are direct link / gloo."""

    megabytes: int
    ways: dict[str, LinkFigures]
    throughput_ratio_direct_to_gloo: float
    latency_ratio_direct_to_gloo: float

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Amount:
    """Megabytes of the large tensor, echoes of the small one, how often the large one is streamed."""

    megabytes: int
    echoes: int
    repeats: int


@dataclass(frozen=True)
class _Task:
    """What all processes of one way are told."""

    way: str
    amount: _Amount
    names: list[str]
    addresses: dict[str, str]
    folder: Path
    session: str


def measure_links(megabytes: int, echoes: int, repeats: int) -> LinksFigures:
    """Run all ways in turn, with a tensor of `megabytes` that is streamed `repeats` times.

    Raises `RunFailedError` when a process fails or is late.
    """
    ways = {way: _run(way, _Amount(megabytes, echoes, repeats)) for way in WAYS}
    direct, plain = ways["direct link"], ways["gloo"]
    return LinksFigures(
        megabytes=megabytes,
        ways=ways,
        throughput_ratio_direct_to_gloo=direct.gigabytes_per_second / plain.gigabytes_per_second,
        latency_ratio_direct_to_gloo=direct.echo_milliseconds / plain.echo_milliseconds,
    )


def _run(way: str, amount: _Amount) -> LinkFigures:
    names = ["one", "two", "relay"] if way == "relayed link" else ["one", "two"]
    with tempfile.TemporaryDirectory() as folder:
        addresses: dict[str, str] = {}
        if way != "gloo":
            make_local_identities(names, {name: Path(folder) / name for name in names})
            addresses = local_addresses(["relay"] if way == "relayed link" else names, None)
        task = _Task(way, amount, names, addresses, Path(folder), secrets.token_hex(8))
        results = run_processes(_party, {name: (name, task) for name in names}, _WAIT, f"the benchmark of the {way}")
    measured = results["one"]
    assert isinstance(measured, LinkFigures)
    return measured


def _party(name: str, task: _Task, results: Connection) -> None:
    torch.set_num_threads(1)
    if task.way == "gloo":
        results.send(_gloo(task.names.index(name), task))
        return
    relays = [name for name in task.names if name == "relay"]
    identity = load_identity(task.folder / name, name)
    agreement = Agreement(task.session, "bench links", "bench")
    reach = Reach.of(name, task.names, task.addresses, relays)
    with NetworkLinks(identity, agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
        result = _over_links(links, task.amount) if name != "relay" else None
    results.send(result)


def _over_links(links: Links, amount: _Amount) -> LinkFigures | None:
    peer, first = ("two", True) if links.name == "one" else ("one", False)

    def send(tensor: torch.Tensor) -> None:
        links.send_tensor(peer, "bench", tensor)

    def receive(tensor: torch.Tensor) -> None:
        links.receive_tensor(peer, "bench", tensor.dtype, tensor.shape)

    return _measure(send, receive, amount, first)


def _gloo(rank: int, task: _Task) -> LinkFigures | None:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{task.folder}/store", rank=rank, world_size=2)
    result = _measure(
        lambda tensor: distributed.send(tensor, 1 - rank),
        lambda tensor: distributed.recv(tensor, 1 - rank),
        task.amount,
        first=rank == 0,
    )
    distributed.destroy_process_group()
    return result


def _measure(
    send: Callable[[torch.Tensor], object], receive: Callable[[torch.Tensor], object], amount: _Amount, first: bool
) -> LinkFigures | None:
    """Echo one element, then stream a large tensor one way and await one element as acknowledgement.

    The first party measures; the other returns None.
    """
    small, large = torch.zeros(1, dtype=torch.int64), torch.arange(amount.megabytes << 17)
    times: list[float] = []
    for _ in range(amount.echoes):
        began = time.perf_counter()
        for step in (send, receive) if first else (receive, send):
            step(small)
        times.append(time.perf_counter() - began)
    seconds: list[float] = []
    for _ in range(amount.repeats):
        began = time.perf_counter()
        if first:
            send(large)
            receive(small)
        else:
            receive(large)
            send(small)
        seconds.append(time.perf_counter() - began)
    if not first:
        return None
    return LinkFigures(1000 * statistics.median(times), large.numel() * 8 / min(seconds) / 1e9)
