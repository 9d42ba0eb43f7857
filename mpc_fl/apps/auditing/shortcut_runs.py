"""Films of all sites, models that judge them, and the trainings of an audit of shortcuts: in one process, with the code of runs.

Who audits has all films, and nothing that is trained here leaves the audit. So nothing is charged to a privacy ledger of the
hospitals; ledgers of these trainings are made, held to the run's budget, and thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mpc_fl.apps.auditing.audited_rounds import OneGroup
from mpc_fl.apps.auditing.shortcut_configs import alone_config
from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.apps.simulation.rounds import SimulatedRounds
from mpc_fl.audit.opening_record import OPENINGS_FILE, OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.evidence.shortcuts_perturbed import lung_fields
from mpc_fl.evidence.shortcuts_tested import Answers
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.feature_statistics import encode_features, plan_features
from mpc_fl.federation.hospital_program import joined_hospital
from mpc_fl.federation.hospital_state import Beginning, Hospital
from mpc_fl.federation.local_update import charge_round
from mpc_fl.federation.planning import features_run_name, sum_rules
from mpc_fl.federation.preparation import take_features, take_normalisation
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.loading import divided_records, load_own, records_per_hospital
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.data.phantoms import make_phantoms
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.model_file import load_calibration, load_model, load_normalisation
from mpc_fl.learning.training.dp_sgd import train_locally
from mpc_fl.roles import AGGREGATOR, hospital_name

Told = Callable[[int, int], None]  # rounds done, rounds in all
_FEW_TESTS = 2  # films with which a hospital of a training here evaluates between rounds


@dataclass(frozen=True)
class SiteFilms:
    """Films of hospital `rank` by what they are for, and where the lungs of its test films lie, bool (N, side, side)."""

    rank: int
    parts: Mapping[Part, Dataset]
    lungs: torch.Tensor

    @property
    def name(self) -> str:
        """The hospital's."""
        return hospital_name(self.rank)

    @property
    def test(self) -> Dataset:
        """Its test films."""
        return self.parts["test"]


def films_of_sites(config: Config, parts: Sequence[Part], only: int | None = None) -> list[SiteFilms]:
    """The films of all hospitals, as the run divided them; or those of the hospital of rank `only`, whose own are here.

    Raises what a run raises that cannot read them, and `DataError` for a hospital without test films.
    """
    ranks = range(config.federation.hospitals) if only is None else (only,)
    divided = {part: divided_records(config, part) for part in parts}
    lungs, size, found = _lungs_of_phantoms(config), config.data.image_size, []
    for rank in ranks:
        own = {part: load_own(records, rank) for part, records in divided.items()}
        if not len(own["test"]):
            raise DataError(f"{hospital_name(rank)} has no test films here", "put some into DIR/test/<class>/")
        fixed = lung_fields(size).expand(len(own["test"]), -1, -1)
        found.append(SiteFilms(rank, own, fixed if lungs is None else lungs[rank]))
    return found


def _lungs_of_phantoms(config: Config) -> list[torch.Tensor] | None:
    """Of each hospital's test phantoms; None where films are no phantoms."""
    if config.data.source != "phantoms":
        return None
    count, classes = config.data.phantoms.test_patients, len(config.data.classes)
    drawn = torch.from_numpy(make_phantoms(count, classes, config.data.image_size, config.seed, "test").lungs)
    return [drawn[rows] for rows in records_per_hospital(config, "test")[1]]


def together(films: Sequence[Dataset]) -> Dataset:
    """Films of several hospitals as one set, with patients numbered one hospital after the other."""
    owners, first = [], 0
    for own in films:
        owners.append(own.patients + first)
        first += own.patient_count
    return Dataset(
        torch.cat([own.inputs for own in films]),
        torch.cat([own.labels for own in films]),
        torch.cat(owners),
        tuple(name for own in films for name in own.names),
    )


@dataclass(frozen=True)
class JudgingModel:
    """A trained model with all that films go through before and its logits after it."""

    model: nn.Module
    config: Config
    normalisation: Normalisation | None = None
    calibration: Calibration | None = None

    def answers(self, films: Dataset, labels: torch.Tensor | None = None) -> Answers:
        """What it says of films; `labels` int64 (N,) are what it was trained to tell, the classes of the films by default."""
        records = normalised(as_records(films, self.config), self.normalisation)
        logits = torch.nan_to_num(predict(self.model, records.inputs))
        if self.calibration is None:
            decided = logits.argmax(dim=1)
        else:
            logits, decided = logits / self.calibration.temperature, self.calibration.decided(logits)
        return Answers(logits, decided, films.labels if labels is None else labels, films.patients)


def model_of_run(path: Path, config: Config) -> JudgingModel:
    """The model in a file, as a diagnosis by it judges. Raises `ModelError`."""
    return JudgingModel(
        load_model(path, config), config, load_normalisation(path, config), load_calibration(path, config)
    )


class _GivenHospitals(HospitalGroup):
    """Hospitals whose films are in memory already."""

    def __init__(self, config: Config, given: Sequence[Mapping[Part, Dataset]]) -> None:
        super().__init__(config, range(len(given)))
        self._given = given

    def read(self, rank: int, part: Part) -> Dataset:
        """Those that were given; to test a few, because in the middle of a training here nobody looks at it."""
        films = self._given[rank][part]
        return films if part != "test" else _first(films, _FEW_TESTS)

    def epsilon(self) -> float | None:
        """What the hospitals' ledgers say is spent, the most of them; None without noise."""
        if self.config.privacy.mechanism == "none":
            return None
        delta = self.config.privacy.delta
        return max(of.hospital.ledger.epsilon(delta, of.hospital.budget.accountant) for of in self.hospitals.values())


def _first(films: Dataset, count: int) -> Dataset:
    few = films.only(torch.arange(min(count, len(films))))
    return replace(few, patients=few.patients - few.patients.min()) if len(few) else few


@dataclass(frozen=True)
class Trained:
    """A model that was trained here, and what its training would have cost each patient; None without noise."""

    model: JudgingModel
    epsilon: float | None


def train_again(
    configure: Callable[[Config, Path], Config], config: Config, given: Sequence[Mapping[Part, Dataset]], told: Told
) -> Trained:
    """A whole federated training of hospitals with these films, as `configure` makes it of the run's configuration.

    Raises what the run itself would raise.
    """
    with tempfile.TemporaryDirectory(prefix="mpc-fl-shortcuts-") as directory:
        own = configure(config, Path(directory))
        group, aggregator = _GivenHospitals(own, given), prepare_aggregator(own)
        record = OpeningRecord(Path(directory) / OPENINGS_FILE, AGGREGATOR)
        rounds = SimulatedRounds(aggregator, sum_rules(own), OneGroup(group), record, lambda *_: None)
        rounds.begin()
        for number in range(1, own.last_round + 1):
            rounds.round(number)
            told(number, own.last_round)
        judging = JudgingModel(aggregator.model, own, aggregator.normalisation, aggregator.calibration)
        return Trained(judging, group.epsilon())


def train_alone(config: Config, site: SiteFilms, told: Told) -> JudgingModel:
    """What one hospital learns from its own films by itself, under the run's epsilon: its rounds and the aggregator's steps.

    Raises what the run itself would raise.
    """
    with tempfile.TemporaryDirectory(prefix="mpc-fl-shortcuts-") as directory:
        own = alone_config(config, Path(directory))
        few = {"train": site.parts["train"], "test": _first(site.test, _FEW_TESTS)}
        hospital = joined_hospital(Beginning(own), site.rank, lambda part: few[part], lambda *_: None)
        aggregator = prepare_aggregator(own)
        if aggregator.normalisation is not None:  # that of the weights
            hospital.normalise(aggregator.normalisation)
        if own.data.normalise == "secure":
            _normalise_alone(hospital, aggregator)
        for number in range(1, own.training.rounds + 1):
            if hospital.noise_multiplier is not None:
                charge_round(hospital, number)
            seed = hospital.noise_seed.derive("round", number)
            trained = train_locally(*hospital.trained(), hospital.local_training, number, seed)
            hospital.velocity = trained.velocity
            hospital.take_global(aggregator.step(-trained.update.double()[hospital.coordinates], number))
            told(number, own.training.rounds)
        return JudgingModel(hospital.model, own, hospital.normalisation)


def _normalise_alone(hospital: Hospital, aggregator: Aggregator) -> None:
    """The sum of features over one hospital, charged as that over all."""
    features = plan_features(hospital.config)
    if (event := features.event()) is not None:
        run = features_run_name(hospital.config)
        hospital.ledger.charge(event, run=run, round_number=0, budget=hospital.budget, reserve=True)
    total = encode_features(features, hospital.train, hospital.noise_seed.derive("features")).inside_protocol()
    take_normalisation(hospital, *take_features(aggregator, features, total))
