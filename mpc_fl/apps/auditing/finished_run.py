"""A finished run as an audit takes it, and the audit as a directory of its own: audit.json and report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpc_fl.apps.audit_summary import AUDIT_FILE, AuditSummary
from mpc_fl.apps.auditing.audited_config import AuditedRun, sample_rate
from mpc_fl.apps.auditing.privacy_audit import CONFIDENCE, AuditPlan, audit_privacy
from mpc_fl.apps.auditing.shadow_runs import infer_membership
from mpc_fl.apps.rows import read_text
from mpc_fl.apps.runs.run_directory import require_free, run_directory, versions
from mpc_fl.apps.summaries import SUMMARY_FILE, Header, TrainingSummary, parse_summary
from mpc_fl.config.loading import load_config
from mpc_fl.errors import DataError
from mpc_fl.files import write_json
from mpc_fl.progress import Progress

_PARTY = "audit"  # what progress is told of


@dataclass(frozen=True)
class AuditRequest:
    """The audit of the run in a directory: so many canaries in all, so many in one repetition, so many models to infer
    membership from (none: 0), patients of several records or of one; `command` is noted."""

    run: Path
    canaries: int
    at_once: int
    of_patients: bool
    shadows: int
    command: str


def summary_content(directory: Path) -> tuple[Header, dict[str, Any]]:
    """Header and content of the summary of a finished run of any kind. Raises `DataError` where there is none."""
    try:
        return parse_summary(read_text(directory, SUMMARY_FILE))
    except DataError as error:
        raise DataError(f"{directory} is not a finished run: {error}", "give the --out of a finished train") from None


def summary_of(directory: Path) -> TrainingSummary:
    """That of a finished training run, by all its parties or simulated. Raises `DataError` for anything else."""
    header, content = summary_content(directory)
    if header.kind != TrainingSummary.KIND:
        raise DataError(
            f"{directory} is no training run of all its parties", "give the --out of a finished train or simulate"
        )
    summary = TrainingSummary.from_json(content)
    if summary.central:
        raise DataError(
            f"{directory} is of training in one place, where nothing was shared", "give that of a federation"
        )
    return summary


def run_to_audit(directory: Path, canaries: int) -> AuditedRun:
    """The run in a directory, with the least noise that any of its hospitals had. Raises `DataError`, and `ConfigError` for a
    configuration that cannot be read."""
    summary, config = summary_of(directory), load_config(directory / "config.yaml")
    noises = [spent.noise_multiplier for spent in summary.privacy if spent.noise_multiplier is not None]
    if config.privacy.mechanism == "none":
        return AuditedRun(config, None, canaries)
    if not noises:
        raise DataError(f"{directory} does not say what noise its hospitals had", f"see {SUMMARY_FILE}")
    return AuditedRun(config, min(noises), canaries)


def audit_run(request: AuditRequest, out: Path, progress: Progress) -> AuditSummary:
    """Audit a run and write what was found, with a report, to the new directory `out`.

    Raises `DataError` where there is no finished run, `ConfigError` for one that cannot be audited or an `out` that exists,
    and what the run itself would raise.
    """
    require_free(out)
    run, audited = run_to_audit(request.run, min(request.at_once, request.canaries)), summary_of(request.run)
    plan = AuditPlan(run, max(1, round(request.canaries / run.canaries)), request.of_patients)
    found = audit_privacy(plan, lambda done, of: progress(_PARTY, "audit", done, of))
    config, training, membership = run.config, run.config.training, None
    if request.shadows:
        membership = infer_membership(
            config, request.shadows, lambda done, of: progress(_PARTY, "membership", done, of)
        )
    spent = [line.epsilon for line in audited.privacy if line.epsilon is not None]
    summary = AuditSummary(
        name=config.name,
        run=str(request.run),
        synthetic=audited.synthetic,
        command=request.command,
        versions=versions(),
        mechanism=config.privacy.mechanism,
        unit="patient" if request.of_patients else "record",
        hospitals=config.federation.hospitals,
        honest=run.honest,
        rounds=training.rounds,
        local_steps=training.local_steps,
        sample_rate=None if config.privacy.mechanism == "none" else sample_rate(run),
        noise_multiplier=run.noise_multiplier,
        delta=plan.delta,
        confidence=CONFIDENCE,
        canaries=plan.canaries,
        repetitions=plan.repetitions,
        bounds=found.bounds,
        upper=found.upper,
        epsilon_of_run=max(spent) if spent else None,
        seconds=round(found.seconds, 2),
        membership=membership,
    )
    with run_directory(out) as directory:
        from mpc_fl.apps.report.audit_page import write_audit_report  # draws: matplotlib comes with it

        write_json(directory / AUDIT_FILE, summary.to_json())
        write_audit_report(directory)
    return summary
