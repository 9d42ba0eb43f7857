"""The model card of a trained model, in Markdown: what it was made from, what it can do, what it must not be used for. Pure.

After Mitchell et al., Model Cards for Model Reporting (FAT* 2019), with the privacy claim and the signed ledger beside. It says
what was agreed (the configuration) and what was opened (sums over hospitals), and nothing that one hospital alone knows: not how
many patients it has, nor what its privacy ledger holds of other runs.

Names in a configuration may hold anything: they are shown as text that Markdown does not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mpc_fl.apps.estimates import NoPrivacy, PlannedPrivacy
from mpc_fl.apps.group_scores import GroupScores, GroupShare
from mpc_fl.apps.rows import why_of_all
from mpc_fl.apps.scores import Scores
from mpc_fl.audit.opening_record import Opening
from mpc_fl.config.config import Config
from mpc_fl.errors import printable
from mpc_fl.learning.models.shares import noised_interval, wilson_interval

CARD_FILE = "model_card.md"
_FEW_RECORDS = 100  # of a class: a 95 % interval is then up to 20 points wide
_LONGEST = 200
_SOURCES = {
    "phantoms": "SYNTHETIC chest X-ray phantoms, made by this program. They are no patients, and neither is the model for any.",
    "images": "Images in folders of the hospitals.",
    "npz": "Images in an npz file of the hospitals.",
    "csv": "Tables of the hospitals, one row per record.",
    "breast_cancer": "The Wisconsin breast cancer table that scikit-learn brings (569 patients of one clinic, 1995).",
}


@dataclass(frozen=True)
class SignedModel:
    """What the signed ledger of a run says: the seal of its last block, who signed, and what was opened.

    `digest` is the SHA-256 of the model file that all signed, None where each hospital has a model of its own; `configuration`
    that of the configuration which all compared.
    """

    seal: str
    parties: tuple[str, ...]
    digest: str | None
    configuration: str
    openings: tuple[Opening, ...]


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. `sha256` is that of the model file here, `evaluated_round` when `final` was opened.

    `privacy` is what the run spends at a hospital whose ledger held nothing before; `origins` what is known of weights that came
    from elsewhere, by what they are used for.
    """

    config: Config
    sha256: str
    parameters: int
    rounds: int
    privacy: NoPrivacy | PlannedPrivacy
    final: Scores | None
    evaluated_round: int | None
    signed: SignedModel | None
    origins: dict[str, str]
    groups: GroupScores | None = None


def card_text(facts: CardFacts) -> str:
    """The whole card."""
    title = f"# Model card: {_text(facts.config.name)}"
    sections = {
        "Model": _model(facts),
        "Data": _data(facts),
        "Privacy": _privacy(facts),
        "Results": _results(facts) + _groups(facts),
        "Limits": _limits(facts),
        "Training": _training(facts.config),
    }
    lead = (
        "Trained by hospitals together, on secret-shared sums, with mpc-fl. This card says what all parties agreed on and what was "
        "opened to them. Not a medical device; for research."
    )
    return "\n\n".join([title, lead, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


# ---- sections ----------------------------------------------------------------------------------------------------------


def _model(facts: CardFacts) -> str:
    config, signed = facts.config, facts.signed
    rows = [
        ("File", f"`model.safetensors`, SHA-256 `{facts.sha256}`"),
        ("Network", f"{_text(config.model.architecture)}, {facts.parameters:,} trained parameters"),
        ("Input", f"{' x '.join(map(str, config.data.input_shape))} float32"),
        ("Classes", ", ".join(map(_text, config.data.classes))),
        ("Digest of the configuration", f"`{config.digest() if signed is None else signed.configuration}`"),
    ]
    if signed is None:
        said = "There is no ledger beside this model whose end all parties signed: who trained it is not shown."
    else:
        rows += [
            ("Signed by", ", ".join(map(_text, signed.parties))),
            ("Head of the signed ledger", f"`{signed.seal}` (seal of its last block)"),
        ]
        said = (
            "The digest of this file is in the last block of the reveal ledger."
            if signed.digest == facts.sha256
            else "Each hospital has a model of its own (FedBN): the ledger holds what is common, not the digest of this file."
        )
        said += " `mpc-fl ledger verify RUN_DIR` checks the ledger."
    return _table(("", ""), rows) + f"\n\n{said}"


def _data(facts: CardFacts) -> str:
    config = facts.config
    data, private = config.data, config.privacy
    lines = [_SOURCES.get(data.source, f"Records that the loader {_text(data.source)} gives at each hospital.")]
    if data.source == "phantoms":
        lines.append(
            f"{data.phantoms.train_patients:,} to train and {data.phantoms.test_patients:,} to test, over all hospitals."
        )
    if data.table.columns is not None:
        units = {column.name: "" if column.unit is None else f" ({column.unit})" for column in data.table.columns}
        lines.append("Columns: " + _text(", ".join(f"{name}{unit}" for name, unit in units.items())) + ".")
    lines.append(f"{config.federation.hospitals} hospitals.")
    if private.smallest_hospital is not None:
        most = "" if private.largest_hospital is None else f" and at most {private.largest_hospital:,}"
        lines.append(f"Each has at least {private.smallest_hospital:,}{most} training patients, which is public.")
    if config.counts_patients:
        lines.append("The number of training patients of all hospitals together was opened to weigh updates.")
    elif data.source != "phantoms":
        lines.append("How many training patients there are was not opened.")
    if facts.final is not None:
        unit = "test records" if facts.final.noise is None else "test patients, a noised number,"
        lines.append(f"{facts.final.records:,} {unit} of all hospitals.")
    lines += [f"{what}: {_text(origin)}." for what, origin in facts.origins.items()]
    if data.shared_patients == "keep":
        exact = facts.final is not None and facts.final.noise is None and config.privacy.mechanism != "none"
        lines.append(
            "Test patients who also train were kept in the test set"
            + (": exact counts of them were opened, which no epsilon covers." if exact else ".")
        )
    return " ".join(lines)


def _privacy(facts: CardFacts) -> str:
    config, planned = facts.config, facts.privacy
    if isinstance(planned, NoPrivacy):
        text = (
            "**No differential privacy** (`privacy.mechanism: none`). The mean update of every round was opened without "
            "noise, and the model may hold what single patients have that others have not. No epsilon holds."
        )
        return f"{text}\n\n{_opened(facts)}"
    settings = config.privacy
    rows = [
        ("Unit", unit_of_privacy(config)),
        ("Mechanism", f"{settings.mechanism}: clipped gradients of patients drawn at random, with Gaussian noise"),
        ("Epsilon, at most", f"{settings.epsilon:g} over all runs that are charged to a hospital's privacy ledger"),
        ("Delta", f"{planned.delta:g}"),
        (
            "Epsilon of this run alone",
            f"{planned.epsilon:.3f}; {planned.epsilon_with_spare:.3f} if all spare rounds ({settings.spare_rounds}) are used",
        ),
        ("Accountant", settings.accountant),
        ("Noise multiplier", f"{planned.noise_multiplier:.4g}, clipping norm {settings.clipping_norm:g}"),
        ("Steps", f"{planned.steps:,}, each draws a patient with probability {planned.sampling_rate:.4g}"),
    ]
    alone = (
        "The figures of this run alone are those of a hospital whose ledger held nothing before; one that had spent "
        "before added more noise. "
    )
    if settings.noise_multiplier is not None or settings.mechanism == "distributed":
        alone = "The noise multiplier is the same at all hospitals. "
    alone += (
        "A hospital charges what it releases before it leaves, and stops where the bound over all runs would not hold. "
        "Where a hospital released data of the same patients without privacy before, no bound holds for them: its own "
        "ledger says so, this card cannot."
    )
    test = (
        "Test patients are counted exactly: this claim is not for them."
        if config.evaluation.noise_multiplier is None
        else "Test patients: the confusion matrix carries noise of "
        f"{config.evaluation.noise_multiplier:g} times what one of them can move, which is charged to the same ledger and is "
        "in the figures above."
    )
    parts = [holds_against(config), _table(("", ""), rows), alone, test]
    if config.training.sampling_seed is not None:
        parts.append(
            "**The sampling order came from a fixed seed: no epsilon holds against anyone who knows that seed.**"
        )
    return "\n\n".join([*parts, _opened(facts)])


def holds_against(config: Config) -> str:
    """Against whom the claim holds, in a sentence."""
    if config.privacy.mechanism == "local":
        return "Each hospital added the whole noise of its update itself: the claim holds against all others together."
    also = "" if config.among_peers else " with the aggregator"
    return (
        f"Hospitals added the noise of every step together: the claim holds against {config.noise_colluders} of them "
        f"that pool what they know{also}."
    )


def unit_of_privacy(config: Config) -> str:
    """Whom the claim is about, and what it compares."""
    unit = config.data.counted_unit
    if unit == "patient":
        return "one training patient of one hospital with all records, added or removed"
    return f"one training {unit} of one hospital, added or removed: per {unit}, not per patient (data.unit: image)"


def _opened(facts: CardFacts) -> str:
    """What left the secret domain, equal openings together."""
    if facts.signed is None:
        return "What was opened is in `openings.jsonl` of the run."
    found: dict[tuple[str, ...], int] = {}
    for opening in facts.signed.openings:
        shape = " x ".join(map(str, opening.shape)) or "one number"
        why = why_of_all(opening.why)
        key = (opening.what, why, shape, ", ".join(opening.to))
        found[key] = found.get(key, 0) + 1
    rows = [(*map(_text, key), str(times)) for key, times in found.items()]
    head = ("What", "Why", "Shape", "Opened to", "Times")
    return (
        f"All that was opened, by the signed ledger. The global models went to all hospitals.\n\n{_table(head, rows)}"
    )


def _results(facts: CardFacts) -> str:
    final = facts.final
    if final is None:
        return "No evaluation was opened: nothing is shown about what this model can do."
    counted = (
        "test records" if final.noise is None else f"test patients, counted with noise of deviation {final.noise:.1f}"
    )
    after = (
        ""
        if facts.evaluated_round == facts.rounds
        else f" This is the model after round {facts.evaluated_round}, not the last."
    )
    lead = (
        f"Accuracy {_percent(final.accuracy)} (95 % interval {_percent(final.accuracy_low)} to {_percent(final.accuracy_high)}), "
        f"balanced accuracy {_percent(final.balanced_accuracy)}, on {final.records:,} {counted} of all hospitals; the "
        f"baseline, always naming the largest class, is {_percent(final.baseline)}.{after}"
    )
    head = ("Class", "Number", "Sensitivity", "Specificity", "Precision", "AUC")
    areas = [None if area is None else f"{area:.3f}" for area in final.auc or [None] * len(final.confusion)]
    rows = [
        (_text(name), f"{sum(final.confusion[index]):,}", *_shares(final, index), areas[index] or "not opened")
        for index, name in enumerate(facts.config.data.classes)
    ]
    how = (
        "Intervals are Wilson's, 95 %; they take records as independent and are too narrow where patients have several."
        if final.noise is None
        else "Intervals, about 95 %, hold what was drawn of patients and the noise of the counts."
    )
    more = ""
    if final.brier is not None and final.calibration_error is not None:
        more = f"\n\nCalibration error {_percent(final.calibration_error)}, Brier score {final.brier:.3f} (0 best, 2 worst)."
    return f"{lead}\n\n{_table(head, rows)}\n\n{how}{more}"


def _groups(facts: CardFacts) -> str:
    """Groups of test patients that are shown, and their gaps; nothing where none were asked for."""
    found, classes = facts.groups, facts.config.data.classes
    if found is None:
        return ""
    rule = f"A group that was not shown to have {found.fewest} patients is withheld"
    named = "; ".join(f"{by}: {', '.join(map(_text, of))}" for by, of in found.withheld.items())
    withheld = f"{rule}: {named}." if named else f"{rule}; there is none."
    if not found.shown:
        return f"\n\n**By group of patients.** None is shown. {withheld}"
    head = ("By", "Group", "Number", *(f"Sensitivity, {_text(name)}" for name in classes))
    rows = [
        (
            of.attribute,
            _text(of.group),
            f"{of.scores.records:,}",
            *(_group_share(part.sensitivity) for part in of.classes),
        )
        for of in found.shown
    ]
    return f"\n\n**By group of patients.** {withheld}\n\n{_table(head, rows)}\n\n{_gap_words(found, list(classes))}"


def _group_share(share: GroupShare) -> str:
    if share.share is None or share.low is None or share.high is None:
        return "too few to say"
    return f"{_percent(share.share)} ({_percent(share.low)} to {_percent(share.high)})"


def _gap_words(found: GroupScores, classes: list[str]) -> str:
    sure, largest = [gap for gap in found.gaps if gap.is_more_than_chance], found.largest
    if largest is None:
        return "No two groups could be compared."
    gaps = (
        f"{_text(gap.worst)} {_percent(gap.gap)} below {_text(gap.best)} ({gap.attribute}; {_text(gap.named(classes))})"
        for gap in (sure or [largest])
    )
    told = "Gaps that are more than chance" if sure else "No gap is shown to be more than chance; the largest"
    how = "a normal test" if found.noise is not None else "Fisher's exact test"
    return (
        f"{told}: {'; '.join(gaps)}. Each group was tested against the others by {how}, with Holm's correction, at 5 %."
    )


def _shares(final: Scores, index: int) -> Iterable[str]:
    """Sensitivity, specificity and precision of a class, each with its interval."""
    confusion, classes = final.confusion, len(final.confusion)
    total, own, named = sum(map(sum, confusion)), sum(confusion[index]), sum(row[index] for row in confusion)
    hits, others = confusion[index][index], classes - 1
    for share, of, cells in (
        (hits, own, (1, others)),
        (total - own - named + hits, total - own, (others**2, others)),
        (hits, named, (1, others)),
    ):
        if of < 1:
            yield "none to count"
            continue
        low, high = (
            wilson_interval(share / of, of)
            if final.noise is None
            else noised_interval(share / of, of, final.noise, cells)
        )
        yield f"{_percent(share / of)} ({_percent(low)} to {_percent(high)})"


def _limits(facts: CardFacts) -> str:
    config, final = facts.config, facts.final
    limits = [
        "Not a medical device. Do not use it to diagnose, to rank or to refuse treatment to a patient, nor without a "
        "physician who looks at the same record.",
        "It knows the classes above and nothing else: every record gets one of them, also one that shows something else, or is no "
        "record of this kind.",
        "Its test records come from the hospitals that trained it. Nothing here says what it does with other devices, patients or "
        "regions; nothing was tested over time or against physicians.",
    ]
    if config.data.source == "phantoms":
        limits.append("It was trained and tested on synthetic phantoms: it has no use beyond a demonstration.")
    if final is None:
        limits.append("Nothing is known of its accuracy.")
    else:
        few = [
            f"{_text(name)} ({sum(row)})"
            for name, row in zip(config.data.classes, final.confusion, strict=True)
            if sum(row) < _FEW_RECORDS
        ]
        if few:
            limits.append(
                f"Small test set: fewer than {_FEW_RECORDS} of {', '.join(few)}. Read the intervals, not the shares."
            )
        if final.accuracy_low <= final.baseline:
            limits.append("**It is not shown to be better than the baseline, always naming the largest class.**")
    if facts.origins:
        limits.append(
            "What the weights from elsewhere were trained on counts as public: no claim of privacy is made for it."
        )
    if config.privacy.mechanism != "none":
        limits.append("A patient who is at several of the hospitals spends at each of them: their epsilons add up.")
    limits.append(
        "Whoever has the file can try it as often as they like; `mpc-fl serve` answers without giving it away."
    )
    return "\n".join(f"- {limit}" for limit in limits)


def _training(config: Config) -> str:
    strategy = config.training.strategy or f"{config.strategy} (by default)"
    rows = [("Strategy", strategy), ("Seed", str(config.seed))]
    for section in (config.model, config.training):
        rows += [
            (name, _setting(value))
            for name, value in section.model_dump(mode="json").items()
            if name not in ("strategy",)
        ]
    return _table(("Setting", "Value"), rows)


# ---- text --------------------------------------------------------------------------------------------------------------


def _setting(value: Any) -> str:
    return "null" if value is None else _text(str(value))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _text(text: str) -> str:
    """Text of others, on one line and without anything that Markdown or HTML would read."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", printable(text, _LONGEST))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
