"""The report of a finished run: one HTML file without any link to the outside, made from the run's files alone.

Everything read from a run directory is untrusted: text is escaped, figures are images that cannot run code, and the
page forbids itself any outside source. A file that is missing or unreadable costs its section, not the report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mpc_fl.apps.report import figures
from mpc_fl.apps.report.figures import (
    Markup,
    duration,
    escape,
    number,
    paragraph,
    percent,
    plain,
    plot,
    size,
    table,
    tiles,
)
from mpc_fl.errors import DataError
from mpc_fl.files import write_text

_MOST_IMAGES = 24
_TRAINING_STATEMENT = """These sums are the only values that left the secret domain. Everything else that was computed
from patients and sent to another party was a share, which alone is uniformly random. The global model, which the
aggregator computes from the opened mean updates, goes to every hospital."""
_INFERENCE_STATEMENT = """The logits (or the class alone), opened to the hospital alone, are all that left the secret domain.
Images and weights were sent as shares; what is revealed between layers is masked by random values used once."""


@dataclass(frozen=True)
class Run:
    """A run directory with the two files that all sections need. `config` is empty when config.yaml is unreadable."""

    directory: Path
    summary: dict[str, Any]
    config: dict[str, Any]

    def parties(self, prefix: str = "") -> list[str]:
        """Names of the parties that left files, hospital-2 before hospital-10."""
        names = [path.name for path in self.directory.glob(f"parties/{prefix}*") if path.is_dir()]
        return sorted(names, key=lambda name: (re.sub(r"\d+", "", name), len(name), name))

    @property
    def hospital(self) -> str:
        """The hospital that asked, of an inference; untrusted like all else, so a name of another form counts as none."""
        name = str(self.summary.get("hospital", "hospital-0"))
        return name if re.fullmatch(r"hospital-\d{1,3}", name) else "hospital-0"

    def classes(self, count: int) -> list[str]:
        """Names of the classes, or their numbers when the names on file do not fit `count` classes."""
        names = self.summary.get("classes") or (self.config.get("data") or {}).get("classes") or []
        return [str(name) for name in names] if len(names) == count else [f"class {index}" for index in range(count)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(run_dir: Path, name: str) -> str:
    try:
        return (run_dir / name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{name} is missing") from None
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{name} cannot be read") from None


def _json_lines(run: Run, name: str) -> list[dict[str, Any]]:
    try:
        return [dict(json.loads(line)) for line in _read(run.directory, name).splitlines() if line.strip()]
    except (TypeError, ValueError):
        raise DataError(f"{name} cannot be read") from None


def _each(read: Callable[[str], Any], names: Iterable[str]) -> tuple[dict[str, Any], Markup]:
    """What could be read for each name, and a note on what could not."""
    found, notes = {}, ""
    for name in names:
        try:
            found[name] = read(name)
        except DataError as error:
            notes += _missing(str(error))
    return found, Markup(notes)


def _hospital_metrics(run: Run) -> tuple[dict[str, list[dict[str, Any]]], Markup]:
    return _each(lambda name: _json_lines(run, f"parties/{name}/metrics.jsonl"), run.parties("hospital-"))


def _missing(what: str) -> Markup:
    return paragraph(f"Not shown: {what}.", "missing")


def _guarded(build: Callable[[Run], Markup], run: Run) -> Markup:
    """What `build` makes, or one line that says why it cannot: files may be missing or of another version."""
    try:
        return build(run)
    except DataError as error:
        return _missing(str(error))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return _missing("the files of this part are not of the form that this version reads")


# ---- a training run --------------------------------------------------------------------------------------------------


def _final(run: Run) -> dict[str, Any]:
    return dict(run.summary.get("final") or _json_lines(run, "metrics.jsonl")[-1]["evaluation"])


def _skipped(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    """A headline number where files were left out; a run that says nothing about it is of an older version."""
    count = summary.get("skipped_files")
    return [("Skipped files", count, "could not be read and were left out")] if count else []


def _result(run: Run) -> Markup:
    final, summary = _final(run), run.summary
    largest, guess = max(map(sum, final["confusion"])) / max(1, final["records"]), 1 / len(final["confusion"])
    spent = [entry for entry in summary["privacy"] if entry["epsilon"] is not None]
    worst = max(spent, key=lambda entry: entry["epsilon"], default={"epsilon": "none", "delta": None})
    remark = f"per patient, at delta = {worst['delta']:g}" if spent else "no differential privacy"
    interval = f"95 % interval {percent(final['accuracy_low'])} to {percent(final['accuracy_high'])}"
    facts = [
        ("Accuracy", percent(final["accuracy"]), f"{interval}; {final['records']} test records"),
        ("Balanced accuracy", percent(final["balanced_accuracy"]), "mean over classes of the share found"),
        ("Chance level", percent(max(largest, guess)), f"largest class {percent(largest)}; 1/classes {percent(guess)}"),
        ("Epsilon, largest of all hospitals", plain(worst["epsilon"]) if spent else "none", remark),
        ("Rounds", summary["rounds"], f"{len(summary['hospitals'])} hospitals"),
        ("Time", duration(summary["seconds"]), f"{summary['parameters']:,} trained parameters"),
        *_skipped(summary),
    ]
    better = final["accuracy_low"] > max(largest, guess)
    text = f"""The {"whole interval lies" if better else "interval does not lie"} above the chance level: the model is
    {"better" if better else "not shown to be better"} than naming the largest class. The interval is Wilson's; it takes
    test records as independent and is too narrow where patients have several records."""
    return Markup(tiles(facts) + paragraph(text))


def _global_curve(run: Run) -> Markup:
    lines = [line for line in _json_lines(run, "metrics.jsonl") if line["evaluation"] is not None]
    rounds, scores = [line["round"] for line in lines], [line["evaluation"] for line in lines]
    largest = max(map(sum, scores[-1]["confusion"])) / max(1, scores[-1]["records"])
    values = "; ".join(f"round {a}: {percent(b['accuracy'])}" for a, b in zip(rounds, scores, strict=True))
    caption = """Accuracy and balanced accuracy of the global model on the test records of all hospitals together, with
    the 95 % Wilson interval of the accuracy. Round 0 is the initial model. Only the sums over hospitals were opened."""
    return plot(figures.global_curve(rounds, scores, largest), f"Accuracy by round. {values}.", caption)


def _absences(run: Run) -> Markup:
    """Who took no part in a round, if anybody."""
    took_part, everybody = run.summary.get("took_part") or {}, run.summary["hospitals"]
    missing = {number: [name for name in everybody if name not in here] for number, here in took_part.items()}
    rows = [(number, ", ".join(names)) for number, names in missing.items() if names]
    if not rows:
        return Markup("")
    text = """In these rounds hospitals were absent: lost, late, or left out by the check of norms. Their updates are in
    none of these rounds' sums, and evaluation counts of the others were not opened: the difference would be theirs."""
    return Markup(paragraph(text) + table("Absent hospitals by round", ("Round", "Absent"), rows, 0))


def _hospital_curves(run: Run) -> Markup:
    lines, notes = _hospital_metrics(run)
    if not lines:
        return Markup(notes or _missing("the hospitals' metrics.jsonl are missing"))
    rounds = {name: [line["round"] for line in of] for name, of in lines.items()}
    loss, accuracy = (
        {name: [number(line[key]) for line in of] for name, of in lines.items()} for key in ("loss", "own_accuracy")
    )
    last = "; ".join(f"{name}: loss {plain(loss[name][-1])}, accuracy {percent(accuracy[name][-1])}" for name in lines)
    caption = """Loss of local training, and accuracy of the global model after each round on the hospital's own test
    records. This run had all parties on one machine: at a real site each hospital sees only its own line."""
    return Markup(plot(figures.hospital_curves(rounds, loss, accuracy), f"Last round. {last}.", caption) + notes)


def _by_class(run: Run) -> Markup:
    final = _final(run)
    confusion, scores = final["confusion"], final["scores"]
    names, total = run.classes(len(confusion)), sum(map(sum, confusion))
    areas = [plain(figures.area_under_curve(*pair), ".3f") for pair in scores]
    rows = []
    for index, name in enumerate(names):
        hits, own, named = confusion[index][index], sum(confusion[index]), sum(row[index] for row in confusion)
        ratios = ((hits, own), (total - own - named + hits, total - own), (hits, named))
        rows.append((name, own, *(f"{a}/{b} = {percent(a / b)}" if b else "n/a" for a, b in ratios), areas[index]))
    matrix = figures.confusion_matrix(names, confusion)
    found = "; ".join(f"{row[0]}: {row[2]}" for row in rows)
    counts = _missing("the confusion matrix has too many classes to be read")
    if matrix is not None:
        caption = "Confusion matrix of the final model: counts, and percent of the true class (row)."
        counts = plot(matrix, f"Confusion matrix. Found of each class: {found}.", caption)
    alt = "ROC curves. " + "; ".join(f"{name}: AUC {area}" for name, area in zip(names, areas, strict=True))
    caption = f"""ROC curves, one class versus the rest (at most eight are drawn). Curves and AUC come from
    {len(scores[0][0])}-bin histograms of the predicted probabilities, summed over hospitals: no hospital shows single
    scores. Scores in one bin count as ties."""
    roc = plot(figures.roc_curves(names, scores), alt, caption)
    head = ("Class", "Records", "Sensitivity", "Specificity", "Precision", "AUC")
    return Markup(counts + roc + table("Each class versus the rest, final model, all hospitals.", head, rows, 5))


def _calibration(run: Run) -> Markup:
    final = _final(run)
    if "reliability" not in final:
        return _missing("calibration was not recorded by the version that made this run")
    bins = [(int(count), mean, right) for count, mean, right in final["reliability"]]
    facts = [
        (
            "Expected calibration error",
            percent(final["calibration_error"]),
            "mean distance of confidence and share right",
        ),
        ("Brier score", plain(final["brier"]), "all classes; 0 is perfect, 2 the worst"),
        (
            "AUC, mean of classes",
            plain(final["auc_macro"], ".3f"),
            f"at most {plain(final['auc_resolution'], '.1g')} off by bins",
        ),
    ]
    described = (f"{percent(a)} confidence: {percent(b)} of {count} right" for count, a, b in bins if count)
    caption = """Of the records whose predicted class got a probability in each tenth, the share that is right. Below the
    line the model is too sure of itself. Counts and sums of rounded probabilities over all hospitals were opened, in one
    sum with the confusion matrix."""
    return Markup(
        tiles(facts) + plot(figures.reliability_diagram(bins), f"Calibration. {'; '.join(described)}.", caption)
    )


def _privacy(run: Run) -> Markup:
    entries, (lines, notes) = run.summary["privacy"], _hospital_metrics(run)
    spent = {name: [number(line["epsilon"]) for line in of] for name, of in lines.items()}
    spent = {name: values for name, values in spent.items() if not all(map(math.isnan, values))}
    parts = ""
    if all(entry["mechanism"] == "none" for entry in entries):
        parts += paragraph("No differential privacy: updates carry no noise, and no epsilon holds.", "warning")
    elif (run.config.get("training") or {}).get("sampling_seed") is not None:
        text = "The sampling order came from a fixed seed: epsilon does not hold against anyone who knows that seed."
        parts += paragraph(text, "warning")
    if spent:
        rounds = {name: [line["round"] for line in lines[name]] for name in spent}
        targets = [entry["target_epsilon"] for entry in entries]
        alt = "Epsilon after the last round. " + "; ".join(f"{name}: {plain(of[-1])}" for name, of in spent.items())
        caption = """Epsilon spent on each hospital's patients after each round, by its privacy ledger (earlier runs
        included), and the target that training must not pass. Smaller is more private."""
        parts += plot(figures.epsilon_curves(rounds, spent, targets), alt, caption)
    rows = []
    for entry in entries:
        numbers = (plain(entry[key], ".4g") for key in ("epsilon", "target_epsilon", "delta", "noise_multiplier"))
        last = (lines.get(entry["hospital"]) or [{}])[-1]
        rows.append((entry["hospital"], entry["mechanism"], *numbers, percent(last.get("clipped_fraction"))))
    head = ("Hospital", "Mechanism", "Epsilon", "Target", "Delta", "Noise multiplier", "Clipped")
    text = "Privacy of each hospital. Clipped: share of the per-patient gradients clipped in the last round."
    return Markup(parts + notes + table(text, head, rows, 5))


# ---- an inference run ------------------------------------------------------------------------------------------------


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


# ---- both kinds of run -----------------------------------------------------------------------------------------------


def _phase(name: str) -> str:
    """Phases of all rounds, and of all images, under one name."""
    name = re.sub(r"^round \d+ ", "", name)
    return "images" if re.match(r"(images?|batch) \d", name) else name


def _costs(run: Run) -> Markup:
    def phases(party: str) -> dict[str, Any]:
        return dict(json.loads(_read(run.directory, f"parties/{party}/traffic.json"))["phases"])

    traffic, notes = _each(phases, run.parties())
    if not traffic:
        return Markup(notes or _missing("no party left a traffic.json"))
    keys = ("bytes_sent", "bytes_received", "messages_sent", "waits", "seconds_waited")
    costs: dict[str, dict[str, list[float]]] = {party: {} for party in traffic}
    for party, phase, entry in ((party, phase, entry) for party, of in traffic.items() for phase, entry in of.items()):
        mine = [entry["seconds"], *(sum(peer[key] for peer in entry["peers"].values()) for key in keys)]
        before = costs[party].get(_phase(phase), [0] * len(mine))
        costs[party][_phase(phase)] = [a + b for a, b in zip(before, mine, strict=True)]
    seconds, sent = ({a: {b: c[i] for b, c in of.items()} for a, of in costs.items()} for i in (0, 1))
    rows = [
        (party, phase, f"{c[0]:.2f}", f"{c[5]:.2f}", size(c[1]), size(c[2]), f"{c[3]:.0f}", f"{c[4]:.0f}")
        for party, of in costs.items()
        for phase, c in of.items()
    ]
    totals = "; ".join(f"{a}: {duration(sum(seconds[a].values()))}, {size(sum(sent[a].values()))} sent" for a in costs)
    caption = """Wall-clock time and bytes sent by each party, by phase, all rounds or images together. Parties wait for
    each other: the times of different parties overlap and do not add up."""
    head = ("Party", "Phase", "Seconds", "Waited", "Sent", "Received", "Messages", "Waits")
    text = "Waited: seconds spent waiting for peers. Waits: how often a party had to wait. Messages: those sent."
    chart = plot(figures.phase_bars(seconds, sent), f"Totals. {totals}.", caption)
    return Markup(chart + notes + table(text, head, rows, 6))


def _openings(run: Run) -> Markup:
    training = run.summary["kind"] == "train"
    name = "openings.jsonl" if training else f"parties/{run.hospital}/openings.jsonl"
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in _json_lines(run, name):
        why, shape = re.sub(r"^round \d+: ", "each round: ", line["why"]), " x ".join(map(str, line["shape"]))
        key = (line["what"], why, ", ".join(line["to"]), ", ".join(line["among"]), shape or "single")
        groups.setdefault(key, []).append(line)
    rows = [(*key, len(of), f"{sum(math.prod(line['shape']) for line in of):,}") for key, of in groups.items()]
    head = ("What", "Why", "Opened to", "Shared among", "Shape", "Times", "Values")
    text = f"All {sum(map(len, groups.values()))} openings, equal ones together, from {name}."
    statement = _TRAINING_STATEMENT if training else _INFERENCE_STATEMENT
    return Markup(paragraph(statement, "key") + table(text, head, rows, 3))


def _configuration(run: Run) -> Markup:
    versions = [f"{name} {version}" for name, version in run.summary.get("versions", {}).items()]
    logs = sorted(path.name for path in run.directory.glob("logs/*.log"))
    text = _guarded(lambda run: Markup(f"<pre>{escape(_read(run.directory, 'config.yaml'))}</pre>"), run)
    return Markup(
        f"<p>Command:</p><pre>{escape(run.summary.get('command', 'not recorded'))}</pre>"
        + paragraph(f"Versions: {', '.join(versions) or 'not recorded'}. Logs: {', '.join(logs) or 'none'}.")
        + f"<details><summary>Resolved configuration (config.yaml)</summary>{text}</details>"
    )


# ---- the page --------------------------------------------------------------------------------------------------------

_SECTIONS: dict[str, dict[str, tuple[Callable[[Run], Markup], ...]]] = {
    "train": {
        "Result": (_result,),
        "Training curves": (_global_curve, _absences, _hospital_curves),
        "Results by class": (_by_class, _calibration),
        "Privacy": (_privacy,),
    },
    "infer": {"Result": (_diagnosis,), "Each image": (_images,), "All images": (_all_images,)},
}
_SECTIONS["ask"] = _SECTIONS["infer"]  # of a model owner that stays up: only the hospital's files are here
_BOTH = {"What was opened": (_openings,), "Time and bytes": (_costs,), "Configuration": (_configuration,)}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _load(run_dir: Path) -> Run:
    fix = "give the --out of a finished train or infer"
    try:
        summary = json.loads(_read(run_dir, "summary.json"))
        if summary["kind"] not in _SECTIONS:
            raise DataError("summary.json is of an unknown kind")
    except DataError as error:
        raise DataError(f"{run_dir} is not a finished run: {error}", fix) from None
    except (LookupError, TypeError, ValueError):
        raise DataError(f"{run_dir} is not a finished run: summary.json cannot be read", fix) from None
    try:
        config = yaml.safe_load(_read(run_dir, "config.yaml"))
    except (DataError, yaml.YAMLError):
        config = None
    return Run(run_dir, summary, config if isinstance(config, dict) else {})


def _page(run: Run) -> str:
    kind = run.summary["kind"]
    title = escape(
        f"{'Federated training' if kind == 'train' else 'Encrypted diagnosis'}: {run.summary.get('name', '')}"
    )
    banner = paragraph("SYNTHETIC DATA: phantoms, not patients", "banner") if run.summary.get("synthetic") else ""
    contents = main = ""
    for index, (name, builders) in enumerate({**_SECTIONS[kind], **_BOTH}.items()):
        contents += f'<li><a href="#s{index}">{name}</a></li>'
        main += f'<section id="s{index}"><h2>{name}</h2>{"".join(_guarded(b, run) for b in builders)}</section>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{title}</title>
<style>{figures.STYLE_SHEET}</style></head><body>{banner}<h1>{title}</h1>
<p class="soft">Not a medical device; for research.</p><nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>{main}</main><footer>Written by mpc-fl from the files of this run.</footer></body></html>
"""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a finished run from its files, whole or not at all; return its path.

    The report of an inference shows the hospital's images and is readable by this user only.
    Raises `DataError` when `run_dir` is not a finished run, `MpcFlError` when the report cannot be written.
    """
    run = _load(run_dir)
    path = run_dir / "report.html"
    write_text(path, _page(run), 0o644 if run.summary["kind"] == "train" else 0o600)
    return path
