"""One repetition of a run with canaries in it: what whoever pools with the aggregator sees of the honest hospitals, round by round.

The honest hospitals do what they do in every run. The others, as many as the mechanism's promise allows to pool, are the auditor's
own: they add nothing to a sum, neither gradients nor noise, so that a sum shows the honest hospitals alone. With noise that
is `local` these are all but one, since each hospital's noise is to protect its patients against everybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpc_fl.apps.auditing.audited_config import AuditedRun, audited_config, fewest_patients
from mpc_fl.apps.simulation.hospitals import HospitalGroup, Release, Simulated
from mpc_fl.apps.simulation.rounds import SimulatedRounds
from mpc_fl.apps.simulation.sums import SumRequest
from mpc_fl.audit.opening_record import OPENINGS_FILE, OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.evidence.canaries import Canaries, along_canaries, blank_inputs, records_of
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.planning import headroom_of, sum_rules
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.privacy.distributed_gaussian import mean_gradient
from mpc_fl.roles import AGGREGATOR

_OF_TRAINING = ("update", "gradient")
_TESTED = 2  # patients with whom each hospital evaluates


class AuditedGroup(HospitalGroup):
    """All hospitals of a run: those up to `honest` hold the canaries, the others are the auditor's and add zeros."""

    def __init__(self, config: Config, canaries: Canaries, honest: int, patients: int) -> None:
        super().__init__(config, range(config.federation.hospitals))
        self._canaries, self._honest, self._patients = canaries, honest, patients

    def read(self, rank: int, part: Part) -> Dataset:
        """Canaries and blank patients to train on; blank ones for all else."""
        if part == "train" and rank < self._honest:
            return self._canaries.records(rank, self._patients)
        return records_of(
            blank_inputs(max(1, self._patients) if part == "train" else _TESTED, self._canaries.features), 1
        )

    def summand(self, each: Simulated, request: SumRequest) -> tuple[Private[torch.Tensor], Release | None]:
        """What a hospital adds; of the auditor's own hospitals nothing, in training."""
        encoded, release = super().summand(each, request)
        if request.kind in _OF_TRAINING and each.hospital.rank >= self._honest:
            encoded = Private("nothing", torch.zeros_like(encoded.inside_protocol()))
        return encoded, release

    def epsilon(self, delta: float) -> float:
        """What the honest hospitals' ledgers say is spent at this delta, the most of them; infinite without noise."""
        if self.config.privacy.mechanism == "none":
            return math.inf
        honest = [self.hospitals[rank].hospital for rank in range(self._honest)]
        return max(hospital.ledger.epsilon(delta, hospital.budget.accountant) for hospital in honest)


class OneGroup:
    """`Workers` of one group, in this process."""

    def __init__(self, group: HospitalGroup) -> None:
        self._group = group

    def all(self, method: Callable[..., Any], *given: Any, **named: Any) -> list[Any]:
        """The answer of the one group there is, in its own way where it has one."""
        return [getattr(self._group, method.__name__)(*given, **named)]

    def each(self, method: Callable[..., None], done: Callable[[int, int], None], *given: object) -> None:
        """Hospital after hospital."""
        for count, rank in enumerate(self._group.ranks, 1):
            getattr(self._group, method.__name__)(rank, *given)
            done(count, len(self._group.ranks))


@dataclass
class Released:
    """What training opened, along each canary's gradient and in units of the clipping norm: float64 (releases, canaries).

    `epsilon`: what the honest hospitals' ledgers say after each round, at the delta of the audit; filled where it is asked for.
    """

    along: list[np.ndarray] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)

    @property
    def matrix(self) -> np.ndarray:
        """All releases, one below the other."""
        return np.stack(self.along)


@dataclass(frozen=True)
class _Observer:
    """Sees every opened sum of training, as numbers of gradients."""

    aggregator: Aggregator
    released: Released

    def __call__(self, request: SumRequest, opened: torch.Tensor) -> None:
        config, mechanism = self.aggregator.config, self.aggregator.mechanism
        if request.kind == "gradient":
            assert mechanism is not None  # with distributed noise alone
            divisor = mechanism.divisor or mechanism.expected_patients
            total = mean_gradient(mechanism, opened.long()) * mechanism.hospitals * divisor
        elif request.kind == "update":
            total = headroom_of(config).decode(opened, -request.plan.weight_total * config.training.batch_size)
        else:
            return
        self.released.along.append(along_canaries(total) / config.privacy.clipping_norm)


def repeat_run(
    run: AuditedRun, canaries: Canaries, directory: Path, told: Callable[[int], None], delta: float | None = None
) -> Released:
    """Make a run again with these canaries, in an empty directory; what it released. `told` is called after each round.

    With a `delta` it also says what is spent after each round. Raises what the run itself would raise.
    """
    config, released = audited_config(run, directory), Released()
    group, aggregator = (
        AuditedGroup(config, canaries, run.honest, fewest_patients(run.config)),
        prepare_aggregator(config),
    )
    record, observer = OpeningRecord(directory / OPENINGS_FILE, AGGREGATOR), _Observer(aggregator, released)
    rounds = SimulatedRounds(aggregator, sum_rules(config), OneGroup(group), record, lambda *_: None, observe=observer)
    rounds.begin()
    for number in range(1, config.training.rounds + 1):
        rounds.round(number)
        if delta is not None:
            released.epsilon.append(group.epsilon(delta))
        told(number)
    return released
