"""What `mpc-fl check` says of data: how many there are, whose they are, what was done to them, what looks wrong. Pure."""

from __future__ import annotations

from mpc_fl.config.config import Config
from mpc_fl.learning.data.patients import BY_ITSELF, FROM_TABLE
from mpc_fl.learning.data.survey import Survey


def owners_word(found: Survey, config: Config) -> str:
    """What records are kept together by, in the plural: patients where these are known, whatever `data.unit` says."""
    unit, alone = config.data.counted_unit, found.patients_from.get(BY_ITSELF, 0)
    readable = found.records - found.unreadable
    if unit == "patient" or (not alone and found.patients < readable):
        return "patients"
    if found.patients_from and alone < readable:
        return f"patients and single {unit}s" if alone else "patients"
    return f"{unit}s"


def data_lines(found: Survey, config: Config) -> list[str]:
    """Lines for people. Those after the first are indented."""
    files = "files" if config.data.source == "images" else "records"
    unit, owners = config.data.counted_unit, owners_word(found, config)
    lines = [f"Data: {found.records} {files}, {found.patients} {owners}, {found.unreadable} unreadable."]
    if found.unit == "image":
        known = "; all patients are known here, so data.unit=patient would do" if owners == "patients" else ""
        lines.append(f"  Privacy is counted per {unit}, not per patient (data.unit: image){known}.")
    for part, of in found.parts.items():
        by_class = ", ".join(
            f"{count} {name}" for name, count in zip(config.data.classes, of.class_counts, strict=True)
        )
        lines.append(f"  {part}: {of.records} {files} of {of.patients} {owners}: {by_class}")
    if len(found.training_patients) > 1:
        least, most = min(found.training_patients), max(found.training_patients)
        each = str(least) if least == most else f"{least} to {most}"
        lines.append(f"  divided over {len(found.training_patients)} hospitals: each trains on {each} {owners}")
    if found.patients_from:
        lines.append(
            "  whose they are: " + ", ".join(f"{count} by {what}" for what, count in found.patients_from.items())
        )
    if found.patient_table is not None:
        lines.append(f"  {FROM_TABLE}: {found.patient_table}")
    treatments = sorted(found.treatments.items(), key=lambda entry: -entry[1])
    lines += [f"  {count} {what}" for what, count in treatments]
    lines += [f"  unreadable: {first}" for first in found.first_unreadable]
    if more := found.unreadable - len(found.first_unreadable):
        lines.append(f"  unreadable: {more} more; the log of a run names all")
    if found.left_aside:
        lines.append(
            "  left aside: " + ", ".join(f"{count} {what}" for what, count in sorted(found.left_aside.items()))
        )
    return [*lines, *(f"  WARNING: {warning}." for warning in found.warnings)]
