"""A hospital's ledger of all releases from its patients, over all runs, in a JSON file on its own disk.

A release is reserved before anything that depends on patients is computed, and marked as released before the first byte of
it leaves. What is marked is never replaced. A release without noise is entered before it leaves, as what it is: from then on
no epsilon holds for these patients. `accounting` says what the records add up to.

Several processes may share the file, also such of runs of one name. Each knows its own reservations by their numbers: one
that another process took for abandoned, and replaced, is entered again when it is released.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.files import to_disk
from mpc_fl.learning.privacy.accounting import (
    ROUNDING,
    Accountant,
    Event,
    PrivacyBudget,
    SubsampledGaussian,
    Unprotected,
    epsilon_of,
)

_LEDGER_FORMAT = "mpc-fl privacy ledger 2"
_FIRST_FORMAT = "mpc-fl privacy ledger 1"  # without numbers of reservations, and without runs that have no privacy
_UNPROTECTED = {"mechanism": "none"}


def _is_reserved(record: dict[str, Any]) -> bool:
    return record.get("released") is False


def _without_reserved(records: list[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    """Without what `run` has reserved and not released: it is about to make that anew."""
    return [record for record in records if not (_is_reserved(record) and record.get("run") == run)]


class PrivacyLedger:
    """One hospital's record of every release made from its patients, in a JSON file.

    A record is written, and is on the disk, before the release it stands for: a crash in between costs budget, never
    privacy. A file that cannot be read, was cut short or edited, or belongs to another hospital is refused, and never
    replaced by an empty one. Deleting the file resets the budget; only the hospital itself can do that.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path = path
        self.who = who
        self._charged = False
        self._reserved: list[tuple[dict[str, Any], PrivacyBudget | None]] = []

    def spent(self, run: str | None = None) -> list[SubsampledGaussian]:
        """All events charged so far, oldest first.

        With `run`, what that run has reserved and not released is left out: the run is about to make it anew. Raises
        `PrivacyBudgetError` for an unusable file, and for patients of whom a run without privacy released something:
        no epsilon can be certified for them any more.
        """
        return self._noised(self.records(run))

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """Epsilon of all that is charged; infinite once something was released without noise."""
        return epsilon_of([self._event(record) for record in self.records()], delta, accountant)

    def state(self) -> list[dict[str, Any]]:
        """The accountant's state: all records of releases that were made. A reserved one may still be replaced."""
        return [record for record in self.records() if not _is_reserved(record)]

    def require(self, state: Iterable[dict[str, Any]]) -> None:
        """Raise `PrivacyBudgetError` when the file lacks a release of a state that a checkpoint kept."""
        known, found = (
            Counter(json.dumps(record, sort_keys=True) for record in which) for which in (state, self.state())
        )
        if known - found:
            raise self._refusal("holds less than when the last checkpoint was written")

    def records(self, run: str | None = None) -> list[dict[str, Any]]:
        """All records, none for a missing file: time, run, round, released, number (of a reservation), and either
        noise_multiplier, sample_rate, steps, total_variation (if any) or mechanism: none. With `run` as `spent`."""
        records = self._read()
        return records if run is None else _without_reserved(records, run)

    def _read(self) -> list[dict[str, Any]]:
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._refusal(error.strerror or "cannot be read") from None
        except ValueError:
            raise self._refusal("is not JSON") from None
        if not isinstance(content, dict) or content.get("format") not in (_LEDGER_FORMAT, _FIRST_FORMAT):
            raise self._refusal("is not of this format")
        records = content.get("records")
        if not isinstance(records, list) or content.get("sha256") != self._digest(content.get("hospital"), records):
            raise self._refusal("does not match its checksum")
        if content["hospital"] != self.who:
            raise self._refusal(f"belongs to {content['hospital']}")
        for record in records:
            self._event(record)
        if content["format"] == _FIRST_FORMAT:
            # Programs of that time sent before they marked: what they reserved may have left.
            records = [{**record, "released": True} if _is_reserved(record) else record for record in records]
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

        With a `budget`, raises `PrivacyBudgetError` and records nothing if the total would exceed it. Also raises it where
        no epsilon holds any more (`spent`), and if the file is unusable or cannot be written. Processes that share the
        file wait for each other.
        """
        with self._locked():
            records = self.records(run)
            self._require_room(records, event, round_number, budget)
            record = {**self._stamp(run, round_number), "released": not reserve, **asdict(event)}
            self._reserved = [(own, limit) for own, limit in self._reserved if own["run"] != run]
            if reserve:
                record["number"] = uuid.uuid4().hex
                self._reserved.append((record, budget))
            self._write([*records, record])
            self._charged = True

    def charge_unprotected(self, *, run: str, round_number: int) -> None:
        """Record durably that `run` releases something of its patients without noise; call this before it leaves.

        One record for a run is enough. From then on `epsilon` is infinite, and `spent` and `charge` refuse.
        """
        with self._locked():
            records = self.records()
            if not any(isinstance(self._event(known), Unprotected) and known["run"] == run for known in records):
                self._write([*records, {**self._stamp(run, round_number), "released": True, **_UNPROTECTED}])

    def release(self) -> None:
        """Mark what this object has reserved as released, durably: to be called before the first byte of it leaves.

        Again for what is marked it does nothing. A reservation that another process of the same run has replaced
        meanwhile is entered again, if the budget has room for it: else raises `PrivacyBudgetError`, as it does where
        nothing was ever charged.
        """
        if not self._charged:
            raise PrivacyBudgetError(f"{self.who}: nothing was charged for this release", "report this as a fault")
        if not self._reserved:
            return
        with self._locked():
            records = self.records()
            for own, budget in self._reserved:
                released = {**own, "released": True}
                places = [place for place, known in enumerate(records) if known.get("number") == own["number"]]
                if places:
                    records[places[0]] = released
                else:
                    self._require_room(records, self._noised([own])[0], own["round"], budget)
                    records.append(released)
            self._write(records)
            self._reserved = []

    def _require_room(
        self, records: list[dict[str, Any]], event: SubsampledGaussian, number: int, budget: PrivacyBudget | None
    ) -> None:
        events = self._noised(records)
        if budget is None:
            return
        after = epsilon_of([*events, event], budget.delta, budget.accountant)
        if after > budget.epsilon + ROUNDING:
            raise PrivacyBudgetError(
                f"{self.who}: round {number} would raise epsilon to {after:.3f}, "
                f"beyond {budget.epsilon:g} at delta {budget.delta:g}",
                "nothing was released; stop here, or agree on a larger privacy.epsilon",
            )

    def _noised(self, records: list[dict[str, Any]]) -> list[SubsampledGaussian]:
        """The events of records that all are noised ones."""
        events = []
        for record in records:
            event = self._event(record)
            if isinstance(event, Unprotected):
                raise PrivacyBudgetError(
                    f"{self.who}: run {record['run']} released data of these patients without noise on {record['time']}, "
                    "so no epsilon can be certified for them any more",
                    f"begin another privacy ledger for other patients, or set privacy.mechanism=none (it is in {self.path})",
                )
            events.append(event)
        return events

    @staticmethod
    def _stamp(run: str, round_number: int) -> dict[str, Any]:
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {"time": time, "run": run, "round": round_number}

    def _refusal(self, reason: str) -> PrivacyBudgetError:
        return PrivacyBudgetError(
            f"{self.who}: privacy ledger {self.path} {reason}",
            "restore it from a backup; without it the budget spent is unknown, so nothing is released",
        )

    def _event(self, record: Any) -> Event:
        try:
            if record.get("mechanism") == "none" and {"run", "time"} <= record.keys():
                return Unprotected()
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
