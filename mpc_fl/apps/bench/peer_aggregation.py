"""One round of secure aggregation among peers, in turn with one that has an aggregator, and with the linear check alone.

All in one run, each hospital a process of one thread, all of them with the update in memory, from a common start, over the same
links, noise off:
- among peers: sign the transcript, encode, mask, send slices, confirm, tell totals, check them, send keys, unmask, decode
  (`peer_plan`, `peer_sum`); its hospitals propose in turn, all with two closing masks, and the aggregator has the clock alone
- with an aggregator: `closed_sums`
- the linear check: what it computes, of as many words, and its messages, at all hospitals at once. Words and what is told of them
  are not signed here
Both sums end when every hospital has the mean and its digest, which the next one is bound to. Seconds of the processor, of all
parties together, hardly depend on what else the machine does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mpc_fl.aggregation.linear_check import COIN_BYTES, LinearMap, as_numbers, fits
from mpc_fl.aggregation.peer_plan import signed_plan
from mpc_fl.aggregation.peer_sum import peer_sum
from mpc_fl.aggregation.rules import AgreedSum, Rules
from mpc_fl.aggregation.slices import Slices
from mpc_fl.aggregation.words import Deadlines, hear_all, say
from mpc_fl.apps.bench.closed_sums import ABOUT, ClosedSums
from mpc_fl.apps.bench.stock_sum import stock_sum_seconds
from mpc_fl.apps.bench.timed_rounds import WAIT, Size, Task, run_parties, signatory_of, timed
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
from mpc_fl.sharing.opening import SecretDomain

FEWEST_PEERS = 3  # two closing masks need two others
_CLOSING = 2
_WORDS = ("coin", "combinations", "repeated")
_PEERS, _AGGREGATED, _CHECK = "among peers", "with an aggregator", "linear check"


@dataclass(frozen=True)
class PeerFigures:
    """Figures of one round among peers; times are medians in seconds until every hospital has the mean, bytes those of a hospital.

    `seconds_linear_check` is that of the check alone. `exact` says that the sum is that of the updates, at every hospital. What
    CrypTen takes is None where it was not measured.
    """

    parties: int
    parameters: int
    seconds: float
    seconds_with_aggregator: float
    ratio_to_aggregator: float
    seconds_linear_check: float
    linear_check_share: float
    processor_seconds: float
    processor_ratio_to_aggregator: float
    processor_linear_check_share: float
    bytes_sent_per_hospital: int
    bytes_sent_per_parameter: float
    bytes_sent_per_hospital_with_aggregator: int
    exact: bool
    seconds_crypten: float | None = None
    speedup_vs_crypten: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {"coordinator": "none"} | {name: value for name, value in asdict(self).items() if value is not None}


def measure_peer_aggregation(parties: int, parameters: int, repeats: int, against: str, left_out: bool) -> PeerFigures:
    """Rounds of both arrangements in turn, and stock CrypTen when `against` is "crypten" and not "none".

    `left_out`: with an aggregator, too, closed so that a hospital may be left out. Raises `RunFailedError` when a process
    fails or is late.
    """
    size = Size(parties, parameters, repeats)
    results: list[_Outcome] = run_parties(_rounds, "sum among peers", size, left_out)
    clock = next(result for result in results if result.seconds)
    seconds, aggregated, check = (clock.seconds[way] for way in (_PEERS, _AGGREGATED, _CHECK))
    used = {way: sum(result.processor[way] for result in results) for way in (_PEERS, _AGGREGATED, _CHECK)}
    sent = {way: max(result.bytes[way] for result in results if result.bytes) for way in (_PEERS, _AGGREGATED)}
    figures = PeerFigures(
        parties=parties,
        parameters=parameters,
        seconds=seconds,
        seconds_with_aggregator=aggregated,
        ratio_to_aggregator=seconds / aggregated,
        seconds_linear_check=check,
        linear_check_share=check / seconds,
        processor_seconds=used[_PEERS],
        processor_ratio_to_aggregator=used[_PEERS] / used[_AGGREGATED],
        processor_linear_check_share=used[_CHECK] / used[_PEERS],
        bytes_sent_per_hospital=sent[_PEERS],
        bytes_sent_per_parameter=sent[_PEERS] / parameters,
        bytes_sent_per_hospital_with_aggregator=sent[_AGGREGATED],
        exact=all(result.exact for result in results),
    )
    if against == "crypten":
        stock = stock_sum_seconds(replace(size, repeats=max(1, repeats // 3)))
        figures = replace(figures, seconds_crypten=stock, speedup_vs_crypten=stock / seconds)
    return figures


@dataclass(frozen=True)
class _Outcome:
    """What one process measured, by way: `seconds` at the aggregator alone, `bytes` of a round at hospitals alone, and medians of
    seconds of the `processor`."""

    processor: dict[str, float]
    seconds: dict[str, float]
    bytes: dict[str, int]
    exact: bool = True


class _PeerSums:
    """One party's part in rounds of the sum among peers; the aggregator has none. `sums` makes its summands."""

    def __init__(self, domain: SecretDomain, sums: ClosedSums) -> None:
        self.domain, self.sums, self.links = domain, sums, domain.links
        self.others = [name for name in sums.members if name != self.links.name]
        self.digest = ""
        if self.links.name != AGGREGATOR:
            self.slices = Slices(sums.members, sums.shape[0])
            self.words = self.slices.cut(sums.encoded().inside_protocol())

    def once(self, repeat: int) -> tuple[torch.Tensor | None, float]:
        """A round: the sum at a hospital."""
        if self.links.name == AGGREGATOR:
            return None, 0.0
        members, headroom = self.sums.members, self.sums.headroom
        rules = Rules(members[repeat % len(members)], members, _CLOSING, _CLOSING, WAIT)
        agreed = AgreedSum(members, ("peers", repeat), ABOUT, {"parameters": self.digest})
        plan = signed_plan(self.domain, rules, agreed)
        _, total = peer_sum(self.domain, rules, agreed, plan, self.sums.encoded())
        assert total is not None
        self.digest = tensor_digest(headroom.decode(total, 1.0, torch.float32))
        return total, 0.0

    def check(self, repeat: int) -> tuple[None, float]:
        """The linear check of all slices of a summand, and of as many totals."""
        if self.links.name == AGGREGATOR:
            return None, 0.0
        links = self.links.scoped(f"check {repeat}")
        deadlines = Deadlines("linear check", time.monotonic(), WAIT)
        linear = LinearMap(repeat.to_bytes(COIN_BYTES, "little", signed=True))
        for step, word in enumerate(_WORDS):
            values: dict[str, Any] = {"number": "0" * 2 * COIN_BYTES}
            if word == "combinations":
                mine = {piece: linear.of(words) for piece, words in self.words.items()}
                values = {"of": {piece: as_numbers(words) for piece, words in mine.items()}}
            say(links, self.others, word, **values)
            hear_all(links, self.others, word, lambda name, said: None, (deadlines, step))
        assert all(fits(linear, self.words[piece], [told]) for piece, told in mine.items())
        links.end_scope()
        return None, 0.0

    def is_exact(self, total: torch.Tensor) -> bool:
        """Whether `total` is the sum of the updates that all know."""
        return self.sums.is_exact(total)


def _rounds(links: Links, task: Task, update: torch.Tensor) -> _Outcome:
    with CrypTenRuntime(links, [*task.hospitals, AGGREGATOR], None, 24) as runtime:
        record = OpeningRecord(task.folder / f"{links.name}.jsonl", links.name)
        domain = runtime.domain(record, signatory_of(task, links.name))
        sums = ClosedSums(domain, task, update)
        peers = _PeerSums(domain, sums)
        ways: dict[str, Callable[[int], tuple[Any, float]]] = {
            _AGGREGATED: sums.once, _CHECK: peers.check, _PEERS: peers.once,
        }  # fmt: skip
        for once in ways.values():  # the first round makes the seeds
            once(-1)
        times = timed(links, task, ways)
        links.set_phase("closed")
    used = {way: statistics.median(each.processor) for way, each in times.items()}
    if links.name == AGGREGATOR:
        return _Outcome(used, {way: each.medians[0] for way, each in times.items()}, {})
    sent = {way: sum(peer.bytes_sent for peer in links.traffic[way].values()) for way in ways}
    rounds = task.size.repeats
    return _Outcome(
        used, {}, {way: count // rounds for way, count in sent.items()}, peers.is_exact(times[_PEERS].outcome)
    )
