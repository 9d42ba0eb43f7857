"""run_files"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpc_fl.apps.report.markup import Markup, paragraph
from mpc_fl.errors import DataError
from mpc_fl.roles import HOSPITAL, is_hospital, split_name


@dataclass(frozen=True)
class Run:
    """A run directory with the two files that all sections need. `config` is empty when config.yaml is unreadable."""

    directory: Path
    summary: dict[str, Any]
    config: dict[str, Any]

    def parties(self) -> list[str]:
        """Names of the parties that left files, hospital-2 before hospital-10."""
        return sorted((path.name for path in self.directory.glob("parties/*") if path.is_dir()), key=split_name)

    @property
    def hospital(self) -> str:
        """The hospital that asked, of an inference; untrusted like all else, so a name of another form counts as none."""
        name = str(self.summary.get("hospital", HOSPITAL))
        return name if is_hospital(name) else HOSPITAL

    def classes(self, count: int) -> list[str]:
        """Names of the classes, or their numbers when the names on file do not fit `count` classes."""
        names = self.summary.get("classes") or (self.config.get("data") or {}).get("classes") or []
        return [str(name) for name in names] if len(names) == count else [f"class {index}" for index in range(count)]


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
    return _each(lambda name: _json_lines(run, f"parties/{name}/metrics.jsonl"), filter(is_hospital, run.parties()))


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


def _skipped(summary: dict[str, Any]) -> list[tuple[str, object, str]]:
    """A headline number where files were left out; a run that says nothing about it is of an older version."""
    count = summary.get("skipped_files")
    return [("Skipped files", count, "could not be read and were left out")] if count else []
