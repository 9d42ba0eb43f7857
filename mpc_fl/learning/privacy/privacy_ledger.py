"""A hospital's ledger of all releases from its patients, over all runs, in a database on its own disk.

A release is reserved before anything that depends on patients is computed, and marked as released before the first byte of
it leaves. What is marked is never replaced. A release without noise is entered before it leaves, as what it is: from then on
no epsilon holds for these patients. `accounting` says what the records add up to.

Several processes may share the file, also such of runs of one name. Each knows its own reservations by their numbers: one
that another process took for abandoned, and replaced, is entered again when it is released.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpc_fl.errors import PrivacyBudgetError, StorageError
from mpc_fl.learning.privacy.accounting import (
    ROUNDING,
    Accountant,
    Event,
    PrivacyBudget,
    SubsampledGaussian,
    Unprotected,
    epsilon_of,
)
from mpc_fl.learning.privacy.ledger_rows import RESTORE, LedgerRows, event_of, has_ledger, opened

_UNPROTECTED = {"mechanism": "none"}
PATIENT = "patient"  # the unit of records that name none


def _is_reserved(record: dict[str, Any]) -> bool:
    return record.get("released") is False


def _reserved_by(records: list[dict[str, Any]], run: str | None) -> list[dict[str, Any]]:
    """What `run` has reserved and not released: it is about to make that anew."""
    return [record for record in records if run is not None and _is_reserved(record) and record.get("run") == run]


class PrivacyLedger:
    """One hospital's record of every release made from its patients: the database `path`, which ends in `.sqlite3`.

    A record is written, and is on the disk, before the release it stands for: a crash in between costs budget, never
    privacy. A file that cannot be read, was cut short or edited, or belongs to another hospital is refused, and never
    replaced by an empty one. Deleting the file resets the budget, and so does an older copy of it, unless a checkpoint
    (`require`) or this object has read further; only the hospital itself can do that.

    `unit` is what this run counts privacy by. What was released per image is protected per patient by nothing that is known, so
    no epsilon per patient is certified over it; per image it is all the same what a whole patient was promised.

    A ledger of an earlier version has the same name but for its end, `.json`, and is taken over (`ledger_rows`).
    """

    def __init__(self, path: Path, who: str, unit: str = PATIENT) -> None:
        self.path = path.with_suffix(".sqlite3")
        self.who = who
        self.unit = unit
        self._read_to: tuple[int, str] | None = None  # number and digest of the last entry that this object has read
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
        """Epsilon of all that is charged; infinite once something was released without noise, or per another unit."""
        events = [Unprotected() if self._is_of_less(record) else self._event(record) for record in self.records()]
        return epsilon_of(events, delta, accountant)

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
        noise_multiplier, sample_rate, steps, total_variation (if any), unit (if not the patient) or mechanism: none. With
        `run` as `spent`."""
        with self._explained():
            if self._read_to is None and not has_ledger(self.path):
                return []  # and none is made
        with self._opened(writing=False) as ledger:
            reserved = _reserved_by(ledger.records, run)
            return [record for record in ledger.records if record not in reserved]

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
        record = {**self._stamp(run, round_number), "released": not reserve, **asdict(event)}
        if self.unit != PATIENT:
            record["unit"] = self.unit
        if reserve:
            record["number"] = uuid.uuid4().hex
        with self._opened(writing=True) as ledger:
            replaced = _reserved_by(ledger.records, run)
            left = [known for known in ledger.records if known not in replaced]
            self._require_room(left, event, round_number, budget)
            for known in replaced:
                ledger.replace(known["number"])
            ledger.charge(record)
        self._reserved = [(own, limit) for own, limit in self._reserved if own["run"] != run]
        self._reserved += [(record, budget)] if reserve else []
        self._charged = True

    def charge_unprotected(self, *, run: str, round_number: int) -> None:
        """Record durably that `run` releases something of its patients without noise; call this before it leaves.

        One record for a run is enough. From then on `epsilon` is infinite, and `spent` and `charge` refuse.
        """
        with self._opened(writing=True) as ledger:
            if not any(isinstance(self._event(known), Unprotected) and known["run"] == run for known in ledger.records):
                ledger.charge({**self._stamp(run, round_number), "released": True, **_UNPROTECTED})

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
        with self._opened(writing=True) as ledger:
            known, counted = {record.get("number") for record in ledger.records}, list(ledger.records)
            for own, budget in self._reserved:
                if own["number"] in known:
                    ledger.release(own["number"])
                else:
                    self._require_room(counted, self._noised([own])[0], own["round"], budget)
                    ledger.charge({**own, "released": True})
                    counted.append(own)
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
            if self._is_of_less(record):
                raise PrivacyBudgetError(
                    f"{self.who}: run {record['run']} counted privacy per {record['unit']} on {record['time']}, so no epsilon per "
                    "patient can be certified any more",
                    f"set data.unit=image, or begin another privacy ledger for other patients (it is in {self.path})",
                )
            events.append(event)
        return events

    def _is_of_less(self, record: dict[str, Any]) -> bool:
        """Whether a release was counted per something smaller than the patient, which this run counts by."""
        return self.unit == PATIENT and record.get("unit", PATIENT) != PATIENT

    @staticmethod
    def _stamp(run: str, round_number: int) -> dict[str, Any]:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return {"time": time, "run": run, "round": round_number}

    def _refusal(self, reason: str) -> PrivacyBudgetError:
        return PrivacyBudgetError(f"{self.who}: privacy ledger {self.path} {reason}", RESTORE)

    def _event(self, record: Any) -> Event:
        try:
            return event_of(record)
        except ValueError:
            raise self._refusal("has a record that is not an event") from None

    @contextmanager
    def _opened(self, writing: bool) -> Iterator[LedgerRows]:
        """The ledger as it is, which others cannot write while this one is `writing`. What it enters is on the disk at the end."""
        with self._explained(), opened(self.path, self.who, writing) as ledger:
            if self._read_to is not None:
                number, digest = self._read_to
                if len(ledger.entries) < number or ledger.entries[number - 1].digest != digest:
                    raise self._refusal("holds less than when this program read it before")
            for record in ledger.records:
                self._event(record)
            if ledger.entries:
                self._read_to = ledger.entries[-1].number, ledger.entries[-1].digest
            yield ledger

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            raise PrivacyBudgetError(f"{self.who}: privacy ledger {error.what}", error.fix) from None
