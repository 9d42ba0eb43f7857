"""The summary of a training run whose files are all there, and its last two files: summary.json and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mpc_fl.apps.costs import PartyCosts
from mpc_fl.apps.rows import GlobalRound, HospitalRound, costs_in
from mpc_fl.apps.runs.run_directory import count_parameters, versions
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.summaries import SUMMARY_FILE, PrivacySpent, Summary, TrainingSummary
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config, party_names
from mpc_fl.files import read_json_lines, write_json
from mpc_fl.learning.data.loading import shared_patients
from mpc_fl.roles import is_hospital


def training_summary(config: Config, directory: Path, command: str, seconds: float, lost: list[str]) -> TrainingSummary:
    """Of a run in `directory` that took so many seconds and has `lost` these hospitals. Raises `DataError` for damaged files."""
    rounds = [typed(GlobalRound, line, "metrics.jsonl") for line in read_json_lines(directory / "metrics.jsonl")]
    hospitals = [name for name in party_names(config) if is_hospital(name)]
    last, evaluated = _last_rounds(directory, hospitals), [line for line in rounds if line.evaluation is not None]
    return TrainingSummary(
        name=config.name,
        synthetic=config.data.source == "phantoms",
        rounds=config.training.rounds,
        parameters=count_parameters(directory / MODEL_FILE, config),
        hospitals=hospitals,
        skipped_files=sum(line.skipped_files for line in last.values()),
        seconds=round(seconds, 2),
        command=command,
        versions=versions(),
        final=evaluated[-1].evaluation if evaluated else None,
        evaluated_round=evaluated[-1].round if evaluated else None,
        began_with=config.model.initial_weights,
        shared_patients=len(shared_patients(config).names),
        unit=config.data.counted_unit,
        treatments=dict(sum((Counter(line.treatments) for line in last.values()), Counter[str]())),
        validation=_validation(rounds),
        chosen=rounds[-1].chosen if rounds else None,
        calibration=rounds[-1].calibration if rounds else None,
        groups=rounds[-1].groups if rounds else None,
        privacy=[_privacy_spent(config, name, line) for name, line in last.items()],
        took_part={str(line.round): line.hospitals for line in rounds},
        lost=lost,
        names=config.federation.names or None,
        simulated=config.task == "simulate",
        costs=costs_of_parties(directory, party_names(config)),
    )


def costs_of_parties(directory: Path, parties: Sequence[str]) -> dict[str, PartyCosts] | None:
    """Of those that left them in a run's directory on this machine, None where nobody did. Raises `DataError` for damaged files."""
    return costs_in(directory, {name: f"parties/{name}/traffic.json" for name in parties}) or None


def conclude(directory: Path, summary: Summary) -> None:
    """Write the summary of a run that is over, and its report."""
    from mpc_fl.apps.report.page import write_report  # draws: matplotlib and Pillow come with it

    write_json(directory / SUMMARY_FILE, summary.to_json())
    write_report(directory)


def _validation(rounds: list[GlobalRound]) -> Scores | None:
    """That of the round whose model is the final one: the chosen round, else the last of training; None where none was opened."""
    trained = [line.round for line in rounds if line.round and line.chosen is None and line.calibration is None]
    chosen = next((line.chosen.round for line in rounds if line.chosen is not None), max(trained, default=0))
    return next((line.validation for line in rounds if line.round == chosen), None)


def _last_rounds(directory: Path, hospitals: list[str]) -> dict[str, HospitalRound]:
    """The last round of each hospital that took part in one."""
    lines = {name: read_json_lines(directory / "parties" / name / "metrics.jsonl") for name in hospitals}
    return {name: typed(HospitalRound, of[-1], f"metrics.jsonl of {name}") for name, of in lines.items() if of}


def _privacy_spent(config: Config, name: str, last: HospitalRound) -> PrivacySpent:
    """Of a hospital's patients, after its last round."""
    return PrivacySpent(
        hospital=name,
        epsilon=last.epsilon,
        delta=config.privacy.delta,
        noise_multiplier=last.noise_multiplier,
        target_epsilon=config.privacy.epsilon,
        mechanism=config.privacy.mechanism,
        per_sample_gradients=last.method,
    )
