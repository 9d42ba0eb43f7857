"""Throughput and latency of the links between two real processes, beside plain gloo in the same run.

Three ways: a direct link (mutual TLS), one through a relay (sealed, and TLS on both halves), and torch.distributed's gloo,
which neither encrypts nor authenticates. Each measures an echo of one element and a one-way stream of large tensors.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.links.links import Agreement, Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts

_WAIT = 120.0
WAYS = ("direct link", "relayed link", "gloo")


def measure_links(megabytes: int, echoes: int, repeats: int) -> dict[str, Any]:
    """Run all ways in turn; returns latency (median, ms) and throughput (best of `repeats`, GB/s) of each, and ratios.

    Raises `RunFailedError` when a process fails or is late.
    """
    results = {way: _run(way, megabytes, echoes, repeats) for way in WAYS}
    plain = results["gloo"]
    return {
        "megabytes": megabytes,
        "ways": results,
        "throughput_ratio_direct_to_gloo": results["direct link"]["gigabytes_per_second"]
        / plain["gigabytes_per_second"],
        "latency_ratio_direct_to_gloo": results["direct link"]["echo_milliseconds"] / plain["echo_milliseconds"],
    }


def _run(way: str, megabytes: int, echoes: int, repeats: int) -> dict[str, float]:
    names = ["one", "two", "relay"] if way == "relayed link" else ["one", "two"]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        addresses: dict[str, str] = {}
        if way != "gloo":
            make_local_identities(names, {name: directory / name for name in names})
            addresses = local_addresses(["relay"] if way == "relayed link" else names, None)
        session, amount = secrets.token_hex(8), (megabytes, echoes, repeats)
        task = {name: (way, name, names, addresses, folder, session, amount) for name in names}
        result: dict[str, float] = run_processes(_party, task, _WAIT, f"the benchmark of the {way}")["one"]
    return result


def _party(
    way: str,
    name: str,
    names: list[str],
    addresses: dict[str, str],
    folder: str,
    session: str,
    amount: tuple[int, int, int],
    results: Connection,
) -> None:
    torch.set_num_threads(1)
    if way == "gloo":
        result = _gloo(names.index(name), f"{folder}/store", *amount)
    else:
        relay = "relay" if "relay" in names else None
        identity = load_identity(Path(folder) / name, name)
        agreement = Agreement(session, "bench links", "bench")
        reach = Reach.of(name, names, addresses, relay)
        with NetworkLinks(identity, agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
            result = _over_links(links, *amount) if name != "relay" else None
    results.send(result)


def _over_links(links: Links, megabytes: int, echoes: int, repeats: int) -> dict[str, float] | None:
    peer, first = ("two", True) if links.name == "one" else ("one", False)
    small, large = torch.zeros(1, dtype=torch.int64), torch.arange(megabytes << 17)

    def send(tensor: torch.Tensor) -> None:
        links.send_tensor(peer, "bench", tensor)

    def receive(tensor: torch.Tensor) -> None:
        links.receive_tensor(peer, "bench", tensor.dtype, tensor.shape)

    return _measure(send, receive, small, large, first, echoes, repeats)


def _gloo(rank: int, store: str, megabytes: int, echoes: int, repeats: int) -> dict[str, float] | None:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    small, large = torch.zeros(1, dtype=torch.int64), torch.arange(megabytes << 17)
    result = _measure(
        lambda tensor: distributed.send(tensor, 1 - rank),
        lambda tensor: distributed.recv(tensor, 1 - rank),
        small,
        large,
        rank == 0,
        echoes,
        repeats,
    )
    distributed.destroy_process_group()
    return result


def _measure(
    send: Any, receive: Any, small: torch.Tensor, large: torch.Tensor, first: bool, echoes: int, repeats: int
) -> dict[str, float] | None:
    """Echo `small`, then stream `large` one way and await one element as acknowledgement. The first party measures."""
    times: list[float] = []
    for _ in range(echoes):
        began = time.perf_counter()
        for step in (send, receive) if first else (receive, send):
            step(small)
        times.append(time.perf_counter() - began)
    seconds: list[float] = []
    for _ in range(repeats):
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
    return {
        "echo_milliseconds": 1000 * statistics.median(times),
        "gigabytes_per_second": large.numel() * 8 / min(seconds) / 1e9,
    }
