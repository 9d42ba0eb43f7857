"""The report of an audit of privacy: both bounds in one picture, what they rest on, and what they do not say."""

from __future__ import annotations

from pathlib import Path

from mpc_fl.apps.audit_summary import AUDIT_FILE, AuditSummary
from mpc_fl.apps.formats import duration, percent, plain
from mpc_fl.apps.report.common_sections import made_by
from mpc_fl.apps.report.figures import membership_curve, privacy_bounds
from mpc_fl.apps.report.markup import Markup, paragraph, plot, table, tiles
from mpc_fl.apps.report.page import document
from mpc_fl.apps.rows import read_object
from mpc_fl.files import write_text


def _result(summary: AuditSummary) -> Markup:
    best = max(summary.bounds, key=lambda bound: bound.lower)
    upper = summary.bounds[-1].upper
    facts: list[tuple[str, object, str]] = [
        (
            "Epsilon at least",
            plain(best.lower),
            f"{best.seen}; confidence {summary.confidence:.0%} for all bounds together",
        ),
        (
            "Epsilon at most",
            "no bound" if upper is None else plain(upper),
            "by the accountant, for all steps of training",
        ),
        ("Canaries", summary.canaries, f"in {summary.repetitions} repetitions of the run"),
        ("Time", duration(summary.seconds), ""),
    ]
    if summary.holds:
        said = paragraph(
            "No lower bound exceeds what the accountant says: the audit found no fault in noise, clipping, sampling or accounting. "
            "That is no proof that there is none."
            if upper is not None
            else "There is no noise, so no epsilon holds; the lower bound is as high as so many canaries can show."
        )
    else:
        said = paragraph(
            "The lower bound exceeds the accountant's: patients lose more than is promised. Do not release anything of this run, "
            "and report the fault as SECURITY.md says.",
            "warning",
        )
    return Markup(tiles(facts) + said)


def _picture(summary: AuditSummary) -> Markup:
    figure = privacy_bounds(
        summary.upper,
        [(bound.round, bound.lower) for bound in summary.bounds[:-1]],
        (summary.bounds[-1].round, summary.bounds[-1].lower),
    )
    caption = f"""Above the line nothing is claimed; the audit shows that epsilon is not below the marks. Both are at delta
    {summary.delta:.2g}. Marks: what whoever pools with the aggregator can show of a {summary.unit} after so many rounds, and of the
    final model alone."""
    return plot(figure, "Upper bound on epsilon after each round, and lower bounds", caption)


def _guesses(summary: AuditSummary) -> Markup:
    rows = [
        (of.seen, of.round, of.guesses, of.right, plain(of.lower), "no bound" if of.upper is None else plain(of.upper))
        for of in summary.bounds
    ]
    head = ("From", "After round", "Guesses", "Right", "Epsilon at least", "Epsilon at most")
    text = f"""Of {summary.canaries} canaries each was in the data with probability 1/2. Whoever sees what was opened, and
    whatever the {summary.hospitals - summary.honest} hospitals know that may pool, guesses of the canaries with the most
    extreme scores whether they were in. So many right guesses are improbable unless epsilon is at least the lower bound
    (Steinke, Nasr, Jagielski 2023)."""
    return Markup(paragraph(text) + table("Guesses", head, rows, 5))


def _membership(summary: AuditSummary) -> Markup:
    found = summary.membership
    if found is None:
        return paragraph(
            "Not asked for: --shadows N trains N models on halves of the run's own data, and attacks each."
        )
    rows = [(percent(false), percent(true)) for false, true in found.rates]
    text = f"""{found.models} runs like this one were made on its own data, with half of the {found.patients} training
    patients each. Of each model the others told how sure it would be of a patient that trained it, and of one that did not
    (Carlini et al. 2022). Who attacks has the final model and the patients' records. This is an attack that was tried, not a
    bound: a better one shows more. With half of the patients a model remembers more of each than that of all would."""
    tile = tiles([("Area below the curve", plain(found.area), "one half is chance")])
    picture = plot(
        membership_curve(found.curve),
        "Members recognised against patients taken for members by mistake, both on scales of powers of ten",
        "To the left of the dashed line: better than chance at few mistakes, which is what harms.",
    )
    head = ("Patients taken for members by mistake", "Members recognised")
    return Markup(paragraph(text) + tile + picture + table("At few mistakes", head, rows, 2))


def _rests_on(summary: AuditSummary) -> Markup:
    noise, rate = plain(summary.noise_multiplier, ".4g"), plain(summary.sample_rate, ".4g")
    spent = "" if summary.epsilon_of_run is None else (
        f" The run itself, with all else that it opened, says epsilon {summary.epsilon_of_run:.4g} at its own delta."
    )  # fmt: skip
    facts = f"""Mechanism {summary.mechanism}; noise multiplier {noise}; a step draws a {summary.unit} with probability {rate};
    {summary.rounds} rounds of {summary.local_steps} steps; {summary.honest} of {summary.hospitals} hospitals honest.{spent}"""
    made = """The run was made again with the code that trains, clips, adds noise, sums and accounts, but with canaries for
    patients and a linear network in which each of them moves weights of its own. That is the worst case that the accountant
    bounds; what a model of this run shows of a real patient is less, and how much less is not measured here. The lower bound
    is below the truth by what so many guesses leave open: of a tight mechanism it is about half."""
    return Markup(paragraph(facts) + paragraph(made))


def write_audit_report(directory: Path) -> Path:
    """Write `report.html` of an audit from its audit.json, whole or not at all. Raises `DataError` where that is damaged."""
    summary = read_object(AuditSummary, directory, AUDIT_FILE)
    sections = {
        "Result": Markup(_result(summary) + _picture(summary)),
        "Guesses": _guesses(summary),
        "Membership": _membership(summary),
        "What it rests on": _rests_on(summary),
        "Record": made_by(summary.command, summary.versions, summary.run),
    }
    path = directory / "report.html"
    write_text(path, document(f"Audit of privacy: {summary.name}", summary.synthetic, sections))
    return path
