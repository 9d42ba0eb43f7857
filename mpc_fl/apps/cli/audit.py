"""`mpc-fl audit`: what a run shows of its patients, beside what is promised, what its parties saw, and what diagnoses rest on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpc_fl.apps.cli.options import AsJson, Command, Group, command_line, print_json, say
from mpc_fl.apps.cli.progress import shown_progress
from mpc_fl.errors import ConfigError

if TYPE_CHECKING:
    from mpc_fl.apps.audit_summary import AuditSummary
    from mpc_fl.apps.shortcut_summary import ShortcutSummary
    from mpc_fl.apps.views_summary import ViewsSummary

app = typer.Typer(
    cls=Group,
    name="audit",
    no_args_is_help=True,
    add_completion=False,
    help="""Measure what a run shows of patients, beside what it promises.

    Audits make a run again on this machine, with patients that are made up.
    """,
)


@app.command(cls=Command)
def privacy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished train or simulate.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="New directory for the results. Default: RUN-audit, beside the run.")
    ] = None,
    canaries: Annotated[int, typer.Option(min=40, max=1_000_000, help="How many in all; more show more.")] = 16000,
    at_once: Annotated[
        int, typer.Option(min=40, max=20_000, help="How many in one repetition of the run; fewer need less memory.")
    ] = 1000,
    unit: Annotated[
        Literal["patient", "record"], typer.Option(help="Canaries with two records each, or with one.")
    ] = "patient",
    shadows: Annotated[
        int,
        typer.Option(
            min=0,
            max=256,
            help="Models to train on halves of the run's own data, to infer membership; 0, or 4 and more.",
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Bound epsilon from below, by canaries whose presence is guessed from what training opened (docs/evidence.md).

    The run is made again with its own noise, steps and hospitals, several times, on this machine; that needs no data. With
    --shadows it is also made again so many times on its own data, to attack its model. A lower bound
    above the accountant's upper bound means that patients lose more than is promised: exit status 1. With the confidence of 95 %
    that is no accident.
    """
    from mpc_fl.apps.auditing.finished_run import AuditRequest, audit_run
    from mpc_fl.apps.auditing.shadow_runs import FEWEST_SHADOWS

    if 0 < shadows < FEWEST_SHADOWS:
        raise ConfigError(
            f"{shadows} shadow models tell nothing", f"take --shadows {FEWEST_SHADOWS} or more, 16 for a figure"
        )
    place = run.with_name(run.name + "-audit") if out is None else out
    request = AuditRequest(run, canaries, at_once, unit == "patient", shadows, command_line())
    with shown_progress() as progress:
        summary = audit_run(request, place, progress)
    if as_json:
        print_json({**summary.to_json(), "report": str(place / "report.html")})
    else:
        _say_audit(summary)
        say(f"Report: {place / 'report.html'}")
    if not summary.holds:
        raise typer.Exit(1)


def _say_audit(summary: AuditSummary) -> None:
    for bound in summary.bounds:
        upper = (
            "no upper bound, there is no noise"
            if bound.upper is None
            else f"at most {bound.upper:.3f} by the accountant"
        )
        mark = " CONTRADICTION" if bound.contradicts else ""
        say(
            f"By {bound.seen}: epsilon at least {bound.lower:.3f} ({bound.right} of {bound.guesses} guesses right); {upper}.{mark}"
        )
    say(
        f"Per {summary.unit} at delta {summary.delta:.2g}, all bounds together with confidence {summary.confidence:.0%}; "
        f"{summary.canaries} canaries in {summary.repetitions} repetitions."
    )
    found = summary.membership
    if found is not None:
        rates = ", ".join(f"{true:.1%} of members at {false:.1%} mistakes" for false, true in found.rates)
        say(f"Membership by the final model alone: area {found.area:.3f} below the curve, one half is chance; {rates}.")


@app.command(cls=Command)
def views(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Directory of a train or infer made with runtime.record_messages=true."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="New directory for the results. Default: RUN-views, beside the run.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, max=64, help="Phantoms to look for by gradient inversion.")] = 8,
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Steps of that search; more find more.")] = 300,
    queries: Annotated[
        int,
        typer.Option(min=0, max=1_000_000, help="Most queries to extract the run's model with, 25 or more; 0: none."),
    ] = 800,
    as_json: AsJson = False,
) -> None:
    """Show what each party received, and test that it shows nothing (docs/evidence.md).

    mpc-fl train configs/demo.yaml --set runtime.record_messages=true --out runs/seen, then mpc-fl audit views runs/seen.

    A table says who received what. Masked words are tested: are they uniform, and independent of each other and of what they
    mask? Then images are looked for in what leaves a hospital (gradient inversion): in the plaintext update, which shows them,
    in the noised one, in the masked words. And the run's model is copied by queries, with labels alone and with logits, so
    that quotas of a service can be set by a curve. Exit status 1 where a test is rejected; by chance that happens to at most 1 %
    of audits.
    """
    from mpc_fl.apps.auditing.extracted_models import FEWEST_QUERIES
    from mpc_fl.apps.auditing.views_audit import ViewsRequest, audit_views

    if 0 < queries < FEWEST_QUERIES:
        raise ConfigError(f"{queries} queries extract no model", f"take --queries {FEWEST_QUERIES} or more, or 0")
    place = run.with_name(run.name + "-views") if out is None else out
    with shown_progress() as progress:
        summary = audit_views(ViewsRequest(run, images, steps, queries, command_line()), place, progress)
    if as_json:
        print_json({**summary.to_json(), "report": str(place / "report.html")})
    else:
        _say_views(summary)
        say(f"Report: {place / 'report.html'}")
    if not summary.holds:
        raise typer.Exit(1)


def _say_views(summary: ViewsSummary) -> None:
    tests = sum(made.tests for made in (*summary.recorded, *summary.repeated))
    messages = sum(of.messages for of in summary.received)
    say(f"{messages} messages recorded; {tests} tests of masked words at level {summary.level:.0%} together.")
    for name in summary.rejected:
        say(f"REJECTED: {name}")
    if not summary.rejected:
        say("None is rejected: masked words look uniform and independent.")
    for found in summary.inversions:
        say(
            f"Inversion, {found.view}: similarity {found.mean:.2f} with its own image; "
            f"as close by chance with probability {found.at_chance:.2g}."
        )
    if summary.extraction is not None:
        of = summary.extraction
        (most, by_labels), (_, by_logits) = of.labels[-1], of.logits[-1]
        say(f"Extraction with {most} queries: agreement {by_labels:.1%} by labels, {by_logits:.1%} by logits.")


@app.command(cls=Command)
def shortcuts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished train or simulate on images.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New directory for the results. Default: RUN-shortcuts, beside the run."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Where the run's films are now. Default: where the run had them.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Train a probe that tells the site from the film; as long as the run."),
    ] = True,
    left_out: Annotated[
        bool,
        typer.Option(
            "--left-out/--no-left-out", help="Train without each site, and at each alone; as often as there are sites."
        ),
    ] = True,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Show some patients' films in the report. Phantoms are shown anyway.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find out what diagnoses rest on: the lungs, or a letter in a corner, a cassette's border, a site's look (docs/evidence.md).

    The run's model judges its test films again with lungs masked, with the borders or corners of a film of another diagnosis,
    and in another contrast.
    A diagnosis that survives without lungs, or dies with the corners, is a shortcut; the report says which, with
    intervals and corrected tests. Two more questions need trainings, with the run's own network, noise and steps: whether the
    site can be told from the film, and how a model does at a site that it was trained without. All of it is done in one
    process, so all films must be here; nothing is charged to privacy ledgers, because nothing leaves.

    Try it without data: mpc-fl train configs/demo.yaml --set data.phantoms.shortcut.site=0 --out RUN
    """
    from mpc_fl.apps.auditing.shortcut_audit import ShortcutRequest, audit_shortcuts

    place = run.with_name(run.name + "-shortcuts") if out is None else out
    with shown_progress() as progress:
        request = ShortcutRequest(run, probe, left_out, pictures, command_line(), data)
        summary = audit_shortcuts(request, place, progress)
    if as_json:
        print_json({**summary.to_json(), "report": str(place / "report.html")})
        return
    _say_shortcuts(summary)
    say(f"Report: {place / 'report.html'}")


def _say_shortcuts(summary: ShortcutSummary) -> None:
    from mpc_fl.apps.report.shortcut_page import said_of

    whole = next(studied for studied in summary.models if studied.site is None)
    for change in whole.changes:
        of, beyond = change.accuracy_change, change.beyond_seams
        seams = "" if beyond is None else f", {100 * beyond.value:+.1f} beyond seams"
        mark = {"shortcut": " SHORTCUT", "contrast": " CONTRAST"}.get(change.finding, "")
        say(
            f"{change.name}: accuracy {100 * of.value:+.1f} points ({100 * of.low:+.1f} to {100 * of.high:+.1f}){seams}, "
            f"AUC {change.area.value:.3f}, p {change.p_holm:.2g}.{mark}"
        )
    for sentence in said_of(summary):
        say(sentence)
