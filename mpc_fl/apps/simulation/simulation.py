"""A whole simulated run: the directory, the summary and the report of a training run, marked as simulated.

The directory holds what is computed: configuration, model with its card, metrics of the aggregator and of every hospital, what was
opened, and the hospitals' privacy ledgers. What parties keep to trust each other or to go on is not there: certificates, signed
ledger, checkpoints, traffic, a hospital's own copy of the model.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from mpc_fl.apps.runs.estimate import available_memory, estimate_training
from mpc_fl.apps.runs.model_card_file import write_model_card
from mpc_fl.apps.runs.party_log import set_up_log
from mpc_fl.apps.runs.party_process import require_site_allows
from mpc_fl.apps.runs.run_directory import require_free, run_directory
from mpc_fl.apps.runs.training_summary import conclude, training_summary
from mpc_fl.apps.simulation.hospitals import HospitalGroup
from mpc_fl.apps.simulation.refusals import require_simulable
from mpc_fl.apps.simulation.rounds import RoundDone, SimulatedRounds
from mpc_fl.apps.simulation.workers import Workers
from mpc_fl.apps.summaries import TrainingSummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.audit.opening_record import OPENINGS_FILE, OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.errors import MpcFlError
from mpc_fl.federation.aggregator_state import prepare_aggregator
from mpc_fl.federation.feature_statistics import plan_features, require_enough_patients
from mpc_fl.federation.planning import sum_rules
from mpc_fl.files import append_json_line, write_text, written_whole
from mpc_fl.learning.data.loading import patients_per_hospital, public_sizes
from mpc_fl.learning.device import device_of
from mpc_fl.learning.models.feature_extractor import require_weights
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.progress import Progress
from mpc_fl.roles import AGGREGATOR, hospital_name

_COPIES_OF_PARAMETERS = 4  # of each hospital: model, update, what it masks, momentum
_FLOAT = 4


class Placing(Protocol):
    """Makes the workers of a run from its configuration and the values of each group's, as `ray_workers` does."""

    def __call__(self, config: Config, values: dict[str, Any]) -> AbstractContextManager[Workers]:
        """Workers for as long as the block lasts."""


def simulate(config: Config, out: Path, command: str, progress: Progress, placing: Placing) -> TrainingSummary:
    """Simulate a training run on the workers that `placing` gives; return its summary.

    Raises `ConfigError` for what a simulation does not have, `RunFailedError` naming the hospital that failed and why.
    """
    require_free(out)
    require_simulable(config)
    resolved = _preflight(config)
    with run_directory(out) as directory:
        write_text(directory / "config.yaml", config.to_yaml())
        set_up_log(directory / "logs" / f"{AGGREGATOR}.log")
        began = time.monotonic()
        torch.set_num_threads(config.runtime.threads)
        with placing(resolved, resolved.model_dump(mode="json")) as placed:
            aggregator = prepare_aggregator(resolved)
            record = OpeningRecord(directory / OPENINGS_FILE, AGGREGATOR)

            def tell(phase: str, done: int, total: int) -> None:
                progress("simulation", phase, done, total)

            rounds = SimulatedRounds(aggregator, sum_rules(resolved), placed, record, tell)
            _write(directory, rounds.begin())
            for number in range(1, config.last_round + 1):
                _write(directory, rounds.round(number))
            for ledgers in placed.all(HospitalGroup.privacy_ledgers):
                _keep(directory, ledgers)
        save_model(directory / MODEL_FILE, aggregator.model, config, aggregator.normalisation, aggregator.calibration)
        write_model_card(config, directory)
        summary = training_summary(config, directory, command, time.monotonic() - began, [])
        conclude(directory, summary)
    return summary


def _preflight(config: Config) -> Config:
    """The configuration with a session, and what follows from public sizes set: so that no hospital need find it again.

    Raises what a run would raise before it starts, and `MpcFlError` where this machine has too little memory.
    """
    require_site_allows(config)
    device_of(config)
    require_weights(config)
    patients = patients_per_hospital(config)
    if config.data.normalise == "secure":
        require_enough_patients(plan_features(config), sum(patients), before=True)
    resolved = config.with_values(federation={"session": config.federation.session or secrets.token_hex(16)})
    if config.privacy.mechanism != "none":
        sizes = public_sizes(config)
        bounds = {"smallest_hospital": sizes.smallest, "largest_hospital": sizes.largest}
        resolved = resolved.with_values(privacy=bounds)
    _require_memory(resolved, max(patients))
    return resolved


def _require_memory(config: Config, patients: int) -> None:
    """Of this machine, for all hospitals, and for one of so many patients that is at work: others work on other processors."""
    found = estimate_training(config, [patients], hospital_name(0))
    held = _COPIES_OF_PARAMETERS * _FLOAT * found.parameters * config.federation.hospitals
    needed, available = held + found.memory_bytes_per_hospital, available_memory()
    if available is not None and needed > available:
        raise MpcFlError(
            f"{config.federation.hospitals} simulated hospitals need about {needed / 1e9:.1f} GB of memory together, "
            f"{available / 1e9:.1f} GB are available",
            "simulate fewer hospitals, or a smaller network",
        )


def _write(directory: Path, done: RoundDone) -> None:
    """The lines about a round, of the aggregator and of each hospital."""
    append_json_line(directory / "metrics.jsonl", done.line)
    for name, line in done.of_hospitals.items():
        append_json_line(directory / "parties" / name / "metrics.jsonl", line)


def _keep(directory: Path, ledgers: Mapping[str, bytes]) -> None:
    """Privacy ledgers where a real run has them."""
    for name, content in ledgers.items():
        with written_whole(directory / "parties" / name / f"{name}-privacy.sqlite3") as temporary:
            temporary.write_bytes(content)
