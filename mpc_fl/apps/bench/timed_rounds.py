"""Rounds of a benchmark of sums: a process for each party, links between all, and one that says when each round begins.

The aggregator of the processes has the clock, also for rounds in which it takes no other part: it tells all hospitals to begin, and
hears from each that it has its result. Ways to do a round are measured in turn, so that all see the machine in the same state.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cryptography import x509

from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.memory import peak_memory, use_large_pages
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import MpcFlError, RunFailedError
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import AGGREGATOR, hospital_names

WAIT = 300.0  # seconds, for everything


@dataclass(frozen=True)
class Size:
    """How many hospitals, parameters and rounds."""

    parties: int
    parameters: int
    repeats: int


@dataclass(frozen=True)
class Task:
    """What all processes of one way are told. Those without links have no aggregator, and no addresses."""

    way: str
    size: Size
    left_out: bool
    folder: Path
    session: str
    addresses: Mapping[str, str]

    @property
    def hospitals(self) -> list[str]:
        """All hospitals in rank order."""
        return hospital_names(self.size.parties)

    @property
    def names(self) -> list[str]:
        """All parties that have links, hospitals first."""
        return [*self.hospitals, AGGREGATOR]


# What a party does: with its links (or its name, where it has none), the task, and its update, which the aggregator has none of.
Part = Callable[[Any, Task, torch.Tensor], Any]


@dataclass(frozen=True)
class _Failure:
    """Why a process measured nothing."""

    why: str


def run_parties(part: Part, way: str, size: Size, left_out: bool = False, linked: bool = True) -> list[Any]:
    """What `part` gives at every party, each a process of one thread; `part` is a function of a module.

    `left_out`: what its task says of hospitals that may be left out. Without `linked` there are hospitals alone. Raises
    `RunFailedError` when a process fails or is late.
    """
    if linked:
        use_large_pages()  # as the launcher does
    else:
        os.environ.pop("GLIBC_TUNABLES", None)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(way, size, left_out, Path(folder), secrets.token_hex(8), {})
        names = task.names if linked else task.hospitals
        if linked:
            make_local_identities(names, {name: task.folder / name for name in names})
            task = replace(task, addresses=local_addresses(names, None))
        what = f"the benchmark of the {way}"
        results = list(run_processes(_party, {name: (name, task, part) for name in names}, WAIT, what).values())
    for result in results:
        if isinstance(result, _Failure):
            raise RunFailedError(f"{what} failed: {result.why}")
    return results


def _party(name: str, task: Task, part: Part, results: Connection) -> None:
    """One party in a process of its own: sends what its part gives, or a `_Failure`."""
    torch.set_num_threads(1)
    update = torch.empty(0)
    if name != AGGREGATOR:
        update = update_of(task.hospitals.index(name), task.size.parameters)
    try:
        if not task.addresses:
            results.send(part(name, task, update))
            return
        identity = load_identity(task.folder / name, name)
        reach = Reach.of(name, task.names, dict(task.addresses))
        with NetworkLinks(identity, Agreement(task.session, "bench", "bench"), reach, Timeouts(WAIT, WAIT)) as links:
            results.send(part(links, task, update))
    except MpcFlError as error:
        results.send(_Failure(str(error)))


def update_of(rank: int, parameters: int) -> torch.Tensor:
    """A public stand-in for an update, float32 (P,): known to all, so that the sum can be checked."""
    return torch.sin(torch.arange(parameters, dtype=torch.float32) * (0.001 * (rank + 1))) * 0.1


def signatory_of(task: Task, name: str) -> Signatory:
    """Who signs for this party, and the certificates of all."""
    identities = {each: load_identity(task.folder / each, each) for each in task.names}
    certificates = {each: x509.load_pem_x509_certificate(identities[each].certificate) for each in task.names}
    return Signatory(identities[name], certificates.get)


@dataclass
class Times:
    """Of each round, at the aggregator: seconds from its word until all hospitals have acknowledged, and until the moment
    that the round says. At every party: seconds of the processor that its process took. `outcome` is that of the last
    round of the last way."""

    processor: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)
    outcome: Any = None

    @property
    def medians(self) -> tuple[float, float]:
        """Both, 0 where nothing was timed."""
        return (statistics.median(self.seconds), statistics.median(self.opened)) if self.seconds else (0.0, 0.0)


def timed(links: Links, task: Task, ways: Mapping[str, Callable[[int], tuple[Any, float]]]) -> dict[str, Times]:
    """Rounds of each way in turn, each in a phase of its name."""
    times = {way: Times() for way in ways}
    for repeat in range(task.size.repeats):
        for way, once in ways.items():
            links.set_phase(way)
            for each in times.values():  # no more than one is held at a time
                each.outcome = None
            if links.name != AGGREGATOR:
                links.receive_object(AGGREGATOR, "go")
                used = time.process_time()
                times[way].outcome, _ = once(repeat)
                times[way].processor.append(time.process_time() - used)
                links.send_object(AGGREGATOR, "done", {})
                continue
            began, used = time.perf_counter(), time.process_time()
            for name in task.hospitals:
                links.send_object(name, "go", {})
            times[way].outcome, moment = once(repeat)
            for name in task.hospitals:
                links.receive_object(name, "done")
            times[way].processor.append(time.process_time() - used)
            times[way].seconds.append(time.perf_counter() - began)
            times[way].opened.append(moment - began)
    return times


def reset_peak() -> int:
    """Let the system measure the peak of this process's memory anew; returns what it holds now, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()
