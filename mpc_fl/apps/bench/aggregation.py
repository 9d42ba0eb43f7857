"""One round of secure aggregation, beside a plain all-reduce over the same links and the same sum in stock CrypTen.

All three in one run, each hospital a process of one thread, all of them with the update in memory, from a common start:
- `closed sum`: encode, mask, send; fix who is in it, confirm, send keys, unmask, decode (`quorum_sum`), noise off. `seconds`
  end when the aggregator has the mean, `seconds_with_reply` when every hospital has it too and has taken its digest, which
  the next sum is bound to. In turn with it the same sum without transcript and confirmation (`unbound_sum`)
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from cryptography import x509

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.apps.bench.processes import run_processes
from mpc_fl.apps.bench.stock_crypten import stock_crypten
from mpc_fl.apps.bench.unbound_sum import UnboundSum
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.memory import peak_memory, use_large_pages
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.ring import FixedPoint, MeanHeadroom
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import MpcFlError, RunFailedError
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import AGGREGATOR, hospital_names
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
from mpc_fl.sharing.opening import SecretDomain

_WAIT = 300.0
_FLOAT = 4
_ABOUT = Description("sum of updates", "benchmark")


@dataclass(frozen=True)
class AggregationFigures:
    """Figures of one round; times are medians in seconds, bytes are those of a hospital, memory is a peak.

    `seconds` end when the aggregator has the mean, `seconds_with_reply` when every hospital has it too. `exact` says that
    the sum is that of the updates. What CrypTen takes is None where it was not measured.
    """

    parties: int
    parameters: int
    seconds: float
    seconds_with_reply: float
    seconds_plain_allreduce: float
    ratio_vs_plain_allreduce: float
    seconds_unbound: float
    ratio_to_unbound: float
    ratio_to_unbound_with_reply: float
    bytes_sent_per_hospital: int
    bytes_sent_per_parameter: float
    peak_memory_bytes: int
    peak_memory_in_updates: float
    exact: bool
    seconds_crypten: float | None = None
    speedup_vs_crypten: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure_aggregation(
    parties: int, parameters: int, repeats: int, against: str, left_out: bool
) -> AggregationFigures:
    """Each way in turn: the closed sum, the plain all-reduce, and stock CrypTen when `against` is "crypten" and not "none".

    `left_out`: closed so that a hospital may be left out of the sum, as below a full quorum. Raises `RunFailedError` when a
    process fails or is late.
    """
    size = _Size(parties, parameters, repeats)
    ours, plain = _run("closed sum", size, left_out), _run("all-reduce", size)
    figures = AggregationFigures(
        parties=parties,
        parameters=parameters,
        seconds=ours.opened,
        seconds_with_reply=ours.seconds,
        seconds_plain_allreduce=plain.seconds,
        ratio_vs_plain_allreduce=ours.seconds / plain.seconds,
        seconds_unbound=ours.unbound_opened,
        ratio_to_unbound=ours.opened / ours.unbound_opened,
        ratio_to_unbound_with_reply=ours.seconds / ours.unbound,
        bytes_sent_per_hospital=ours.bytes,
        bytes_sent_per_parameter=ours.bytes / parameters,
        peak_memory_bytes=ours.memory,
        peak_memory_in_updates=ours.memory / (_FLOAT * parameters),
        exact=ours.exact,
    )
    if against == "crypten":
        stock = _run("crypten", replace(size, repeats=max(1, repeats // 3)))
        figures = replace(figures, seconds_crypten=stock.seconds, speedup_vs_crypten=stock.seconds / ours.opened)
    return figures


@dataclass(frozen=True)
class _Size:
    """How many hospitals, parameters and rounds."""

    parties: int
    parameters: int
    repeats: int


@dataclass(frozen=True)
class _Task:
    """What all processes of one way are told. Stock CrypTen has no aggregator, and no addresses."""

    way: Literal["closed sum", "all-reduce", "crypten"]
    size: _Size
    left_out: bool
    folder: Path
    session: str
    addresses: dict[str, str]

    @property
    def hospitals(self) -> list[str]:
        return hospital_names(self.size.parties)

    @property
    def names(self) -> list[str]:
        return self.hospitals if self.way == "crypten" else [*self.hospitals, AGGREGATOR]


@dataclass(frozen=True)
class _Outcome:
    """What one process measured; `opened` at the aggregator alone, `bytes` at hospitals. `unbound` as `seconds`."""

    seconds: float
    memory: int
    opened: float = 0.0
    unbound: float = 0.0
    unbound_opened: float = 0.0
    bytes: int = 0
    exact: bool = True


@dataclass(frozen=True)
class _Failure:
    """Why a process measured nothing."""

    why: str


def _run(way: Literal["closed sum", "all-reduce", "crypten"], size: _Size, left_out: bool = False) -> _Outcome:
    """The largest figures of all processes."""
    if way == "crypten":
        os.environ.pop("GLIBC_TUNABLES", None)  # as its users run it
    else:
        use_large_pages()  # as the launcher does
    with tempfile.TemporaryDirectory() as folder:
        task = _Task(way, size, left_out, Path(folder), secrets.token_hex(8), {})
        if way != "crypten":
            make_local_identities(task.names, {name: task.folder / name for name in task.names})
            task = replace(task, addresses=local_addresses(task.names, None))
        what = f"the benchmark of the {way}"
        results = list(run_processes(_party, {name: (name, task) for name in task.names}, _WAIT, what).values())
    for result in results:
        if isinstance(result, _Failure):
            raise RunFailedError(f"{what} failed: {result.why}")
    return _Outcome(
        seconds=max(result.seconds for result in results),
        opened=max(result.opened for result in results),
        unbound=max(result.unbound for result in results),
        unbound_opened=max(result.unbound_opened for result in results),
        bytes=max(result.bytes for result in results),
        memory=max(result.memory for result in results),
        exact=all(result.exact for result in results),
    )


def _party(name: str, task: _Task, results: Connection) -> None:
    """One party in a process of its own: sends an `_Outcome` or a `_Failure`."""
    torch.set_num_threads(1)
    names = task.names
    update = _update(names.index(name), task.size.parameters) if name != AGGREGATOR else torch.empty(0)
    try:
        if task.way == "crypten":
            results.send(_crypten(names.index(name), task, update))
            return
        identity = load_identity(task.folder / name, name)
        reach, agreement = Reach.of(name, names, task.addresses), Agreement(task.session, "bench", "bench")
        with NetworkLinks(identity, agreement, reach, Timeouts(_WAIT, _WAIT)) as links:
            results.send((_closed_sum if task.way == "closed sum" else _all_reduce)(links, task, update))
    except MpcFlError as error:
        results.send(_Failure(str(error)))


def _update(rank: int, parameters: int) -> torch.Tensor:
    """A public stand-in for an update, float32 (P,): known to all, so that the sum can be checked."""
    return torch.sin(torch.arange(parameters, dtype=torch.float32) * (0.001 * (rank + 1))) * 0.1


@dataclass
class _Times:
    """Of each round, at the aggregator: seconds from its word until all hospitals have acknowledged, and until the moment
    that the round says. `outcome` is that of the last round of the last way."""

    seconds: list[float] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)
    outcome: Any = None

    @property
    def medians(self) -> tuple[float, float]:
        """Both, 0 where nothing was timed."""
        return (statistics.median(self.seconds), statistics.median(self.opened)) if self.seconds else (0.0, 0.0)


def _timed(links: Links, task: _Task, ways: Mapping[str, Callable[[int], tuple[Any, float]]]) -> dict[str, _Times]:
    """Rounds of each way in turn, each in a phase of its name."""
    times = {way: _Times() for way in ways}
    for repeat in range(task.size.repeats):
        for way, once in ways.items():
            links.set_phase(way)
            for each in times.values():  # no more than one is held at a time
                each.outcome = None
            if links.name != AGGREGATOR:
                links.receive_object(AGGREGATOR, "go")
                times[way].outcome, _ = once(repeat)
                links.send_object(AGGREGATOR, "done", {})
                continue
            began = time.perf_counter()
            for name in task.hospitals:
                links.send_object(name, "go", {})
            times[way].outcome, moment = once(repeat)
            for name in task.hospitals:
                links.receive_object(name, "done")
            times[way].seconds.append(time.perf_counter() - began)
            times[way].opened.append(moment - began)
    return times


class _ClosedSum:
    """One party's part in rounds of the closed sum."""

    def __init__(self, domain: SecretDomain, task: _Task, update: torch.Tensor) -> None:
        links, self.members = domain.links, tuple(task.hospitals)
        self.domain, self.update = domain, update
        self.shape = (task.size.parameters,)
        self.headroom, self.weight = MeanHeadroom(FixedPoint(24, 64.0), len(self.members)), 1 / len(self.members)
        quorum, closing = (2, 2) if task.left_out else (len(self.members), 0)
        self.rules = Rules(AGGREGATOR, self.members, quorum, closing, _WAIT)
        self.starts = {name: links.key_fingerprint(name) for name in self.members}
        self.unbound = UnboundSum(self.domain, self.members, AGGREGATOR, closing)
        self.digest = ""

    def _encoded(self) -> Private[torch.Tensor]:
        return Private("update", self.headroom.encode(self.update, self.weight, "update"))

    def once(self, repeat: int) -> tuple[torch.Tensor, float]:
        """A round: the sum and the moment that it was opened, at the aggregator; the mean and 0 at a hospital."""
        agreed = AgreedSum(self.members, ("round", repeat), _ABOUT, {"parameters": self.digest})
        if self.domain.links.name != AGGREGATOR:
            contribute(self.domain, self.rules, agreed, self._encoded())
            mean = self._mean()
            self.digest = tensor_digest(mean)
            return mean, 0.0
        _, total = collect(self.domain, self.rules, agreed, self.starts, self.headroom.dtype, self.shape)
        mean, moment = self._reply(total)
        self.digest = tensor_digest(mean)
        return total, moment

    def once_unbound(self, repeat: int) -> tuple[torch.Tensor, float]:
        """The same without transcript and confirmation."""
        if self.domain.links.name != AGGREGATOR:
            self.unbound.contribute(repeat, self._encoded())
            return self._mean(), 0.0
        total = self.unbound.collect(repeat, self.headroom.dtype, self.shape)
        return total, self._reply(total)[1]

    def _reply(self, total: torch.Tensor) -> tuple[torch.Tensor, float]:
        mean = self.headroom.decode(total, 1.0, torch.float32)
        moment = time.perf_counter()
        for name in self.members:
            self.domain.links.send_tensor(name, "mean", mean)
        return mean, moment

    def _mean(self) -> torch.Tensor:
        return self.domain.links.receive_tensor(AGGREGATOR, "mean", torch.float32, self.shape)

    def is_exact(self, total: torch.Tensor) -> bool:
        """Whether `total` is the sum of the updates that all know."""
        updates = (_update(rank, self.shape[0]) for rank in range(len(self.members)))
        plain = sum(self.headroom.encode(update, self.weight, "update").long() for update in updates)
        return bool((total.long() == plain).all())


def _closed_sum(links: Links, task: _Task, update: torch.Tensor) -> _Outcome:
    with CrypTenRuntime(links, [*task.hospitals, AGGREGATOR], None, 24) as runtime:
        record = OpeningRecord(task.folder / f"{links.name}.jsonl", links.name)
        part = _ClosedSum(runtime.domain(record, _signatory(task, links.name)), task, update)
        part.once(-1)  # the first round makes the seeds
        part.once_unbound(-1)
        held = _reset_peak()
        times = _timed(links, task, {"unbound": part.once_unbound, "bound": part.once})
        memory = peak_memory() - held + update.numel() * _FLOAT
        links.set_phase("closed")
    (seconds, opened), unbound = times["bound"].medians, times["unbound"].medians
    if links.name == AGGREGATOR:
        return _Outcome(seconds, memory, opened, *unbound, exact=part.is_exact(times["bound"].outcome))
    sent = sum(peer.bytes_sent for peer in links.traffic["bound"].values())
    return _Outcome(seconds, memory, bytes=sent // task.size.repeats)


def _signatory(task: _Task, name: str) -> Signatory:
    identities = {each: load_identity(task.folder / each, each) for each in task.names}
    certificates = {each: x509.load_pem_x509_certificate(identities[each].certificate) for each in task.names}
    return Signatory(identities[name], certificates.get)


def _all_reduce(links: Links, task: _Task, update: torch.Tensor) -> _Outcome:
    hospitals, shape = task.hospitals, (task.size.parameters,)

    def once(repeat: int) -> tuple[torch.Tensor, float]:
        if links.name != AGGREGATOR:
            links.send_tensor(AGGREGATOR, "update", update)
            return links.receive_tensor(AGGREGATOR, "mean", torch.float32, shape), 0.0
        total = links.receive_tensor(hospitals[0], "update", torch.float32, shape)
        for name in hospitals[1:]:
            total += links.receive_tensor(name, "update", torch.float32, shape)
        total /= len(hospitals)
        for name in hospitals:
            links.send_tensor(name, "mean", total)
        return total, 0.0

    once(-1)
    held = _reset_peak()
    seconds, _ = _timed(links, task, {"plain": once})["plain"].medians
    return _Outcome(seconds, peak_memory() - held)


def _crypten(rank: int, task: _Task, update: torch.Tensor) -> _Outcome:
    import torch.distributed as distributed

    seconds, parties = [], task.size.parties
    with stock_crypten(rank, parties, task.folder / "store") as crypten:
        for _ in range(task.size.repeats + 1):  # the first one warms up
            distributed.barrier()
            began = time.perf_counter()
            total = sum(crypten.cryptensor(update, src=source) for source in range(parties))
            total.get_plain_text(dst=0)
            distributed.barrier()
            seconds.append(time.perf_counter() - began)
    return _Outcome(statistics.median(seconds[1:]), memory=0)


def _reset_peak() -> int:
    """Let the system measure the peak of this process's memory anew; returns what it holds now."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()
