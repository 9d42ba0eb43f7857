"""The report of an audit of views: who received what, what tests say of it, and pictures of what can be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from mpc_fl.apps.formats import duration, percent, plain, size
from mpc_fl.apps.report.common_sections import made_by
from mpc_fl.apps.report.figures import extraction_curves, png_uri
from mpc_fl.apps.report.markup import Markup, escape, paragraph, plot, table, tiles
from mpc_fl.apps.report.page import document
from mpc_fl.apps.rows import read_object
from mpc_fl.apps.views_summary import PICTURES_FILE, VIEWS_FILE, Inversion, Judged, ViewsSummary
from mpc_fl.errors import DataError
from mpc_fl.files import write_text

_SHOWN = ("image", "plaintext", "noised", "masked")  # beside each other, by hospital
_LARGEST = 64  # pixels across, of a picture and of a sheet of them
_CHANCE = 0.05


def _result(summary: ViewsSummary) -> Markup:
    tests = sum(made.tests for made in (*summary.recorded, *summary.repeated))
    facts: list[tuple[str, object, str]] = [
        ("Messages", sum(of.messages for of in summary.received), "recorded by all parties"),
        ("Tests of masked words", tests, f"level {percent(summary.level)} for all together"),
        ("Rejected", len(summary.rejected), "none is expected"),
    ]
    for found in summary.inversions[:3:2]:
        facts.append(
            (f"Inversion, {found.view}", plain(found.mean, ".2f"), "similarity with its own image; 1 is the image")
        )
    facts.append(("Time", duration(summary.seconds), ""))
    if summary.holds:
        said = paragraph(
            "Masked words look uniform, and independent of each other and of what they mask. The tests see what is crude, such as "
            "masks left out or used twice; they are no proof."
        )
    else:
        said = paragraph(
            "Masked words do not look as they must. Release nothing of this run, and report it as SECURITY.md says, unless a "
            f"second audit finds nothing: by chance {percent(summary.level)} of audits end so.",
            "warning",
        )
    return Markup(tiles(facts) + said)


def _received(summary: ViewsSummary) -> Markup:
    rows = [(of.receiver, of.sender, of.what, of.form, of.messages, size(of.bytes)) for of in summary.received]
    head = ("Received by", "From", "What", "Form", "Messages", "Bytes")
    text = (
        "All that each party received, after the links' decryption. What left a hospital is in the rows of the others."
    )
    more = paragraph(
        f"The contents of {summary.not_kept} messages were not kept (runtime.recorded_bytes), and not tested.",
        "warning",
    )
    return Markup(paragraph(text) + (more if summary.not_kept else "") + table("Who received what", head, rows, 2))


def _tested(made: list[Judged], caption: str) -> Markup:
    rows = [(of.of, of.tests, plain(of.smallest, ".2g"), len(of.rejected)) for of in made]
    rejected = [paragraph(name, "warning") for of in made for name in of.rejected]
    return Markup(
        table(caption, ("Words", "Tests", "Smallest p-value", "Rejected"), rows, 3) + "".join(rejected)
        if rows
        else paragraph("There are no masked words that are long enough to be tested.")
    )


def _tests(summary: ViewsSummary) -> Markup:
    text = """Each message of masked words: how often each byte and each bit come, how often neighbouring bits differ, whether words
    depend on the word before. Each pair that must not depend on each other: whether their difference is uniform, whether they
    correlate, whether their bits agree. The level is shared out by Holm's method, so the smallest p-value of many tests may be
    small."""
    own = _tested(summary.recorded, "Messages of this run")
    if not summary.repeated:
        return Markup(paragraph(text) + own)
    again = """The run's sums were made again, twice, in one process: there the update behind the words is known, so it is tested,
    too, whether they depend on it, and whether they do on the same hospital's in another round and in another run of the same
    data."""
    return Markup(
        paragraph(text)
        + own
        + paragraph(again)
        + _tested(summary.repeated, "Sums made again, with the plaintext at hand")
    )


def _scores(found: Inversion) -> tuple[object, ...]:
    verdict = "at chance" if found.at_chance >= _CHANCE else "shows its image"
    others = sum(found.others) / len(found.others)
    return (found.view, plain(found.mean, ".2f"), plain(min(found.own), ".2f"), plain(others, ".2f"), plain(found.at_chance, ".2g"),
            verdict)  # fmt: skip


def _picture(pixels: torch.Tensor, alt: str) -> str:
    return f'<img class="scan" src="{png_uri(pixels[None].numpy())}" alt="{escape(alt)}" style="width:4.5rem">'


def _inversion(summary: ViewsSummary, pictures: Mapping[str, torch.Tensor]) -> Markup:
    if not summary.inversions:
        return paragraph("A diagnosis has no updates.")
    text = f"""Hospitals of one phantom each took one step with one image, the easiest case for whoever attacks. From what leaves
    them an image is looked for whose gradient points the same way (Geiping et al. 2020). Similarity is the correlation of pixels
    with what all such images have in common taken off: 1 is the image, and another one has 0 on average. The noise multiplier is
    {plain(summary.noise_multiplier, ".3g")}. The sum is what is opened without noise, over
    {len(summary.inversions[-1].own)} hospitals: masks do not hide it."""
    head = ("View", "Similarity", "Lowest", "With other images", "By chance", "")
    rows = [_scores(found) for found in summary.inversions]
    shown = [name for name in _SHOWN if name in pictures]
    count = min((len(pictures[name]) for name in shown), default=0)
    lines = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{_picture(pictures[name][place], name)}</td>' for place in range(count))}</tr>"
        for name in shown
    )
    if "sum" in pictures:
        lines += f"<tr><td>sum</td><td>{_picture(pictures['sum'][0], 'sum')}</td></tr>"
    sheet = f'<div class="scroll"><table>{lines}</table></div>'
    caption = "By chance: how probable so close a fit is if a view shows nothing of its image"
    return Markup(paragraph(text) + table(caption, head, rows, 5) + sheet)


def _extraction(summary: ViewsSummary) -> Markup:
    found = summary.extraction
    if found is None:
        return paragraph("Not made: it needs a trained model, phantoms to ask with, and --queries.")
    text = f"""Whoever asks for diagnoses can train a network of their own on the answers. With how many queries does it agree with
    the model on {found.held_out} new phantoms? Who always says the most frequent class agrees on {percent(found.least)}. Quotas of
    a service (serving.images_per_day, and those of all hospitals together) bound the queries of a day. Cleverer queries, or more
    knowledge, need fewer."""
    logits = dict(found.logits)
    rows = [(count, percent(share), percent(logits.get(count))) for count, share in found.labels]
    curves = {"labels alone": found.labels, "logits": found.logits}
    picture = plot(extraction_curves(curves, found.least), "Agreement against queries", "Agreement on new images.")
    return Markup(paragraph(text) + picture + table("Agreement", ("Queries", "Labels alone", "Logits"), rows, 3))


def _pictures(directory: Path) -> dict[str, torch.Tensor]:
    """uint8 (n, height, width) by name. Raises `DataError` for anything else."""
    path = directory / PICTURES_FILE
    try:
        found = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError):
        raise DataError(f"{path} cannot be read", "make the audit again") from None
    for pictures in found.values():
        if pictures.dtype != torch.uint8 or pictures.dim() != 3 or max(pictures.shape) > _LARGEST:
            raise DataError(f"{path} holds something else than pictures", "make the audit again")
    return found


def write_views_report(directory: Path) -> Path:
    """Write `report.html` of an audit from its files, whole or not at all. Raises `DataError` where these are damaged."""
    summary = read_object(ViewsSummary, directory, VIEWS_FILE)
    sections = {
        "Result": _result(summary),
        "Who received what": _received(summary),
        "Uniform and independent": _tests(summary),
        "Gradient inversion": _inversion(summary, _pictures(directory)),
        "Model extraction": _extraction(summary),
        "Record": made_by(summary.command, summary.versions, summary.run),
    }
    path = directory / "report.html"
    write_text(path, document(f"What parties saw: {summary.name}", summary.synthetic, sections))
    return path
