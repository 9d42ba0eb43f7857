"""The public sketch: linear over the ring with wrap-around, unbiased, of the stated variance, safe against chosen vectors.

Statistical tests run over numbered seeds, so that they give the same result every time; the thresholds are such that
fresh seeds would fail them with the probability each test states.
"""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import ProofSize
from mpc_fl.aggregation.prime_field import PRIME
from mpc_fl.aggregation.sketch import BUCKETS, SignHash
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, HeadroomError, ProtocolError

Q = 1 << 32
BLOCK = BUCKETS // 2


def seed_number(number: int) -> bytes:
    return number.to_bytes(32, "little")


def elements(number: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Uniform ring elements."""
    full = Seed(seed_number(number)).stream("elements").ring_elements((count,))
    return full if dtype == torch.int64 else full.to(torch.int32)


def square_norm(sketch: torch.Tensor) -> float:
    return float(sketch.double().square().sum())


sizes = st.integers(1, 3000)
dtypes = st.sampled_from([torch.int32, torch.int64])


@settings(max_examples=40, deadline=None)
@given(sizes, dtypes, st.integers(0, 2**32), st.integers(-(2**31), 2**31 - 1))
def test_folding_is_linear_in_the_ring_and_wraps(count: int, dtype: torch.dtype, number: int, factor: int) -> None:
    sign_hash = SignHash(seed_number(number), count, 256)
    x, y = elements(number + 1, count, dtype), elements(number + 2, count, dtype)
    folded = sign_hash.fold(x * factor + y)
    assert folded.dtype == dtype and folded.shape == (256,)
    assert torch.equal(folded, sign_hash.fold(x) * factor + sign_hash.fold(y))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**32), st.sampled_from([256, 1024]))
def test_both_rings_have_one_hash(count: int, number: int, buckets: int) -> None:
    sign_hash = SignHash(seed_number(number), count, buckets)
    x = elements(number, count, torch.int64)
    assert torch.equal(sign_hash.fold(x).to(torch.int32), sign_hash.fold(x.to(torch.int32)))


def test_every_coordinate_lands_in_one_bucket_with_a_sign_as_defined() -> None:
    """Unit vectors, one by one; then a sum of them is the fold of any vector, with a last block that is not full."""
    count, buckets = 900, 256
    sign_hash = SignHash(seed_number(5), count, buckets)
    units = torch.stack([sign_hash.fold(row) for row in torch.eye(count, dtype=torch.int32)])
    assert torch.equal(units.abs().sum(1), torch.ones(count, dtype=torch.int64))
    signs, places = units.sum(1), units.abs().argmax(1)
    block, offset = torch.arange(count) // 128, torch.arange(count) % 128
    shifts = torch.tensor(sign_hash._shifts)
    assert torch.equal(places % 128, (offset + shifts[block]) % 128)
    sides = places // 128
    for fair in (signs.double(), 2 * sides.double() - 1):
        assert abs(float(fair.sum())) < 6 * math.sqrt(count)  # a fair coin: 2e-9
    assert abs(float((signs * (2 * sides - 1)).sum())) < 6 * math.sqrt(count)
    x = elements(6, count, torch.int32)
    assert torch.equal(sign_hash.fold(x), (units * x[:, None]).sum(0).to(torch.int32))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.lists(st.integers(1, 20), max_size=8), dtypes, st.randoms(use_true_random=False))
def test_pieces_in_any_order_give_the_whole(count: int, cuts: list[int], dtype: torch.dtype, random: object) -> None:
    sign_hash = SignHash(seed_number(count), count, 256)
    x = elements(count, count, dtype)
    places = sorted({0, count, *(128 * cut for cut in cuts if 128 * cut < count)})
    pieces = list(zip(places[:-1], places[1:], strict=True))
    random.shuffle(pieces)  # type: ignore[attr-defined]
    accumulator = sign_hash.accumulator(dtype)
    for start, stop in pieces:
        accumulator.add(x[start:stop], start)
    assert torch.equal(accumulator.folded(), sign_hash.fold(x))


@given(st.integers(1, 3000), st.integers(1, 9), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=30)
def test_parts_that_are_no_whole_blocks_give_the_whole(count: int, parts: int, dtype: torch.dtype) -> None:
    x, sign_hash = elements(3, count, dtype), SignHash(seed_number(7), count, 256)
    cuts = [at * count // parts for at in range(parts + 1)]
    folds = [sign_hash.fold_part(x[begin:end], begin) for begin, end in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.stack(folds).sum(0, dtype=dtype), sign_hash.fold(x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 5000, 300_001])
def test_masks_fold_as_they_mask(dtype: torch.dtype, count: int) -> None:
    """A vector hidden by added and subtracted masks, less the folded masks, is the folded vector."""
    sign_hash, key = SignHash(seed_number(1), count), seed_number(2)
    x = elements(3, count, dtype)
    masked, seed, again = x.clone(), Seed(key), Seed(key)
    seed.stream("a").add_to(masked)
    seed.stream("b").subtract_from(masked)
    seed.stream("c").add_to(masked)
    assert count < 100 or not torch.equal(masked, x)
    masks = sign_hash.fold_masks(
        [(again.stream("a"), False), (again.stream("b"), True), (again.stream("c"), False)], dtype
    )
    assert torch.equal(sign_hash.fold(masked) + masks, sign_hash.fold(x))
    assert not sign_hash.fold_masks([], dtype).any()


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(ProtocolError, match="32 bytes"):
        SignHash(b"short", 10)
    for buckets in (0, 100, 8193, 1 << 17):
        with pytest.raises(ProtocolError, match="power of two"):
            SignHash(bytes(32), 10, buckets)
    sign_hash = SignHash(bytes(32), 1000, 256)
    with pytest.raises(ValueError, match="int32 or int64"):
        sign_hash.fold(torch.zeros(1000))
    accumulator = sign_hash.accumulator(torch.int32)
    for piece, start in ((torch.zeros(128), 0), (torch.zeros(2000, dtype=torch.int32)[::2], 0)):
        with pytest.raises(ValueError, match="contiguous"):
            accumulator.add(piece, start)
    for length, start in ((128, 1), (100, 0), (128, 896), (1001, 0)):
        with pytest.raises(ValueError, match="whole blocks"):
            accumulator.add(torch.zeros(length, dtype=torch.int32), start)


# -- statistics of the squared norm


def test_squared_norms_are_unbiased_with_the_stated_variance() -> None:
    """2000 seeds. Over pairs of different blocks, Var F = 4 sum x_j^2 x_k^2 / M. Mean within 6, variance within 6 standard
    errors of a normal variable: fails with probability 1e-8."""
    seeds, buckets, count = 2000, 256, 128 * 20
    x = (torch.randn(count, generator=torch.Generator().manual_seed(1)) * 1000).to(torch.int32)
    squares = x.double().square()
    by_block = squares.reshape(20, 128).sum(1)
    variance = 4 * float(by_block.sum() ** 2 - by_block.square().sum()) / 2 / buckets
    estimates = torch.tensor([square_norm(SignHash(seed_number(n), count, buckets).fold(x)) for n in range(seeds)])
    assert abs(float(estimates.mean() - squares.sum())) < 6 * math.sqrt(variance / seeds)
    assert abs(float(estimates.var()) / variance - 1) < 6 * math.sqrt(2 / seeds)


def test_one_block_keeps_its_norm_exactly() -> None:
    x = elements(9, 4000, torch.int64) >> 40
    assert square_norm(SignHash(seed_number(1), 4000).fold(x)) == square_norm(x)


def passes(test: NormTest, x: torch.Tensor, seeds: int) -> int:
    """How often a plaintext vector passes the test's decision."""
    return sum(test.passes(SignHash(seed_number(n), len(x), test.buckets).fold(x)) for n in range(seeds))


COUNT = 10 * BLOCK


def scaled(x: torch.Tensor, norm: float) -> torch.Tensor:
    return (x.double() / x.double().norm() * norm).round().to(torch.int32)


def shapes() -> dict[str, torch.Tensor]:
    """Vectors an attacker who knows the blocks might choose, before scaling."""
    normal = torch.randn(COUNT, generator=torch.Generator().manual_seed(2))
    same_place, two, pair, run = (torch.zeros(COUNT) for _ in range(4))
    same_place[7::BLOCK] = 1.0
    two[[3, BLOCK + 3]] = 1.0
    pair[[3, BLOCK + 9]] = torch.tensor([1.0, -1.0])
    run[: 2 * BLOCK] = 1.0
    return {
        "normal": normal,
        "equal": torch.ones(COUNT),
        "same place": same_place,
        "two": two,
        "pair": pair,
        "run": run,
    }


def test_honest_updates_pass_and_ten_times_longer_ones_do_not() -> None:
    """1000 seeds per shape, |x| exactly the bound, then ten times it. Refused with probability below 1/1201 and passed
    with probability below 1/100 each: more than 9 and 30 are rarer than 1e-6 and 1e-7 even at these bounds."""
    test = NormTest(2.0**24, 32)
    for name, shape in shapes().items():
        assert passes(test, scaled(shape, test.bound * 0.999999), 1000) >= 991, name
        assert passes(test, scaled(shape, test.bound * 10), 300) <= 3, name


@pytest.mark.parametrize("bound", [1000.0, 2.0**24, 2.0**29, 0.049 * Q * math.sqrt(BUCKETS)])
def test_no_vector_passes_because_it_wraps(bound: float) -> None:
    """Longer than ten times the bound, chosen to cancel modulo 2^32; at most 3 of 200 seeds where 1/100 is promised."""
    test, full = NormTest(bound, 32), torch.zeros(COUNT, dtype=torch.int64)
    alternating = torch.arange(COUNT) % 2
    attacks = {
        "half of the ring": full + Q // 2,
        "a quarter of the ring": full + Q // 4,
        "a third of the ring": full + Q // 3,
        "half on every other": alternating * (Q // 2),
        "half and a little": Q // 2 + (elements(4, COUNT, torch.int64) >> 56),
        "ramp": torch.arange(COUNT) * (Q // COUNT),
        "anything": elements(5, COUNT, torch.int64),
        "half in two blocks": torch.where(torch.arange(COUNT) < 2 * BLOCK, Q // 2, 0),
        "half in one place of each block": torch.where(torch.arange(COUNT) % BLOCK == 7, Q // 2, 0),
        "half twice": torch.where(torch.arange(COUNT) % (9 * BLOCK) == 1, Q // 2, 0),
    }
    tried = 0
    for name, attack in attacks.items():
        x = attack.to(torch.int32)
        if float(x.double().norm()) >= 10 * bound:
            tried += 1
            assert passes(test, x, 200) <= 3, name
    assert tried >= 5


def test_tests_that_cannot_be_are_refused() -> None:
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(HeadroomError, match="positive"):
            NormTest(bound, 32)
    with pytest.raises(HeadroomError, match="64 bits"):
        NormTest(0.11 * Q * math.sqrt(BUCKETS), 32)
    NormTest(0.11 * Q * math.sqrt(BUCKETS), 64)


@settings(max_examples=200, deadline=None)
@given(st.floats(1.0, 2.0**50), st.sampled_from([1024, 8192, 65536]), st.sampled_from([32, 64]))
def test_squares_have_headroom_in_the_field(bound: float, buckets: int, ring_bits: Literal[32, 64]) -> None:
    try:
        test = NormTest(bound, ring_bits, buckets)
    except HeadroomError:
        assert bound > 0.1 * 2.0**ring_bits * math.sqrt(buckets) or bound > 2.0**42
        return
    # What is not found has buckets below 2^(u + 1) <= 4 sqrt(M A), see `norm_proof`; its squares do not wrap.
    largest = 2 << ProofSize(test, 3).value_exponent
    assert largest <= 4 * math.sqrt(buckets * test.largest_square_sum) + 8 and buckets * largest**2 < PRIME // 2
    if buckets == 8192:
        assert test.largest_square_sum <= 1.55 * bound**2 + 1


# -- bounds


def test_an_honest_update_stays_within_its_bound() -> None:
    """DP-SGD as `training` does it, on gradients that all point one way: 300 updates, bound exceeded with 1e-4 each."""
    from mpc_fl.aggregation.norm_bound import update_norm_bound
    from mpc_fl.config.config import parse_config

    privacy = {"noise_multiplier": 1.1, "smallest_hospital": 40, "largest_hospital": 40, "clipping_norm": 0.5}
    training = {"local_steps": 7, "batch_size": 20, "momentum": 0.8, "learning_rate": 0.2}
    generator = torch.Generator().manual_seed(3)
    for proximal in (0.0, 0.5):
        shared = {
            "privacy": privacy,
            "training": {**training, "proximal": proximal, "strategy": "fedprox" if proximal else None},
        }
        bound, parameters, over, longest = update_norm_bound(parse_config(shared, "test"), 500), 500, 0, 0.0
        direction = torch.zeros(parameters)
        direction[0] = 0.5
        for _ in range(300):
            weights = torch.zeros(parameters, requires_grad=True)
            sgd = torch.optim.SGD([weights], lr=0.2, momentum=0.8)
            for _ in range(7):
                patients = int(torch.binomial(torch.tensor(40.0), torch.tensor(0.5), generator=generator))
                noise = 1.1 * 0.5 * torch.randn(parameters, generator=generator)
                weights.grad = (patients * direction + noise) / 20 + proximal * weights.detach()
                sgd.step()
            norm = float(weights.detach().norm())
            over, longest = over + (norm > bound), max(longest, norm)
        assert over == 0 and longest > 0.5 * bound  # far longer than needed would let boosted ones through


def test_noise_makes_the_bound_tight_for_large_models() -> None:
    from mpc_fl.aggregation.norm_bound import gradient_norm_bound, in_grid_units, step_weights, update_norm_bound
    from mpc_fl.config.config import parse_config
    from mpc_fl.learning.privacy.distributed_gaussian import MechanismTerms, plan_mechanism

    privacy = {"noise_multiplier": 1.0, "smallest_hospital": 1000, "largest_hospital": 1000}
    config = parse_config({"privacy": privacy}, "test")
    weights = step_weights(10, 0.1, 0.9)
    assert weights[-1] == pytest.approx(0.1) and weights[-2] == pytest.approx(0.19)
    noise = math.sqrt(11_178_051 * sum(weight * weight for weight in weights)) / 64
    assert noise < update_norm_bound(config, 11_178_051) < 1.2 * noise
    assert in_grid_units(2.0, 10, 400, 0.5) == 1024 + 10

    mechanism = plan_mechanism(
        MechanismTerms(
            parameters=11_178_051,
            hospitals=3,
            colluders=1,
            expected_patients=64,
            clipping_norm=1.0,
            noise_multiplier=1.0,
        )
    )
    bound = gradient_norm_bound(mechanism)
    assert 1 < bound / math.sqrt(mechanism.parameters * mechanism.noise_share.variance) < 2.6
    test = NormTest.of_sketches(bound, mechanism.ring_bits)
    assert math.sqrt(test.largest_square_sum) == pytest.approx(bound)
    least = bound / mechanism.scale
    assert gradient_norm_bound(mechanism, 2 * least) == pytest.approx(2 * bound)
    # An honest hospital could exceed it, and whether it does would tell of its patients.
    with pytest.raises(ConfigError, match="could tell of patients"):
        gradient_norm_bound(mechanism, 0.99 * least)


@pytest.mark.parametrize("parameters", [40, 5000, 40_000])
def test_no_data_bring_a_noised_gradient_beyond_its_bound(parameters: int) -> None:
    """As many patients as a step can have, all with one gradient, the worst for the sketch: its bit is the same for all data.

    Gradients with equal coordinates at one position of all blocks are those that one bucket can add up.
    """
    from mpc_fl.aggregation.norm_bound import gradient_norm_bound
    from mpc_fl.crypto.secrecy import Private
    from mpc_fl.learning.privacy.distributed_gaussian import MechanismTerms, noised_share, plan_mechanism

    mechanism = plan_mechanism(MechanismTerms(parameters, 3, 1, 16, 1.0, 1.0))
    test = NormTest.of_sketches(gradient_norm_bound(mechanism), mechanism.ring_bits)
    gradient = torch.zeros(parameters, dtype=torch.float64)
    gradient[::BLOCK] = 1.0
    gradient *= mechanism.sensitivity / gradient.norm()
    total = (mechanism.patients_bound * gradient.floor()).to(mechanism.dtype)
    noised = noised_share(mechanism, Private("sum", total), Seed(seed_number(1))).inside_protocol()
    assert passes(test, noised, 300) == 300


def test_the_bit_of_a_check_is_charged() -> None:
    from mpc_fl.learning.privacy.distributed_gaussian import step_total_variation

    one = step_total_variation(1, 2, 1) - (step_total_variation(2, 2, 1) - step_total_variation(1, 2, 1))
    assert one == pytest.approx(3 * 2.0**-128, rel=1e-3)  # the refusal of a sample, and two tails of the norm


@pytest.mark.parametrize(
    "privacy",
    [{"mechanism": "none"}, {"smallest_hospital": 100}],
    ids=["no clipping", "calibrated noise"],
)
def test_where_nothing_bounds_an_update_the_bound_is_configured(privacy: dict[str, object]) -> None:
    from mpc_fl.aggregation.norm_bound import update_norm_bound
    from mpc_fl.config.config import parse_config

    with pytest.raises(ConfigError, match="set .*aggregation.norm_bound"):
        update_norm_bound(parse_config({"privacy": privacy}, "test"), 100)
    configured = parse_config({"privacy": privacy, "aggregation": {"norm_bound": 3.0}}, "test")
    assert update_norm_bound(configured, 100) == 3.0
