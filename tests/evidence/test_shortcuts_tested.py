"""Intervals, the paired test and Holm's correction, against what can be counted by hand; findings follow from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpc_fl.evidence.shortcuts_tested import (
    Answers,
    Changed,
    Estimate,
    Resampled,
    accuracy_and_area,
    changed,
    estimate,
    paired_p_value,
)
from mpc_fl.learning.models.shares import holm


def answers(logits: torch.Tensor, labels: torch.Tensor, patients: torch.Tensor | None = None) -> Answers:
    of = torch.arange(len(labels)) if patients is None else patients
    return Answers(logits.float(), logits.argmax(dim=1), labels, of)


def drawn(count: int, skill: float, seed: int = 0) -> Answers:
    """A model of two classes whose logits say the class with so much skill."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    logits = torch.randn(count, 2, generator=generator)
    logits[torch.arange(count), labels] += skill
    return answers(logits, labels)


def test_holm_as_in_an_example_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_the_paired_test_is_that_of_fair_coins() -> None:
    draw = np.random.default_rng(0)
    # Five patients who all get worse: of 32 ways of their coins two are as extreme.
    assert paired_p_value(np.array([-1.0] * 5 + [0.0] * 90), draw) == pytest.approx(2 / 32, abs=0.01)
    assert paired_p_value(np.zeros(10), draw) == 1.0
    assert paired_p_value(np.array([1.0, -1.0] * 20), draw) == 1.0
    assert paired_p_value(np.array([-1.0] * 40), draw) == pytest.approx(1e-4)


def test_the_test_is_right_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    found = [paired_p_value(draw.choice([-1.0, 0.0, 1.0], size=40), draw) for _ in range(100)]
    assert np.mean(np.array(found) < 0.05) <= 0.12 and np.mean(np.array(found) < 0.5) > 0.3


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    of = drawn(60, 1.0)
    _, area = accuracy_and_area(of, 0)
    scores = torch.softmax(of.logits.double(), dim=1)[:, 1].numpy()
    sick, healthy = scores[of.labels == 1], scores[of.labels == 0]
    pairs = (sick[:, None] > healthy).mean() + (sick[:, None] == healthy).mean() / 2
    assert area.value == pytest.approx(float(pairs), abs=1e-12) and area.low < area.value < area.high


def test_intervals_cover_the_truth() -> None:
    covered = 0
    for seed in range(40):
        of = drawn(100, 1.0, seed)
        found = estimate(*Resampled(of.labels, of.patients, np.random.default_rng(seed)).mean(of.right))
        covered += found.low <= 0.7602 <= found.high  # P(right) = Phi(1 / sqrt(2))
    assert covered >= 33


def test_films_of_one_patient_are_no_more_evidence_than_one() -> None:
    of = drawn(100, 1.0)
    often = answers(of.logits.repeat(6, 1), of.labels.repeat(6), torch.arange(100).repeat(6))
    apart = answers(of.logits.repeat(6, 1), of.labels.repeat(6))
    wide, narrow = (accuracy_and_area(each, 0)[0] for each in (often, apart))
    single = accuracy_and_area(of, 0)[0]
    assert wide.high - wide.low == pytest.approx(single.high - single.low, rel=0.15)
    assert narrow.high - narrow.low < 0.6 * (single.high - single.low)


def test_a_change_that_does_nothing_and_one_that_ends_all() -> None:
    before = drawn(300, 3.0)
    same = changed("corners replaced", "places", before, before, 0)
    assert same.p_value == 1.0 and same.kept == pytest.approx(1.0) and same.finding == "none"
    assert same.accuracy_change == Estimate(0.0, 0.0, 0.0) == same.log_odds_change == same.area_change
    blind = replace(before, logits=torch.zeros(300, 2), decided=torch.zeros(300, dtype=torch.int64))
    after = replace(changed("corners replaced", "places", before, blind, 0), p_holm=0.001)
    assert after.accuracy_change.high < -0.3 and after.area.value == 0.5 and after.kept == 0.0
    assert after.log_odds_change.high < 0 and after.finding == "shortcut"
    assert replace(after, kind="contrast").finding == "contrast"
    assert replace(after, p_holm=0.06).finding == "none"


def test_a_loss_by_seams_alone_is_no_shortcut() -> None:
    before = drawn(300, 3.0)
    worse = drawn(300, 1.0)
    seams = replace(worse, labels=before.labels)
    blind = replace(before, logits=torch.zeros(300, 2), decided=1 - before.labels)
    alike = replace(changed("corners replaced", "places", before, seams, 0, seams), p_holm=0.001)
    assert alike.accuracy_change.high < -0.03 and alike.beyond_seams == Estimate(0.0, 0.0, 0.0)
    assert alike.finding == "none"
    beyond = replace(changed("corners replaced", "places", before, blind, 0, seams), p_holm=0.001)
    assert beyond.beyond_seams is not None and beyond.beyond_seams.high < -0.3 and beyond.finding == "shortcut"


def test_a_diagnosis_without_lungs_is_a_shortcut_and_chance_is_none() -> None:
    before = drawn(300, 3.0)
    noise = answers(torch.randn(300, 2, generator=torch.Generator().manual_seed(4)), before.labels)
    assert changed("lungs masked", "lungs", before, before, 0).finding == "shortcut"
    chance: Changed = changed("lungs masked", "lungs", before, noise, 0)
    assert chance.finding == "none" and chance.area.low < 0.5 < chance.area.high
    knows_nothing = changed("lungs masked", "lungs", noise, noise, 0)
    assert knows_nothing.finding == "none"
