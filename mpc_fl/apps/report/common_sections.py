"""Sections that reports of all kinds have: what was opened, time and bytes of each party, the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mpc_fl.apps.costs import PartyCosts
from mpc_fl.apps.formats import duration, energy, plain, size
from mpc_fl.apps.report import figures
from mpc_fl.apps.report.markup import Markup, escape, paragraph, plot, table
from mpc_fl.apps.report.run_files import Run, each, guarded, missing
from mpc_fl.apps.rows import OpenedValue, PartyTraffic, read_object, read_rows, read_text, why_of_all

_TRAINING_STATEMENT = """These sums are the only values that left the secret domain. Everything else that was computed
from patients and sent to another party was a share, which alone is uniformly random. The global model, computed from the
opened mean updates by the aggregator or by each hospital, is every hospital's."""


_INFERENCE_STATEMENT = """The logits (or the class alone), opened to the hospital alone, are all that left the secret domain.
Images and weights were sent as shares; what is revealed between layers is masked by random values used once."""


def costs(run: Run) -> Markup:
    """Seconds, bytes, messages and energy of each party, by phase."""
    spent, notes = each(
        lambda party: read_object(PartyTraffic, run.directory, run.file_of(party, "traffic.json")).costs(),
        run.parties(),
    )
    if not spent:
        return Markup(notes or missing("no party left a traffic.json"))
    seconds = {party: {phase: cost.seconds for phase, cost in of.phases.items()} for party, of in spent.items()}
    sent = {party: {phase: float(cost.bytes_sent) for phase, cost in of.phases.items()} for party, of in spent.items()}
    rows = [
        (party, phase, f"{c.seconds:.2f}", f"{c.seconds_waited:.2f}", plain(c.processor_seconds, ".2f"), size(c.bytes_sent),
         size(c.bytes_received), c.messages_sent, c.waits, energy(c.joules))
        for party, of in spent.items()
        for phase, c in of.phases.items()
    ]  # fmt: skip
    totals = "; ".join(
        f"{a}: {duration(of.total.seconds)}, {size(of.total.bytes_sent)} sent" for a, of in spent.items()
    )
    caption = """Wall-clock time and bytes sent by each party, by phase, all rounds or images together. Parties wait for
    each other: the times of different parties overlap and do not add up."""
    head = ("Party", "Phase", "Seconds", "Waited", "Processor", "Sent", "Received", "Messages", "Waits", "Energy")
    text = """Waited: seconds spent waiting for peers. Processor: seconds of all threads and processes of the party.
    Waits: how often a party had to wait. Messages: those sent."""
    drawn = figures.phase_bars(run.by_short_name(seconds), run.by_short_name(sent))
    chart = plot(drawn, f"Totals. {totals}.", caption)
    return Markup(chart + notes + table(text, head, rows, 8) + _energy(spent))


def _energy(spent: Mapping[str, PartyCosts]) -> Markup:
    """What each party spent in all, and how its energy is known."""
    known = {party: of for party, of in spent.items() if of.energy is not None}
    if not known:
        return paragraph("The version that made this run did not record its energy.")
    rows = [
        (party, of.energy, duration(of.total.processor_seconds),
         "none" if of.total.gpu_seconds is None else duration(of.total.gpu_seconds), energy(of.total.joules),
         plain(of.grams_co2, ".3g", unit=" g"))
        for party, of in known.items()
    ]  # fmt: skip
    head = ("Party", "Energy is", "Processor", "GPU", "Energy", "CO2 equivalent")
    text = """Energy of each party in all. Measured: by the counters of its machine, shared out by processor seconds
    among all that ran there. Estimated: seconds times the watts of site.costs, which is no measurement. CO2: by the grid intensity
    of site.costs."""
    return table(text, head, rows, 4)


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
