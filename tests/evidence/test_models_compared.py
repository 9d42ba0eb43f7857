"""Figures with intervals over trainings and patients, against what can be counted by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from mpc_fl.evidence import models_compared
from mpc_fl.evidence.models_compared import JudgedRecords, differences, figures_of, with_intervals


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_compared, "_RESAMPLES", 400)


def drawn(skill: float, records: int = 240, models: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float64 (models, records, 3) that know the class with so much skill, and the classes."""
    draw = np.random.default_rng(seed)
    labels = np.arange(records) % 3
    scores = draw.normal(size=(models, records, 3))
    scores[:, np.arange(records), labels] += skill
    powers = np.exp(scores)
    return powers / powers.sum(axis=-1, keepdims=True), labels


def test_figures_are_those_of_scikit_learn() -> None:
    (probabilities,), labels = drawn(1.0)
    said = probabilities.argmax(axis=1)
    expected = (
        np.mean(said == labels),
        balanced_accuracy_score(labels, said),
        roc_auc_score(labels, probabilities, multi_class="ovr"),
        matthews_corrcoef(labels, said),
    )
    assert figures_of(probabilities, labels, np.ones(len(labels))) == pytest.approx(expected)


def test_a_weight_of_two_is_a_record_twice() -> None:
    (probabilities,), labels = drawn(0.5, 30)
    weights = np.ones(30)
    weights[:6] = 2
    rows = np.concatenate([np.arange(30), np.arange(6)])
    twice = figures_of(probabilities[rows], labels[rows], np.ones(36))
    assert figures_of(probabilities, labels, weights) == pytest.approx(twice)


def test_intervals_hold_the_mean_and_are_wider_where_patients_have_more_records() -> None:
    probabilities, labels = drawn(1.0)
    alone = with_intervals([probabilities], JudgedRecords(labels, np.arange(240)))
    # The same records, forty of them to a patient, of one class: six patients say much less.
    of_patient = np.repeat(np.arange(6), 40)
    order = np.argsort(labels, kind="stable")
    together = with_intervals([probabilities[:, order]], JudgedRecords(labels[order], of_patient))
    for one, other in zip(alone, together, strict=True):
        assert one.low < one.value < one.high
        assert one.value == pytest.approx(other.value)
    assert together[0].high - together[0].low > 0  # classes that are lacking are left out
    width = alone[0].high - alone[0].low
    assert width == pytest.approx(4 * np.sqrt(alone[0].value * (1 - alone[0].value) / 240), rel=0.25)


def test_differences_of_one_way_with_itself_are_nothing_and_a_better_one_is_better() -> None:
    good, labels = drawn(2.0)
    poor, _ = drawn(0.5, models=3, seed=1)
    tested = JudgedRecords(labels, np.arange(240))
    for same in differences([good], [good], tested):
        assert (same.value, same.low, same.high) == (0, 0, 0)
    accuracy = differences([good, good], [poor, poor], tested)[0]
    assert 0 < accuracy.low < accuracy.value < accuracy.high
    assert differences([poor, poor], [good, good], tested)[0].value == pytest.approx(-accuracy.value)
    with pytest.raises(ValueError, match="as many"):
        differences([good], [poor, poor], tested)
