"""common_sections"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from mpc_fl.apps.report import figures
from mpc_fl.apps.report.formats import duration, size
from mpc_fl.apps.report.markup import Markup, escape, paragraph, plot, table
from mpc_fl.apps.report.run_files import Run, _each, _guarded, _json_lines, _missing, _read

_TRAINING_STATEMENT = """These sums are the only values that left the secret domain. Everything else that was computed
from patients and sent to another party was a share, which alone is uniformly random. The global model, which the
aggregator computes from the opened mean updates, goes to every hospital."""


_INFERENCE_STATEMENT = """The logits (or the class alone), opened to the hospital alone, are all that left the secret domain.
Images and weights were sent as shares; what is revealed between layers is masked by random values used once."""


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
