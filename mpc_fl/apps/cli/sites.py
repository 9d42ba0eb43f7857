"""What a site runs: `mpc-fl party`, one party alone, and `mpc-fl report`, the report of a run that is finished."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpc_fl.apps.cli.options import (
    Anyway,
    AsJson,
    DataPath,
    FromModel,
    Overrides,
    command_line,
    configure,
    print_json,
    say,
)
from mpc_fl.apps.cli.progress import shown_progress
from mpc_fl.roles import is_hospital

if TYPE_CHECKING:
    from mpc_fl.config.config import Config

log = logging.getLogger("mpc_fl")


def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], as_json: AsJson = False) -> None:
    """Write report.html of a finished run again, from its files."""
    from mpc_fl.apps.runs import local_runs as run

    path = run.report(run_dir)
    print_json({"report": str(path)}) if as_json else say(f"Report: {path}")


def party(
    config: Annotated[Path, typer.Option(help="The run's configuration: same file everywhere but for `site`.")],
    role: Annotated[
        str | None,
        typer.Argument(
            metavar="[ROLE]",
            help="hospital, aggregator, dealer, model-owner, or one of federation.names; torchrun, Slurm and Kubernetes tell it.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Rank of a hospital, or without ROLE of any party.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory where this party writes.")] = None,
    identity: Annotated[Path | None, typer.Option(help="Directory with this party's key and certificate.")] = None,
    data: DataPath = None,
    images: Annotated[Path | None, typer.Option(help="Hospital: images to diagnose.")] = None,
    model: Annotated[Path | None, typer.Option(help="Model owner: model.safetensors.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from what --out holds: after a failure, or with more training.rounds."),
    ] = False,
    leave_after: Annotated[
        int | None,
        typer.Option(min=1, metavar="ROUND", help="Hospital without an aggregator: leave the run after this round."),
    ] = None,
    from_model: FromModel = None,
    anyway: Anyway = False,
    overrides: Overrides = None,
) -> None:
    """Run one party alone, as a site does on its own machine. The launcher spawns exactly these programs.

    The configuration must hold federation.addresses (host:port of every party) and a fresh federation.session. A hospital takes
    all of --data, which is its own.
    """
    from mpc_fl.apps.runs.party_log import set_up_log
    from mpc_fl.apps.runs.party_process import quoting_nothing, require_site_allows
    from mpc_fl.apps.runs.placement import party_of, site_of
    from mpc_fl.apps.runs.site_data import with_own_data
    from mpc_fl.apps.runs.site_run import run_site
    from mpc_fl.audit.model_origin import MODEL_FILE
    from mpc_fl.chosen_names import told_by_name
    from mpc_fl.crypto.certificates import ROOT_FILE

    settings = configure(
        config, overrides, from_model, out=out, identity=identity, data=data, images=images, model=model
    )
    if resume:
        settings = settings.with_values(site={"resume": True})
    if leave_after is not None:
        settings = settings.with_values(site={"leave_after": leave_after})
    settings.data.require_agreed_columns()
    name = party_of(settings, role, rank, os.environ)
    settings = with_own_data(site_of(settings, name), name)
    names = settings.federation.chosen_names
    set_up_log(settings.site.log, names)
    with told_by_name(names), quoting_nothing():
        require_site_allows(settings, name, by_itself=True)
        if is_hospital(name) and settings.task == "train":
            _look_before(settings, name, anyway)
    with told_by_name(names), shown_progress(names) as progress:
        written = run_site(
            name, settings, command_line(), lambda phase, done, total: progress(name, phase, done, total)
        )
    if written is not None:
        say(f"Model:  {written.with_name(MODEL_FILE)}\nReport: {written}")
        say(
            f"To check what was opened: mpc-fl ledger verify {shlex.quote(str(written.parent))} --authority {ROOT_FILE}"
        )


def _look_before(config: Config, name: str, anyway: bool) -> None:
    """Before anybody is dialled: whether this hospital has the patients for a run, what looks wrong about them, and what its
    privacy ledger leaves for it."""
    from mpc_fl.apps.runs.site_data import own_patients
    from mpc_fl.federation.ledger_forecast import ledger_forecast
    from mpc_fl.learning.data.survey import patient_warnings
    from mpc_fl.links.party_links import site_directory

    site_directory(config)
    patients = own_patients(config, name)
    log.info("%s has data of %d training %ss", name, patients, config.data.counted_unit)
    for warning in patient_warnings(config):
        say(f"WARNING: {warning}.")
    forecast = None if config.site.resume else ledger_forecast(config, name, patients)
    if forecast is None:
        return
    if not anyway:
        forecast.require_worth()
    say(f"{forecast.described}.")
