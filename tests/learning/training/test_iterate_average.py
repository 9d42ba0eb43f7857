"""Means of global models: which are in them, and that a run that is resumed comes to the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.training.iterate_average import ExponentialAverage, IterateAverage, global_average


@given(st.data())
def test_the_last_model_is_the_mean_of_the_last_ones(data: st.DataObject) -> None:
    models = data.draw(st.integers(1, 12))
    last = data.draw(st.none() | st.integers(1, models))
    made = torch.randn(models, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    interrupted = data.draw(st.integers(0, models))
    average = IterateAverage(last, models)
    for position in range(models):
        if position == interrupted:
            state, average = average.state(), IterateAverage(last, models)
            average.load_state(state, 5)
        sent = average.take(made[position], position)
        if position < models - 1:
            assert torch.equal(sent, made[position])
    torch.testing.assert_close(sent, made[models - (last or 1) :].mean(dim=0))


def test_a_round_made_anew_counts_its_models_again() -> None:
    average = IterateAverage(2, 4)
    for position, value in [(0, 5.0), (1, 5.0), (2, 1.0), (2, 2.0)]:
        average.take(torch.full((3,), value), position)
    assert torch.equal(average.take(torch.full((3,), 6.0), 3), torch.full((3,), 3.0))


@pytest.mark.parametrize(
    "state",
    [
        {"sum": torch.zeros(3, dtype=torch.float64)},
        {"sum": torch.zeros(3), "count": torch.tensor([1])},
        {"sum": torch.zeros(4, dtype=torch.float64), "count": torch.tensor([1])},
        {"sum": torch.zeros(3, dtype=torch.float64), "count": torch.tensor([0])},
        {"sum": torch.zeros(3, dtype=torch.float64), "count": torch.tensor([1.0])},
    ],
)
def test_a_state_that_cannot_be_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="cannot be"):
        IterateAverage(2, 4).load_state(state, 3)


@given(st.data())
def test_the_exponential_average_weighs_the_past_ever_less(data: st.DataObject) -> None:
    models, decay = data.draw(st.integers(1, 40)), data.draw(st.floats(0.01, 0.999))
    made = torch.randn(models, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    interrupted = data.draw(st.integers(0, models))
    average = ExponentialAverage(decay, models)
    expected = made[0].double()
    for position in range(models):
        if position == interrupted:
            state, average = average.state(), ExponentialAverage(decay, models)
            average.load_state(state, 5)
        if position:
            now = min(decay, (1 + position) / (10 + position))
            expected = now * expected + (1 - now) * made[position]
        sent = average.take(made[position], position)
        if position < models - 1:
            assert torch.equal(sent, made[position]), "the run goes on from the model itself"
    assert sent.dtype == torch.float32
    torch.testing.assert_close(sent.double(), expected, rtol=1e-6, atol=1e-7)


def test_each_mean_is_the_configured_one_and_takes_no_state_of_the_other() -> None:
    last, exponential = (
        global_average(Config().with_values(training=training))
        for training in ({"average_last": 3}, {"ema_decay": 0.9})
    )
    assert isinstance(last, IterateAverage) and isinstance(exponential, ExponentialAverage)
    for position in range(4):
        last.take(torch.ones(3), position), exponential.take(torch.ones(3), position)
    for one, other in ((last, exponential), (exponential, last)):
        with pytest.raises(ModelError, match="cannot be"):
            one.load_state(other.state(), 3)
