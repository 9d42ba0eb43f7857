"""training_sections"""

from __future__ import annotations

import math
from typing import Any

from mpc_fl.apps.report import figures
from mpc_fl.apps.report.formats import duration, number, percent, plain
from mpc_fl.apps.report.markup import Markup, paragraph, plot, table, tiles
from mpc_fl.apps.report.run_files import Run, _hospital_metrics, _json_lines, _missing, _skipped


def _final(run: Run) -> dict[str, Any]:
    return dict(run.summary.get("final") or _json_lines(run, "metrics.jsonl")[-1]["evaluation"])


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
