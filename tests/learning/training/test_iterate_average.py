"""The mean of the last global models: which are in it, and that a run that is resumed comes to the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.errors import ModelError
from mpc_fl.learning.training.iterate_average import IterateAverage


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
