"""The section of a training report about groups of test patients: each with its intervals, gaps, and what is withheld."""

from __future__ import annotations

from mpc_fl.apps.formats import percent, plain
from mpc_fl.apps.group_scores import GroupScores, GroupShare, GroupShown
from mpc_fl.apps.report import figures
from mpc_fl.apps.report.markup import Markup, paragraph, plot, table, tiles
from mpc_fl.apps.report.run_files import Run, each
from mpc_fl.apps.rows import OwnModel, read_object
from mpc_fl.roles import is_hospital

_DRAWN = 4  # classes
_OWN_MODEL = "own_model.json"  # as `federation.own_model` names it


def groups(run: Run) -> Markup:
    """All that is known of groups; nothing where none were asked for."""
    found = run.training.groups if run.content.get("groups") is not None else None
    if found is None:
        return Markup("")
    if not found.shown:
        return Markup(paragraph(f"Groups of test patients: none is shown. {_withheld(found)}"))
    names = run.classes(len(found.shown[0].classes))
    return Markup(_headline(found, names) + _picture(found, names) + _by_group(found) + _gaps(found, names))


def _headline(found: GroupScores, names: list[str]) -> Markup:
    largest, facts = found.largest, list[tuple[str, object, str]]()
    if largest is not None:
        sure = [gap for gap in found.gaps if gap.is_more_than_chance]
        facts = [
            (
                "Largest gap between groups",
                percent(largest.gap),
                f"{largest.attribute}, {largest.named(names)}: {largest.worst} below {largest.best}; 95 % interval "
                f"{percent(largest.low)} to {percent(largest.high)}",
            ),
            ("Gaps that are more than chance", len(sure), f"of {len(found.gaps)}, at 5 % for all tests together"),
        ]
    counted = (
        f"Counts of groups carry noise of {found.noise:.1f} patients each, in epsilon; the confusion matrix alone was opened."
        if found.noise is not None
        else "Counts of groups are exact sums over all hospitals, which no epsilon covers."
    )
    text = f"""The final model on groups of test patients, of all hospitals together. {counted} How many patients a group has was
    opened with noise. {_withheld(found)}"""
    return Markup(tiles(facts) + paragraph(text))


def _withheld(found: GroupScores) -> str:
    rule = f"A group that was not shown to have {found.fewest} patients is withheld: its counts are in no sum"
    if not found.withheld:
        return f"{rule}; there is none."
    named = "; ".join(f"{attribute}: {', '.join(of)}" for attribute, of in found.withheld.items())
    return f"{rule}. Withheld: {named}."


def _picture(found: GroupScores, names: list[str]) -> Markup:
    shown = [(f"{of.attribute}: {of.group}", [_span(part.sensitivity) for part in of.classes]) for of in found.shown]
    drawn = figures.group_shares(names[:_DRAWN], [(name, spans[:_DRAWN]) for name, spans in shown])
    told = "; ".join(
        f"{name}: {', '.join(percent(span[0]) if span else 'n/a' for span in spans)}" for name, spans in shown
    )
    caption = f"""Sensitivity by group, with 95 % intervals: the share of a class's records that the final model finds{
        f" (of {len(names)} classes the first {_DRAWN} are drawn)" if len(names) > _DRAWN else ""
    }. A group without a mark has too
    few to say."""
    return plot(drawn, f"Sensitivity by group. {told}.", caption)


def _span(share: GroupShare) -> tuple[float, float, float] | None:
    if share.share is None or share.low is None or share.high is None:
        return None
    return share.share, share.low, share.high


def _by_group(found: GroupScores) -> Markup:
    rows = [
        (of.attribute, of.group, of.scores.records, percent(of.scores.accuracy), _interval(of), *_probabilities(of))
        for of in found.shown
    ]
    counted = "patients" if found.noise is not None else "records"
    text = f"""Groups, in {counted}. Accuracy differs where a group has other classes, so groups are compared by sensitivity and
    specificity. A calibration error is compared with what chance makes of so few records."""
    head = ("By", "Group", counted.capitalize(), "Accuracy", "95 % interval", "AUC", "Calibration error", "By chance")
    return table(text, head, rows, 6)


def _interval(of: GroupShown) -> str:
    return f"{percent(of.scores.accuracy_low)} to {percent(of.scores.accuracy_high)}"


def _probabilities(of: GroupShown) -> tuple[str, str, str]:
    if of.scores.noise is not None:
        return "not opened", "not opened", ""
    areas = [part.auc for part in of.classes]
    shown = " / ".join("n/a" if area is None else f"{area.area:.3f}" for area in areas)
    return shown, percent(of.scores.calibration_error), percent(of.error_by_chance)


def _gaps(found: GroupScores, names: list[str]) -> Markup:
    rows = [
        (
            gap.attribute,
            gap.named(names),
            gap.worst,
            gap.best,
            percent(gap.gap),
            f"{percent(gap.low)} to {percent(gap.high)}",
            "not tested" if gap.chance is None else f"{plain(gap.chance, '.2g')} ({gap.differs})",
        )
        for gap in sorted(found.gaps, key=lambda gap: -gap.gap)
    ]
    test = "a normal test with the variance of the noise" if found.noise is not None else "Fisher's exact test"
    text = f"""Gaps: the worst and the best group, their difference with its interval (Newcombe), and how probable it is by chance
    that one group is as far from all others of its attribute ({test}, corrected for all tests of the run by Holm's procedure; below
    0.05 is more than chance). Records count as independent of each other."""
    return table(text, ("By", "Figure", "Worst", "Best", "Gap", "95 % interval", "By chance (group)"), rows, 3)


def own_models(run: Run) -> Markup:
    """The final model beside one that each hospital trained alone, where hospitals were asked for that."""
    kept = [name for name in run.parties() if is_hospital(name) and (run.directory / _own_file(run, name)).is_file()]
    found, notes = each(lambda name: read_object(OwnModel, run.directory, _own_file(run, name)), kept)
    if not kept:
        return Markup("")
    rows = [
        (
            name,
            of.alone.records,
            f"{percent(of.federated.accuracy)} ({percent(of.federated.accuracy_low)} to {percent(of.federated.accuracy_high)})",
            f"{percent(of.alone.accuracy)} ({percent(of.alone.accuracy_low)} to {percent(of.alone.accuracy_high)})",
            f"{of.federated_alone_right} / {of.own_alone_right}",
            plain(of.chance, ".2g"),
        )
        for name, of in found.items()
    ]
    here = "This is this hospital's own, which it alone sees."
    if not run.is_of_a_party:
        here = "This run had all parties on one machine: at a real site each hospital sees only its own line."
    text = f"""The final model, and one that a hospital trained on its own patients alone, without noise, both on its own test
    records. Neither its own model nor these counts leave it. Right alone: records that one of both decides rightly and the other
    does not; by chance: how probable so unequal numbers are among equally good models (McNemar's exact test). {here}"""
    head = ("Hospital", "Records", "Federation's model", "Own model", "Right alone", "By chance")
    return Markup(notes + table(text, head, rows, 5))


def _own_file(run: Run, name: str) -> str:
    return run.file_of(name, _OWN_MODEL)
