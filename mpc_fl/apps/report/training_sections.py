"""Sections of the report of a training run: the result, curves, results by class, calibration, privacy."""

from __future__ import annotations

import math

from mpc_fl.apps.formats import duration, number, percent, plain
from mpc_fl.apps.report import figures
from mpc_fl.apps.report.markup import Markup, paragraph, plot, table, tiles
from mpc_fl.apps.report.run_files import Run, hospital_rounds, missing, skipped
from mpc_fl.apps.rows import GlobalRound, HospitalRound, read_rows
from mpc_fl.apps.scores import Scores
from mpc_fl.errors import DataError

_NOT_OPENED = "with evaluation.noise_multiplier the confusion matrix alone is opened"


def _evaluated(run: Run) -> list[tuple[int, Scores]]:
    """The rounds after which the global model was evaluated. Raises `DataError` when there is none."""
    rows = read_rows(GlobalRound, run.directory, "metrics.jsonl")
    found = [(row.round, row.evaluation) for row in rows if row.evaluation is not None]
    if not found:
        raise DataError("metrics.jsonl holds no evaluation")
    return found


def _final(run: Run) -> Scores:
    """Of the model after the last round; the first version wrote it to metrics.jsonl alone."""
    return run.training.final or _evaluated(run)[-1][1]


def result(run: Run) -> Markup:
    """Headline numbers, and whether the model is better than the baseline."""
    final, summary = _final(run), run.training
    spent = [(entry.epsilon, entry.delta) for entry in summary.privacy if entry.epsilon is not None]
    if len(spent) < len(summary.privacy):
        spent = []  # for the patients of one hospital none holds, so there is no largest one
    worst, delta = max(spent, key=lambda pair: pair[0], default=(None, None))
    remark = f"per {summary.counted_unit}, at delta = {delta:g}" if spent else "no differential privacy"
    interval = f"95 % interval {percent(final.accuracy_low)} to {percent(final.accuracy_high)}"
    counted = "test records"
    if final.noise is not None:
        counted = f"test {summary.counted_unit}s, counted with noise of {final.noise:.1f}"
    facts: list[tuple[str, object, str]] = [
        ("Accuracy", percent(final.accuracy), f"{interval}; {final.records} {counted}"),
        ("Balanced accuracy", percent(final.balanced_accuracy), "mean over classes of the share found"),
        ("Baseline", percent(final.baseline), "accuracy of always naming the largest class"),
        ("Epsilon, largest of all hospitals", plain(worst) if spent else "none", remark),
        ("Rounds", summary.rounds, f"{len(summary.hospitals)} hospitals"),
        ("Time", duration(summary.seconds), f"{summary.parameters:,} trained parameters"),
        *skipped(summary),
    ]
    better = final.accuracy_low > final.baseline
    text = f"""The {"whole interval lies" if better else "interval does not lie"} above the baseline: the model is
    {"better" if better else "not shown to be better"} than always naming the largest class. {_interval_words(final)}"""
    return Markup(tiles(facts) + paragraph(text) + _caveats(run))


def _interval_words(final: Scores) -> str:
    if final.noise is not None:
        return "The interval holds what was drawn of patients and the noise of the counts."
    return """The interval is Wilson's; it takes test records as independent and is too narrow where patients have several
    records."""


def images(run: Run) -> Markup:
    """What was done to how many images or rows before they were of one form; nothing where no version and no file says so."""
    done = run.training.treatments
    if not done:
        return Markup("")
    rows = sorted(done.items(), key=lambda entry: (-entry[1], entry[0]))
    whose = "this hospital" if run.is_of_a_party else "all hospitals"
    if (run.config.get("data") or {}).get("source") == "csv":
        what = "table" if run.is_of_a_party else "tables"
        text = f"""How the {what} of {whose} {"was" if run.is_of_a_party else "were"} read, training and test, and what became of
        missing and unusual values. The run's data settings say how; docs/data.md says what it means."""
        return Markup(paragraph(text) + table("Rows by how they were read", ("What", "Rows"), rows, 1))
    text = f"""What was done to the image files of {whose}, training and test: where brightness came from, and what else was
    changed. The run's data settings say how; docs/data.md says what it means."""
    return Markup(paragraph(text) + table("Images by what was done to them", ("What", "Images"), rows, 1))


def _caveats(run: Run) -> Markup:
    """Of which round the result is where it is not the last, and what became of test patients that train."""
    summary, text = run.training, ""
    if summary.evaluated_round is not None and summary.evaluated_round < summary.rounds:
        text += paragraph(
            f"The result is that after round {summary.evaluated_round}: no evaluation was opened after the last one, "
            "because hospitals were absent.",
            "warning",
        )
    if summary.shared_patients:
        kept = (run.config.get("data") or {}).get("shared_patients") == "keep"
        become = (
            "They stayed in the test set: accuracy may be too high, and no epsilon covers exact counts of them"
            if kept
            else "They were left out of the test set"
        )
        text += paragraph(
            f"{summary.shared_patients} test patients are also training patients by name. {become}.", "warning"
        )
    return Markup(text)


def choice(run: Run) -> Markup:
    """Which round's model it is, by what figure on validation patients, with what noise, and how it was calibrated."""
    summary, evaluation = run.training, run.config.get("evaluation") or {}
    if summary.validation is None and summary.chosen is None:
        return Markup("") if summary.calibration is None else _calibrated(run)
    figure, chosen, found = str(evaluation.get("criterion", "accuracy")), summary.chosen, summary.validation
    facts: list[tuple[str, object, str]] = []
    if chosen is not None:
        facts.append(("Chosen round", chosen.round, f"of {len(chosen.figures)} validated ones, of {summary.rounds}"))
    if found is not None:
        value = found.accuracy if figure == "accuracy" else found.balanced_accuracy
        noise = "exact counts" if found.noise is None else f"counts with noise of {found.noise:.1f} patients"
        facts.append((f"Validation {figure.replace('_', ' ')}", percent(value), f"{found.records} counted; {noise}"))
    text = """The model was chosen by sums over the validation patients of all hospitals, which training does not see: of all
    validated rounds the one with the best figure, of equal ones the last. The best of several figures is too high by chance;
    the result above is on test patients, who were not asked before."""
    if chosen is None:
        text = "Validation patients are kept aside from training, to choose settings by; nothing of this run was chosen by them."
    rows = [(number, percent(value)) for number, value in (chosen.figures if chosen is not None else {}).items()]
    shown = table("Opened figures of validation by round", ("Round", figure.replace("_", " ")), rows, 1) if rows else ""
    return Markup(tiles(facts) + paragraph(text) + shown + _calibrated(run))


def _calibrated(run: Run) -> Markup:
    fitted = run.training.calibration
    if fitted is None:
        return Markup("")
    names = run.classes(len(fitted.offsets))
    rows = [(name, f"{offset:+g}") for name, offset in zip(names, fitted.offsets, strict=True)]
    text = f"""Calibration on validation patients: logits are divided by a temperature of {fitted.temperature:g} for probabilities
    (1 changes nothing), and the class offsets are added to them for the decision. A value that does not stand out of the noise
    is left as it was."""
    return Markup(paragraph(text) + table("Class offsets, in logits", ("Class", "Offset"), rows, 1))


def global_curve(run: Run) -> Markup:
    """Accuracy of the global model, after the rounds whose evaluation was opened."""
    evaluated = _evaluated(run)
    rounds, scores = [number for number, _ in evaluated], [found for _, found in evaluated]
    values = "; ".join(f"round {number}: {percent(found.accuracy)}" for number, found in evaluated)
    caption = """Accuracy and balanced accuracy of the global model on the test records of all hospitals together, with
    its 95 % interval, after the rounds that evaluation.every says. Round 0 is the initial model; the baseline
    is the accuracy of always naming the largest class. Only sums over hospitals were opened: exact ones, unless
    evaluation.noise_multiplier is set."""
    figure = figures.global_curve(rounds, scores, scores[-1].baseline)
    return plot(figure, f"Accuracy by round. {values}.", caption)


def absences(run: Run) -> Markup:
    """Who took no part in a round, if anybody."""
    rows = [(number, ", ".join(names)) for number, names in run.training.absences().items()]
    if not rows:
        return Markup("")
    text = """In these rounds hospitals were absent: lost, late, or left out by the check of norms. Their updates are in
    none of these rounds' sums, and evaluation counts of the others were not opened: the difference would be theirs."""
    return Markup(paragraph(text) + table("Absent hospitals by round", ("Round", "Absent"), rows, 0))


def hospital_curves(run: Run) -> Markup:
    """Loss and accuracy of each hospital by round."""
    lines, notes = hospital_rounds(run)
    if not lines:
        return Markup(notes or missing("the hospitals' metrics.jsonl are missing"))
    rounds = {name: [line.round for line in of] for name, of in lines.items()}
    loss = {name: [number(line.loss) for line in of] for name, of in lines.items()}
    accuracy = {name: [number(line.own_accuracy) for line in of] for name, of in lines.items()}
    last = "; ".join(f"{name}: loss {plain(loss[name][-1])}, accuracy {percent(accuracy[name][-1])}" for name in lines)
    here = "This is this hospital's own line, which it alone sees."
    if not run.is_of_a_party:
        here = "This run had all parties on one machine: at a real site each hospital sees only its own line."
    caption = f"""Loss of local training, and accuracy of the global model after each round on the hospital's own test
    records. {here}"""
    short = run.by_short_name
    drawn = figures.hospital_curves(short(rounds), short(loss), short(accuracy))
    return Markup(plot(drawn, f"Last round. {last}.", caption) + notes)


def by_class(run: Run) -> Markup:
    """Confusion matrix, ROC curves and a table of the classes."""
    final = _final(run)
    confusion, scores = final.confusion, final.scores
    names = run.classes(len(confusion))
    areas = [plain(figures.area_under_curve(*pair), ".3f") for pair in scores] if scores else ["n/a"] * len(names)
    rows = _class_rows(names, confusion, areas)
    matrix = figures.confusion_matrix(names, confusion)
    found = "; ".join(f"{row[0]}: {row[2]}" for row in rows)
    counts = missing("the confusion matrix has too many classes to be read")
    if matrix is not None:
        caption = "Confusion matrix of the final model: counts, and percent of the true class (row)."
        counts = plot(matrix, f"Confusion matrix. Found of each class: {found}.", caption)
    roc = _roc_curves(names, areas, scores) if scores else missing(f"ROC curves: {_NOT_OPENED}")
    head = ("Class", "Records", "Sensitivity", "Specificity", "Precision", "AUC")
    return Markup(counts + roc + table("Each class versus the rest, final model, all hospitals.", head, rows, 5))


def _roc_curves(names: list[str], areas: list[str], scores: list[list[list[int]]]) -> Markup:
    alt = "ROC curves. " + "; ".join(f"{name}: AUC {area}" for name, area in zip(names, areas, strict=True))
    caption = f"""ROC curves, one class versus the rest (at most eight are drawn). Curves and AUC come from
    {len(scores[0][0])}-bin histograms of the predicted probabilities, summed over hospitals: no hospital shows single
    scores. Scores in one bin count as ties."""
    return plot(figures.roc_curves(names, scores), alt, caption)


def _class_rows(names: list[str], confusion: list[list[int]], areas: list[str]) -> list[tuple[object, ...]]:
    """For each class: name, records, sensitivity, specificity, precision as counts and shares, area under the curve."""
    total, rows = sum(map(sum, confusion)), []
    for index, name in enumerate(names):
        hits, own, named = confusion[index][index], sum(confusion[index]), sum(row[index] for row in confusion)
        ratios = ((hits, own), (total - own - named + hits, total - own), (hits, named))
        shares = (f"{a}/{b} = {percent(a / b)}" if b else "n/a" for a, b in ratios)
        rows.append((name, own, *shares, areas[index]))
    return rows


def calibration(run: Run) -> Markup:
    """Whether the model is as sure as it is right."""
    final = _final(run)
    if final.noise is not None:
        return missing(f"calibration: {_NOT_OPENED}")
    if final.reliability is None:
        return missing("calibration was not recorded by the version that made this run")
    facts = [
        ("Expected calibration error", percent(final.calibration_error), "mean distance of confidence and share right"),
        ("Brier score", plain(final.brier), "all classes; 0 is perfect, 2 the worst"),
        (
            "AUC, mean of classes",
            plain(final.auc_macro, ".3f"),
            f"at most {plain(final.auc_resolution, '.1g')} off by bins",
        ),
    ]
    bins = final.reliability
    described = (f"{percent(a)} confidence: {percent(b)} of {count} right" for count, a, b in bins if count)
    caption = """Of the records whose predicted class got a probability in each tenth, the share that is right. Below the
    line the model is too sure of itself. Counts and sums of rounded probabilities over all hospitals were opened, in one
    sum with the confusion matrix."""
    return Markup(
        tiles(facts) + plot(figures.reliability_diagram(bins), f"Calibration. {'; '.join(described)}.", caption)
    )


def privacy(run: Run) -> Markup:
    """What the patients of each hospital have spent."""
    entries, (lines, notes) = run.training.privacy, hospital_rounds(run)
    parts = ""
    if all(entry.mechanism == "none" for entry in entries):
        parts += paragraph("No differential privacy: updates carry no noise, and no epsilon holds.", "warning")
    elif (run.config.get("training") or {}).get("sampling_seed") is not None:
        text = "The sampling order came from a fixed seed: epsilon does not hold against anyone who knows that seed."
        parts += paragraph(text, "warning")
    parts += _unit(run) + _guarantee(run)
    parts += _epsilon_by_round(run.by_short_name(lines), [entry.target_epsilon for entry in entries])
    rows = []
    for entry in entries:
        numbers = (entry.epsilon, entry.target_epsilon, entry.delta, entry.noise_multiplier)
        of = lines.get(entry.hospital)
        clipped = percent(of[-1].clipped_fraction if of else None)
        rows.append((entry.hospital, entry.mechanism, *(plain(value, ".4g") for value in numbers), clipped))
    head = ("Hospital", "Mechanism", "Epsilon", "Target", "Delta", "Noise multiplier", "Clipped")
    unit = run.training.counted_unit
    text = f"Privacy of each hospital. Clipped: share of the gradients, one per {unit}, clipped in the last round."
    return Markup(parts + notes + table(text, head, rows, 5))


def _of_the_beginning(run: Run) -> str:
    """What the promise does not cover where the run began with weights from elsewhere."""
    weights = (run.config.get("model") or {}).get("initial_weights")
    if weights is None:
        return ""
    return f"""The run began with the weights of SHA-256 {weights}: what their own training showed of its patients is in epsilon
    only where the same privacy ledger held it."""


def _unit(run: Run) -> Markup:
    """A warning where privacy is counted by something smaller than the patient."""
    unit = run.training.counted_unit
    if unit == "patient":
        return Markup("")
    text = f"""Privacy is counted per {unit}, not per patient (data.unit: image). A patient with k {unit}s that nothing joins
    has up to k times epsilon, and a delta that is larger yet."""
    return paragraph(text, "warning")


def _guarantee(run: Run) -> Markup:
    """What (epsilon, delta) means in this run and what it does not cover, where there is noise."""
    settings, evaluation = run.config.get("privacy") or {}, run.config.get("evaluation") or {}
    if settings.get("mechanism") not in ("local", "distributed") or "spare_rounds" not in settings:
        return Markup("")  # none, or a version that drew and divided by counts
    shared = """With local noise a patient known to k hospitals has at most k times epsilon and delta."""
    if settings["mechanism"] == "distributed":
        shared = """A patient known to k hospitals may be in one sum k times, under the noise for once: as if the noise multiplier
        were k times smaller."""
    noise, unit = evaluation.get("noise_multiplier"), run.training.counted_unit
    validated = ""
    if (run.config.get("data") or {}).get("validation_fraction"):
        validated = "Validation and calibration carry noise of the same kind, and are in epsilon."
        if evaluation.get("public_validation"):
            validated = f"Validation {unit}s are said to be public: no epsilon covers them."
    tested = f"""Evaluation carries noise of {noise} times what one test {unit} can move, and is in epsilon."""
    if evaluation.get("test") is False:
        tested = f"Test {unit}s were left alone."
    elif noise is None:
        tested = "Evaluation opened exact sums of counts over hospitals: no epsilon covers test patients."
    whole = "patient, with all records," if unit == "patient" else unit
    text = f"""Guaranteed: whoever sees all that was opened, and the model, can hardly tell whether one {whole}
    was among a hospital's training {unit}s or not. Sampling, divisors, weights and noise follow from public figures, and no
    number of patients was opened. Not guaranteed: that public bounds on hospitals' sizes are hidden, or who took part. {shared}
    {_of_the_beginning(run)}
    {tested} {validated} Rounds that were lost and made anew are in epsilon; the budget had room for {settings["spare_rounds"]}."""
    return Markup(paragraph(text))


def _epsilon_by_round(lines: dict[str, list[HospitalRound]], targets: list[float]) -> str:
    """A curve for each hospital that adds noise; nothing when none does."""
    spent = {name: [number(line.epsilon) for line in of] for name, of in lines.items()}
    spent = {name: values for name, values in spent.items() if not all(map(math.isnan, values))}
    if not spent:
        return ""
    rounds = {name: [line.round for line in lines[name]] for name in spent}
    alt = "Epsilon after the last round. " + "; ".join(f"{name}: {plain(of[-1])}" for name, of in spent.items())
    caption = """Epsilon spent on each hospital's patients after each round, by its privacy ledger (earlier runs
        included), and the target that training must not pass. Smaller is more private."""
    return plot(figures.epsilon_curves(rounds, spent, targets), alt, caption)
