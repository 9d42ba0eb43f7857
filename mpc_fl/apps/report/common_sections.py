"""Sections that reports of all kinds have: what was opened, time and bytes of each party, the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mpc_fl.apps.formats import duration, size
from mpc_fl.apps.report import figures
from mpc_fl.apps.report.markup import Markup, escape, paragraph, plot, table
from mpc_fl.apps.report.run_files import Run, each, guarded, missing
from mpc_fl.apps.rows import OpenedValue, PartyTraffic, PhaseTraffic, read_object, read_rows, read_text, why_of_all

_TRAINING_STATEMENT = """These sums are the only values that left the secret domain. Everything else that was computed
from patients and sent to another party was a share, which alone is uniformly random. The global model, computed from the
opened mean updates by the aggregator or by each hospital, is every hospital's."""


_INFERENCE_STATEMENT = """The logits (or the class alone), opened to the hospital alone, are all that left the secret domain.
Images and weights were sent as shares; what is revealed between layers is masked by random values used once."""


def phase_of_all(name: str) -> str:
    """Phases of all rounds, and of all images, under one name."""
    name = re.sub(r"^round \d+ ", "", name)
    return "images" if re.match(r"(images?|batch) \d", name) else name


@dataclass
class _Cost:
    """What a party spent in a phase, all rounds or images together; bytes and messages with all peers."""

    seconds: float = 0.0
    sent: int = 0
    received: int = 0
    messages: int = 0
    waits: int = 0
    waited: float = 0.0

    def add(self, phase: PhaseTraffic) -> None:
        self.seconds += phase.seconds
        for peer in phase.peers.values():
            self.sent += peer.bytes_sent
            self.received += peer.bytes_received
            self.messages += peer.messages_sent
            self.waits += peer.waits
            self.waited += peer.seconds_waited


def _costs(traffic: PartyTraffic) -> dict[str, _Cost]:
    """By phase, in the order of work."""
    found: dict[str, _Cost] = {}
    for name, phase in traffic.phases.items():
        found.setdefault(phase_of_all(name), _Cost()).add(phase)
    return found


def costs(run: Run) -> Markup:
    """Seconds, bytes and messages of each party, by phase."""
    traffic, notes = each(
        lambda party: read_object(PartyTraffic, run.directory, run.file_of(party, "traffic.json")), run.parties()
    )
    if not traffic:
        return Markup(notes or missing("no party left a traffic.json"))
    spent = {party: _costs(of) for party, of in traffic.items()}
    seconds = {party: {phase: cost.seconds for phase, cost in of.items()} for party, of in spent.items()}
    sent = {party: {phase: float(cost.sent) for phase, cost in of.items()} for party, of in spent.items()}
    rows = [
        (party, phase, f"{c.seconds:.2f}", f"{c.waited:.2f}", size(c.sent), size(c.received), c.messages, c.waits)
        for party, of in spent.items()
        for phase, c in of.items()
    ]
    totals = "; ".join(f"{a}: {duration(sum(seconds[a].values()))}, {size(sum(sent[a].values()))} sent" for a in spent)
    caption = """Wall-clock time and bytes sent by each party, by phase, all rounds or images together. Parties wait for
    each other: the times of different parties overlap and do not add up."""
    head = ("Party", "Phase", "Seconds", "Waited", "Sent", "Received", "Messages", "Waits")
    text = "Waited: seconds spent waiting for peers. Waits: how often a party had to wait. Messages: those sent."
    drawn = figures.phase_bars(run.by_short_name(seconds), run.by_short_name(sent))
    chart = plot(drawn, f"Totals. {totals}.", caption)
    return Markup(chart + notes + table(text, head, rows, 6))


def openings(run: Run) -> Markup:
    """Every value that left the secret domain, equal ones together."""
    training = run.is_training
    name = "openings.jsonl" if training else f"parties/{run.hospital}/openings.jsonl"
    groups: dict[tuple[str, ...], list[OpenedValue]] = {}
    for line in read_rows(OpenedValue, run.directory, name):
        why, shape = why_of_all(line.why), " x ".join(map(str, line.shape))
        key = (line.what, why, ", ".join(line.to), ", ".join(line.among), shape or "single")
        groups.setdefault(key, []).append(line)
    rows = [(*key, len(of), f"{sum(math.prod(line.shape) for line in of):,}") for key, of in groups.items()]
    head = ("What", "Why", "Opened to", "Shared among", "Shape", "Times", "Values")
    text = f"All {sum(map(len, groups.values()))} openings, equal ones together, from {name}."
    statement = _TRAINING_STATEMENT if training else _INFERENCE_STATEMENT
    return Markup(paragraph(statement, "key") + table(text, head, rows, 3))


def made_by(command: str, versions: Mapping[str, str], audited: str | None = None) -> Markup:
    """The command and versions that a page was made with, and the directory of the run that was `audited`, if it is of one."""
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    of_run = Markup("") if audited is None else paragraph(f"Audited run: {audited}.")
    return Markup(f"<p>Command:</p><pre>{escape(command)}</pre>" + of_run + paragraph(f"Versions: {said}."))


def configuration(run: Run) -> Markup:
    """The command, versions and configuration that make the run again, and the logs that it left."""
    versions = [f"{name} {version}" for name, version in (run.header.versions or {}).items()]
    logs = sorted(path.name for path in run.directory.glob("logs/*.log"))
    text = guarded(lambda run: Markup(f"<pre>{escape(read_text(run.directory, 'config.yaml'))}</pre>"), run)
    return Markup(
        f"<p>Command:</p><pre>{escape(run.header.command)}</pre>"
        + paragraph(f"Versions: {', '.join(versions) or 'not recorded'}. Logs: {', '.join(logs) or 'none'}.")
        + f"<details><summary>Resolved configuration (config.yaml)</summary>{text}</details>"
    )
