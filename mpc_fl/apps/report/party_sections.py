"""Sections of the report of one party that trained by itself: what it has of the result, and its own counts."""

from __future__ import annotations

from mpc_fl.apps.formats import duration, percent, plain
from mpc_fl.apps.report.markup import Markup, paragraph, table, tiles
from mpc_fl.apps.report.run_files import Run, skipped


def result(run: Run) -> Markup:
    """Headline numbers that this party has."""
    of, spent = run.party, run.party.privacy
    facts: list[tuple[str, object, str]] = []
    if of.final is not None:
        interval = f"95 % interval {percent(of.final.accuracy_low)} to {percent(of.final.accuracy_high)}"
        facts.append(
            ("Accuracy", percent(of.final.accuracy), f"{interval}; {of.final.records} test records of all hospitals")
        )
    if of.records is not None:
        tested = f"of the final model, on {of.records.get('test', 0)} own test records"
        value = "none" if of.own_accuracy is None else percent(of.own_accuracy)
        facts.append(("Own accuracy", value, tested if of.own_accuracy is not None else "no own test records"))
    if spent is not None:
        holds = f"per {of.unit}, at delta = {spent.delta:g}" if spent.epsilon is not None else "no differential privacy"
        facts.append(("Epsilon of own patients", plain(spent.epsilon) if spent.epsilon is not None else "none", holds))
    facts += [
        ("Rounds", of.rounds_made, f"of {of.rounds}, with {of.hospitals} hospitals in all"),
        ("Time", duration(of.seconds), f"{of.parameters:,} trained parameters"),
        ("Openings", of.openings, "values that left the secret domain, in which this party had a part"),
        *skipped(of),
    ]
    text = f"""This is the report of {of.party} alone, from its own files. What only other parties have is not in it."""
    return Markup(tiles(facts) + paragraph(text))


def counts(run: Run) -> Markup:
    """How many of its own patients and records were for what, of which classes, and what was none."""
    of = run.party
    patients, records, by_class = of.patients or {}, of.records or {}, of.class_counts or {}
    classes = (
        of.classes if patients and all(len(by_class.get(part, ())) == len(of.classes) for part in patients) else []
    )
    rows = [(part, patients[part], records.get(part, 0), *(by_class[part] if classes else ())) for part in patients]
    text = "Own patients and records by what they were for. These numbers stay at this hospital."
    head = ("For", f"{of.unit}s".capitalize(), "Records", *classes)
    found = table(text, head, rows, len(head) - 1) if rows else Markup("")
    aside = sorted((of.left_aside or {}).items(), key=lambda entry: (-entry[1], entry[0]))
    return Markup(found + table("Left aside: no records", ("What", "Count"), aside, 1)) if aside else found
