"""What a search releases, trials of different rates and lengths and validations between them, composes as in dp-accounting."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.learning.privacy.accounting import SubsampledGaussian, epsilon_of
from tests.learning.privacy.test_privacy_loss import bounds

TRAINING = st.builds(
    SubsampledGaussian, st.floats(0.7, 6.0), st.sampled_from([0.02, 0.1, 0.37, 1.0]), st.integers(1, 120)
)
EVALUATION = st.builds(SubsampledGaussian, st.floats(2.0, 30.0), st.just(1.0), st.integers(1, 8))
SEARCHES = st.tuples(st.lists(TRAINING, min_size=1, max_size=3), st.lists(EVALUATION, min_size=1, max_size=3))


@settings(max_examples=25, deadline=None)
@given(SEARCHES, st.sampled_from([1e-3, 1e-5]))
def test_epsilon_of_a_search_lies_between_the_bounds_of_dp_accounting(
    search: tuple[list[SubsampledGaussian], list[SubsampledGaussian]], delta: float
) -> None:
    trials, evaluations = search
    events = [*trials, *evaluations]
    history = tuple((event.noise_multiplier, event.sample_rate, event.steps) for event in events)
    low, high = bounds(history, delta, 1e-3)
    assert low <= epsilon_of(events, delta) <= high * 1.002 + 1e-4


@settings(max_examples=25, deadline=None)
@given(SEARCHES, st.randoms(use_true_random=False), st.sampled_from([1e-3, 1e-5]))
def test_the_order_of_trials_and_evaluations_changes_nothing(
    search: tuple[list[SubsampledGaussian], list[SubsampledGaussian]], order: object, delta: float
) -> None:
    events = list(itertools.chain(*search))
    single = [
        SubsampledGaussian(event.noise_multiplier, event.sample_rate, part)
        for event in events
        for part in (event.steps // 2, event.steps - event.steps // 2)
    ]
    order.shuffle(single)  # type: ignore[attr-defined]
    assert epsilon_of(single, delta) == epsilon_of(events, delta)
    assert epsilon_of([*events, events[0]], delta) >= epsilon_of(events, delta)
