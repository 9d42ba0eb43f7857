"""The distributed mechanism: sensitivity and headroom as proven, noise as accounted, for what is really computed."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import HeadroomError, PrivacyBudgetError, ProtocolError, SecrecyError
from mpc_fl.learning.privacy import discrete_gaussian as integer_noise
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, epsilon_of
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    add_patients,
    mean_gradient,
    noised_share,
    patients_bound,
    plan_mechanism,
    require_patients,
    step_total_variation,
)

STANDARD_ERRORS = 5.5  # a normal variable beyond: 4e-8


def small(parameters: int = 1000, **changes: object) -> DistributedGaussian:
    mechanism = plan_mechanism(
        MechanismTerms(
            parameters=parameters,
            hospitals=3,
            colluders=1,
            expected_patients=16,
            clipping_norm=0.5,
            noise_multiplier=1.25,
        )
    )
    return replace(mechanism, **changes)  # type: ignore[arg-type]


def rounded(mechanism: DistributedGaussian, *gradients: torch.Tensor) -> torch.Tensor:
    """The exact sum of some patients, each given as float32 (P,)."""
    total = torch.zeros(mechanism.parameters, dtype=mechanism.dtype)
    if gradients:
        add_patients(mechanism, total, [torch.stack(gradients)])
    return total


# --- sensitivity ------------------------------------------------------------------------------------------------------


def squared_norm(total: torch.Tensor) -> int:
    return sum(value * value for value in total.tolist())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 8),
    st.sampled_from(["normal", "equal", "one", "just above half", "sparse", "tiny", "huge"]),
    st.floats(-3, 3),
    st.integers(0, 2**31),
)
def test_no_patient_exceeds_the_sensitivity(parameters: int, bits: int, kind: str, log_norm: float, seed: int) -> None:
    """Also on grids coarser than any that is planned, down to where a whole norm is one grid unit per coordinate."""
    grid = 1 << (math.ceil(math.log2(max(2, math.sqrt(parameters)))) + bits)
    mechanism = small(parameters, sensitivity=grid)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(parameters, generator=generator)
    if kind == "equal":
        gradient = torch.ones(parameters)
    elif kind == "one":
        gradient = torch.zeros(parameters)
        gradient[seed % parameters] = -1.0
    elif kind == "just above half":  # every coordinate rounds up by nearly half a unit
        gradient = (torch.randint(0, 3, (parameters,), generator=generator) + 0.5001) / mechanism.scale
    elif kind == "sparse":
        gradient[torch.rand(parameters, generator=generator) < 0.9] = 0.0
    elif kind == "tiny":
        gradient *= 1e-42
    elif kind == "huge":
        gradient *= 1e37
    if kind not in ("just above half", "tiny", "huge"):
        gradient *= 10**log_norm * mechanism.clipping_norm / max(float(gradient.norm()), 1e-12)
    assert squared_norm(rounded(mechanism, gradient)) <= mechanism.sensitivity**2


def test_the_bound_on_sensitivity_is_nearly_reached() -> None:
    """10,000 coordinates of 2.51 units each, which all round to 3: B is not a loose bound."""
    mechanism = small(10_000, sensitivity=251 + 50)
    assert squared_norm(rounded(mechanism, torch.ones(10_000))) == 300**2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.integers(0, 2**31))
def test_one_patient_moves_the_sum_by_its_own_rounded_gradient(patients: int, seed: int) -> None:
    """Exactly, whoever the others are, and however patients and parameters are grouped."""
    mechanism = small(977)
    gradients = list(torch.randn(patients + 1, 977, generator=torch.Generator().manual_seed(seed)))
    with_one, without = rounded(mechanism, *gradients), rounded(mechanism, *gradients[1:])
    assert torch.equal(with_one - without, rounded(mechanism, gradients[0]))
    pieces = torch.zeros(977, dtype=torch.int32)
    for gradient in reversed(gradients):
        add_patients(mechanism, pieces, [gradient[:800].reshape(1, 40, 20), gradient[800:].unsqueeze(0)])
    assert torch.equal(pieces, with_one)


def test_large_gradients_in_several_blocks() -> None:
    mechanism = plan_mechanism(
        MechanismTerms(
            parameters=700_001,
            hospitals=2,
            colluders=0,
            expected_patients=2,
            clipping_norm=1.0,
            noise_multiplier=1.0,
        ),
        ring_bits=64,
    )
    rows = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(5)) / 500
    total = torch.zeros(700_001, dtype=torch.int64)
    norms = add_patients(mechanism, total, [rows[:, :400_000], rows[:, 400_000:]])
    assert torch.allclose(norms, rows.double().norm(dim=1), rtol=1e-12)
    factors = mechanism.scale * (1 / rows.double().norm(dim=1)).clamp(max=1.0)
    assert torch.equal(total, (rows.double() * factors.unsqueeze(1)).round().sum(dim=0).long())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad: float) -> None:
    mechanism = small(64)
    good, spoilt = torch.randn(64), torch.randn(64)
    spoilt[7] = bad
    total = torch.zeros(64, dtype=torch.int32)
    norms = add_patients(mechanism, total, [torch.stack([spoilt, good, spoilt])])
    assert torch.equal(total, rounded(mechanism, good)) and torch.isfinite(norms).tolist() == [False, True, False]


def test_nobody_adds_nothing() -> None:
    mechanism, total = small(10), torch.zeros(10, dtype=torch.int32)
    assert add_patients(mechanism, total, [torch.empty(0, 4), torch.empty(0, 3, 2)]).shape == (0,)
    assert torch.equal(total, torch.zeros(10, dtype=torch.int32))


@pytest.mark.parametrize(
    ("total", "gradient"),
    [
        (torch.zeros(10, dtype=torch.int64), torch.zeros(1, 10)),
        (torch.zeros(9, dtype=torch.int32), torch.zeros(1, 10)),
        (torch.zeros(10, dtype=torch.int32), torch.zeros(1, 9)),
        (torch.zeros(10, dtype=torch.int32), torch.zeros(1, 10, dtype=torch.float64)),
    ],
)
def test_other_shapes_and_types_are_refused(total: torch.Tensor, gradient: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="totals are|float32"):
        add_patients(small(10), total, [gradient])


def test_the_mean_is_that_of_the_clipped_gradients() -> None:
    mechanism = small(5000)
    gradients = torch.randn(12, 5000, generator=torch.Generator().manual_seed(1)) * 0.01
    clipped = gradients.double() * (0.5 / gradients.double().norm(dim=1, keepdim=True)).clamp(max=1.0)
    mean = mean_gradient(mechanism, rounded(mechanism, *gradients))
    assert mean.dtype == torch.float64
    # Twelve times half a grid unit at most, over 3 * 16 expected patients.
    assert float((mean - clipped.sum(dim=0) / 48).abs().max()) <= 6 / (mechanism.scale * 48) + 1e-6


# --- headroom ---------------------------------------------------------------------------------------------------------

PLANS = st.fixed_dictionaries(
    {
        "parameters": st.integers(1, 30_000_000),
        "hospitals": st.integers(2, 64),
        "colluders": st.integers(0, 1),
        "expected_patients": st.integers(1, 1024),
        "clipping_norm": st.floats(1e-3, 1e3),
        "noise_multiplier": st.floats(1e-3, 1e3),
        "ring_bits": st.sampled_from([32, 64]),
    }
)


@settings(max_examples=150, deadline=None)
@given(PLANS)
def test_a_plan_has_headroom_and_a_fine_grid(values: dict) -> None:
    ring_bits = values.pop("ring_bits")
    try:
        mechanism = plan_mechanism(MechanismTerms(**values), ring_bits)
    except HeadroomError:
        assert ring_bits == 32  # 64 bits are enough for all of these
        return
    bound = mechanism.patients_bound * mechanism.sensitivity + mechanism.noise_share.largest
    assert mechanism.hospitals * bound == mechanism.largest_sum < 2 ** (mechanism.ring_bits - 1)
    root = math.sqrt(mechanism.parameters)
    assert root / 2 <= 0.01 * mechanism.sensitivity
    assert mechanism.scale * mechanism.clipping_norm + root / 2 < mechanism.sensitivity
    assert mechanism.noise_share.variance >= 2 * integer_noise.SMOOTHING


def test_a_plan_is_no_finer_than_useful() -> None:
    mechanism = small(10_000)
    assert 512 * 100 <= mechanism.sensitivity < 2 * 512 * 100
    assert mechanism.dtype == torch.int32


def test_the_largest_sum_does_not_wrap() -> None:
    """All of a hospital's patients in one coordinate, at all hospitals, both signs."""
    mechanism = plan_mechanism(
        MechanismTerms(
            parameters=4,
            hospitals=3,
            colluders=1,
            expected_patients=4,
            clipping_norm=1.0,
            noise_multiplier=2.0,
        )
    )
    fullest = mechanism.patients_bound
    gradient = torch.tensor([1.0, -1.0, 0.0, 0.0])
    sums = []
    for hospital in range(3):
        total = torch.zeros(4, dtype=torch.int32)
        add_patients(mechanism, total, [gradient.expand(fullest, 4)])
        share = noised_share(mechanism, Private("sum", total), Seed(bytes([hospital]) * 32))
        sums.append(share.inside_protocol())
    in_ring = sums[0] + sums[1] + sums[2]
    assert torch.equal(in_ring.long(), torch.stack(sums).long().sum(dim=0))
    assert float(in_ring[0]) > 0 > float(in_ring[1])
    mean_gradient(mechanism, in_ring)


@pytest.mark.parametrize("expected", [1, 7, 64, 500, 4096])
def test_more_patients_than_the_bound_are_drawn_with_probability_below_2_to_minus_128(expected: int) -> None:
    bound = patients_bound(expected)
    for trials in (expected, 2 * expected, 50 * expected, 10**7):
        tail = stats.binom.logsf(bound, trials, expected / trials) if trials > expected else -math.inf
        assert tail < -128 * math.log(2)
    assert stats.poisson.logsf(bound // 2 + expected // 2, expected) > -128 * math.log(2)  # and no more than needed


def test_what_does_not_fit_is_refused() -> None:
    mechanism = small(10)
    require_patients(mechanism, mechanism.patients_bound, "hospital-1")
    with pytest.raises(HeadroomError, match="hospital-1 drew more patients"):
        require_patients(mechanism, mechanism.patients_bound + 1, "hospital-1")
    for sign in (1, -1):
        total = torch.zeros(10, dtype=torch.int32)
        total[3] = sign * (mechanism.patients_bound * mechanism.sensitivity + 1)
        with pytest.raises(HeadroomError, match="sum of hospital-1 exceeds"):
            noised_share(mechanism, Private("sum of hospital-1", total), Seed.from_system())
        opened = torch.zeros(10, dtype=torch.int64)
        opened[3] = sign * (mechanism.largest_sum + 1)
        with pytest.raises(ProtocolError, match="exceeds its bound"):
            mean_gradient(mechanism, opened)
    with pytest.raises(ProtocolError, match="another shape"):
        mean_gradient(mechanism, torch.zeros(9, dtype=torch.int32))
    with pytest.raises(ValueError, match="totals are"):
        noised_share(mechanism, Private("sum", torch.zeros(10)), Seed.from_system())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"colluders": 3}, PrivacyBudgetError, "collusion bound of 3 among 3 hospitals"),
        ({"colluders": -1}, PrivacyBudgetError, "collusion bound"),
        ({"noise_multiplier": 0.0}, PrivacyBudgetError, "noise multiplier must lie"),
        ({"noise_multiplier": math.nan}, PrivacyBudgetError, "noise multiplier must lie"),
        ({"clipping_norm": math.inf}, PrivacyBudgetError, "clipping norm must be"),
        ({"parameters": 0}, HeadroomError, "parameters"),
        ({"expected_patients": 0}, HeadroomError, "patients"),
        ({"parameters": 11_000_000, "expected_patients": 5000}, HeadroomError, "32 bits.*training.batch_size.*64 bits"),
        ({"noise_multiplier": 1e6}, PrivacyBudgetError, "noise multiplier must lie"),
        ({"noise_multiplier": 1e3, "parameters": 11_000_000}, HeadroomError, "do not fit"),
    ],
)
def test_impossible_plans_are_refused(values: dict, error: type[Exception], message: str) -> None:
    plan = {
        "parameters": 1000,
        "hospitals": 3,
        "colluders": 1,
        "expected_patients": 16,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
    }
    with pytest.raises(error, match=message):
        plan_mechanism(MechanismTerms(**{**plan, **values}))


# --- noise and accounting ---------------------------------------------------------------------------------------------


def test_shares_carry_their_part_of_the_noise() -> None:
    """sigma^2 / (n - t) each, n / (n - t) sigma^2 in all, sigma^2 with the colluders' own taken off; independent.

    5.5 standard errors, 4e-8 each.
    """
    count = 1 << 19
    mechanism = plan_mechanism(
        MechanismTerms(
            parameters=count,
            hospitals=4,
            colluders=1,
            expected_patients=8,
            clipping_norm=2.0,
            noise_multiplier=0.8,
        )
    )
    exact = torch.arange(count, dtype=torch.int32) % 100
    noise = []
    for hospital in range(4):
        total = Private("sum", exact)
        share = noised_share(mechanism, total, Seed.from_system(), threads=1 + hospital % 2)
        noise.append((share.inside_protocol() - exact).double())
    assert torch.equal(exact, torch.arange(count, dtype=torch.int32) % 100)  # a retry starts from the same sum
    sigma = 0.8 * mechanism.sensitivity
    tolerance = STANDARD_ERRORS * math.sqrt(2 / count)
    for share in noise:
        assert abs(float(share.mean())) < STANDARD_ERRORS * sigma / math.sqrt(3 * count)
        assert abs(float(share.square().mean()) / (sigma**2 / 3) - 1) < tolerance
    assert abs(float(sum(noise).square().mean()) / (sigma**2 * 4 / 3) - 1) < tolerance
    assert abs(float(sum(noise[1:]).square().mean()) / sigma**2 - 1) < tolerance
    for one in range(4):
        for other in range(one):
            correlation = float((noise[one] * noise[other]).mean()) / (sigma**2 / 3)
            assert abs(correlation) < STANDARD_ERRORS / math.sqrt(count)


def test_noise_is_never_drawn_twice() -> None:
    mechanism, seed = small(10), Seed.from_system()
    total = Private("sum", torch.zeros(10, dtype=torch.int32))
    noised_share(mechanism, total, seed)
    with pytest.raises(SecrecyError, match="used twice"):
        noised_share(mechanism, total, seed)


def exact_law(variance: Fraction) -> np.ndarray:
    """What the sampler of a small variance really draws, from its one table: float64 over -reach .. reach."""
    table = integer_noise._alias_table(variance)
    word_bits = 32 - table.column_bits
    law = np.zeros(table.values.max() - table.values.min() + 1)
    for column, tie in enumerate(table.ties):
        own = ((int(table.thresholds[column]) - (column << word_bits)) + tie / 2**192) / 2**word_bits
        np.add.at(law, table.values[2 * column : 2 * column + 2] - table.values.min(), [own, 1 - own])
    law = np.trim_zeros(law / law.sum())
    assert len(law) % 2 == 1
    return law


@pytest.mark.parametrize(("noise_multiplier", "rate", "hospitals", "colluders"), [(1.0, 0.2, 3, 1), (2.0, 1.0, 4, 1)])
@pytest.mark.parametrize("delta", [1e-6, 1e-2])
def test_the_law_of_the_opened_sum_has_the_accounted_epsilon(
    noise_multiplier: float, rate: float, hospitals: int, colluders: int, delta: float
) -> None:
    """One step, one parameter, the worst patient: delta computed from the tables the honest hospitals draw from."""
    mechanism = DistributedGaussian(1, hospitals, colluders, 8, 1.0, noise_multiplier, 32, 32)
    share = exact_law(mechanism.noise_share.variance)
    honest = share
    for _ in range(hospitals - colluders - 1):
        honest = np.convolve(honest, share)
    reach = len(honest) // 2
    x = np.arange(-reach, reach + 1)
    ideal = np.exp(-(x**2) / (2 * (float(noise_multiplier * 32) ** 2 + 5)))
    assert np.abs(honest - ideal / ideal.sum()).sum() < 1e-13

    patient = int(rounded(mechanism, torch.tensor([1e9])))
    assert patient == 31  # s C = 31.5 and a bit less
    patient = mechanism.sensitivity  # the accounted bound
    absent = np.concatenate([honest, np.zeros(patient)])
    present = np.concatenate([np.zeros(patient), honest])
    sampled = (1 - rate) * absent + rate * present
    epsilon = epsilon_of([mechanism.event(rate, 1)], delta, "prv")
    for one, other in ((sampled, absent), (absent, sampled)):
        assert np.maximum(one - math.exp(epsilon) * other, 0).sum() <= delta
    # Not a loose bound: 3 % less, and prv's own error of 0.01 either way, would not hold.
    worst = max(
        np.maximum(one - math.exp(0.97 * epsilon - 0.02) * other, 0).sum()
        for one, other in ((sampled, absent), (absent, sampled))
    )
    assert worst > delta


def test_the_event_is_the_gaussian_one_and_a_distance() -> None:
    mechanism = small(1000)
    distance = step_total_variation(1000, 3, 1)
    assert mechanism.event(0.1, 7) == SubsampledGaussian(1.25, 0.1, 7, distance)
    assert 1000 * 2 * 2.0**-127 <= distance < 1000 * 2 * 2.0**-126 + 2.0**-127
    gaussian = epsilon_of([SubsampledGaussian(1.25, 0.1, 7)], 1e-5)
    assert gaussian < epsilon_of([mechanism.event(0.1, 7)], 1e-5) < gaussian * (1 + 1e-6)


def test_a_realistic_run_can_be_certified() -> None:
    """ResNet18 at 64 hospitals for a million steps: the distances stay far below the part of delta set aside."""
    distance = step_total_variation(11_178_051, 64, 1)
    event = SubsampledGaussian(30.0, 0.01, 1_000_000, distance)
    assert epsilon_of([event], 1e-6) < 5
