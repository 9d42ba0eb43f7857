"""Sections of the report of an encrypted diagnosis: what came out, each image with its probabilities, all images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.numpy import load_file

from mpc_fl.apps.formats import duration, percent, plain
from mpc_fl.apps.report import figures
from mpc_fl.apps.report.markup import Markup, escape, paragraph, table, tiles
from mpc_fl.apps.report.run_files import Run, each, missing, skipped
from mpc_fl.apps.rows import PlaintextReference, read_object, read_rows
from mpc_fl.apps.summaries import ImageResult
from mpc_fl.audit.model_origin import ModelOrigin
from mpc_fl.audit.receipts import RECEIPTS_FILE

_MOST_IMAGES = 24
_RECEIPTS = "Hospital and model owner signed a receipt of each batch. Check them with mpc-fl ledger verify RUN_DIR."


@dataclass(frozen=True)
class _Image:
    """The diagnosis of an image with names for numbers, and beside it that of the network in the clear, if there is one.

    `plaintext` are class probabilities, `difference` is the largest of a logit.
    """

    result: ImageResult
    classes: list[str]
    plaintext: list[float] | None
    difference: float | None

    @property
    def chosen(self) -> str:
        return self.classes[self.result.predicted]

    @property
    def truth(self) -> str:
        return self.classes[self.result.label] if self.result.label >= 0 else "unknown"


def _image(run: Run, result: ImageResult, reference: list[float] | None) -> _Image:
    """`reference` are the logits of the network in the clear."""
    classes = run.classes(len(result.probabilities or run.diagnosis.classes))
    if reference is None:
        return _Image(result, classes, None, None)
    powers = [math.exp(logit - max(reference)) for logit in reference]
    difference = None
    if result.logits is not None:
        difference = max(abs(a - b) for a, b in zip(result.logits, reference, strict=True))
    return _Image(result, classes, [power / sum(powers) for power in powers], difference)


def _all(run: Run) -> tuple[list[_Image], Markup]:
    """All images, and a note when the plaintext reference is missing."""
    results = read_rows(ImageResult, run.directory, f"parties/{run.hospital}/results.jsonl")
    wanted = ["plaintext_reference.json"] if run.diagnosis.comparison else []
    found, note = each(lambda name: read_object(PlaintextReference, run.directory, name).logits, wanted)
    reference: list[list[float]] | list[None] = found[wanted[0]] if found else [None] * len(results)
    return [_image(run, result, logits) for result, logits in zip(results, reference, strict=True)], note


def diagnosis(run: Run) -> Markup:
    """Headline numbers."""
    summary, comparison = run.diagnosis, run.diagnosis.comparison
    facts: list[tuple[str, object, str]] = [
        ("Images", summary.images, "diagnosed without showing them to the model owner"),
        ("Time per image", duration(summary.seconds_per_image), f"whole run {duration(summary.seconds)}"),
    ]
    if comparison:
        remark = f"plaintext takes {duration(comparison.plaintext_seconds_per_image)} per image"
        facts.append(("Same classes as plaintext", "yes" if comparison.classes_agree else "no", remark))
        if comparison.largest_logit_difference is not None:
            facts.append(("Largest logit difference", plain(comparison.largest_logit_difference), "to plaintext"))
    if summary.revealed:
        remark = (
            "the model owner reveals nothing else" if summary.revealed == "label" else "by the model owner's choice"
        )
        facts.append(("Opened", "the label alone" if summary.revealed == "label" else "logits", remark))
    facts += skipped(summary)
    results = summary.results or [image.result for image in _all(run)[0]]
    known = [result for result in results if result.label >= 0]
    if known:
        right = sum(result.label == result.predicted for result in known)
        facts.append(("Right", f"{right} of {len(known)}", "images whose true class is known"))
    origin, refused = summary.model_file, summary.refused
    signed = (run.directory / f"parties/{run.hospital}/{RECEIPTS_FILE}").is_file()
    return Markup(
        tiles(facts)
        + (_of_model(origin) if origin else "")
        + (paragraph(f"Not all images were answered: {refused}", "warning") if refused else "")
        + (paragraph(_RECEIPTS, "soft") if signed else "")
    )


def _of_model(origin: ModelOrigin) -> Markup:
    text = f"The model file {origin.words}. Its SHA-256 is {origin.sha256}: that of the model card to read with it."
    return paragraph(text, "soft" if origin.signed else "warning")


def images(run: Run) -> Markup:
    """The first images, each with its probabilities."""
    found, note = _all(run)
    shown = found[:_MOST_IMAGES]
    addresses = [""] * len(shown)
    try:
        pixels = load_file(run.directory / f"parties/{run.hospital}/images.safetensors")["images"]
        addresses = [figures.png_uri(picture) for picture in pixels[: len(shown)]]
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        note = Markup(note + missing("images.safetensors is missing or cannot be read (tables have none)"))
    cards = "".join(_card(image, address) for image, address in zip(shown, addresses, strict=True))
    text = f"{len(shown)} of {run.diagnosis.images} images. Probabilities are the softmax of the opened logits."
    if shown and shown[0].result.probabilities is None:
        text = f"{len(shown)} of {run.diagnosis.images} images. Only the class was opened."
    return Markup(paragraph(text, "soft") + note + cards)


def _card(image: _Image, address: str) -> str:
    """An image, at the `data:` address of its pixels if there is one, and a chart of its probabilities."""
    result = image.result
    alt = text = f"{result.name}: predicted {image.chosen}, true class {image.truth}"
    for kind, values in (("encrypted", result.probabilities or []), ("plaintext", image.plaintext or [])):
        listed = (f"{a} {percent(b)}" for a, b in zip(image.classes, values, strict=False))
        alt += f"; {kind}: {', '.join(listed) or 'not computed'}"
    if image.difference is not None:
        text += f"; largest logit difference to plaintext {plain(image.difference)}"
    scan = f'<img class="scan" src="{address}" alt="The image {escape(result.name)}">' if address else ""
    chart = ""
    if result.probabilities is not None:
        bars = figures.probability_bars(image.classes, result.probabilities, image.plaintext)
        chart = f'<img class="plot" src="{figures.svg_uri(bars)}" alt="{escape(alt)}">'
    return f'<figure class="card">{scan}{chart}<figcaption>{escape(text)}</figcaption></figure>'


def all_images(run: Run) -> Markup:
    """A table with a row for each image."""
    rows = []
    for image in _all(run)[0]:
        opened, seconds = image.result.probabilities, plain(image.result.seconds)
        chance = "not opened" if opened is None else percent(opened[image.result.predicted])
        names = (image.result.index, image.result.name, image.truth, image.chosen)
        rows.append((*names, chance, seconds, plain(image.difference)))
    head = ("Index", "Name", "True class", "Predicted", "Probability", "Seconds", "Logit difference")
    return table("All images. Logit difference: the largest to the plaintext reference.", head, rows, 3)
