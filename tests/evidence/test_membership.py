"""Membership: confidences and curves against what is counted by hand, and an attack on models that do remember."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mpc_fl.evidence.membership import confidences, likelihood_ratios, roc_of


def test_confidence_is_the_mean_over_a_patients_records_of_the_log_odds() -> None:
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1, 0])
    right = torch.softmax(logits.double(), dim=1)[torch.arange(5), labels]
    odds = torch.log(right / (1 - right))
    found = confidences(logits, labels, torch.tensor([0, 1, 0, 1, 1]))
    assert found == pytest.approx([float(odds[[0, 2]].mean()), float(odds[[1, 3, 4]].mean())])
    assert np.isfinite(confidences(logits * 1e4, labels, torch.arange(5))).all()


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_the_curve_is_that_of_a_library(pairs: list[tuple[int, bool]]) -> None:
    scores, inside = np.array([float(score) for score, _ in pairs]), np.array([of for _, of in pairs])
    if inside.all() or not inside.any():
        with pytest.raises(ValueError, match="members"):
            roc_of(scores, inside)
        return
    roc = roc_of(np.append(scores, np.nan), np.append(inside, True))
    assert roc.area == pytest.approx(roc_auc_score(inside, scores))
    assert roc.false[-1] == roc.true[-1] == 1.0
    best = max(scores)
    if not inside[scores == best].all():
        assert roc.true_rate_at(0.0) == 0.0


def remembered(strength: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What 16 models say of 400 patients, each sure in a degree of its own and surer by `strength` if it trained."""
    generator = np.random.Generator(np.random.Philox(seed))
    inside = generator.random((16, 400)) < 0.5
    return generator.normal(0, 5, 400) + generator.normal(size=inside.shape) + strength * inside, inside


def test_models_that_remember_are_told_from_those_that_do_not() -> None:
    sure, inside = remembered(3.0, 1)
    roc = roc_of(likelihood_ratios(sure, inside), inside)
    assert roc.area > 0.95 and roc.true_rate_at(0.01) > 0.4
    plain = roc_of(sure, inside)  # who is easy is no member for that
    assert roc.area > plain.area + 0.2
    nothing, inside = remembered(0.0, 2)
    assert abs(roc_of(likelihood_ratios(nothing, inside), inside).area - 0.5) < 0.03


def test_who_was_always_in_or_always_out_is_left_out() -> None:
    inside = np.array([[True, True], [True, False], [True, True], [True, False]])
    scores = likelihood_ratios(np.random.Generator(np.random.Philox(3)).normal(size=(4, 2)), inside)
    assert np.isnan(scores[:, 0]).all() and np.isfinite(scores[:, 1]).all()
