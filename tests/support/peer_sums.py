"""Peer sums of hospitals that are threads with links in memory, in virtual time: some may deviate, be lost or fall silent.

A deviation replaces functions of the program by ones that do something else where the deviating hospital's thread calls them
(`only_at`); every other hospital runs its unmodified program.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation.peer_sum import peer_sum
from mpc_fl.aggregation.rules import AgreedSum, Check, Description, Rules
from mpc_fl.aggregation.transcript import transcript_of
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.links.frames import Frame
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import DroppedError, InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.links.settings import Timeouts, Tolerance
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan
from tests.support.signatories import signatories
from tests.support.virtual_time import REAL_SECONDS, keep_virtual_time

WHY = "round 1"


def hospitals_of(count: int) -> tuple[str, ...]:
    return tuple(f"hospital-{rank}" for rank in range(count))


def summand(name: str, elements: int, dtype: torch.dtype = torch.int32, number: int = 1) -> torch.Tensor:
    """A hospital's secret that tests know: uniform in a part of the ring, so that sums do not wrap."""
    words = Seed(number.to_bytes(32, "little")).stream(name).ring_elements((elements,), 24)
    return (words - (1 << 23)).to(dtype)


def expected(names: Sequence[str], elements: int, dtype: torch.dtype = torch.int32, number: int = 1) -> torch.Tensor:
    """The sum of these summands."""
    return torch.stack([summand(name, elements, dtype, number) for name in names]).sum(0, dtype=dtype)


def rules_of(proposer: str, hospitals: tuple[str, ...], smallest: int = 2, closing: int = 2) -> Rules:
    return Rules(proposer, hospitals, smallest, closing, 60.0)


def planned(links: Links, rules: Rules, agreed: AgreedSum) -> SumPlan:
    """The plan of a first attempt, as the caller of `peer_sum` makes it."""
    closing = min(rules.closing, len(agreed.hospitals) - 1)
    transcript = transcript_of(links, rules, agreed, agreed.hospitals, 0)
    return SumPlan(
        agreed.hospitals, rules.opener, (*agreed.label, 0), closing, transcript, apart=rules.check is not None
    )


def only_at(monkeypatch: pytest.MonkeyPatch, who: str, where: Any, name: str, deviating: Callable[..., Any]) -> None:
    """Let `who` call `deviating(original, *arguments)` for a function of a module or class, and nobody else."""
    original = getattr(where, name)

    def called(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread().name == who:
            return deviating(original, *arguments, **named)
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, called)


@dataclass
class Outcome:
    """How it ended: V and the sum at those that have it, the error of the others; `released`: whose summand counts as that."""

    admitted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    totals: dict[str, torch.Tensor | None] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    frames: list[tuple[str, str, str, int]] = field(default_factory=list)

    def said(self, name: str) -> str:
        """The line of a hospital that failed."""
        return str(self.errors[name])


class PeerSums:
    """Hospitals of one run; `run` makes one sum or several with them. The proposer is the first hospital."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, count: int = 3, elements: int = 1000) -> None:
        self.directory, self.hospitals, self.elements = directory, hospitals_of(count), elements
        self.signatory: dict[str, Signatory] = signatories(list(self.hospitals), directory / "identities")
        self.clock = keep_virtual_time(monkeypatch)
        self.proposer, self.smallest, self.numbers = self.hospitals[0], 2, (1,)
        self.dtype = torch.int32
        self.check: Check | None = None
        self.summands: dict[str, torch.Tensor] = {}  # of hospitals that have others than usual
        self.network = InMemoryNetwork(list(self.hospitals), Agreement("test", "digest", "train"), Timeouts(60.0, 60.0))

    def run(self, watch: Callable[[str, str, Frame], None] = lambda *_: None) -> Outcome:
        """All hospitals to their ends; `watch` sees every frame, on its sender's thread."""
        outcome = Outcome()

        def watched(sender: str, receiver: str, frame: Frame) -> None:
            self.clock.let_pass(0.01)
            outcome.frames.append((sender, receiver, frame.tag, frame.size))
            watch(sender, receiver, frame)

        self.network.watch(watched)
        threads = [
            threading.Thread(target=self._hospital, args=(name, outcome), name=name, daemon=True)
            for name in self.hospitals
        ]
        self.clock.expect(len(threads))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(REAL_SECONDS)
            assert not thread.is_alive(), f"{thread.name} did not end"
        return outcome

    def _hospital(self, name: str, outcome: Outcome) -> None:
        record = OpeningRecord(self.directory / f"{name}.jsonl", name)
        try:
            with self.clock.entered(), self.network.links(name, Tolerance(frozenset(self.hospitals))) as links:
                for peer in links.peers:
                    links.send_object(peer, "go", {})
                for peer in links.peers:  # nobody is lost before all are connected
                    links.receive_object(peer, "go")
                domain = SecretDomain(links, self.hospitals, record, signatory=self.signatory[name])
                for number in self.numbers:
                    self._sum(domain, number, outcome)
        except DroppedError:
            pass

    def _sum(self, domain: SecretDomain, number: int, outcome: Outcome) -> None:
        name = domain.links.name
        rules = replace(rules_of(self.proposer, self.hospitals, self.smallest), check=self.check)
        agreed = AgreedSum(self.hospitals, ("update", number), Description("sum of updates", WHY))
        plan = planned(domain.links, rules, agreed)
        own = self.summands.get(name, summand(name, self.elements, self.dtype, number))
        encoded = Private("update", own.to(self.dtype, copy=True))
        try:
            admitted, total = peer_sum(domain, rules, agreed, plan, encoded, lambda: outcome.released.append(name))
        except Exception as error:  # noqa: BLE001 - shown by the test; a deviating hospital may end as it likes
            outcome.errors[name] = error
        else:
            outcome.admitted[name], outcome.totals[name] = admitted, total

    def openings(self, name: str) -> list[dict[str, Any]]:
        """What a hospital recorded before it opened it."""
        path = self.directory / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
