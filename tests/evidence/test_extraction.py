"""A student learns from answers what the model says, more of it from more answers, and more from logits than from labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpc_fl.evidence.extraction import Lessons, agreement, fidelity_curve, taught
from mpc_fl.learning.models.evaluation import predict

QUICK = Lessons(passes=20, rate=0.05)


def linear(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 3))


def inputs(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))


def test_fidelity_grows_with_queries_and_with_what_is_answered() -> None:
    model, asked, held_out = linear(1), inputs(400, 1), inputs(1000, 2)
    logits, classes = predict(model, asked), predict(model, held_out).argmax(1)
    begun = list[int]()

    def fresh() -> nn.Module:
        begun.append(1)
        return linear(2)

    curves = {
        "labels": fidelity_curve(fresh, (asked, logits.argmax(1)), (held_out, classes), [10, 400], QUICK),
        "logits": fidelity_curve(fresh, (asked, logits), (held_out, classes), [10, 400], QUICK),
    }
    assert len(begun) == 4
    for points in curves.values():
        assert [point.queries for point in points] == [10, 400]
        assert points[0].share + 0.1 < points[1].share and points[1].share > 0.85
    assert curves["logits"][1].share > 0.95
    assert agreement(model, held_out, classes) == 1.0


def test_the_first_weights_are_those_that_were_given() -> None:
    untaught = taught(linear(2), inputs(0, 1), torch.zeros(0, dtype=torch.int64), QUICK)
    assert torch.equal(untaught[0].weight, linear(2)[0].weight)  # type: ignore[index]


def test_more_queries_than_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer answers"):
        fidelity_curve(lambda: linear(1), (inputs(5, 1), torch.zeros(5)), (inputs(5, 2), torch.zeros(5)), [6], QUICK)
