"""Bytes, messages and rounds, per peer and phase of a run, and what this process spends in each phase."""

from __future__ import annotations

from dataclasses import dataclass

from mpc_fl.metering import Spent, meter


@dataclass
class Traffic:
    """Bytes and messages of one peer in one phase; `bytes_relayed` were passed on from it to others, sealed."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    bytes_relayed: int = 0
    waits: int = 0
    seconds_waited: float = 0.0

    def take(self, size: int, waited: float | None) -> None:
        """A message of `size` bytes was taken, after so many seconds; None if it was there already."""
        self.bytes_received += size
        self.messages_received += 1
        if waited is not None:
            self.waits += 1
            self.seconds_waited += waited


class TrafficCounter:
    """Counts by the phase that is going on. `by_phase[phase][peer]` is a `Traffic`; a wait is one round of messages. `spent`
    is of the phases that have ended."""

    def __init__(self, phase: str) -> None:
        self.by_phase: dict[str, dict[str, Traffic]] = {}
        self.spent: dict[str, Spent] = {}
        self.phase = phase
        self._meter = meter()

    def set_phase(self, phase: str) -> None:
        """End the current phase and begin another, or go on with one of the same name."""
        spent, before = self._meter.lap(), self.spent.get(self.phase)
        self.spent[self.phase] = spent if before is None else before + spent
        self.phase = phase

    def of(self, peer: str) -> Traffic:
        """The counts of `peer` in the current phase."""
        return self.by_phase.setdefault(self.phase, {}).setdefault(peer, Traffic())
