"""The accountant agrees with Opacus and dp-accounting, calibration meets its target, the ledger refuses to forget."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.learning.privacy import accounting as privacy
from mpc_fl.learning.privacy.accounting import (
    RDP_ORDERS,
    PrivacyBudget,
    SubsampledGaussian,
    calibrate_noise_multiplier,
    check_delta,
    epsilon_of,
)
from mpc_fl.learning.privacy.ledger_rows import checksum
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger

DELTA = 1e-4
EVENTS = [SubsampledGaussian(1.0, 0.16, 25), SubsampledGaussian(2.0, 0.1, 10)]


def test_no_events_cost_nothing() -> None:
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([SubsampledGaussian(1.0, 0.1, 0)], DELTA, "prv") == 0.0


def test_the_first_orders_are_those_of_opacus() -> None:
    count = len(RDPAccountant.DEFAULT_ALPHAS)
    assert RDP_ORDERS[:count] == tuple(RDPAccountant.DEFAULT_ALPHAS)
    assert min(RDP_ORDERS[count:]) > max(RDP_ORDERS[:count])


def test_epsilon_is_that_of_opacus() -> None:
    renyi, numerical = RDPAccountant(), PRVAccountant()
    renyi.history = [(1.0, 0.16, 25), (2.0, 0.1, 10)]
    numerical.history = list(renyi.history)
    by_renyi = epsilon_of(EVENTS, DELTA, "rdp")
    assert by_renyi == pytest.approx(renyi.get_epsilon(DELTA, alphas=list(RDP_ORDERS)), rel=1e-9)
    assert by_renyi <= renyi.get_epsilon(DELTA) + 1e-9
    assert epsilon_of(EVENTS, DELTA, "prv") == pytest.approx(numerical.get_epsilon(DELTA), rel=1e-9)
    assert epsilon_of(EVENTS, DELTA) < epsilon_of(EVENTS, DELTA, "prv") < by_renyi


def test_known_value_without_subsampling() -> None:
    # One Gaussian release with sigma = 1 has Renyi divergence alpha / 2 (Mironov 2017, proposition 7); the conversion
    # of Balle et al. 2020 (theorem 21) at delta = 1e-5 is minimised over the same orders here.
    def converted(order: float) -> float:
        return order / 2 + math.log1p(-1 / order) - (math.log(1e-5) + math.log(order)) / (order - 1)

    assert epsilon_of([SubsampledGaussian(1.0, 1.0, 1)], 1e-5, "rdp") == pytest.approx(
        min(converted(order) for order in RDP_ORDERS), rel=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(st.floats(0.6, 5.0), st.floats(0.01, 1.0), st.integers(1, 30), st.integers(1, 30))
def test_splitting_a_run_does_not_change_its_cost(noise: float, rate: float, first: int, second: int) -> None:
    parts = [SubsampledGaussian(noise, rate, first), SubsampledGaussian(noise, rate, second)]
    whole = epsilon_of([SubsampledGaussian(noise, rate, first + second)], DELTA)
    assert epsilon_of(parts, DELTA) == whole
    assert epsilon_of(parts[:1], DELTA) < whole


@pytest.mark.parametrize(
    ("accountant", "spent"),
    [
        ("pld", []),
        ("pld", EVENTS),
        ("rdp", []),
        ("rdp", EVENTS),
        pytest.param("prv", EVENTS[:1], marks=pytest.mark.slow),
    ],
)
def test_calibration_meets_the_target_closely(accountant: privacy.Accountant, spent: list[SubsampledGaussian]) -> None:
    noise = calibrate_noise_multiplier(PrivacyBudget(8.0, DELTA, accountant), 0.16, 20, spent, "hospital-0")
    total = epsilon_of([*spent, SubsampledGaussian(noise, 0.16, 20)], DELTA, accountant)
    assert 7.97 < total <= 8.0


def test_small_epsilons_can_be_certified() -> None:
    noise = calibrate_noise_multiplier(PrivacyBudget(0.1, DELTA), 0.16, 50)
    assert 0.099 < epsilon_of([SubsampledGaussian(noise, 0.16, 50)], DELTA) <= 0.1


def test_calibration_refuses_a_spent_budget() -> None:
    with pytest.raises(PrivacyBudgetError, match=r"hospital-2: privacy budget already spent: epsilon .* of 2 at delta"):
        calibrate_noise_multiplier(PrivacyBudget(2.0, DELTA), 0.16, 20, EVENTS, "hospital-2")
    almost = epsilon_of(EVENTS, DELTA) + 1e-9
    with pytest.raises(PrivacyBudgetError, match="hospital-2: privacy budget already spent"):
        calibrate_noise_multiplier(PrivacyBudget(almost, DELTA), 0.16, 20, EVENTS, "hospital-2")


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


# --- integer noise: a distance from the Gaussian ------------------------------------------------------------------------

CASES = [(2.0, 0.1, 100), (0.8, 0.05, 200), (3.0, 1.0, 20)]


@pytest.mark.parametrize(("noise", "rate", "steps"), CASES)
def test_renyi_epsilon_is_that_of_dp_accounting(noise: float, rate: float, steps: int) -> None:
    """Tolerance 1e-9 at whole orders, where both are exact; at others dp-accounting has an upper bound only."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    ours = epsilon_of([SubsampledGaussian(noise, rate, steps, 1e-30)], 1e-5, "rdp")
    theirs = rdp.RdpAccountant(list(RDP_ORDERS))
    theirs.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    assert ours <= theirs.get_epsilon(1e-5) * (1 + 1e-6)
    whole = [order for order in RDP_ORDERS if order == int(order)]
    theirs = rdp.RdpAccountant(whole)
    theirs.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    own = steps * privacy._renyi_of_one_step(noise, rate)[[RDP_ORDERS.index(order) for order in whole]]
    assert own == pytest.approx(theirs._rdp, rel=1e-9)


@pytest.mark.parametrize(("noise", "rate", "steps"), CASES)
def test_epsilon_of_integer_noise_lies_within_the_bounds_of_dp_accounting(
    noise: float, rate: float, steps: int
) -> None:
    """The discrete Gaussian's own privacy loss, in one dimension, composed by another library, from both sides.

    `pld` must lie above the optimistic estimate and at most 0.2 % above the pessimistic one, `prv` (whose own error is 0.01) at
    most 0.02; `rdp` must lie above both. 512 grid units of sensitivity.
    """
    bounds = [
        privacy_loss_distribution.from_discrete_gaussian_mechanism(
            math.sqrt((512 * noise) ** 2 + 5),
            sensitivity=512,
            sampling_prob=rate,
            value_discretization_interval=2e-4,
            pessimistic_estimate=pessimistic,
        )
        .self_compose(steps)
        .get_epsilon_for_delta(1e-4)
        for pessimistic in (False, True)
    ]
    event = SubsampledGaussian(noise, rate, steps, 1e-30)
    assert bounds[0] <= epsilon_of([event], 1e-4, "pld") <= bounds[1] * 1.002
    assert bounds[0] <= epsilon_of([event], 1e-4, "prv") <= bounds[1] + 0.02
    assert bounds[1] <= epsilon_of([event], 1e-4, "rdp")


def test_total_variation_is_paid_from_delta() -> None:
    def total(distance: float, steps: int = 10) -> float:
        return epsilon_of([SubsampledGaussian(1.0, 0.16, steps, distance)], DELTA)

    exact = total(0.0)
    assert total(1e-30) == epsilon_of([SubsampledGaussian(1.0, 0.16, 10)], DELTA * (1 - 2.0**-20)) > exact
    # The largest distance whose (1 + exp(epsilon)) * 10 steps fit 2^-20 of delta; then nothing can be certified.
    largest = DELTA * 2.0**-20 / (1 + math.exp(total(1e-30))) / 10
    assert total(largest * 0.999) == total(1e-30) and total(largest * 1.001) == math.inf
    split = [SubsampledGaussian(1.0, 0.16, 5, largest * 0.5), SubsampledGaussian(1.0, 0.16, 5, largest * 1.51)]
    assert epsilon_of(split, DELTA) == math.inf
    assert total(0.5, steps=0) == 0.0
    assert epsilon_of([SubsampledGaussian(1e-2, 1.0, 10, 1e-300)], DELTA) == math.inf  # and no overflow


@pytest.mark.parametrize("distance", [-1e-9, 1.0, math.nan, math.inf, True, "0", None])
def test_impossible_distances_are_refused(distance: object) -> None:
    with pytest.raises(PrivacyBudgetError, match="total variation"):
        SubsampledGaussian(1.0, 0.1, 1, distance)  # type: ignore[arg-type]


def test_calibration_pays_for_the_distance() -> None:
    noise = calibrate_noise_multiplier(PrivacyBudget(4.0, DELTA), 0.16, 20, EVENTS[1:], total_variation=1e-25)
    event = SubsampledGaussian(noise, 0.16, 20, 1e-25)
    assert 3.98 < epsilon_of([*EVENTS[1:], event], DELTA) <= 4.0
    with pytest.raises(PrivacyBudgetError, match="no noise multiplier"):
        calibrate_noise_multiplier(PrivacyBudget(4.0, DELTA), 0.16, 20, total_variation=1e-8)


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
    assert list(ledger.path.parent.iterdir()) == [ledger.path] and ledger.path.stat().st_mode & 0o777 == 0o600


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


def test_a_ledger_of_before_distances_were_recorded_is_read(ledger: PrivacyLedger) -> None:
    """The file as version 0.1.0 wrote it, and the next record beside it."""
    record = {"time": "2026-01-01T00:00:00+00:00", "run": "phantoms", "round": 1}
    record |= {"noise_multiplier": 1.0, "sample_rate": 0.16, "steps": 25}
    digest = checksum("hospital-1", [record])
    ledger.path.parent.mkdir(parents=True)
    ledger.path.with_suffix(".json").write_text(
        f'{{"format": "mpc-fl privacy ledger 1", "hospital": "hospital-1", "sha256": "{digest}", "records": [\n'
        f"{json.dumps(record)}\n]}}\n"
    )
    assert ledger.spent() == EVENTS[:1]
    event = SubsampledGaussian(2.0, 0.1, 10, 3e-27)
    ledger.charge(event, run="phantoms", round_number=2, budget=PrivacyBudget(20.0, DELTA))
    assert ledger.spent() == [*EVENTS[:1], event]


def test_a_ledger_must_hold_what_a_checkpoint_knew(ledger: PrivacyLedger, tmp_path: Path) -> None:
    for number in (1, 2):
        ledger.charge(EVENTS[0], run="phantoms", round_number=number)
    state = ledger.state()
    assert [record["round"] for record in state] == [1, 2]
    ledger.charge(EVENTS[1], run="phantoms", round_number=3, reserve=True)
    assert ledger.state() == state  # a reserved one may still be replaced
    ledger.release()
    ledger.require(state)
    other = PrivacyLedger(tmp_path / "other.json", "hospital-1")
    for number in (2, 3):  # as many records, but others
        other.charge(EVENTS[1], run="phantoms", round_number=number)
    for forgetful in (other, PrivacyLedger(tmp_path / "none.json", "hospital-1")):
        with pytest.raises(PrivacyBudgetError, match="holds less than when the last checkpoint was written"):
            forgetful.require(state)


def test_charge_stops_before_the_budget_is_exceeded(ledger: PrivacyLedger) -> None:
    event = SubsampledGaussian(calibrate_noise_multiplier(PrivacyBudget(4.0, DELTA), 0.2, 30), 0.2, 10)
    budget = PrivacyBudget(4.0, DELTA)
    for number in range(3):  # the calibrated run fits, round by round
        ledger.charge(event, run="phantoms", round_number=number, budget=budget)
    before = ledger.path.read_bytes()
    with pytest.raises(PrivacyBudgetError, match="hospital-1: round 3 would raise epsilon to"):
        ledger.charge(event, run="phantoms", round_number=3, budget=budget)
    assert ledger.path.read_bytes() == before


def _edited(path: Path) -> bytes:
    content = path.read_bytes()
    assert content.count(b'"steps": 25') == 1
    return content.replace(b'"steps": 25', b'"steps": 01')


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.read_bytes()[:-4096], lambda path: b"", lambda path: b"{}", _edited],
    ids=["cut", "empty", "JSON", "edited"],
)
def test_damaged_ledger_is_refused_and_kept(ledger: PrivacyLedger, damage) -> None:  # type: ignore[no-untyped-def]
    ledger.charge(EVENTS[0], run="phantoms", round_number=0)
    content = damage(ledger.path)
    ledger.path.write_bytes(content)
    with pytest.raises(
        PrivacyBudgetError, match="hospital-1: privacy ledger .* is damaged.*: restore it from a backup"
    ):
        ledger.spent()
    with pytest.raises(PrivacyBudgetError, match="restore it from a backup"):
        ledger.charge(EVENTS[0], run="phantoms", round_number=1)
    assert ledger.path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not of this format"),
        ("{}", "is not of this format"),
        ('{"format": "mpc-fl privacy ledger 1", "records": []}', "does not match its checksum"),
        (
            f'{{"format": "mpc-fl privacy ledger 2", "hospital": "hospital-1", "records": [{{}}], '
            f'"sha256": "{checksum("hospital-1", [{}])}"}}',
            "has a record that is not an event",
        ),
        (
            f'{{"format": "mpc-fl privacy ledger 2", "hospital": "hospital-2", "records": [], '
            f'"sha256": "{checksum("hospital-2", [])}"}}',
            "belongs to hospital-2",
        ),
    ],
)
def test_a_damaged_ledger_of_an_earlier_version_is_refused_and_kept(
    ledger: PrivacyLedger, content: str, reason: str
) -> None:
    earlier = ledger.path.with_suffix(".json")
    earlier.parent.mkdir(parents=True)
    earlier.write_text(content)
    for attempt in (ledger.spent, ledger.spent, lambda: ledger.charge(EVENTS[0], run="phantoms", round_number=1)):
        with pytest.raises(PrivacyBudgetError, match=f"hospital-1: privacy ledger .*privacy.json {reason}"):
            attempt()
    assert earlier.read_text() == content


def test_ledger_of_another_hospital_is_refused(ledger: PrivacyLedger) -> None:
    ledger.charge(EVENTS[0], run="phantoms", round_number=0)
    with pytest.raises(PrivacyBudgetError, match="belongs to .hospital-1., not to hospital-2"):
        PrivacyLedger(ledger.path, "hospital-2").spent()


def test_a_write_that_fails_leaves_the_old_ledger(ledger: PrivacyLedger) -> None:
    ledger.charge(EVENTS[0], run="phantoms", round_number=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(PrivacyBudgetError, match=r"reading or writing .* failed: .*ulimit -f"):
            ledger.charge(EVENTS[1], run="phantoms", round_number=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger.spent() == EVENTS[:1]
