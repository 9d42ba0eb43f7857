"""inference_sections"""

from __future__ import annotations

import json
import math
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from mpc_fl.apps.report import figures
from mpc_fl.apps.report.formats import duration, percent, plain
from mpc_fl.apps.report.markup import Markup, escape, paragraph, table, tiles
from mpc_fl.apps.report.run_files import Run, _each, _json_lines, _missing, _read, _skipped

_MOST_IMAGES = 24


def _results(run: Run) -> tuple[list[dict[str, Any]], Markup]:
    """Lines of results.jsonl with names for numbers and the plaintext reference, and a note when that is missing."""
    results = _json_lines(run, f"parties/{run.hospital}/results.jsonl")
    wanted = ["plaintext_reference.json"] if run.summary.get("comparison") else []
    found, note = _each(lambda name: json.loads(_read(run.directory, name))["logits"], wanted)
    reference = found[wanted[0]] if found else [None] * len(results)
    for line, logits in zip(results, reference, strict=True):
        names = run.classes(len(line["probabilities"] or run.summary["classes"]))
        line.update(classes=names, chosen=names[line["predicted"]], plaintext=None, difference=None)
        line["truth"] = names[line["label"]] if line["label"] >= 0 else "unknown"
        if logits is not None:
            powers = [math.exp(logit - max(logits)) for logit in logits]
            line["plaintext"] = [power / sum(powers) for power in powers]
            if line["logits"] is not None:
                line["difference"] = max(abs(a - b) for a, b in zip(line["logits"], logits, strict=True))
    return results, note


def _diagnosis(run: Run) -> Markup:
    summary, comparison = run.summary, run.summary.get("comparison")
    facts = [
        ("Images", summary["images"], "diagnosed without showing them to the model owner"),
        ("Time per image", duration(summary["seconds_per_image"]), f"whole run {duration(summary['seconds'])}"),
    ]
    if comparison:
        remark = f"plaintext takes {duration(comparison['plaintext_seconds_per_image'])} per image"
        facts.append(("Same classes as plaintext", "yes" if comparison["classes_agree"] else "no", remark))
        if comparison["largest_logit_difference"] is not None:
            facts.append(("Largest logit difference", plain(comparison["largest_logit_difference"]), "to plaintext"))
    facts += _skipped(summary)
    known = [line for line in summary.get("results") or _results(run)[0] if line["label"] >= 0]
    if known:
        right = sum(line["label"] == line["predicted"] for line in known)
        facts.append(("Right", f"{right} of {len(known)}", "images whose true class is known"))
    refused = summary.get("refused")
    return Markup(tiles(facts) + (paragraph(f"Not all images were answered: {refused}", "warning") if refused else ""))


def _images(run: Run) -> Markup:
    lines, note = _results(run)
    addresses = [""] * len(lines := lines[:_MOST_IMAGES])
    try:
        pixels = load_file(run.directory / f"parties/{run.hospital}/images.safetensors")["images"]
        addresses = [figures.png_uri(picture) for picture in pixels[: len(lines)]]
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        note = Markup(note + _missing("images.safetensors is missing or cannot be read (tables have none)"))
    cards = ""
    for line, address in zip(lines, addresses, strict=True):
        alt = text = f"{line['name']}: predicted {line['chosen']}, true class {line['truth']}"
        for kind, values in (("encrypted", line["probabilities"] or []), ("plaintext", line["plaintext"] or [])):
            listed = (f"{a} {percent(b)}" for a, b in zip(line["classes"], values, strict=False))
            alt += f"; {kind}: {', '.join(listed) or 'not computed'}"
        if line["difference"] is not None:
            text += f"; largest logit difference to plaintext {plain(line['difference'])}"
        scan = f'<img class="scan" src="{address}" alt="The image {escape(line["name"])}">' if address else ""
        chart = ""
        if line["probabilities"] is not None:
            bars = figures.probability_bars(line["classes"], line["probabilities"], line["plaintext"])
            chart = f'<img class="plot" src="{figures.svg_uri(bars)}" alt="{escape(alt)}">'
        cards += f'<figure class="card">{scan}{chart}<figcaption>{escape(text)}</figcaption></figure>'
    text = f"{len(lines)} of {run.summary['images']} images. Probabilities are the softmax of the opened logits."
    if lines and lines[0]["probabilities"] is None:
        text = f"{len(lines)} of {run.summary['images']} images. Only the class was opened."
    return Markup(paragraph(text, "soft") + note + cards)


def _all_images(run: Run) -> Markup:
    rows = []
    for line in _results(run)[0]:
        opened, seconds = line["probabilities"], plain(line["seconds"])
        chance = "not opened" if opened is None else percent(opened[line["predicted"]])
        names = (line["index"], line["name"], line["truth"], line["chosen"])
        rows.append((*names, chance, seconds, plain(line["difference"])))
    head = ("Index", "Name", "True class", "Predicted", "Probability", "Seconds", "Logit difference")
    return table("All images. Logit difference: the largest to the plaintext reference.", head, rows, 3)
