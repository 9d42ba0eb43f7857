"""The results of the article, a section for each question: tables, pictures and sentences, all filled in from what was found."""

from __future__ import annotations

from case_study.attacks import CHANCE, PLAINTEXT, attacks, shortcuts
from case_study.figures import AccuracyTable, Comparison, Findings, RunFound
from case_study.paper import Block, Heading, Picture, Table, Text
from case_study.wording import at_epsilon, capital, interval, network_name, points, verdict
from mpc_fl.apps.formats import duration, in_ranges, percent, plain, size
from mpc_fl.apps.report.figures import (
    accuracy_by_epsilon,
    accuracy_changes,
    global_curve,
)
from mpc_fl.evidence.shortcuts_tested import Estimate

_ROWS = {
    "central": "central",
    "alone": "one hospital alone",
    "local": "federated, local noise",
    "distributed": "federated, distributed noise",
}


def _plain_interval(of: Estimate) -> str:
    return f"{of.value:.3f} ({of.low:.3f} to {of.high:.3f})"


def _row_name(row: str, epsilon: float | None) -> str:
    return "federated" if row == "local" and epsilon is None else _ROWS.get(row, row)


def _table(features: str, table: AccuracyTable) -> list[Block]:
    rows = tuple(
        (
            _row_name(of.row, of.epsilon), "none" if of.spent is None else f"{of.spent:.2f}", of.seeds,
            interval(of.figures["accuracy"]), interval(of.figures["balanced accuracy"]),
            _plain_interval(of.figures["macro AUC"]), duration(of.seconds),
        )
        for of in table.table
    )  # fmt: skip
    epsilons = table.epsilons
    series = {}
    for row, name in _ROWS.items():
        by_epsilon = {of.epsilon: of.figures["accuracy"] for of in table.table if of.row == row}
        found = [by_epsilon.get(epsilon) for epsilon in epsilons]
        series[name] = [None if of is None else (of.value, of.low, of.high) for of in found]
    names = ["none" if epsilon is None else f"{epsilon:g}" for epsilon in epsilons]
    figure = accuracy_by_epsilon(names, series, f"Accuracy, {network_name(features)}")
    head = ("Trained", "Epsilon spent", "Seeds", "Accuracy", "Balanced accuracy", "Macro AUC", "Time of one")
    caption = "Without privacy there is no noise to distribute: the federation stands as local noise."
    return [
        Heading(f"{capital(network_name(features))}"),
        Picture(figure, f"accuracy-{features}", f"Accuracy by epsilon, {network_name(features)}", caption),
        Table(f"Accuracy against epsilon, {network_name(features)}", head, rows, 6),
    ]


def _where(of: Comparison) -> str:
    return f"{capital(network_name(of.network))}, {at_epsilon(of.epsilon)}"


def _compared(comparisons: list[Comparison]) -> list[Block]:
    if not comparisons:
        return []
    shown = [of for of in comparisons if of.network != "both"]
    names = [f"{_where(of)}: {network_name(of.first)} less {network_name(of.second)}" for of in comparisons]
    rows = tuple(
        (
            name,
            points(of.accuracy),
            f"{of.area.value:+.3f} ({of.area.low:+.3f} to {of.area.high:+.3f})",
            verdict(of.accuracy),
        )
        for name, of in zip(names, comparisons, strict=True)
    )
    against = [of for of in shown if of.second in ("alone", "central")]
    series = {
        f"federated less {second}": [
            (of.accuracy.value, of.accuracy.low, of.accuracy.high) for of in against if of.second == second
        ]
        for second in ("alone", "central")
    }
    labels = [_where(of) for of in against if of.second == "alone"]
    blocks: list[Block] = [
        Heading("Differences, on the same patients and seeds"),
        Text(
            """An interval that holds zero leaves open which way is better; that is no proof that they are alike. Intervals
            are not corrected for their number."""
        ),
    ]
    if labels and len(series["federated less alone"]) == len(series["federated less central"]):
        picture = accuracy_changes(labels, series, "What a federation gains and loses")
        caption = (
            "Difference of accuracy with its interval: beside a hospital alone, and beside all films in one place."
        )
        blocks.append(Picture(picture, "differences", "Differences of accuracy with intervals", caption))
    head = ("Compared", "Accuracy", "Macro AUC", "The first is")
    return [*blocks, Table("Differences", head, rows, 3)]


def accuracy(found: Findings) -> list[Block]:
    """Central, alone, federated, with noise: the tables and what differs."""
    blocks = [block for features, table in found.tables.items() for block in _table(features, table)]
    return [*blocks, *_compared(found.comparisons)]


def _run_row(name: str, of: RunFound) -> tuple[object, ...]:
    figures = of.figures
    reached = "n/a"
    if figures["accuracy"] is not None:
        reached = f"{percent(figures['accuracy'])} ({percent(figures['accuracy_low'])} to {percent(figures['accuracy_high'])})"
    spent = "none" if figures["epsilon"] is None else f"{figures['epsilon']:.2f}"
    sent = "n/a" if of.bytes_sent is None else size(of.bytes_sent)
    return (
        name, figures["mechanism"], spent, reached, plain(figures["auc_macro"], ".3f"), f"{figures['parameters']:,}", sent,
        duration(figures["seconds"]),
    )  # fmt: skip


_RUN_HEAD = ("Run", "Noise", "Epsilon spent", "Accuracy", "Macro AUC", "Parameters", "Sent by a hospital", "Time")


def real_runs(found: Findings) -> list[Block]:
    """Runs of `mpc-fl train` with equal sites."""
    rows = tuple(_run_row(name, of) for name, of in found.runs.items() if not name.startswith("unequal"))
    if not rows:
        return []
    text = """Each hospital and the aggregator were processes with links of their own: secure sums, signed ledgers, one run each.
    Intervals are those of the test films alone."""
    blocks: list[Block] = [Text(text), Table("Federations of real parties", _RUN_HEAD, rows, 6)]
    sums = found.runs.get("head-sums")
    row = found.row(found.study.head, "local", None)
    if sums is not None and row is not None and sums.figures["accuracy"] is not None:
        reached = row.figures["accuracy"]
        inside = reached.low <= sums.figures["accuracy"] <= reached.high
        blocks.append(
            Text(
                f"""Masks cancel, so that secure sums should cost no accuracy: the run without noise reached
                {percent(sums.figures["accuracy"])}, {"within" if inside else "OUTSIDE"} the interval of the same training
                without masks, {interval(reached)}."""
            )
        )
    return [*blocks, *_own_models("head-sums", sums)]


def _own_models(name: str, run: RunFound | None) -> list[Block]:
    if run is None or not run.own:
        return []
    rows = tuple(
        (
            hospital, of.alone.records, percent(of.federated.accuracy), percent(of.alone.accuracy),
            of.federated_alone_right, of.own_alone_right, plain(of.chance, ".2g"),
        )
        for hospital, of in run.own.items()
    )  # fmt: skip
    head = (
        "Hospital",
        "Own test films",
        "Federation's model",
        "Its own",
        "Right by the first alone",
        "By its own alone",
        "By chance",
    )
    caption = f"{name}: both models on each hospital's own test films (McNemar's exact test; not corrected)"
    return [Table(caption, head, rows, 6)]


def unequal(found: Findings) -> list[Block]:
    """Sites that differ in size and in classes."""
    runs = {name: of for name, of in found.runs.items() if name.startswith("unequal")}
    if not runs:
        return []
    text = """Shares of the classes were drawn for each hospital from a Dirichlet distribution (0.5): sites differ in size, and one
    may hardly see a class. Its own model then says little of that class, whatever it reaches on its own test films."""
    rows = tuple(_run_row(name, of) for name, of in runs.items())
    blocks: list[Block] = [Text(text), Table("Unequal sites", _RUN_HEAD, rows, 6)]
    return [*blocks, *_own_models("unequal-sums", runs.get("unequal-sums"))]


def peers(found: Findings) -> list[Block]:
    """Without an aggregator: who joined and who left."""
    of = found.peers
    if of is None:
        return []
    others = [name for name in of.hospitals if name not in (of.newcomer, of.leaver)]
    joined, left = of.rounds_with(of.newcomer), of.rounds_with(of.leaver)
    took_part = "took part in no round" if not joined else f"took part in rounds {in_ranges([str(n) for n in joined])}"
    last = f"{of.leaver} was in {len(left)} rounds, the last {max(left)}" if left else f"{of.leaver} was in no round"
    said = f"""{len(of.hospitals)} hospitals, nobody in the middle: rounds are proposed in turn, and each opens a part of every
        sum. {of.newcomer} was started while the others trained and {took_part}; {last}, as it had said. The blocks that all
        signed tell it: joined {", ".join(of.joined) or "nobody"}, left {", ".join(of.left) or "nobody"}. The ledger of
        {of.blocks} blocks was verified. Those that stayed ({", ".join(others)}, and whoever joined) have
        {"one model" if of.one_model else "DIFFERENT models"}."""
    blocks: list[Block] = [Text(said)]
    evaluated = [line for line in of.rounds if line.evaluation is not None]
    scores = [line.evaluation for line in evaluated if line.evaluation is not None]
    if scores:
        numbers = [line.round for line in evaluated]
        caption = "After each round, on the test films of the hospitals that were in it; these change when one joins or leaves."
        picture = Picture(
            global_curve(numbers, scores, scores[-1].baseline), "peers", "Accuracy after each round", caption
        )
        at_end = scores[-1]
        reached = f"At the end: {percent(at_end.accuracy)} ({percent(at_end.accuracy_low)} to {percent(at_end.accuracy_high)})."
        blocks += [picture, Text(reached)]
    return blocks


def diagnosis(found: Findings) -> list[Block]:
    """Diagnoses under encryption."""
    if not found.diagnoses:
        return []
    rows = list[tuple[object, ...]]()
    for name, of in found.diagnoses.items():
        same, summary = of.summary.comparison, of.summary
        clear = "n/a" if same is None else duration(same.plaintext_seconds_per_image)
        agree = "n/a" if same is None else ("yes" if same.classes_agree else "NO")
        largest = "n/a" if same is None else plain(same.largest_logit_difference, ".2g")
        right = f"{of.right} of {of.known}"
        rows.append((name, summary.images, right, agree, largest, duration(summary.seconds_per_image), clear))
    text = """The model owner sees no film, the hospital no weight, and a dealer who colludes with neither sees nothing of either.
    On public features the hospital computes these in the clear, and the secret layer alone is evaluated."""
    head = (
        "Diagnosis",
        "Films",
        "Right",
        "Classes as in the clear",
        "Largest difference of logits",
        "A film",
        "In the clear",
    )
    return [Text(text), Table("Encrypted diagnosis", head, tuple(rows), 6)]


def negative_of_runs(found: Findings) -> list[str]:
    """What runs, audits and attacks showed that one would rather not have, a sentence each."""
    said = list[str]()
    for name, run in found.runs.items():
        for hospital, of in run.own.items():
            if of.alone.accuracy > of.federated.accuracy:
                said.append(
                    f"""{name}: {hospital}'s own model is better on its own test films ({percent(of.alone.accuracy)} beside
                    {percent(of.federated.accuracy)}, by chance {of.chance:.2g})."""
                )
    said += [
        f"{name}: a lower bound on epsilon exceeds the promise." for name, of in found.audits.items() if not of.holds
    ]
    if found.views is not None:
        shown = [of.view for of in found.views.inversions if of.at_chance < CHANCE and of.view != PLAINTEXT]
        said += [f"Gradient inversion finds more than chance in: {view}." for view in shown]
        said += [f"A test of masked words was rejected: {name}." for name in found.views.rejected]
    if found.shortcuts is not None:
        said += [f"A shortcut was found: {name}." for name in found.shortcuts.shortcuts]
    for name, diagnosed in found.diagnoses.items():
        if diagnosed.summary.comparison is not None and not diagnosed.summary.comparison.classes_agree:
            said.append(f"{name}: a class under encryption is not that in the clear.")
    if found.peers is not None:
        said += (
            [] if found.peers.rounds_with(found.peers.newcomer) else ["The hospital that was to join came too late."]
        )
        said += [] if found.peers.one_model else ["Hospitals without an aggregator ended with different models."]
    return said


def all_sections(found: Findings) -> dict[str, list[Block]]:
    """All results by title; empty where nothing was found."""
    return {
        "Accuracy and privacy": accuracy(found),
        "Real federations": real_runs(found),
        "Unequal sites": unequal(found),
        "Without an aggregator: joining and leaving": peers(found),
        "Encrypted diagnosis": diagnosis(found),
        "Attacks": attacks(found),
        "Shortcuts": shortcuts(found),
    }
