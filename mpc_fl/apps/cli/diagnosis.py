"""`mpc-fl infer | serve`: encrypted diagnoses on this machine, at a hospital that asks a server, and the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpc_fl.apps.cli.options import (
    AsJson,
    AuthorityOfModel,
    ConfigPath,
    LedgerOfModel,
    OutPath,
    Overrides,
    command_line,
    configure,
    earlier_failure_of,
    error_console,
    print_json,
    say,
    say_earlier_failure,
    say_skipped,
)
from mpc_fl.apps.cli.progress import shown_progress
from mpc_fl.apps.formats import duration
from mpc_fl.errors import ConfigError, MpcFlError, RefusedError
from mpc_fl.roles import DEALER, HOSPITAL, MODEL_OWNER

if TYPE_CHECKING:
    from mpc_fl.apps.summaries import AnyDiagnosisSummary, Comparison
    from mpc_fl.audit.model_origin import ModelOrigin
    from mpc_fl.config.config import Config


def infer(
    config: ConfigPath,
    out: OutPath,
    model: Annotated[
        Path | None, typer.Option(help="model.safetensors of a training run; the model owner's secret.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Image file or directory; the hospital's secret. Phantoms need none.")
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="This hospital's key and certificate, to ask a server.")] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Model owner to ask (mpc-fl serve).")] = None,
    dealer: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The server's dealer.")] = None,
    ledger: LedgerOfModel = None,
    authority: AuthorityOfModel = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Diagnose images under encryption: the model owner never sees them, the hospital never sees the weights.

    Three processes: hospital, model owner, dealer. Only the hospital learns the result. With
    --set inference.plaintext_reference=true the same images are also run in the clear, to compare.
    The model file is held against the digest that all parties of its training signed, if their ledger
    is beside it or given with --ledger; another file is refused.

    With --identity this process is a hospital alone and asks a model owner that stays up (mpc-fl serve); addresses that
    --server and --dealer do not give are those in the configuration's federation.addresses. With --set site.pool=DIR
    batches made ahead (mpc-fl dealer fill --server) are used first.
    """
    from mpc_fl.apps.runs.launcher import start_early

    if identity is not None or server is not None or dealer is not None:
        from mpc_fl.inference.serving.client import asking

        if ledger is not None or authority is not None:
            raise ConfigError("the model and its ledger are the server's", "leave --ledger and --authority out")
        settings = configure(config, overrides, images=images, identity=identity)
        _ask(asking(settings, server, dealer), out, model, as_json)
        return
    if model is None:
        raise ConfigError("no model was given", "pass --model FILE, or --identity DIR to ask a server")
    given = {"model": model, "reveal_ledger": ledger, "authority": authority}
    settings = configure(config, overrides, images=images, **given)
    with start_early(settings, "infer") as starter:  # it imports while this process does
        from mpc_fl.apps.runs import local_runs as run

        with shown_progress(settings.federation.chosen_names) as progress:
            summary = run.infer(settings, out, command_line(), progress, starter)
    _say_films(model, settings, as_json)
    if as_json:
        _print_summary(summary, out)
        return
    if summary.synthetic:
        say("Data: SYNTHETIC phantoms, not patients.")
    _say_diagnoses(summary)
    if summary.model_file is not None:
        say(f"The model file {summary.model_file.words}.")
    if summary.comparison is not None:
        _say_comparison(summary.comparison)
    say_skipped(summary.skipped_files)
    _say_report(summary, out)


def _say_films(model: Path, settings: Config, as_json: bool = False) -> None:
    """Where nothing says how films became the inputs of the model; on standard error beside JSON."""
    from mpc_fl.learning.models.model_file import note_on_films

    note = note_on_films(model, settings)
    if note is not None:
        error_console().print(f"{note}.", markup=False) if as_json else say(f"{note}.")


def _say_comparison(comparison: Comparison) -> None:
    """The encrypted diagnoses beside those in the clear."""
    difference, agree = comparison.largest_logit_difference, "agree" if comparison.classes_agree else "DIFFER"
    logits = "logits not opened" if difference is None else f"largest logit difference {difference:.5f}"
    say(f"Encrypted and plaintext classes {agree}; {logits}.")


def _print_summary(summary: AnyDiagnosisSummary, out: Path) -> None:
    """All for machines. Raises `MpcFlError` after it where the report could not be written."""
    report = None if summary.unreported else str(out / "report.html")
    print_json({**summary.to_json(), "report": report, **earlier_failure_of(out)})
    if summary.unreported:
        raise MpcFlError(summary.unreported, f"make it with: mpc-fl report {out}")


def _say_report(summary: AnyDiagnosisSummary, out: Path) -> None:
    """Where it is, and what failed before. Raises `MpcFlError` where it could not be written: all else has been said."""
    say_earlier_failure(out)
    if summary.unreported:
        raise MpcFlError(summary.unreported, f"the diagnoses are above and in {out}")
    say(f"Report: {out / 'report.html'}")


def _ask(settings: Config, out: Path, model: Path | None, as_json: bool) -> None:
    """A hospital that asks a server."""
    from mpc_fl.apps.runs import local_runs as run

    if model is not None:
        raise ConfigError("the model is the server's", "leave --model out to ask a server")
    with shown_progress(settings.federation.chosen_names) as progress:
        summary = run.ask(settings, out, command_line(), progress)
    if as_json:
        _print_summary(summary, out)
    else:
        if summary.synthetic:
            say("Data: SYNTHETIC phantoms, not patients.")
        _say_diagnoses(summary)
        say(
            "Opened: the label alone."
            if summary.revealed == "label"
            else "Opened: logits, by the model owner's choice."
        )
        _say_report(summary, out)
    if summary.refused:
        raise RefusedError(summary.refused)


def serve(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="Directory of the service; kept from start to start, holds the quotas.")],
    model: Annotated[Path | None, typer.Option(help="model.safetensors; the model owner's secret.")] = None,
    identity: Annotated[
        Path | None,
        typer.Option(help="Key and certificate of the model owner; without, of a simulation on this machine."),
    ] = None,
    role: Annotated[str, typer.Option(help="With --identity: model-owner, or dealer for the dealer it works with.")] = (
        MODEL_OWNER
    ),
    ledger: LedgerOfModel = None,
    authority: AuthorityOfModel = None,
    overrides: Overrides = None,
) -> None:
    """Keep a model owner up that answers any hospital of the federation, until Ctrl-C.

    Hospitals get the label alone. Logits, which give a model away faster, are your choice: --set inference.reveal=logits.
    Hospitals take turns batch by batch; serving.images_per_day and serving.images_per_minute bound what each may ask,
    serving.images_per_day_of_all and serving.images_per_minute_of_all what all of them may. Both sides sign a receipt of
    each batch; mpc-fl ledger verify OUT reads them. With
    --set site.pool=DIR each hospital may keep batches made ahead here (mpc-fl dealer fill --server). Without
    --identity model owner and dealer run here, with identities for all hospitals in OUT/parties/NAME/identity.
    """
    from mpc_fl.apps.runs.launcher import start_early
    from mpc_fl.apps.runs.party_log import set_up_log
    from mpc_fl.apps.runs.party_process import run_alone

    given = {"model": model, "reveal_ledger": ledger, "authority": authority}
    settings = configure(config, overrides, identity=identity, out=out, **given)

    def tell(federation: Path, origin: ModelOrigin) -> None:
        say(f"The model file {origin.words}.")
        if settings.site.model is not None:
            _say_films(settings.site.model, settings)
        what = "the label alone" if settings.with_values(task="serve").reveal == "label" else "LOGITS, as configured"
        say(f"Hospitals get {what}.")
        say(f"Ask with: mpc-fl infer {federation} --identity {out / 'parties' / HOSPITAL / 'identity'} --out DIR")

    if role not in (MODEL_OWNER, DEALER):
        raise ConfigError(f"'{role}' cannot serve", "give --role model-owner or --role dealer")
    if identity is None:
        with start_early(settings, "serve") as starter:
            from mpc_fl.apps.runs import local_runs as run

            run.serve(settings, out, lambda *_progress: None, tell, starter)
        return
    set_up_log(settings.site.log, settings.federation.chosen_names)
    run_alone(role, settings.with_values(task="serve"), lambda *_progress: None)


def _say_diagnoses(summary: AnyDiagnosisSummary) -> None:
    for result in summary.results or []:
        name = summary.classes[result.predicted]
        chance = f" ({max(result.probabilities):.1%})" if result.probabilities else ""  # the label alone was opened
        say(f"{result.name}: {name}{chance}, {duration(result.seconds)}")
