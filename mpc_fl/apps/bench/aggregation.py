"""One round of secure aggregation, beside a plain all-reduce over the same links and the same sum in stock CrypTen.

All three in one run, each hospital a process of one thread, all of them with the update in memory, from a common start:
- `closed sum`: encode, mask, send; fix who is in it, send keys, unmask, decode (`quorum_sum`), noise off. `seconds` end when
  the aggregator has the mean, `seconds_with_reply` when every hospital has it too
- `all-reduce`: float32 updates to the aggregator, which adds them up and sends the mean back, over the same TLS links
- `crypten`: stock CrypTen over gloo without encryption: every party shares its update with all, sums, opens to one. As its
  users run it, without the large pages that this project gives its processes
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import Description, Rules
from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.bench.stock_crypten import stock_crypten
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.memory import peak_memory, use_large_pages
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import MpcFlError, RunFailedError
from mpc_fl.links.links import Agreement, Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import AGGREGATOR, hospital_names
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
from mpc_fl.sharing.opening import SecretDomain

_WAIT = 300.0
_FLOAT = 4
_ABOUT = Description("sum of updates", "benchmark")


def measure_aggregation(parties: int, parameters: int, repeats: int, against: str, left_out: bool) -> dict[str, Any]:
    """Median seconds of each way, their ratios, bytes sent per hospital and round, and the peak of memory.

    `left_out`: closed so that a hospital may be left out of the sum, as below a full quorum. `against` is "crypten" or
    "none". Raises `RunFailedError` when a process fails or is late.
    """
    ours = _run("closed sum", parties, parameters, repeats, left_out)
    plain = _run("all-reduce", parties, parameters, repeats, False)
    result: dict[str, Any] = {
        "parties": parties,
        "parameters": parameters,
        "seconds": ours["opened"],
        "seconds_with_reply": ours["seconds"],
        "seconds_plain_allreduce": plain["seconds"],
        "ratio_vs_plain_allreduce": ours["seconds"] / plain["seconds"],
        "bytes_sent_per_hospital": ours["bytes"],
        "bytes_sent_per_parameter": ours["bytes"] / parameters,
        "peak_memory_bytes": ours["memory"],
        "peak_memory_in_updates": ours["memory"] / (_FLOAT * parameters),
        "exact": ours["exact"],
    }
    if against == "crypten":
        stock = _run("crypten", parties, parameters, max(1, repeats // 3), False)
        result["seconds_crypten"] = stock["seconds"]
        result["speedup_vs_crypten"] = stock["seconds"] / ours["opened"]
    return result


def _run(way: str, parties: int, parameters: int, repeats: int, left_out: bool) -> dict[str, Any]:
    hospitals = hospital_names(parties)
    names = hospitals if way == "crypten" else [*hospitals, AGGREGATOR]
    if way == "crypten":
        os.environ.pop("GLIBC_TUNABLES", None)  # as its users run it
    else:
        use_large_pages()  # as the launcher does
    with tempfile.TemporaryDirectory() as folder:
        directory, addresses = Path(folder), {}
        if way != "crypten":
            make_local_identities(names, {name: directory / name for name in names})
            addresses = local_addresses(names, None)
        session = secrets.token_hex(8)
        task = {name: (name, way, names, addresses, folder, session, parameters, repeats, left_out) for name in names}
        results = list(run_processes(_party, task, _WAIT, f"the benchmark of the {way}").values())
    failed = [result["error"] for result in results if "error" in result]
    if failed:
        raise RunFailedError(f"the benchmark of the {way} failed: {failed[0]}")
    return {
        "seconds": max(result["seconds"] for result in results),
        "opened": max(result.get("opened", 0.0) for result in results),
        "bytes": max(result.get("bytes", 0) for result in results),
        "memory": max(result["memory"] for result in results),
        "exact": all(result.get("exact", True) for result in results),
    }


def _party(
    name: str,
    way: str,
    names: list[str],
    addresses: dict[str, str],
    folder: str,
    session: str,
    parameters: int,
    repeats: int,
    left_out: bool,
    results: Connection,
) -> None:
    torch.set_num_threads(1)
    update = _update(names.index(name), parameters) if name != AGGREGATOR else torch.empty(0)
    try:
        if way == "crypten":
            results.send(_crypten(names.index(name), names, folder, update, repeats))
            return
        identity = load_identity(Path(folder) / name, name)
        reach, agreement = Reach.of(name, names, addresses), Agreement(session, "bench", "bench")
        with NetworkLinks(identity, agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
            run = _closed_sum if way == "closed sum" else _all_reduce
            results.send(run(links, names[:-1], folder, update, parameters, repeats, left_out))
    except MpcFlError as error:
        results.send({"error": str(error)})


def _update(rank: int, parameters: int) -> torch.Tensor:
    """A public stand-in for an update, float32 (P,): known to all, so that the sum can be checked."""
    return torch.sin(torch.arange(parameters, dtype=torch.float32) * (0.001 * (rank + 1))) * 0.1


def _timed(
    links: Links, hospitals: list[str], repeats: int, once: Callable[[int], tuple[Any, float]]
) -> tuple[float, float, Any]:
    """Median seconds, at the aggregator, from its word until all hospitals have acknowledged, and until the moment that
    `once` says; and the last outcome."""
    seconds, opened, outcome = [], [], None
    for repeat in range(repeats):
        outcome = None
        if links.name != AGGREGATOR:
            links.receive_object(AGGREGATOR, "go")
            outcome, _ = once(repeat)
            links.send_object(AGGREGATOR, "done", {})
            continue
        began = time.perf_counter()
        for name in hospitals:
            links.send_object(name, "go", {})
        outcome, moment = once(repeat)
        for name in hospitals:
            links.receive_object(name, "done")
        seconds.append(time.perf_counter() - began)
        opened.append(moment - began)
    if not seconds:
        return 0.0, 0.0, outcome
    return statistics.median(seconds), statistics.median(opened), outcome


def _closed_sum(
    links: Links, hospitals: list[str], folder: str, update: torch.Tensor, parameters: int, repeats: int, left_out: bool
) -> dict[str, Any]:
    headroom, members = MeanHeadroom(FixedPoint(24, 64.0), len(hospitals)), tuple(hospitals)
    rules = Rules(AGGREGATOR, 2 if left_out else len(members), 2 if left_out else 0, _WAIT)
    starts = {name: links.key_fingerprint(name) for name in members}
    weight = 1 / len(members)
    with CrypTenRuntime(links, [*hospitals, AGGREGATOR], None, 24) as runtime:
        domain = SecretDomain(runtime, OpeningRecord(Path(folder) / f"{links.name}.jsonl", links.name))

        def once(repeat: int) -> tuple[torch.Tensor, float]:
            if links.name != AGGREGATOR:
                encoded = Private("update", headroom.encode(update, weight, "update"))
                contribute(domain, rules, members, ("round", repeat), encoded, _ABOUT)
                del encoded
                return links.receive_tensor(AGGREGATOR, "mean", torch.float32, (parameters,)), 0.0
            label = ("round", repeat)
            _, total = collect(domain, rules, members, starts, label, headroom.dtype, (parameters,), _ABOUT)
            mean = headroom.decode(total, 1.0, torch.float32)
            moment = time.perf_counter()
            for name in members:
                links.send_tensor(name, "mean", mean)
            return total, moment

        once(-1)  # the first round makes the seeds
        links.set_phase("measured")
        held = _reset_peak()
        seconds, opened, outcome = _timed(links, hospitals, repeats, once)
        memory = peak_memory() - held + update.numel() * _FLOAT
        links.set_phase("closed")
    traffic = links.traffic["measured"]
    result = {
        "seconds": seconds,
        "opened": opened,
        "memory": memory,
        "bytes": sum(t.bytes_sent for t in traffic.values()) // repeats,
    }
    if links.name == AGGREGATOR:
        plain = sum(headroom.encode(_update(rank, parameters), weight, "update").long() for rank in range(len(members)))
        result |= {"exact": bool((outcome.long() == plain).all()), "bytes": 0}
    return result


def _all_reduce(
    links: Links, hospitals: list[str], folder: str, update: torch.Tensor, parameters: int, repeats: int, left_out: bool
) -> dict[str, Any]:
    def once(repeat: int) -> tuple[torch.Tensor, float]:
        if links.name != AGGREGATOR:
            links.send_tensor(AGGREGATOR, "update", update)
            return links.receive_tensor(AGGREGATOR, "mean", torch.float32, (parameters,)), 0.0
        total = links.receive_tensor(hospitals[0], "update", torch.float32, (parameters,))
        for name in hospitals[1:]:
            total += links.receive_tensor(name, "update", torch.float32, (parameters,))
        total /= len(hospitals)
        for name in hospitals:
            links.send_tensor(name, "mean", total)
        return total, 0.0

    once(-1)
    held = _reset_peak()
    seconds, _, _ = _timed(links, hospitals, repeats, once)
    return {"seconds": seconds, "memory": peak_memory() - held}


def _crypten(rank: int, names: list[str], folder: str, update: torch.Tensor, repeats: int) -> dict[str, Any]:
    import torch.distributed as distributed

    seconds = []
    with stock_crypten(rank, len(names), Path(folder) / "store") as crypten:
        for _ in range(repeats + 1):  # the first one warms up
            distributed.barrier()
            began = time.perf_counter()
            total = sum(crypten.cryptensor(update, src=source) for source in range(len(names)))
            total.get_plain_text(dst=0)
            distributed.barrier()
            seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "memory": 0}


def _reset_peak() -> int:
    """Let the system measure the peak of this process's memory anew; returns what it holds now."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()
