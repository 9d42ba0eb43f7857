"""The accountant agrees with Opacus, calibration meets its target, the ledger refuses rather than forgets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from mpc_fl import privacy
from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.privacy import (
    RDP_ORDERS,
    PrivacyBudget,
    PrivacyLedger,
    SubsampledGaussian,
    calibrate_noise_multiplier,
    check_delta,
    epsilon_of,
)

DELTA = 1e-4
EVENTS = [SubsampledGaussian(1.0, 0.16, 25), SubsampledGaussian(2.0, 0.1, 10)]


def test_no_events_cost_nothing() -> None:
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([SubsampledGaussian(1.0, 0.1, 0)], DELTA, "prv") == 0.0


def test_epsilon_is_that_of_opacus() -> None:
    renyi, numerical = RDPAccountant(), PRVAccountant()
    renyi.history = [(1.0, 0.16, 25), (2.0, 0.1, 10)]
    numerical.history = list(renyi.history)
    assert epsilon_of(EVENTS, DELTA) == pytest.approx(renyi.get_epsilon(DELTA, alphas=list(RDP_ORDERS)), rel=1e-9)
    assert epsilon_of(EVENTS, DELTA) <= renyi.get_epsilon(DELTA) + 1e-9
    assert epsilon_of(EVENTS, DELTA, "prv") == pytest.approx(numerical.get_epsilon(DELTA), rel=1e-9)
    assert epsilon_of(EVENTS, DELTA, "prv") < epsilon_of(EVENTS, DELTA)


def test_known_value_without_subsampling() -> None:
    # One Gaussian release with sigma = 1 has Renyi divergence alpha / 2 (Mironov 2017, proposition 7); the conversion
    # of Balle et al. 2020 (theorem 21) at delta = 1e-5 is minimised over the same orders here.
    import math

    def converted(order: float) -> float:
        return order / 2 + math.log1p(-1 / order) - (math.log(1e-5) + math.log(order)) / (order - 1)

    assert epsilon_of([SubsampledGaussian(1.0, 1.0, 1)], 1e-5) == pytest.approx(
        min(converted(order) for order in RDP_ORDERS), rel=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(st.floats(0.6, 5.0), st.floats(0.01, 1.0), st.integers(1, 30), st.integers(1, 30))
def test_splitting_a_run_does_not_change_its_cost(noise: float, rate: float, first: int, second: int) -> None:
    parts = [SubsampledGaussian(noise, rate, first), SubsampledGaussian(noise, rate, second)]
    whole = epsilon_of([SubsampledGaussian(noise, rate, first + second)], DELTA)
    assert epsilon_of(parts, DELTA) == whole
    assert epsilon_of(parts[:1], DELTA) < whole


@pytest.mark.parametrize(("accountant", "spent"), [("rdp", []), ("rdp", EVENTS), ("prv", EVENTS[:1])])
def test_calibration_meets_the_target_closely(accountant: privacy.Accountant, spent: list[SubsampledGaussian]) -> None:
    noise = calibrate_noise_multiplier(8.0, DELTA, 0.16, 20, spent, accountant, "hospital-0")
    total = epsilon_of([*spent, SubsampledGaussian(noise, 0.16, 20)], DELTA, accountant)
    assert 7.97 < total <= 8.0


def test_small_epsilons_can_be_certified() -> None:
    noise = calibrate_noise_multiplier(0.1, DELTA, 0.16, 50)
    assert 0.099 < epsilon_of([SubsampledGaussian(noise, 0.16, 50)], DELTA) <= 0.1


def test_calibration_refuses_a_spent_budget() -> None:
    with pytest.raises(PrivacyBudgetError, match=r"hospital-2: privacy budget already spent: epsilon .* of 2 at delta"):
        calibrate_noise_multiplier(2.0, DELTA, 0.16, 20, EVENTS, "rdp", "hospital-2")
    almost = epsilon_of(EVENTS, DELTA) + 1e-9
    with pytest.raises(PrivacyBudgetError, match="hospital-2: privacy budget already spent"):
        calibrate_noise_multiplier(almost, DELTA, 0.16, 20, EVENTS, "rdp", "hospital-2")


def test_delta_must_stay_below_one_patient() -> None:
    check_delta(1e-4, 400, "hospital-0")
    with pytest.raises(PrivacyBudgetError, match="hospital-0: delta 0.0025 is not below 1/400"):
        check_delta(1 / 400, 400, "hospital-0")
    with pytest.raises(PrivacyBudgetError, match="no training patients"):
        check_delta(1e-4, 0, "hospital-0")
    for delta in (0.0, 1.0, -1.0):
        with pytest.raises(PrivacyBudgetError, match="delta"):
            epsilon_of(EVENTS, delta)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (0.0, 0.1, 1),
        (-1.0, 0.1, 1),
        (float("nan"), 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, 0.1, -1),
        (1.0, 0.1, 1.5),
    ],
)
def test_impossible_events_are_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(PrivacyBudgetError):
        SubsampledGaussian(noise, rate, steps)


# --- the ledger -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "site" / "privacy.json", "hospital-1")


def test_ledger_remembers_across_processes(ledger: PrivacyLedger) -> None:
    assert ledger.spent() == []
    for number, event in enumerate(EVENTS):
        ledger.charge(event, run="phantoms", round_number=number)
    again = PrivacyLedger(ledger.path, "hospital-1")
    assert again.spent() == EVENTS
    assert [(record["run"], record["round"]) for record in again.records()] == [("phantoms", 0), ("phantoms", 1)]
    assert sum(line.startswith('{"time"') for line in ledger.path.read_text().splitlines()) == 2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-6, 1.0), st.integers(0, 10**6)), min_size=1, max_size=4))
def test_ledger_round_trips_every_event(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[float, float, int]]
) -> None:
    ledger = PrivacyLedger(tmp_path_factory.mktemp("ledger") / "privacy.json", "hospital-1")
    events = [SubsampledGaussian(*value) for value in values]
    for event in events:
        ledger.charge(event, run="any", round_number=0)
    assert ledger.spent() == events


def test_charge_stops_before_the_budget_is_exceeded(ledger: PrivacyLedger) -> None:
    event = SubsampledGaussian(calibrate_noise_multiplier(4.0, DELTA, 0.2, 30), 0.2, 10)
    budget = PrivacyBudget(4.0, DELTA)
    for number in range(3):  # the calibrated run fits, round by round
        ledger.charge(event, run="phantoms", round_number=number, budget=budget)
    before = ledger.path.read_bytes()
    with pytest.raises(PrivacyBudgetError, match="hospital-1: round 3 would raise epsilon to"):
        ledger.charge(event, run="phantoms", round_number=3, budget=budget)
    assert ledger.path.read_bytes() == before


def _edited(path: Path) -> str:
    content = json.loads(path.read_text())
    content["records"][0]["steps"] = 1
    return json.dumps(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.read_text()[:-40],
        lambda path: "",
        lambda path: "[]",
        lambda path: "{}",
        lambda path: '{"format": "mpc-fl privacy ledger 1", "records": []}',
        _edited,
    ],
    ids=["cut", "empty", "list", "mapping", "no checksum", "edited"],
)
def test_damaged_ledger_is_refused_and_kept(ledger: PrivacyLedger, damage) -> None:  # type: ignore[no-untyped-def]
    ledger.charge(EVENTS[0], run="phantoms", round_number=0)
    text = damage(ledger.path)
    ledger.path.write_text(text)
    with pytest.raises(PrivacyBudgetError, match="restore it from a backup"):
        ledger.spent()
    with pytest.raises(PrivacyBudgetError, match="restore it from a backup"):
        ledger.charge(EVENTS[0], run="phantoms", round_number=1)
    assert ledger.path.read_text() == text


def test_ledger_of_another_hospital_is_refused(ledger: PrivacyLedger) -> None:
    ledger.charge(EVENTS[0], run="phantoms", round_number=0)
    with pytest.raises(PrivacyBudgetError, match="belongs to hospital-1"):
        PrivacyLedger(ledger.path, "hospital-2").spent()


def test_interrupted_write_leaves_the_old_ledger(ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.charge(EVENTS[0], run="phantoms", round_number=0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PrivacyBudgetError, match="No space left"):
        ledger.charge(EVENTS[1], run="phantoms", round_number=1)
    assert ledger.spent() == EVENTS[:1]
