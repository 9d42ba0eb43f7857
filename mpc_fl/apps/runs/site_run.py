"""A run of one party at its site, from its program to its own summary and report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mpc_fl.apps.rows import GlobalRound, HospitalRound, costs_in, read_rows
from mpc_fl.apps.runs.party_process import quoting_nothing, run_alone
from mpc_fl.apps.runs.run_directory import count_parameters, versions
from mpc_fl.apps.summaries import SUMMARY_FILE, PartySummary, PrivacySpent
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.files import read_json_lines, write_json, write_text
from mpc_fl.links.party_links import site_directory
from mpc_fl.roles import is_hospital


def run_site(name: str, config: Config, command: str, notify: Callable[[str, int, int], None]) -> Path | None:
    """Run the party `name`; of a training run write config.yaml, summary.json and report.html beside what it left.

    Returns the path of the report, None for other tasks. Raises `MpcFlError` alone.
    """
    began = time.monotonic()
    run_alone(name, config, notify)
    if config.task != "train":
        return None
    from mpc_fl.apps.report.page import write_report  # draws: matplotlib and Pillow come with it

    out, of = site_directory(config), _of_hospital if is_hospital(name) else _of_aggregator
    with quoting_nothing():
        write_text(out / "config.yaml", config.to_yaml())
        summary = of(name, config, command, time.monotonic() - began)
        write_json(out / SUMMARY_FILE, summary.to_json())
        return write_report(out)


def _summary(name: str, config: Config, command: str, seconds: float) -> PartySummary:
    """What all parties have."""
    out = site_directory(config)
    return PartySummary(
        name=config.name,
        party=name,
        synthetic=config.data.source == "phantoms",
        rounds=config.training.rounds,
        rounds_made=0,
        hospitals=config.federation.hospitals,
        parameters=count_parameters(out / MODEL_FILE, config),
        seconds=round(seconds, 2),
        command=command,
        versions=versions(),
        classes=list(config.data.classes),
        unit=config.data.counted_unit,
        openings=len(read_json_lines(out / OPENINGS_FILE)),
        began_with=config.model.initial_weights,
        names=config.federation.names or None,
        costs=costs_in(out, {name: "traffic.json"}),
    )


def _of_hospital(name: str, config: Config, command: str, seconds: float) -> PartySummary:
    rounds = read_rows(HospitalRound, site_directory(config), "metrics.jsonl")
    if not rounds:
        raise DataError(f"{name} made no round of this run", "its log says why; the model is that of the others")
    last, privacy = rounds[-1], config.privacy
    summary = _summary(name, config, command, seconds)
    if config.among_peers:
        summary = _with_opened(summary, read_rows(GlobalRound, site_directory(config), ROUNDS_FILE))
    return replace(
        summary,
        rounds_made=sum(line.round <= config.training.rounds for line in rounds),
        patients=last.patients,
        records=last.records,
        class_counts=last.class_counts,
        skipped_files=last.skipped_files,
        left_aside=last.left_aside,
        treatments=last.treatments,
        own_accuracy=last.own_accuracy,
        privacy=PrivacySpent(
            hospital=name,
            epsilon=last.epsilon,
            delta=privacy.delta,
            noise_multiplier=last.noise_multiplier,
            target_epsilon=privacy.epsilon,
            mechanism=privacy.mechanism,
            per_sample_gradients=last.method,
        ),
    )


def _of_aggregator(name: str, config: Config, command: str, seconds: float) -> PartySummary:
    rounds = read_rows(GlobalRound, site_directory(config), "metrics.jsonl")
    made = sum(0 < line.round <= config.training.rounds for line in rounds)
    return replace(_with_opened(_summary(name, config, command, seconds), rounds), rounds_made=made)


def _with_opened(summary: PartySummary, rounds: list[GlobalRound]) -> PartySummary:
    """What was opened of all hospitals, and who took part."""
    evaluated = [line for line in rounds if line.evaluation is not None]
    return replace(
        summary,
        final=evaluated[-1].evaluation if evaluated else None,
        evaluated_round=evaluated[-1].round if evaluated else None,
        took_part={str(line.round): line.hospitals for line in rounds},
        groups=rounds[-1].groups if rounds else None,
    )
