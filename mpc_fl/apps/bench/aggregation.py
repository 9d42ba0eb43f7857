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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mpc_fl.apps.bench.closed_sums import ClosedSums
from mpc_fl.apps.bench.stock_sum import stock_sum_seconds
from mpc_fl.apps.bench.timed_rounds import Size, Task, reset_peak, run_parties, signatory_of, timed
from mpc_fl.apps.runs.memory import peak_memory
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime

_FLOAT = 4


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
    size = Size(parties, parameters, repeats)
    ours = _largest(run_parties(_closed_sum, "closed sum", size, left_out))
    plain = _largest(run_parties(_all_reduce, "all-reduce", size))
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
        stock = stock_sum_seconds(replace(size, repeats=max(1, repeats // 3)))
        figures = replace(figures, seconds_crypten=stock, speedup_vs_crypten=stock / ours.opened)
    return figures


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


def _largest(results: Sequence[_Outcome]) -> _Outcome:
    """The largest figures of all processes."""
    return _Outcome(
        seconds=max(result.seconds for result in results),
        opened=max(result.opened for result in results),
        unbound=max(result.unbound for result in results),
        unbound_opened=max(result.unbound_opened for result in results),
        bytes=max(result.bytes for result in results),
        memory=max(result.memory for result in results),
        exact=all(result.exact for result in results),
    )


def _closed_sum(links: Links, task: Task, update: torch.Tensor) -> _Outcome:
    with CrypTenRuntime(links, [*task.hospitals, AGGREGATOR], None, 24) as runtime:
        record = OpeningRecord(task.folder / f"{links.name}.jsonl", links.name)
        part = ClosedSums(runtime.domain(record, signatory_of(task, links.name)), task, update)
        part.once(-1)  # the first round makes the seeds
        part.once_unbound(-1)
        held = reset_peak()
        times = timed(links, task, {"unbound": part.once_unbound, "bound": part.once})
        memory = peak_memory() - held + update.numel() * _FLOAT
        links.set_phase("closed")
    (seconds, opened), unbound = times["bound"].medians, times["unbound"].medians
    if links.name == AGGREGATOR:
        return _Outcome(seconds, memory, opened, *unbound, exact=part.is_exact(times["bound"].outcome))
    sent = sum(peer.bytes_sent for peer in links.traffic["bound"].values())
    return _Outcome(seconds, memory, bytes=sent // task.size.repeats)


def _all_reduce(links: Links, task: Task, update: torch.Tensor) -> _Outcome:
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
    held = reset_peak()
    seconds, _ = timed(links, task, {"plain": once})["plain"].medians
    return _Outcome(seconds, peak_memory() - held)
