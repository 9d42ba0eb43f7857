"""What attacks found: gradient inversion and what parties saw, copies by queries, membership, epsilon from below, shortcuts."""

from __future__ import annotations

from case_study.figures import Findings
from case_study.paper import Block, Heading, Picture, Table, Text
from case_study.wording import interval, points
from mpc_fl.apps.audit_summary import AuditSummary
from mpc_fl.apps.formats import percent, plain
from mpc_fl.apps.report.figures import extraction_curves, membership_curve
from mpc_fl.apps.views_summary import Inversion

CHANCE = 0.05  # below, a view shows more than chance would
MASKED, PLAINTEXT = "masked", "plaintext"
_VIEW_HEAD = ("View", "Mean", "Lowest", "With other films", "By chance", "")


def _inversions(found: Findings) -> tuple[Inversion | None, Inversion | None]:
    of = {} if found.views is None else {at.view: at for at in found.views.inversions}
    return of.get(PLAINTEXT), of.get(MASKED)


def attacks_in_short(found: Findings) -> list[str]:
    """For the abstract."""
    said, (plaintext, masked) = list[str](), _inversions(found)
    if plaintext is not None and masked is not None:
        hidden = "at chance" if masked.at_chance >= CHANCE else "NOT at chance"
        said.append(
            f"""Gradient inversion finds films in plaintext updates (similarity {plaintext.mean:.2f}, 1 is the film); in the
            words that really leave a hospital it is {hidden} ({masked.mean:.2f})."""
        )
    areas = {name: of.membership.area for name, of in found.audits.items() if of.membership is not None}
    if areas:
        listed = ", ".join(f"{area:.2f} for {name.removeprefix('membership-')}" for name, area in areas.items())
        said.append(f"Membership inference by the final model has an area of {listed} (one half is chance).")
    return said


def _membership(name: str, audit: AuditSummary) -> list[Block]:
    rows = tuple(
        (of.seen, of.round, of.guesses, of.right, plain(of.lower), "no bound" if of.upper is None else plain(of.upper))
        for of in audit.bounds
    )
    head = ("From", "After round", "Guesses", "Right", "Epsilon at least", "Epsilon at most")
    said = "no lower bound exceeds what is promised" if audit.holds else "A LOWER BOUND EXCEEDS WHAT IS PROMISED"
    if audit.noise_multiplier is None:
        said = "there is no noise and no promise; the lower bound is as high as so many canaries can show"
    caption = f"{name}: {audit.canaries} canaries, delta {audit.delta:.2g}; {said}"
    blocks: list[Block] = [Table(caption, head, rows, 5)]
    member = audit.membership
    if member is not None:
        rates = ", ".join(f"{percent(true)} of members at {percent(false)} mistakes" for false, true in member.rates)
        of_whom = f"{name}: {member.models} shadow models, {member.patients} patients"
        text = f"{of_whom}; area {member.area:.3f}, one half is chance; {rates}."
        picture = membership_curve(member.curve)
        caption = "Left of the dashed line: better than chance at few mistakes, which is what harms."
        blocks += [Text(text), Picture(picture, name, f"Membership, {name}", caption)]
    return blocks


def attacks(found: Findings) -> list[Block]:
    """Gradient inversion, uniformity, extraction, membership and lower bounds."""
    blocks, views = list[Block](), found.views
    if views is not None:
        rows = tuple(
            (
                of.view, plain(of.mean, ".2f"), plain(min(of.own), ".2f"), plain(sum(of.others) / len(of.others), ".2f"),
                plain(of.at_chance, ".2g"), "at chance" if of.at_chance >= CHANCE else "shows its film",
            )
            for of in views.inversions
        )  # fmt: skip
        tests = sum(of.tests for of in (*views.recorded, *views.repeated))
        rejected = f"{len(views.rejected)} were rejected" if views.rejected else "none was rejected"
        blocks += [
            Heading("Gradient inversion, and what parties saw"),
            Table(
                "Similarity of what was found with the film",
                ("View", "Mean", "Lowest", "With other films", "By chance", ""),
                rows,
                5,
            ),
            Text(
                f"""{tests} tests of masked words, of a run of which all messages were recorded, at {percent(views.level)}
                together: {rejected}. Masks hide an update from who adds up, not the sum from who sees it: of so few films
                without noise it may show some."""
            ),
        ]
        if views.extraction is not None:
            curves = {"labels alone": views.extraction.labels, "logits": views.extraction.logits}
            caption = (
                f"How often a copy agrees with the model on {views.extraction.held_out} new phantoms, against queries."
            )
            picture = extraction_curves(curves, views.extraction.least)
            blocks.append(Picture(picture, "extraction", "Agreement of a copy against queries", caption))
    if found.audits:
        blocks.append(Heading("Membership, and epsilon from below"))
    return [*blocks, *(block for name, audit in found.audits.items() for block in _membership(name, audit))]


def shortcuts(found: Findings) -> list[Block]:
    """What diagnoses rest on."""
    if found.shortcuts is None:
        return []
    whole = next(of for of in found.shortcuts.models if of.site is None)
    rows = tuple(
        (
            of.name, points(of.accuracy_change), "" if of.beyond_seams is None else points(of.beyond_seams),
            plain(of.area.value, ".3f"), plain(of.p_holm, ".2g"), of.finding,
        )
        for of in whole.changes
    )  # fmt: skip
    said = ", ".join(found.shortcuts.shortcuts)
    text = (
        f"The model shows a shortcut: {said}."
        if said
        else "No shortcut was found by lungs, borders or corners; that is no proof that there is none."
    )
    head = ("Change", "Accuracy", "Beyond seams", "AUC left", "p (Holm)", "Finding")
    before = f"Before any change {interval(whole.accuracy)} on {whole.records} films."
    return [Text(f"{before} {text}"), Table("Films changed on purpose (small-distributed)", head, rows, 5)]
