"""Training on the patients of all hospitals in one place: what a federation is measured against. Nobody is protected from anybody.

The same network and recipe on the same training patients, without noise, masks, sums and servers (`own_model.alone_config`). A step
draws as many patients as the steps of all hospitals together, so that a run computes as many gradients of single records as the
federation. There are no links: in the same files as those of a party stands what it cost.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpc_fl.apps.rows import GlobalRound, read_rows
from mpc_fl.apps.runs.party_log import set_up_log
from mpc_fl.apps.runs.party_process import require_site_allows
from mpc_fl.apps.runs.party_starter import modules_to_share
from mpc_fl.apps.runs.run_directory import count_parameters, require_free, run_directory, versions
from mpc_fl.apps.runs.training_summary import conclude, costs_of_parties
from mpc_fl.apps.summaries import PrivacySpent, TrainingSummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError
from mpc_fl.federation.feature_statistics import decode_features, encode_features, plan_features
from mpc_fl.federation.global_model import calibrate_on_public_images, normalisation_of_weights
from mpc_fl.federation.hospital_program import joined_hospital
from mpc_fl.federation.hospital_state import Beginning, Hospital
from mpc_fl.federation.ledger_forecast import privacy_ledger_of
from mpc_fl.federation.own_model import alone_config
from mpc_fl.federation.planning import run_name
from mpc_fl.federation.secure_evaluation import own_evaluation
from mpc_fl.files import append_json_line, write_text
from mpc_fl.learning.data.dataset import Dataset, PatientRecords
from mpc_fl.learning.data.loading import load_hospital, shared_patients
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters
from mpc_fl.learning.training.dp_sgd import train_locally
from mpc_fl.learning.training.process_group import training_group
from mpc_fl.links.party_links import write_costs
from mpc_fl.links.traffic import TrafficCounter
from mpc_fl.progress import Progress
from mpc_fl.roles import hospital_names

CENTRAL = "central"  # whose directory the costs are in


def central_config(config: Config) -> Config:
    """The configuration by which all patients are trained on in one place. Raises `ConfigError` for what has no meaning there."""
    if config.evaluation.choose != "last" or config.evaluation.calibrate != "none":
        raise ConfigError(
            "central training takes the model of its last round as it is",
            "leave evaluation.choose and evaluation.calibrate as they are by default",
        )
    drawn, processes = config.training.batch_size * config.federation.hospitals, config.site.training_processes
    here = {"training_processes": processes, "resume": False}
    return alone_config(config).with_values(training={"batch_size": drawn}, site=here)


def train_central(config: Config, out: Path, command: str, progress: Progress) -> TrainingSummary:
    """Train on all patients in this process; write model, metrics, costs and report to `out`, and return the summary.

    Raises `ConfigError`, `DataError`, `ModelError`.
    """
    require_free(out)
    central = central_config(config)
    require_site_allows(central)
    torch.set_num_threads(config.runtime.threads)
    for module in modules_to_share(
        central.with_values(task="train")
    ):  # parties are forked with them: it is no cost there
        importlib.import_module(module)
    with run_directory(out) as directory:
        write_text(directory / "config.yaml", central.to_yaml())
        set_up_log(directory / "logs" / f"{CENTRAL}.log")
        own, began = directory / "parties" / CENTRAL, time.monotonic()
        own.mkdir(parents=True)
        central, counter = central.with_values(site={"out": str(own)}), TrafficCounter("data")
        _charge(central)
        notify = functools.partial(progress, CENTRAL)
        hospital = joined_hospital(Beginning(central), 0, lambda part: _of_all(config, part), notify)
        _normalise(hospital, central)
        for line in _rounds(hospital, central, counter, progress):
            append_json_line(directory / "metrics.jsonl", line)
        counter.set_phase("conclusion")
        save_model(directory / MODEL_FILE, hospital.model, central, hospital.normalisation)
        counter.set_phase("closed")
        write_costs(counter, own, config.site.costs)
        seconds = round(time.monotonic() - began, 2)
        summary = _summary(central, directory, hospital, command, seconds)
        conclude(directory, summary)
    return summary


def _charge(config: Config) -> None:
    """The model shows its patients without noise: so the ledger of each hospital says, as after a federated run without noise."""
    for name in hospital_names(config.federation.hospitals):
        privacy_ledger_of(config, name).charge_unprotected(run=run_name(config), round_number=0)


def _of_all(config: Config, part: Part) -> Dataset:
    """The patients of all hospitals for one part: where each takes the whole data, once."""
    ranks = 1 if config.data.partition.method == "none" else config.federation.hospitals
    return together([load_hospital(config, rank, part) for rank in range(ranks)])


def together(parts: list[Dataset]) -> Dataset:
    """The records of several hospitals as those of one; a patient of two hospitals is two."""
    before, patients, skipped, treatments = 0, list[torch.Tensor](), 0, dict[str, int]()
    for part in parts:
        patients.append(part.patients + before)
        before, skipped = before + part.patient_count, skipped + part.skipped
        for what, count in part.treatments.items():
            treatments[what] = treatments.get(what, 0) + count
    return Dataset(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(patients),
        tuple(name for part in parts for name in part.names),
        skipped,
        treatments,
    )


@dataclass(frozen=True)
class _SomePatients:
    """Some patients of a data set (`PatientRecords`)."""

    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: tuple[torch.Tensor, ...]


def _normalise(hospital: Hospital, config: Config) -> None:
    """Bring inputs to what the federation would: the same sums, which nobody has to hide here."""
    normalisation: Normalisation | None = normalisation_of_weights(config)
    if config.data.normalise == "secure":
        plan, bound = plan_features(config), config.aggregation.count_bound
        total = torch.zeros(plan.length, dtype=torch.int64)
        of, patients = hospital.train, hospital.train.records_of_patient
        for first in range(0, len(patients), bound):  # as many as one hospital may have
            some: PatientRecords = _SomePatients(of.inputs, of.labels, patients[first : first + bound])
            total += encode_features(plan, some, Seed.from_system()).inside_protocol()
        normalisation = decode_features(plan, total).normalisation
    if normalisation is not None:
        hospital.normalise(normalisation)
    calibrate_on_public_images(hospital.model, config, hospital.normalisation)


def _rounds(
    hospital: Hospital, config: Config, counter: TrafficCounter, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Train round after round; a line of metrics for each, with an evaluation where one is due."""
    last = config.training.rounds
    with training_group(config, hospital.trained_network) as hospital.group:
        for number in range(last + 1):
            began = time.monotonic()
            if number:
                counter.set_phase(f"round {number} training")
                seed = hospital.noise_seed.derive(CENTRAL, number)
                local = train_locally(*hospital.trained(), hospital.local_training, number, seed)
                load_flat_parameters(hospital.model, flatten_parameters(hospital.model) + local.update)
                hospital.velocity = local.velocity
                progress(CENTRAL, "training", number, last)
            counter.set_phase(f"round {number} evaluation")
            found = own_evaluation(hospital, number, "test").own.to_json() if config.evaluates(number) else None
            yield {"round": number, "evaluation": found, "hospitals": [], "seconds": time.monotonic() - began}


def _summary(config: Config, directory: Path, hospital: Hospital, command: str, seconds: float) -> TrainingSummary:
    names, privacy = hospital_names(config.federation.hospitals), config.privacy
    evaluated = [of for of in read_rows(GlobalRound, directory, "metrics.jsonl") if of.evaluation is not None]
    return TrainingSummary(
        name=config.name,
        synthetic=config.data.source == "phantoms",
        rounds=config.training.rounds,
        parameters=count_parameters(directory / MODEL_FILE, config),
        hospitals=names,
        skipped_files=hospital.skipped_files,
        seconds=seconds,
        command=command,
        versions=versions(),
        privacy=[PrivacySpent(name, None, privacy.delta, None, privacy.epsilon, "none") for name in names],
        final=evaluated[-1].evaluation if evaluated else None,
        evaluated_round=evaluated[-1].round if evaluated else None,
        began_with=config.model.initial_weights,
        shared_patients=len(shared_patients(config).names),
        unit=config.data.counted_unit,
        treatments=hospital.treatments,
        names=config.federation.names or None,
        costs=costs_of_parties(directory, [CENTRAL]),
        central=True,
    )
