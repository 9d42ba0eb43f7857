"""What a site runs: `mpc-fl party`, one party alone, and `mpc-fl report`, the report of a run that is finished."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mpc_fl.apps.cli.options import AsJson, DataPath, FromModel, Overrides, configure, print_json, say
from mpc_fl.apps.cli.progress import shown_progress


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
            help="hospital, aggregator, dealer or model-owner; torchrun, Slurm and Kubernetes tell it.",
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
    from_model: FromModel = None,
    overrides: Overrides = None,
) -> None:
    """Run one party alone, as a site does on its own machine. The launcher spawns exactly these programs.

    The configuration must hold federation.addresses (host:port of every party) and a fresh federation.session.
    """
    from mpc_fl.apps.runs.party_log import set_up_log
    from mpc_fl.apps.runs.party_process import run_alone
    from mpc_fl.apps.runs.placement import party_of, site_of

    settings = configure(
        config, overrides, from_model, out=out, identity=identity, data=data, images=images, model=model
    )
    if resume:
        settings = settings.with_values(site={"resume": True})
    settings.data.require_agreed_columns()
    name = party_of(settings, role, rank, os.environ)
    settings = site_of(settings, name)
    set_up_log(settings.site.log)
    with shown_progress() as progress:
        run_alone(name, settings, lambda phase, done, total: progress(name, phase, done, total))
