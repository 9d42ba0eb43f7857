"""Membership inference against a run's final model: the run made again several times on its own data, half of the patients
each time.

Each repetition is a whole run with the network, noise, steps and hospitals of the audited one; of every hospital's training
patients each takes part with probability 1/2, by the stream cipher. Then every model is attacked with the others as shadow
models (`mpc_fl/evidence/membership.py`). Who attacks has the final model alone, and the records of the patients in question.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mpc_fl.apps.audit_summary import MembershipFound
from mpc_fl.apps.auditing.audited_config import shadow_config
from mpc_fl.apps.auditing.audited_rounds import OneGroup
from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.apps.simulation.rounds import SimulatedRounds
from mpc_fl.audit.opening_record import OPENINGS_FILE, OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.evidence.membership import Roc, confidences, likelihood_ratios, roc_of
from mpc_fl.federation.aggregator_state import prepare_aggregator
from mpc_fl.federation.planning import sum_rules
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.roles import AGGREGATOR

FEWEST_SHADOWS = 4  # repetitions: below, hardly any patient is both in and out of the others
_FALSE_RATES = (0.001, 0.01, 0.1)
_POINTS = 200  # of a curve in a summary


class _HalfOfEach(HospitalGroup):
    """Hospitals that train without half of their patients, which ones the stream cipher decides."""

    def __init__(self, config: Config, stream: Stream) -> None:
        super().__init__(config, range(config.federation.hospitals))
        self._stream = stream
        self.inside: dict[int, np.ndarray] = {}
        self.all_records: dict[int, Dataset] = {}

    def read(self, rank: int, part: Part) -> Dataset:
        """The records of the patients that are in; of tests and validation all."""
        records = super().read(rank, part)
        if part != "train":
            return records
        inside = (self._stream.words(records.patient_count, np.uint8) & 1).astype(bool)
        self.inside[rank], self.all_records[rank] = inside, records
        return of_patients(records, inside)


def of_patients(records: Dataset, inside: np.ndarray) -> Dataset:
    """The records of the patients that are `inside`, bool (patients,), who are numbered anew."""
    of = torch.from_numpy(inside)
    chosen = records.only(of[records.patients].nonzero().squeeze(1))
    numbers = torch.cumsum(of.long(), dim=0) - 1
    return replace(chosen, patients=numbers[chosen.patients])


@dataclass(frozen=True)
class _Shadow:
    """How sure a model is of each patient, float64 (patients,), and who of them trained it, bool (patients,)."""

    sure: np.ndarray
    inside: np.ndarray


def infer_membership(config: Config, shadows: int, told: Callable[[int, int], None]) -> MembershipFound:
    """Train so many models and attack each. `told(round, rounds)` follows over all of them.

    Raises `ConfigError` for hospitals that are too small, and what the run itself would raise.
    """
    found, seed, rounds = list[_Shadow](), Seed.from_system(), config.last_round
    for number in range(shadows):
        with tempfile.TemporaryDirectory(prefix="mpc-fl-shadow-") as directory:
            found.append(_trained(config, Path(directory), seed.stream("patients", number)))
        told((number + 1) * rounds, shadows * rounds)
    inside = np.stack([shadow.inside for shadow in found])
    roc = roc_of(likelihood_ratios(np.stack([shadow.sure for shadow in found]), inside), inside)
    rates = [(rate, roc.true_rate_at(rate)) for rate in _FALSE_RATES]
    return MembershipFound(shadows, inside.shape[1], roc.area, rates, _thinned(roc))


def _trained(config: Config, directory: Path, stream: Stream) -> _Shadow:
    own = shadow_config(config, directory)
    group, aggregator = _HalfOfEach(own, stream), prepare_aggregator(own)
    record = OpeningRecord(directory / OPENINGS_FILE, AGGREGATOR)
    rounds = SimulatedRounds(aggregator, sum_rules(own), OneGroup(group), record, lambda *_: None)
    rounds.begin()
    for number in range(1, own.last_round + 1):
        rounds.round(number)
    sure = []
    for rank in group.ranks:
        records = normalised(as_records(group.all_records[rank], own), aggregator.normalisation)
        sure.append(confidences(predict(aggregator.model, records.inputs), records.labels, records.patients))
    return _Shadow(np.concatenate(sure), np.concatenate([group.inside[rank] for rank in group.ranks]))


def _thinned(roc: Roc) -> list[tuple[float, float]]:
    """So many points of a curve at most, closer together where few are taken for members by mistake."""
    wanted = np.append(0.0, np.geomspace(1e-4, 1.0, _POINTS - 1))
    places = np.unique(np.searchsorted(roc.false, wanted, side="right") - 1)
    return [(float(roc.false[place]), float(roc.true[place])) for place in places]
