"""The report of an audit of shortcuts: what the diagnosis rests on, whether sites show in films, and what is not said by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpc_fl.apps.formats import duration, percent, plain
from mpc_fl.apps.report.common_sections import made_by
from mpc_fl.apps.report.figures import accuracy_changes, png_uri
from mpc_fl.apps.report.markup import Markup, escape, paragraph, plot, table, tiles
from mpc_fl.apps.report.page import document
from mpc_fl.apps.rows import read_object
from mpc_fl.apps.shortcut_summary import (
    ALONE,
    CORNERS,
    FEDERATION,
    SHORTCUTS_FILE,
    ChangeFound,
    FilmShown,
    ModelStudied,
    ShortcutSummary,
)
from mpc_fl.evidence.shortcuts_tested import LEAST_KEPT, LEAST_LOSS, LEVEL, Estimate
from mpc_fl.files import write_text

_MOST_ALONE = 3  # hospitals in one figure
_SAYS = {"shortcut": "shows a shortcut", "contrast": "leans on contrast", "none": "no sign"}


def _share(of: Estimate) -> str:
    return f"{percent(of.value)} ({percent(of.low)} to {percent(of.high)})"


def _points(of: Estimate) -> str:
    return f"{100 * of.value:+.1f} ({100 * of.low:+.1f} to {100 * of.high:+.1f})"


def _number(of: Estimate, form: str = ".3f") -> str:
    return f"{of.value:{form}} ({of.low:{form}} to {of.high:{form}})"


def _of_all(summary: ShortcutSummary) -> ModelStudied:
    return next(studied for studied in summary.models if studied.site is None)


def said_of(summary: ShortcutSummary) -> list[str]:
    """What was found, a sentence each: of the run's model, of hospitals alone beside it, and of sites."""
    whole, said = _of_all(summary), list[str]()
    if whole.shortcuts:
        said.append(f"The run's model shows a shortcut: {_and(whole.shortcuts)}.")
    else:
        said.append("The run's model shows no shortcut by lungs, borders or corners.")
    contrast = [change.name for change in whole.changes if change.finding == "contrast"]
    if contrast:
        said.append(f"It leans on the contrast that it was trained with: {_and(contrast)}.")
    of_federation = {studied.site: studied for studied in summary.of_model(FEDERATION)}
    for alone in summary.of_model(ALONE):
        beside = of_federation.get(alone.site)
        own, common = _corners(alone), None if beside is None else _corners(beside)
        if (
            own is None
            or common is None
            or own.finding != "shortcut"
            or own.beyond_seams is None
            or common.beyond_seams is None
        ):
            continue
        said.append(
            f"{alone.site} alone learned what is in the corners: with those of a film of another diagnosis instead of the same "
            f"it loses {-100 * own.beyond_seams.value:.1f} points of accuracy on its own films, the federation "
            f"{max(0.0, -100 * common.beyond_seams.value):.1f} on the same ones."
        )
    if summary.probe is not None:
        where = "can" if summary.probe.told else "cannot be shown to"
        said.append(
            f"The site {where} be told from the film: the probe is right about {percent(summary.probe.accuracy.value)} of them, "
            f"who sees no film about {percent(max(summary.probe.chance, summary.probe.by_diagnosis))}."
        )
    return said


def _corners(studied: ModelStudied) -> ChangeFound | None:
    return next((change for change in studied.changes if change.name == CORNERS), None)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _result(summary: ShortcutSummary) -> Markup:
    whole, probe = _of_all(summary), summary.probe
    facts: list[tuple[str, object, str]] = [
        (
            "Accuracy untouched",
            percent(whole.accuracy.value),
            f"{whole.records} test films of {whole.patients} patients",
        ),
        ("Signs of shortcuts", len(whole.shortcuts), "of the run's model"),
        ("Time", duration(summary.seconds), ""),
    ]
    if probe is not None:
        facts.insert(2, ("Site told", percent(probe.accuracy.value), f"by a probe; chance is {percent(probe.chance)}"))
    mark = "" if summary.mark is None else paragraph(f"Put into these phantoms on purpose: {summary.mark}.")
    kind = "warning" if whole.shortcuts else "plain"
    return Markup(tiles(facts) + mark + "".join(paragraph(sentence, kind) for sentence in said_of(summary)))


def _rests_on(summary: ShortcutSummary, films: Sequence[FilmShown]) -> Markup:
    whole = _of_all(summary)
    text = f"""Each change is made to all test films, and the same model judges them again. Lungs are {summary.lungs}. With
    lungs masked a diagnosis should be lost: where {LEAST_KEPT:.0%} or more are left of what the area below the curve has above
    one half, and its interval is above one half, the diagnosis comes from elsewhere. Borders and corners are those of a film of
    another diagnosis, and should not matter. Their seams alone may, which no film of the training has; so the same is done with
    films of the same diagnosis, and what counts is the loss beyond the seams. Another contrast should not matter either; that is no
    shortcut by itself, but what another scanner changes. A loss counts from {100 * LEAST_LOSS:.0f} points on, with its interval
    below zero, where the paired test against the untouched films says so at {LEVEL:.0%} over all changes together (Holm)."""
    whose = "all hospitals'" if summary.films_of is None else f"{summary.films_of}'s"
    series = {f"the run's model, {whose} films": [_triple(change) for change in whole.changes]}
    names = [change.name for change in whole.changes]
    figure = accuracy_changes(names, series, "The run's model on changed films")
    picture = plot(figure, "Change of accuracy by each change of the films", "With intervals of 95 % over patients.")
    return Markup(
        paragraph(text) + picture + _table_of(whole, f"The run's model, {whose} films") + _shown(summary, films)
    )


def _triple(change: ChangeFound) -> tuple[float, float, float]:
    of = change.accuracy_change
    return of.value, of.low, of.high


def _table_of(studied: ModelStudied, caption: str) -> Markup:
    rows = [("untouched", "", _share(studied.accuracy), "", "", _number(studied.area), "", "")]
    rows += [
        (
            of.name,
            _SAYS.get(of.finding, "n/a"),
            _share(of.accuracy),
            _points(of.accuracy_change),
            "" if of.beyond_seams is None else _points(of.beyond_seams),
            _number(of.area),
            _number(of.log_odds_change, "+.2f"),
            plain(of.p_holm, ".2g"),
        )
        for of in studied.changes
    ]
    head = ("Films", "Says", "Accuracy", "Change, points", "Beyond seams", "AUC", "Change of log odds", "p (Holm)")
    return table(caption, head, rows, 6)


def _shown(summary: ShortcutSummary, films: Sequence[FilmShown]) -> Markup:
    """One film of each class, changed; below each the model's probability of its class."""
    cards = ""
    for film in films:
        name = summary.classes[film.label]
        for what, pixels in film.images.items():
            moved = film.probabilities[what] - film.probabilities["untouched"]
            effect = "" if what == "untouched" else f" ({100 * moved:+.0f} points)"
            cards += (
                f'<figure class="card"><img class="scan" src="{png_uri(pixels)}" alt="{escape(name)}, {escape(what)}">'
                f"<div><b>{escape(name)}</b>, {escape(what)}<br>probability of {escape(name)}: "
                f"{percent(film.probabilities[what])}{effect}</div></figure>"
            )
    if not cards:
        return paragraph("No film is shown: these are patients' films. --pictures puts some into this page.")
    return Markup(f"<details><summary>Films, changed, and what the model says of each</summary>{cards}</details>")


def _alone(summary: ShortcutSummary) -> Markup:
    alone, beside = list(summary.of_model(ALONE)), {of.site: of for of in summary.of_model(FEDERATION)}
    if not alone:
        return paragraph("Not asked for: --no-left-out leaves out the trainings of single hospitals.")
    worst = sorted(alone, key=_largest_loss)
    text = """A hospital that trains by itself meets one site alone, and what goes with the diagnosis there by accident looks
    like the disease to it. Each hospital's own model and the federation's are asked about the same films, those of the hospital."""
    parts = ""
    for own in worst[:_MOST_ALONE]:
        series = {f"{own.site} alone": [_triple(change) for change in own.changes]}
        if own.site in beside:
            series["federation, same films"] = [_triple(change) for change in beside[own.site].changes]
        names = [change.name for change in own.changes]
        parts += plot(
            accuracy_changes(names, series, f"On the films of {own.site}"),
            f"Change of accuracy on the films of {own.site}, of its own model and of the federation's",
            f"Untouched: {own.site} alone {_share(own.accuracy)}, federation {_share(beside[own.site].accuracy)}.",
        )
    tables = "".join(_table_of(own, f"{own.site} alone, on its own films") for own in worst)
    return Markup(paragraph(text) + parts + f"<details><summary>Each hospital alone</summary>{tables}</details>")


def _largest_loss(studied: ModelStudied) -> float:
    """Of places that should not matter, as a change of accuracy."""
    return min((of.beyond_seams.value for of in studied.changes if of.beyond_seams is not None), default=0.0)


def _site(summary: ShortcutSummary) -> Markup:
    probe = summary.probe
    if probe is None:
        return paragraph("Not asked for (--no-probe).")
    noise = "no noise" if probe.epsilon is None else f"noise as in the run, epsilon {plain(probe.epsilon)}"
    text = f"""The probe is the run's network, trained on the run's films with hospitals for classes: mechanism
    {probe.mechanism}, {probe.steps} steps, {noise}. It shows what the run's own training could use to know a site. Every step
    was a sum of its own, because a hospital that has one class alone learns nothing else by itself."""
    charged = """Nothing was charged to a privacy ledger: who audits has all films, and neither the probe nor its sums leave the
    audit. If hospitals trained it together and released it, each would charge that epsilon beside the run's."""
    rows = [
        ("the probe", _share(probe.accuracy)),
        ("nobody sees a film", percent(probe.chance)),
        ("nobody sees a film, but knows the diagnosis", percent(probe.by_diagnosis)),
        ("gain over the better of both, points", _points(probe.gain)),
        ("area below the curve, mean over sites", _number(probe.area)),
    ]
    said = table(
        f"Right about the site, of {probe.sites}, on {probe.records} test films", ("Who guesses", "Right"), rows, 1
    )
    return Markup(paragraph(text) + said + paragraph(charged))


def _left_out(summary: ShortcutSummary) -> Markup:
    if not summary.left_out:
        return paragraph("Not asked for (--no-left-out).")
    rows = [
        (
            of.site,
            of.patients,
            _share(of.federation),
            "n/a" if of.without is None else _share(of.without),
            _share(of.own),
            _share(of.own_elsewhere),
        )
        for of in summary.left_out
    ]
    head = ("Site", "Patients", "Run's model", "Trained without it", "Its own", "Its own at all others")
    text = """A model that has learned the disease is as good at a site that it has not seen. One that is much worse there, or a
    hospital's own that is good at home and bad elsewhere, has learned the site as well."""
    return Markup(paragraph(text) + table("Accuracy on the test films of each site", head, rows, 5))


def _limits(summary: ShortcutSummary) -> Markup:
    where = f"Lungs were taken to be {summary.lungs}; nothing outlines them. "
    more = """Grey lungs have an edge that no training film has, and a model may lose by the edge alone; what is seen
    with lungs masked may lie in heart, chest wall or posture, and be medicine all the same. A fixed region misses lungs of
    films that are turned or cropped. A change that does nothing says nothing of shortcuts that are not in this list. Intervals
    and tests are over patients of these sites; they say nothing of other hospitals, nor of another draw of noise."""
    return paragraph(where + more)


def write_shortcut_report(directory: Path, films: Sequence[FilmShown]) -> Path:
    """Write `report.html` of an audit of shortcuts from its shortcuts.json and these films, whole or not at all.

    Raises `DataError` where the file is damaged.
    """
    summary = read_object(ShortcutSummary, directory, SHORTCUTS_FILE)
    sections = {
        "Result": _result(summary),
        "What the diagnosis rests on": _rests_on(summary, films),
        "One hospital alone": _alone(summary),
        "Can the site be told?": _site(summary),
        "Leaving each site out": _left_out(summary),
        "What this does not show": _limits(summary),
        "Record": made_by(summary.command, summary.versions, summary.run),
    }
    path = directory / "report.html"
    write_text(path, document(f"Audit of shortcuts: {summary.name}", summary.synthetic, sections))
    return path
