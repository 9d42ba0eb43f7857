"""privacy_ledger"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.files import to_disk
from mpc_fl.learning.privacy.accounting import _ROUNDING, PrivacyBudget, SubsampledGaussian, epsilon_of

_LEDGER_FORMAT = "mpc-fl privacy ledger 1"


def _without_unreleased(records: list[dict[str, Any]], run: str | None) -> list[dict[str, Any]]:
    """Without a last record of `run` that was reserved and never released."""
    unreleased = bool(records) and records[-1].get("released") is False and records[-1].get("run") == run
    return records[:-1] if unreleased else records


class PrivacyLedger:
    """One hospital's record of every noisy release made from its patients, in a JSON file.

    A record is written, and is on the disk, before the release it stands for: a crash in between costs budget, never
    privacy. A file that cannot be read, was cut short or edited, or belongs to another hospital is refused, and never
    replaced by an empty one. Deleting the file resets the budget; only the hospital itself can do that.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path = path
        self.who = who

    def spent(self, run: str | None = None) -> list[SubsampledGaussian]:
        """All events charged so far, oldest first. Raises `PrivacyBudgetError` for an unusable file.

        With `run`, a last record of that run that was never released is left out: the run is about to make it anew.
        """
        records = self.records()
        return [self._event(record) for record in _without_unreleased(records, run)]

    def state(self) -> list[dict[str, Any]]:
        """The accountant's state: all records of releases that were made. A reserved one may still be replaced."""
        return [record for record in self.records() if record.get("released", True)]

    def require(self, state: Iterable[dict[str, Any]]) -> None:
        """Raise `PrivacyBudgetError` when the file lacks a release of a state that a checkpoint kept."""
        known, found = (
            Counter(json.dumps(record, sort_keys=True) for record in which) for which in (state, self.state())
        )
        if known - found:
            raise self._refusal("holds less than when the last checkpoint was written")

    def records(self) -> list[dict[str, Any]]:
        """All records: time, run, round, noise_multiplier, sample_rate, steps, total_variation (if any). A missing file
        has none."""
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._refusal(error.strerror or "cannot be read") from None
        except ValueError:
            raise self._refusal("is not JSON") from None
        if not isinstance(content, dict) or content.get("format") != _LEDGER_FORMAT:
            raise self._refusal("is not of this format")
        records = content.get("records")
        if not isinstance(records, list) or content.get("sha256") != self._digest(content.get("hospital"), records):
            raise self._refusal("does not match its checksum")
        if content["hospital"] != self.who:
            raise self._refusal(f"belongs to {content['hospital']}")
        for record in records:
            self._event(record)
        return records

    def charge(
        self,
        event: SubsampledGaussian,
        *,
        run: str,
        round_number: int,
        budget: PrivacyBudget | None = None,
        reserve: bool = False,
    ) -> None:
        """Record `event` durably; call this before the result leaves the hospital.

        With `reserve` it counts at once, but until `release` the same run may replace it: a round that was begun and never
        left the hospital is not paid for twice.

        With a `budget`, raises `PrivacyBudgetError` and records nothing if the total would exceed it. Also raises it if
        the file is unusable or cannot be written. Processes that share the file wait for each other.
        """
        with self._locked():
            records = _without_unreleased(self.records(), run)
            if budget is not None:
                events = [self._event(record) for record in records]
                after = epsilon_of([*events, event], budget.delta, budget.accountant)
                if after > budget.epsilon + _ROUNDING:
                    raise PrivacyBudgetError(
                        f"{self.who}: round {round_number} would raise epsilon to {after:.3f}, "
                        f"beyond {budget.epsilon:g} at delta {budget.delta:g}",
                        "nothing was released; stop here, or agree on a larger privacy.epsilon",
                    )
            time = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = {"time": time, "run": run, "round": round_number, "released": not reserve, **asdict(event)}
            records.append(record)
            self._write(records)

    def release(self) -> None:
        """Mark the last record as released, durably: to be called when nothing but the keys of a sum is left to send."""
        with self._locked():
            records = self.records()
            if records and records[-1].get("released") is False:
                records[-1]["released"] = True
                self._write(records)

    def _refusal(self, reason: str) -> PrivacyBudgetError:
        return PrivacyBudgetError(
            f"{self.who}: privacy ledger {self.path} {reason}",
            "restore it from a backup; without it the budget spent is unknown, so nothing is released",
        )

    def _event(self, record: Any) -> SubsampledGaussian:
        try:
            distance = record.get("total_variation", 0.0)  # ledgers of version 0.1 have none
            return SubsampledGaussian(record["noise_multiplier"], record["sample_rate"], record["steps"], distance)
        except (KeyError, TypeError, AttributeError, PrivacyBudgetError):
            raise self._refusal("has a record that is not an event") from None

    @staticmethod
    def _digest(hospital: Any, records: list[Any]) -> str:
        return hashlib.sha256(json.dumps([hospital, records], sort_keys=True).encode()).hexdigest()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.path.with_name(self.path.name + ".lock"), "w")  # noqa: SIM115
        except OSError as error:
            raise self._refusal(f"cannot be written: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, also if the process dies
            yield

    def _write(self, records: list[dict[str, Any]]) -> None:
        digest = self._digest(self.who, records)
        lines = ",\n".join(json.dumps(record) for record in records)
        text = (
            f'{{"format": {json.dumps(_LEDGER_FORMAT)}, "hospital": {json.dumps(self.who)}, '
            f'"sha256": "{digest}", "records": [\n{lines}\n]}}\n'
        )
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                to_disk(file)
            os.replace(temporary, self.path)
            to_disk(self.path.parent)
        except OSError as error:
            raise self._refusal(f"cannot be written: {error.strerror}") from None
