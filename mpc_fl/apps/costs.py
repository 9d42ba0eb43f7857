"""What a run cost, by party and phase: time, processors, GPU, bytes, energy, CO2. Pure.

What a version did not record, and what there was none of, is None. Of equal phases of all rounds, or of all images, the costs are
together (`phase_of_all`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Energy = Literal["measured", "processors measured, GPU estimated", "estimated"]


def phase_of_all(name: str) -> str:
    """Phases of all rounds, and of all images, under one name."""
    name = re.sub(r"^round \d+ ", "", name)
    return "images" if re.match(r"(images?|batch) \d", name) else name


@dataclass(frozen=True)
class Cost:
    """Of a party in a phase; bytes, messages and waits are with all peers together. Seconds, joules, bytes."""

    seconds: float = 0.0
    processor_seconds: float | None = 0.0
    gpu_seconds: float | None = None
    joules: float | None = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    waits: int = 0
    seconds_waited: float = 0.0

    def rounded(self) -> Cost:
        """To tenths of milliseconds and of millijoules."""
        return replace(
            self,
            seconds=round(self.seconds, 4),
            processor_seconds=_rounded(self.processor_seconds),
            gpu_seconds=_rounded(self.gpu_seconds),
            joules=_rounded(self.joules),
            seconds_waited=round(self.seconds_waited, 4),
        )

    def __add__(self, other: Cost) -> Cost:
        used = [of.gpu_seconds for of in (self, other) if of.gpu_seconds is not None]
        return Cost(
            self.seconds + other.seconds,
            _both(self.processor_seconds, other.processor_seconds),
            sum(used) if used else None,
            _both(self.joules, other.joules),
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.messages_sent + other.messages_sent,
            self.waits + other.waits,
            self.seconds_waited + other.seconds_waited,
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _both(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class PartyCosts:
    """Of a party: by phase in the order of work, in all, how its energy is known, and grams of CO2 equivalent."""

    phases: dict[str, Cost]
    total: Cost
    energy: str | None = None
    grams_co2: float | None = None


@dataclass(frozen=True)
class RunCosts:
    """Of all parties whose costs are here together. `energy` names the least certain way in which that of one is known."""

    processor_seconds: float | None = None
    gpu_seconds: float | None = None
    bytes_sent: int | None = None
    joules: float | None = None
    energy: str | None = None
    grams_co2: float | None = None


_WAYS: tuple[Energy, ...] = ("estimated", "processors measured, GPU estimated", "measured")


def energy_words(processors_measured: bool, gpu: bool) -> Energy:
    """How the joules of a party are known: those of its GPU always by its seconds."""
    if not processors_measured:
        return "estimated"
    return "processors measured, GPU estimated" if gpu else "measured"


def costs_of_all(parties: Iterable[PartyCosts]) -> RunCosts:
    """Sums over parties, None where one of them has no such figure. Their seconds by the clock overlap and are not added."""
    of = list(parties)
    if not of:
        return RunCosts()
    total, grams = Cost(), [party.grams_co2 for party in of]
    for party in of:
        total += party.total
    return RunCosts(
        total.processor_seconds,
        total.gpu_seconds,
        total.bytes_sent,
        total.joules,
        next((way for way in _WAYS if any(party.energy == way for party in of)), None),
        None if None in grams else sum(value for value in grams if value is not None),
    )
