"""Whatever the order of charges, releases, crashes and resumes: the ledger holds at least what was released."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.learning.privacy.accounting import PrivacyBudget, SubsampledGaussian, epsilon_of
from mpc_fl.learning.privacy.ledger_rows import checksum
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger

DELTA = 1e-4
EVENT = SubsampledGaussian(2.0, 0.25, 5)


def ledger_at(directory: Path) -> PrivacyLedger:
    return PrivacyLedger(directory / "privacy.json", "hospital-0")


class Process:
    """A run's process at a hospital, as far as the ledger sees it: an object of its own, and what it sent."""

    def __init__(self, directory: Path, run: str) -> None:
        self.ledger, self.run = ledger_at(directory), run
        self.to_send: SubsampledGaussian | None = None


class SharedLedger(RuleBasedStateMachine):
    """Processes of several runs, some of one name, share a file: they reserve, send, die and come back in any order."""

    processes = Bundle("processes")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name)
        self.sent: Counter[SubsampledGaussian] = Counter()
        self.unprotected = False
        self.charges = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(target=processes, run=st.sampled_from(["a", "b"]))
    def start(self, run: str) -> Process:
        """Also after a crash, and beside a process of the same run that still lives."""
        return Process(self.directory, run)

    @rule(process=processes, reserve=st.booleans())
    def charge(self, process: Process, reserve: bool) -> None:
        self.charges += 1
        event = SubsampledGaussian(2.0 + self.charges / 16, 0.25, 1)  # each can be told from all others
        try:
            process.ledger.charge(event, run=process.run, round_number=self.charges, reserve=reserve)
        except PrivacyBudgetError:
            assert self.unprotected
            return
        process.to_send = event if reserve else None
        if not reserve:
            self.sent[event] += 1

    @rule(process=processes)
    def send(self, process: Process) -> None:
        if process.to_send is None:
            return
        try:
            process.ledger.release()
        except PrivacyBudgetError:
            assert self.unprotected
            return
        self.sent[process.to_send] += 1
        process.to_send = None

    @rule(process=processes)
    def send_without_noise(self, process: Process) -> None:
        process.ledger.charge_unprotected(run=process.run, round_number=1)
        self.unprotected = True

    @rule(process=consumes(processes))
    def crash(self, process: Process) -> None:
        pass

    @invariant()
    def all_that_was_sent_is_charged(self) -> None:
        ledger = ledger_at(self.directory)
        records = ledger.records()
        known = Counter(
            SubsampledGaussian(record["noise_multiplier"], record["sample_rate"], record["steps"])
            for record in records
            if record.get("mechanism") != "none" and record["released"]
        )
        assert not self.sent - known
        found = ledger.epsilon(DELTA, "rdp")
        assert found == math.inf if self.unprotected else found >= epsilon_of(self.sent.elements(), DELTA, "rdp") - 1e-9


SharedLedger.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestSharedLedger = SharedLedger.TestCase


def test_a_release_stays_when_another_run_reserved_after_it(tmp_path: Path) -> None:
    """Version 1 marked whichever record was last: b's, and then dropped a's."""
    a, b = ledger_at(tmp_path), ledger_at(tmp_path)
    a.charge(EVENT, run="a", round_number=1, reserve=True)
    b.charge(SubsampledGaussian(3.0, 0.25, 5), run="b", round_number=1, reserve=True)
    a.release()
    b.charge(SubsampledGaussian(4.0, 0.25, 5), run="b", round_number=1, reserve=True)  # b never sent the first one
    ledger_at(tmp_path).charge(SubsampledGaussian(5.0, 0.25, 5), run="a", round_number=2, reserve=True)
    assert [event.noise_multiplier for event in ledger_at(tmp_path).spent()] == [2.0, 4.0, 5.0]
    assert [record["released"] for record in ledger_at(tmp_path).records()] == [True, False, False]


@pytest.mark.parametrize("room", [2.0, 1.1], ids=["room", "no room"])
def test_a_reservation_that_a_twin_replaced_is_entered_again_or_not_sent(room: float, tmp_path: Path) -> None:
    budget = PrivacyBudget(room * epsilon_of([EVENT], DELTA), DELTA)
    first, twin = ledger_at(tmp_path), ledger_at(tmp_path)
    first.charge(EVENT, run="a", round_number=1, budget=budget, reserve=True)
    twin.charge(EVENT, run="a", round_number=1, budget=budget, reserve=True)  # takes the first for abandoned
    assert len(first.spent()) == 1
    if room > 2**0.5:  # what two such events cost, nearly
        first.release()
    else:
        with pytest.raises(PrivacyBudgetError, match="hospital-0: round 1 would raise epsilon"):
            first.release()
    twin.release()
    assert len(first.spent()) == (2 if room > 2**0.5 else 1)


def test_nothing_is_released_that_was_not_charged(tmp_path: Path) -> None:
    with pytest.raises(PrivacyBudgetError, match="nothing was charged for this release"):
        ledger_at(tmp_path).release()


def test_after_a_release_without_noise_no_epsilon_is_certified(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.charge(EVENT, run="before", round_number=1)
    ledger.charge_unprotected(run="plain", round_number=1)
    ledger.charge_unprotected(run="plain", round_number=2)
    again = ledger_at(tmp_path)
    assert again.epsilon(DELTA) == again.epsilon(DELTA, "rdp") == math.inf
    assert [record["run"] for record in again.records()] == ["before", "plain"]
    time = again.records()[1]["time"]
    message = f"hospital-0: run plain released data of these patients without noise on {time}"
    budget = PrivacyBudget(100.0, DELTA)
    before = again.path.read_bytes()
    for attempt in (
        lambda: again.spent(),
        lambda: again.spent(run="plain"),
        lambda: again.charge(EVENT, run="later", round_number=1, budget=budget),
        lambda: again.charge(EVENT, run="plain", round_number=1, reserve=True),
    ):
        with pytest.raises(PrivacyBudgetError) as refused:
            attempt()
        assert message in str(refused.value) and "\n" not in str(refused.value)
    assert again.path.read_bytes() == before


def test_no_epsilon_per_patient_is_certified_over_what_was_counted_per_image(tmp_path: Path) -> None:
    per_image, per_patient = (
        PrivacyLedger(tmp_path / "p.json", "hospital-0", "image"),
        PrivacyLedger(tmp_path / "p.json", "hospital-0"),
    )
    per_patient.charge(EVENT, run="first", round_number=1)
    per_image.charge(EVENT, run="second", round_number=1, reserve=True)
    per_image.release()
    # Whoever was promised something as a patient has it for each image, too; not the other way round.
    assert per_image.spent() == [EVENT, EVENT] and math.isfinite(per_image.epsilon(DELTA))
    assert "unit" not in per_patient.records()[0] and per_patient.records()[1]["unit"] == "image"
    assert per_patient.epsilon(DELTA) == math.inf
    with pytest.raises(PrivacyBudgetError, match="run second counted privacy per image on .*set data.unit=image"):
        per_patient.spent()
    with pytest.raises(PrivacyBudgetError, match="counted privacy per image"):
        per_patient.charge(EVENT, run="third", round_number=1)


def test_a_ledger_of_version_1_is_read_and_what_it_reserved_stays(tmp_path: Path) -> None:
    """A program of version 1 sent before it marked, so a reservation of it may have left. Written on, it is version 2."""
    ledger = ledger_at(tmp_path)
    records = [
        {"time": "2026-01-01T00:00:00+00:00", "run": "a", "round": number, "released": number == 1}
        | {"noise_multiplier": 2.0, "sample_rate": 0.25, "steps": number, "total_variation": 0.0}
        for number in (1, 2)
    ]
    content = {"format": "mpc-fl privacy ledger 1", "hospital": "hospital-0", "records": records}
    earlier = tmp_path / "privacy.json"
    earlier.write_text(json.dumps({**content, "sha256": checksum("hospital-0", records)}))
    assert [event.steps for event in ledger.spent(run="a")] == [1, 2]
    ledger.charge(EVENT, run="a", round_number=2, reserve=True)
    assert [event.steps for event in ledger.spent()] == [1, 2, 5]
    ledger.require(records[:1])
    [kept] = tmp_path.glob("privacy.json.taken-over-*")
    assert json.loads(kept.read_text())["records"] == records
    assert json.loads(earlier.read_text()) == {"moved to": "privacy.sqlite3"}  # which version 1 refuses to read
    ledger.release()
    assert [record["released"] for record in ledger_at(tmp_path).records()] == [True] * 3


def test_a_ledger_of_version_2_is_taken_over_with_what_it_reserved(tmp_path: Path) -> None:
    stamp = {"time": "2026-01-01T00:00:00+00:00", "round": 1}
    noised = {"noise_multiplier": 2.0, "sample_rate": 0.25, "steps": 1, "total_variation": 0.0}
    records = [
        {**stamp, "run": "a", "released": True, **noised, "number": "1" * 32},
        {**stamp, "run": "b", "released": False, **noised, "number": "2" * 32},
    ]
    content = {"format": "mpc-fl privacy ledger 2", "hospital": "hospital-0", "records": records}
    (tmp_path / "privacy.json").write_text(json.dumps({**content, "sha256": checksum("hospital-0", records)}))
    ledger = ledger_at(tmp_path)
    assert ledger.records() == records and ledger.records("b") == records[:1] and ledger.state() == records[:1]
    ledger.charge(EVENT, run="b", round_number=2, reserve=True)
    assert [event.steps for event in ledger.spent()] == [1, 5]


def test_a_ledger_that_was_put_back_while_a_run_uses_it_is_refused(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.charge(EVENT, run="a", round_number=1)
    before = ledger.path.read_bytes()
    ledger.charge(EVENT, run="a", round_number=2)
    assert len(ledger.records()) == 2
    ledger.path.write_bytes(before)
    for attempt in (ledger.records, lambda: ledger.charge(EVENT, run="a", round_number=3)):
        with pytest.raises(PrivacyBudgetError, match="holds less than when this program read it before"):
            attempt()
    assert ledger.path.read_bytes() == before
    ledger.path.unlink()
    with pytest.raises(PrivacyBudgetError, match="holds less than"):
        ledger.records()


def test_two_hundred_mutations_never_lower_what_is_spent(tmp_path: Path) -> None:
    ledger, chosen = ledger_at(tmp_path), random.Random(13)
    for number in range(40):
        ledger.charge(SubsampledGaussian(2.0 + number, 0.25, 5), run="a", round_number=number, reserve=number % 2 == 0)
        ledger.release()
    content, spent, refused = ledger.path.read_bytes(), ledger.spent(), 0
    places = [place for place, byte in enumerate(content) if byte]
    for number in range(200):
        place, length = chosen.choice(places), chosen.choice([1, 8, 200])
        inserted = b"" if number % 2 else chosen.randbytes(length)
        changed = content[:place] + inserted + content[place + length * (number % 3 > 0) :]
        ledger.path.write_bytes(changed)
        try:
            assert ledger_at(tmp_path).spent() == spent, (number, place)
        except PrivacyBudgetError as error:
            assert "hospital-0: privacy ledger" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 150


HAMMER = """
import pathlib, sys
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
who = int(sys.argv[2])
for number in range(20):
    ledger = PrivacyLedger(pathlib.Path(sys.argv[1]), "hospital-0")
    event = SubsampledGaussian(1.0 + who, 0.25, 1 + number)
    ledger.charge(event, run="one name", round_number=number, reserve=True)
    ledger.release()
"""


@pytest.mark.processes
def test_processes_that_share_a_file_lose_no_release(tmp_path: Path) -> None:
    """Three processes of one run's name, each of which may take the others' reservations for abandoned."""
    path = tmp_path / "privacy.json"
    processes = [subprocess.Popen([sys.executable, "-c", HAMMER, str(path), str(who)]) for who in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    found = Counter((event.noise_multiplier, event.steps) for event in PrivacyLedger(path, "hospital-0").spent())
    assert not Counter((1.0 + who, 1 + number) for who in range(3) for number in range(20)) - found
